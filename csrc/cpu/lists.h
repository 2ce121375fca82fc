// From lists of tensors, and rows of a mask bank, to a sequence of weights.
#pragma once

#include <memory>
#include <mutex>
#include <optional>

#include "nm.h"
#include "select.h"

namespace sparse_cocktail {

using Tensors = std::vector<Tensor>;
using MaybeTensors = std::optional<Tensors>;
using MaybeTensor = std::optional<Tensor>;

// Calls fn(Format) for the one dtype of a list: one order ranks all of its weights.
template <class Fn>
void dispatch_list(const char* op, const Tensors& weights, const Fn& fn) {
  if (weights.empty()) return;
  for (size_t i = 1; i < weights.size(); ++i) {
    STD_TORCH_CHECK(weights[i].scalar_type() == weights[0].scalar_type(), op, ": weights[", i,
                    "] has dtype ", torch::headeronly::toString(weights[i].scalar_type()),
                    ", but weights[0] has ",
                    torch::headeronly::toString(weights[0].scalar_type()),
                    "; one call takes weights of one dtype");
  }
  dispatch_format(op, "weights[0]", weights[0], fn);
}

template <class F>
std::vector<Part<F>> parts_of(const char* op, const Tensors& weights) {
  std::vector<Part<F>> parts(weights.size());
  for (size_t i = 0; i < weights.size(); ++i) {
    parts[i].name = "weights[" + std::to_string(i) + "]";
    parts[i].view = view_of(op, parts[i].name.c_str(), weights[i]);
    parts[i].data = static_cast<const typename F::Raw*>(weights[i].const_data_ptr());
  }
  return parts;
}

// The words of one mask per weight, or null where there are none.
template <class F>
std::vector<const uint32_t*> words_of_list(const char* op, const char* name,
                                           const std::vector<Part<F>>& parts,
                                           const MaybeTensors& masks) {
  std::vector<const uint32_t*> words(parts.size(), nullptr);
  if (!masks) return words;
  STD_TORCH_CHECK(masks->size() == parts.size(), op, ": ", name, " has ", masks->size(),
                  " masks for ", parts.size(), " weights; pass one per weight");
  for (size_t i = 0; i < parts.size(); ++i) {
    const std::string indexed = std::string(name) + "[" + std::to_string(i) + "]";
    words[i] = words_for(op, indexed.c_str(), (*masks)[i], parts[i].view);
  }
  return words;
}

// A new tensor of bits per weight.
template <class F>
Tensors empty_masks(const std::vector<Part<F>>& parts) {
  Tensors masks;
  for (const Part<F>& part : parts) masks.push_back(empty_bits(part.view));
  return masks;
}

// The same from a row of a mask bank, which holds the bits of all weights one after the other.
template <class F>
std::vector<uint32_t*> words_of_row(const char* op, const char* name,
                                    const std::vector<Part<F>>& parts, const MaybeTensor& row) {
  std::vector<uint32_t*> words(parts.size(), nullptr);
  if (!row) return words;
  int64_t count = 0;
  for (const Part<F>& part : parts) count += part.view.words();
  STD_TORCH_CHECK(row->scalar_type() == ScalarType::Int && row->is_contiguous() &&
                      row->numel() == count,
                  op, ": ", name, " has dtype ", torch::headeronly::toString(row->scalar_type()),
                  " and shape ", to_string(row->sizes()), ", but a row of these weights is ", count,
                  " contiguous int32 words; make one with MaskBank.add()");
  uint32_t* next = static_cast<uint32_t*>(row->mutable_data_ptr());
  for (size_t i = 0; i < parts.size(); ++i) {
    words[i] = next;
    next += parts[i].view.words();
  }
  return words;
}

// A part of scratch memory, cut off its front.
class Arena {
 public:
  Arena(uint8_t* memory, int64_t bytes) : next_(memory), left_(bytes) {}

  template <class T>
  T* take(const char* op, int64_t count) {
    const int64_t bytes = (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    STD_TORCH_CHECK(bytes <= left_, op, ": scratch has ", left_, " bytes left of the ", bytes,
                    " that are needed; make a new one with ops.workspace, as after a change of "
                    "the weights, the backend or the number of threads");
    T* taken = reinterpret_cast<T*>(next_);
    next_ += bytes, left_ -= bytes;
    return taken;
  }

 private:
  uint8_t* next_;
  int64_t left_;
};

inline Arena aligned_arena(uint8_t* memory, int64_t bytes) {
  const int64_t lost = -reinterpret_cast<intptr_t>(memory) & 63;
  return {memory + lost, bytes - lost};
}

// Scratch of one call. It stays for the next one: a call would spend as long on the pages of fresh
// memory as on its candidates. Not a tensor: torch fills new tensors in its deterministic mode.
class OwnScratch {
 public:
  explicit OwnScratch(int64_t bytes) : lock_(kept().mutex, std::try_to_lock) {
    bytes += 2048;
    Buffer& buffer = lock_ && bytes <= kMostKept ? kept().buffer : own_;
    if (buffer.bytes < bytes) buffer = {std::unique_ptr<uint8_t[]>(new uint8_t[bytes]), bytes};
    buffer_ = &buffer;
  }
  Arena arena() const { return aligned_arena(buffer_->memory.get(), buffer_->bytes); }

 private:
  static constexpr int64_t kMostKept = int64_t{1} << 29;  // of which few pages are ever touched
  struct Buffer {
    std::unique_ptr<uint8_t[]> memory;
    int64_t bytes = 0;
  };
  struct Kept {
    std::mutex mutex;  // a second call at the same time takes memory of its own
    Buffer buffer;
  };
  static Kept& kept() {
    static Kept* const all = new Kept;  // never freed: threads may outlive static objects
    return *all;
  }

  std::unique_lock<std::mutex> lock_;
  Buffer own_, *buffer_;
};

inline Arena arena_of(const char* op, const Tensor& scratch) {
  STD_TORCH_CHECK(scratch.scalar_type() == ScalarType::Byte && scratch.is_contiguous(), op,
                  ": scratch has dtype ", torch::headeronly::toString(scratch.scalar_type()),
                  " and strides ", to_string(scratch.strides()),
                  ", but it is contiguous uint8; make it with ops.workspace");
  return aligned_arena(static_cast<uint8_t*>(scratch.mutable_data_ptr()), scratch.numel());
}

inline int64_t count_of(const char* op, const char* name, const Tensor& count) {
  STD_TORCH_CHECK(count.scalar_type() == ScalarType::Long && count.numel() == 1, op, ": ", name,
                  " must be one int64; make it with torch.tensor");
  return *static_cast<const int64_t*>(count.const_data_ptr());
}

}  // namespace sparse_cocktail
