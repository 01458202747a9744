// Ceilings of the AMX tiles; memory and float32 are AVX-512's.
#include "ceilings.h"

#include <cstring>

#include "tiles_amx.h"

namespace llmopt {
namespace {

constexpr int kChains = 6, kUnroll = 4;

// six sums and two operands that are not zero: zeros would draw less power than data does
void begin_chains(uint8_t x, uint8_t y) {
  alignas(64) uint8_t operand[2][1024];
  std::memset(operand[0], x, 1024);
  std::memset(operand[1], y, 1024);
  amx::written_for_tiles();
  _tile_loadconfig(&amx::kWholeTiles);
  amx::tile_zero<0>();
  amx::tile_zero<1>();
  amx::tile_zero<2>();
  amx::tile_zero<3>();
  amx::tile_zero<4>();
  amx::tile_zero<5>();
  amx::tile_load<6>(operand[0], 64);
  amx::tile_load<7>(operand[1], 64);
  amx::written_for_tiles();  // the operands end here, not before the loads
}

double dot_int8(int64_t steps) {
  begin_chains(3, 2);
  for (int64_t s = 0; s < steps; ++s) {
#pragma GCC unroll 4
    for (int u = 0; u < kUnroll; ++u) {
      amx::tile_dot_s8<0, 6, 7>();
      amx::tile_dot_s8<1, 6, 7>();
      amx::tile_dot_s8<2, 6, 7>();
      amx::tile_dot_s8<3, 6, 7>();
      amx::tile_dot_s8<4, 6, 7>();
      amx::tile_dot_s8<5, 6, 7>();
    }
  }
  _tile_release();
  return 2.0 * 16 * 16 * 64 * kChains * kUnroll * static_cast<double>(steps);
}

double dot_bf16(int64_t steps) {
  begin_chains(0x3f, 0x3e);
  for (int64_t s = 0; s < steps; ++s) {
#pragma GCC unroll 4
    for (int u = 0; u < kUnroll; ++u) {
      amx::tile_dot_bf16<0, 6, 7>();
      amx::tile_dot_bf16<1, 6, 7>();
      amx::tile_dot_bf16<2, 6, 7>();
      amx::tile_dot_bf16<3, 6, 7>();
      amx::tile_dot_bf16<4, 6, 7>();
      amx::tile_dot_bf16<5, 6, 7>();
    }
  }
  _tile_release();
  return 2.0 * 16 * 16 * 32 * kChains * kUnroll * static_cast<double>(steps);
}

}  // namespace

CeilingLoops amx_ceilings() {
  CeilingLoops loops = avx512_ceilings();
  loops.dot_int8 = dot_int8;
  loops.dot_bf16 = dot_bf16;
  return loops;
}

}  // namespace llmopt
