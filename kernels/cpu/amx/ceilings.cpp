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
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_zero(4);
  _tile_zero(5);
  _tile_loadd(6, operand[0], 64);
  _tile_loadd(7, operand[1], 64);
  amx::written_for_tiles();  // the operands end here, not before the loads
}

double dot_int8(int64_t steps) {
  begin_chains(3, 2);
  for (int64_t s = 0; s < steps; ++s) {
#pragma GCC unroll 4
    for (int u = 0; u < kUnroll; ++u) {
      _tile_dpbssd(0, 6, 7);
      _tile_dpbssd(1, 6, 7);
      _tile_dpbssd(2, 6, 7);
      _tile_dpbssd(3, 6, 7);
      _tile_dpbssd(4, 6, 7);
      _tile_dpbssd(5, 6, 7);
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
      _tile_dpbf16ps(0, 6, 7);
      _tile_dpbf16ps(1, 6, 7);
      _tile_dpbf16ps(2, 6, 7);
      _tile_dpbf16ps(3, 6, 7);
      _tile_dpbf16ps(4, 6, 7);
      _tile_dpbf16ps(5, 6, 7);
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
