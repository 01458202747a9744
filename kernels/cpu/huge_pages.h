// Asks the system for huge pages behind a range of memory, or for its memory ahead of use; a refusal is harmless.
#pragma once
#include <cstddef>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace llmopt {

// `begin` on a page boundary
inline void advise_huge_pages(void* begin, size_t bytes) {
#if defined(__linux__)
  madvise(begin, bytes, MADV_HUGEPAGE);
#else
  (void)begin;
  (void)bytes;
#endif
}

// `begin` on a page boundary; what is written there is kept (Linux 5.14)
inline void populate_pages(void* begin, size_t bytes) {
#if defined(__linux__)
  constexpr int kPopulateWrite = 23;  // MADV_POPULATE_WRITE, which older headers lack
  madvise(begin, bytes, kPopulateWrite);
#else
  (void)begin;
  (void)bytes;
#endif
}

}  // namespace llmopt
