// Masked weights on the CPU: where(mask, w, 0), cast on the way, for one weight or a list; and
// where(mask, source, w) in place.
#include "lists.h"

namespace sparse_cocktail {
namespace {

// Weights move as integers: a kept NaN stays NaN, and a pruned one becomes +0.
template <class Source, class Target, class Cast>
void keep_strided(const Run& run, const Source* source, Target* target, const Cast& cast) {
  for (int64_t i = 0; i < run.count; ++i) {
    const Target kept = -static_cast<Target>(run.within[i / kWordBits] >> i % kWordBits & 1);
    target[i * run.stride] = cast(source[i * run.stride]) & kept;  // no branch to guess
  }
}

// From one format into another, or into itself.
template <class From, class To>
struct Keep {
  using Source = typename From::Raw;
  using Target = typename To::Raw;

  static Target cast(Source raw) {
    if constexpr (std::is_same_v<From, To>) return raw;
    else if constexpr (std::is_same_v<To, BFloat16>) return bfloat16_of(raw);
    else return float16_of(raw);
  }
  static void dense(const uint32_t* bits, const Source* source, Target* target, int64_t count) {
    const KernelTable& kernel = kernels();
    if constexpr (std::is_same_v<From, To>) kernel.of(From{}).keep(bits, source, target, count);
    else if constexpr (std::is_same_v<To, Float16>)
      kernel.casts.to_float16(bits, source, target, count);
    else
      kernel.casts.to_bfloat16(bits, source, target, count);
  }
};

template <class From, class To>
void keep_all(const char* op, const Tensors& weights, const Tensors& bits, const Tensors& results) {
  using K = Keep<From, To>;
  auto parts = parts_of<From>(op, weights);
  const auto words = words_of_list(op, "bits", parts, bits);
  std::vector<typename To::Raw*> targets;
  for (size_t i = 0; i < parts.size(); ++i) {
    STD_TORCH_CHECK(results[i].strides().equals(weights[i].strides()) &&
                        results[i].sizes().equals(weights[i].sizes()) &&
                        results[i].scalar_type() == results[0].scalar_type(), op, ": weights[", i,
                    "] has strides ", to_string(weights[i].strides()), ", but its result has ",
                    to_string(results[i].strides()), "; make it with torch.empty_like from a "
                    "weight without gaps");
    parts[i].within = words[i], parts[i].index = i;
    targets.push_back(static_cast<typename To::Raw*>(results[i].mutable_data_ptr()));
  }
  const Sequence<From> sequence(std::move(parts));
  for_each_slot(sequence.slots(), [&](int64_t slot) {
    sequence.walk(slot, false, [&](const Part<From>& part, int64_t, const Run& run) {
      const auto* source = static_cast<const typename From::Raw*>(run.data);
      auto* target = targets[part.index] + (source - part.data);
      if (run.stride == 1) {
        K::dense(run.within, source, target, run.count);
      } else {
        keep_strided(run, source, target, K::cast);
      }
    });
  });
}

// Writes results of the weights' strides: of their dtype, or 16 bits from fp32.
void masked_weights_into(Tensors weights, Tensors bits, Tensors results) {
  const char* op = "masked_weights";
  STD_TORCH_CHECK(results.size() == weights.size(), op, ": results has ", results.size(),
                  " entries for ", weights.size(), " weights; pass one per weight");
  dispatch_list(op, weights, [&](auto format) {
    using F = decltype(format);
    const ScalarType own = weights[0].scalar_type(), wanted = results[0].scalar_type();
    if (wanted == own) return keep_all<F, F>(op, weights, bits, results);
    if constexpr (std::is_same_v<F, Float32>) {
      if (wanted == ScalarType::BFloat16) return keep_all<F, BFloat16>(op, weights, bits, results);
      if (wanted == ScalarType::Half) return keep_all<F, Float16>(op, weights, bits, results);
    }
    STD_TORCH_CHECK(false, op, ": weights of dtype ", torch::headeronly::toString(own),
                    " cannot become ", torch::headeronly::toString(wanted),
                    " on the way, only float32 becomes bfloat16 or float16; cast the result");
  });
}

template <class F>
void copy_all(const char* op, const Tensors& weights, const Tensors& sources, const Tensors& bits) {
  using Raw = typename F::Raw;
  auto parts = parts_of<F>(op, weights);
  const auto words = words_of_list(op, "bits", parts, bits);
  std::vector<const Raw*> from;
  for (size_t i = 0; i < parts.size(); ++i) {
    STD_TORCH_CHECK(sources[i].strides().equals(weights[i].strides()) &&
                        sources[i].sizes().equals(weights[i].sizes()) &&
                        sources[i].scalar_type() == weights[i].scalar_type(), op, ": sources[", i,
                    "] has dtype ", torch::headeronly::toString(sources[i].scalar_type()),
                    ", shape ", to_string(sources[i].sizes()), " and strides ",
                    to_string(sources[i].strides()), ", but its weight has ",
                    torch::headeronly::toString(weights[i].scalar_type()), ", ",
                    to_string(weights[i].sizes()), " and ", to_string(weights[i].strides()),
                    "; copy it into torch.empty_like of the weight");
    parts[i].within = words[i], parts[i].index = i;
    from.push_back(static_cast<const Raw*>(sources[i].const_data_ptr()));
  }
  const Sequence<F> sequence(std::move(parts));
  for_each_slot(sequence.slots(), [&](int64_t slot) {
    sequence.walk(slot, false, [&](const Part<F>& part, int64_t, const Run& run) {
      auto* target = static_cast<Raw*>(const_cast<void*>(run.data));
      const Raw* source = from[part.index] + (target - part.data);
      if (run.stride == 1) return kernels().of(F{}).copy(run.within, source, target, run.count);
      for (int64_t i = 0; i < run.count; ++i) {
        const Raw set = -static_cast<Raw>(run.within[i / kWordBits] >> i % kWordBits & 1);
        Raw& own = target[i * run.stride];
        own ^= (source[i * run.stride] ^ own) & set;
      }
    });
  });
}

void masked_copy_into(Tensors weights, Tensors sources, Tensors bits) {
  const char* op = "masked_copy_";
  STD_TORCH_CHECK(sources.size() == weights.size(), op, ": sources has ", sources.size(),
                  " entries for ", weights.size(), " weights; pass one per weight");
  dispatch_list(op, weights, [&](auto format) {
    copy_all<decltype(format)>(op, weights, sources, bits);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(sparse_cocktail_cpp, m) {
  m.def("masked_weights_into(Tensor[] weights, Tensor[] bits, Tensor(a!)[] results) -> ()");
  m.def("masked_copy_into(Tensor(a!)[] weights, Tensor[] sources, Tensor[] bits) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(sparse_cocktail_cpp, CPU, m) {
  m.impl("masked_weights_into", TORCH_BOX(&masked_weights_into));
  m.impl("masked_copy_into", TORCH_BOX(&masked_copy_into));
}

}  // namespace sparse_cocktail
