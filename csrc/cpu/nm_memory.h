// Writing large results: past the caches, into large pages.
#pragma once

#include <cstring>

#include "../common/view.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace sparse_cocktail {

// Results from here on would drive everything else out of the caches, themselves included.
constexpr int64_t kStreamedBytes = int64_t{16} << 20;

inline bool worth_streaming(int64_t bytes) { return bytes >= kStreamedBytes; }

// Copies `count` elements; past the caches where asked, which saves reading the lines first.
template <class Raw>
inline void put(const Raw* source, int64_t count, Raw* target, bool streams) {
  int64_t bytes = count * static_cast<int64_t>(sizeof(Raw));
  const auto* from = reinterpret_cast<const char*>(source);
  auto* to = reinterpret_cast<char*>(target);
#if defined(__SSE2__)
  if (streams) {
    const int64_t head = std::min<int64_t>(bytes, -reinterpret_cast<uintptr_t>(to) % 64);
    memcpy(to, from, head);
    from += head, to += head, bytes -= head;
    for (; bytes >= 64; from += 64, to += 64, bytes -= 64) {
      for (int i = 0; i < 64; i += 16) {
        const __m128i piece = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i));
        _mm_stream_si128(reinterpret_cast<__m128i*>(to + i), piece);
      }
    }
  }
#else
  (void)streams;
#endif
  memcpy(to, from, bytes);
}

// A thread's streamed writes are seen by others after this.
inline void finish_streaming() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// New memory comes in pages, and the kernel clears each at its first touch: with pages of 2 MB
// there are 512 times fewer such stops.
inline void use_huge_pages(const Tensor& tensor) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t page = uintptr_t{2} << 20;
  const auto begin = reinterpret_cast<uintptr_t>(tensor.mutable_data_ptr());
  const uintptr_t bytes = tensor.numel() * tensor.element_size();
  const uintptr_t first = (begin + page - 1) / page * page, last = (begin + bytes) / page * page;
  if (last > first + page) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)tensor;
#endif
}

}  // namespace sparse_cocktail
