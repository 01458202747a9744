// The threads that work on one op, or on a whole program of ops, inside a single OpenMP region.
//
// An op's work is a function of a Team: every thread calls it, takes its share, and meets the others at sync(). Starting
// a region costs microseconds, meeting at a barrier that spins a fraction of one; a decode step has some two hundred ops.
#pragma once
#include <omp.h>
#include <sched.h>

#include <atomic>
#include <cstdint>

#include "threads.h"

namespace llmopt {

class Barrier {
 public:
  explicit Barrier(int size) : size_(size) {}

  void wait() {
    const int phase = phase_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size_) {
      arrived_.store(0, std::memory_order_relaxed);
      phase_.store(phase + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; phase_.load(std::memory_order_acquire) == phase; ++spins) {
      pause();
      // more threads than cores: the one waited for may not be running
      if (spins > kSpins) sched_yield();
    }
  }

 private:
  static constexpr int kSpins = 1000;  // some fifty microseconds
  static void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }

  const int size_;
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<int> phase_{0};
};

struct Team {
  int rank, size;
  Barrier* barrier;

  void sync() const {
    if (size > 1) barrier->wait();
  }
  Share share(int64_t n) const { return share_of(n, rank, size); }
};

// Calls work(team) on `threads` threads. Work must not throw.
template <class Work>
void run_team(int threads, const Work& work) {
  if (threads <= 1) return work(Team{0, 1, nullptr});
  Barrier barrier(threads);
#pragma omp parallel num_threads(threads)
  {
    // OpenMP may give fewer threads than asked for; then the first does everything, and nobody waits for the missing
    if (omp_get_num_threads() == threads) {
      work(Team{omp_get_thread_num(), threads, &barrier});
    } else if (omp_get_thread_num() == 0) {
      work(Team{0, 1, nullptr});
    }
  }
}

}  // namespace llmopt
