#pragma once
#include <cstdint>

#include "isa.h"

namespace llmopt {

// words of the Mersenne twister's state (Matsumoto and Nishimura, 1998: MT19937)
constexpr int kTwisterWords = 624;

struct NoiseKernels {
  // the state that follows a state
  void (*twist)(const uint32_t* state, uint32_t* next);
  // n values of the exponential distribution from 2 n words of states, in order
  void (*values)(const uint32_t* words, int64_t n, float* out);
};

const NoiseKernels& noise_kernels_portable();
const NoiseKernels& noise_kernels_avx2();
const NoiseKernels& noise_kernels_avx512();

inline const NoiseKernels& noise_kernels(Isa isa) {
#ifdef LLMOPT_X86
  if (isa >= Isa::kAvx512) return noise_kernels_avx512();
  if (isa == Isa::kAvx2) return noise_kernels_avx2();
#else
  (void)isa;
#endif
  return noise_kernels_portable();
}

}  // namespace llmopt
