// One pool for all kernels: libgomp, the same one torch uses, so that a torch op and a kernel never fight over cores.
#pragma once
#include <omp.h>

#include <cstdint>

namespace llmopt {

// True in the thread that a fork left in the child. The threads of its pool stayed in the parent, and libgomp would wait for
// them for ever: such a thread works alone. Threads that the child starts have pools of their own.
inline thread_local bool pool_lost = false;

// Threads worth waking for `work` units when one thread should get at least `grain` of them.
inline int threads_for(int64_t work, int64_t grain) {
  if (omp_in_parallel() || pool_lost) return 1;
  const int64_t most = omp_get_max_threads();
  const int64_t useful = (work + grain - 1) / (grain > 0 ? grain : 1);
  return static_cast<int>(useful < 1 ? 1 : (useful < most ? useful : most));
}

// Contiguous share [begin, end) of n items for thread t of T.
struct Share {
  int64_t begin, end;
};
inline Share share_of(int64_t n, int t, int T) { return {n * t / T, n * (t + 1) / T}; }

}  // namespace llmopt
