// The threads that work on one op, or on a whole program of ops, inside a single OpenMP region.
//
// An op's work is a function of a Team: every thread calls it, takes its share, and meets the others at sync(). Starting
// a region costs microseconds, meeting at a barrier that spins a fraction of one; a decode step has some two hundred ops.
#pragma once
#include <linux/futex.h>
#include <omp.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <cstdint>

#include "threads.h"

namespace llmopt {

// Threads that arrive early spin for a while, which is what happens where each has a core, and then sleep: with more threads
// than cores, or a core taken away, the one waited for needs the core of the one that waits.
class Barrier {
 public:
  explicit Barrier(int size) : size_(size) {}

  void wait() {
    const uint32_t phase = phase_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size_) {
      arrived_.store(0, std::memory_order_relaxed);
      // sequentially consistent with `asleep_`: either the sleeper sees the new phase, or we see the sleeper
      phase_.store(phase + 1, std::memory_order_seq_cst);
      if (asleep_.load(std::memory_order_seq_cst) > 0) futex(FUTEX_WAKE_PRIVATE, size_);
      return;
    }
    for (int spins = 0; spins < kSpins; ++spins) {
      if (phase_.load(std::memory_order_acquire) != phase) return;
      pause();
    }
    asleep_.fetch_add(1, std::memory_order_seq_cst);
    while (phase_.load(std::memory_order_seq_cst) == phase) futex(FUTEX_WAIT_PRIVATE, phase);
    asleep_.fetch_sub(1, std::memory_order_relaxed);
  }

 private:
  static constexpr int kSpins = 2000;  // some hundred microseconds
  static void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }
  void futex(int operation, uint32_t value) {
    syscall(SYS_futex, reinterpret_cast<uint32_t*>(&phase_), operation, value, nullptr, nullptr, 0);
  }

  const int size_;
  alignas(64) std::atomic<int> arrived_{0};
  std::atomic<int> asleep_{0};
  alignas(64) std::atomic<uint32_t> phase_{0};
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
  if (threads <= 1 || pool_lost) return work(Team{0, 1, nullptr});
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
