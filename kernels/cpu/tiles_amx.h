// AMX tiles: eight registers of up to 16 rows of 64 bytes. A thread loads a configuration before it touches them and
// releases them when it is done; detect_isa() has asked Linux for the permission.
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

}  // namespace llmopt::amx
