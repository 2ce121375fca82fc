#include "driver.h"
#include "nm_pack.cu"

using namespace sparse_cocktail;

namespace {

template <class To>
const char* pack_from(int bytes, int bf16, const PackArguments& a) {
  if (bytes == 4) return nm_pack_weight_launch<Float32, To>(a, nullptr);
  return bf16 ? nm_pack_weight_launch<BFloat16, To>(a, nullptr)
              : nm_pack_weight_launch<Float16, To>(a, nullptr);
}

}  // namespace

extern "C" int nm_pack_weight(int bytes, int from_bf16, int to_bf16, const void* weight,
                              const void* bits, int64_t out, int64_t in, int64_t row_stride,
                              int64_t in_stride, void* packed, void* meta) {
  PackArguments a{};
  a.weight = weight, a.bits = static_cast<const uint32_t*>(bits);
  a.row_stride = row_stride, a.in_stride = in_stride;
  a.out = static_cast<int>(out), a.in = static_cast<int>(in);
  a.column_blocks = static_cast<int>(column_blocks_of(in));
  a.blocks = static_cast<int>(row_blocks_of(out)) * a.column_blocks;
  a.packed = static_cast<uint4*>(packed), a.meta = static_cast<uint32_t*>(meta);
  return cuda_host::guarded([&] {
    return to_bf16 ? pack_from<BFloat16>(bytes, from_bf16, a)
                   : pack_from<Float16>(bytes, from_bf16, a);
  });
}
