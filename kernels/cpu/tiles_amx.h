// AMX tiles: eight registers of up to 16 rows of 64 bytes. A thread loads a configuration before it touches them and
// releases them when it is done; supported_isa() has asked Linux for the permission.
#pragma once
#include <immintrin.h>

#include <cstdint>

namespace llmopt::amx {

// operand of ldtilecfg, palette 1. GCC 12 believes that the instruction reads eight bytes, so keep it constant: stores
// to the rest of a variable could be dropped.
struct alignas(64) TileConfig {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];  // of tile i
  uint8_t rows[16];
};
static_assert(sizeof(TileConfig) == 64);

// all tiles 16 rows of 64 bytes
inline constexpr TileConfig kWholeTiles{1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};

// GCC 12's tile loads do not say that they read memory: between writing what they read and the first of them
inline void written_for_tiles() { __asm__ volatile("" : : : "memory"); }

#ifndef LLMOPT_EMULATED_AMX  // else tests/emulated_amx.h has defined these
// the instructions with the tile's number as a template argument; the intrinsics take literals alone
template <int kTile>
inline void tile_zero() {
  __asm__ volatile("tilezero %%tmm%c0" : : "i"(kTile));
}
template <int kTile>
inline void tile_load(const void* p, int64_t stride) {
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(p), "r"(stride), "i"(kTile));
}
template <int kTile>
inline void tile_store(void* p, int64_t stride) {
  __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(p), "r"(stride), "i"(kTile) : "memory");
}
// c[m][n] += sum over k of a[m][k] * b[k / 4][4 * n + k % 4], signed bytes into int32
template <int kC, int kA, int kB>
inline void tile_dot_s8() {
  __asm__ volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kC), "i"(kA), "i"(kB));
}
// c[m][n] += sum over k of a[m][k] * b[k / 2][2 * n + k % 2], bfloat16 into float32
template <int kC, int kA, int kB>
inline void tile_dot_bf16() {
  __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kC), "i"(kA), "i"(kB));
}
#endif

}  // namespace llmopt::amx
