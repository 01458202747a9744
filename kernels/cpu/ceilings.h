// What the machine can do at most: reading memory, and doing dot products on registers alone. A kernel's rate is shown as
// a fraction of these, so they must be the best the instruction set allows, not what some kernel happens to reach.
#pragma once
#include <cstdint>

namespace llmopt {

// Loops of one instruction set. The compute loops run `steps` rounds and return the number of operations done (a
// multiply-add counts as two); a null pointer means that the instruction set has no such instruction.
struct CeilingLoops {
  // sums the bytes in some way; bytes is a multiple of 4096. Two streams at once: one leaves a tenth of the rate unused
  uint64_t (*read)(const uint8_t* data, int64_t bytes);
  double (*dot_int8)(int64_t steps);  // bytes, one side unsigned or both signed, into int32
  double (*dot_bf16)(int64_t steps);  // bf16 pairs into float32
  double (*fma_fp32)(int64_t steps);
};

CeilingLoops portable_ceilings();
CeilingLoops avx2_ceilings();
CeilingLoops avx512_ceilings();
CeilingLoops amx_ceilings();

}  // namespace llmopt
