// Asks the system for huge pages behind a range of memory; a refusal is harmless.
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

}  // namespace llmopt
