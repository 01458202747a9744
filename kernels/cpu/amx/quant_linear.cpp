// The int4 / int8 linear of many tokens on AMX tiles: 16 tokens times 16 rows, a group of inputs at a time. Everything
// else is AVX-512's. The sums of a group are exact integers and the float operations are those of block() in
// quant_linear_kernel.h, in its order: both give the same bits, so that a token's result never depends on the batch.
#include "simd_avx512.h"
#include "quant_linear_kernel.h"
#include "tiles_amx.h"

namespace llmopt {
namespace {

using namespace amx;
using namespace avx512;

// Fewer tokens leave a part of the tile empty. At 16 the tiles win by a fifth; at 17 they lose a tenth, at 24 they win by a
// half (docs/decisions/0007).
constexpr int64_t kLeastTokens = 16;
// unpacked weights that are held at once: they and the 16 tokens in hand stay in L2
constexpr int64_t kPanelBytes = 512 * 1024;
// groups multiplied ahead of the one whose sums are added: the tiles work while the vector units add
constexpr int kAhead = 4;

// a group of 32 fills half of the operands' depth: 32 bytes of a token, 8 quads of the rows
constexpr TileConfig kShallowTiles{1, 0, {}, {64, 64, 64, 64, 32, 64, 32, 64}, {16, 16, 16, 16, 16, 8, 16, 8}};

int64_t panel_tiles(const QuantWeight& w) {
  const int64_t tiles = kPanelBytes / panel_tile_bytes(w);
  return tiles < 1 ? 1 : tiles;
}

int64_t tiled_panel_bytes(const QuantWeight& w) {
  const int64_t own = panel_tiles(w) * panel_tile_bytes(w), other = linear_kernels_avx512().panel_bytes(w);
  return own > other ? own : other;
}

// zero points of a group's 16 rows, each in the four bytes of its lane
__m512i zero_bytes(const QuantWeight& w, const Tile& tile, int64_t g) {
  if (!w.asymmetric) return _mm512_set1_epi8(w.bits == 4 ? 8 : -128);
  return mul(load_u8(tile.zeros + 16 * g), set1(0x01010101)).v;
}

// One tile, the zero points subtracted: 16 quads, 1024 bytes, are the second operand of a product.
template <int kBits>
void unpack_signed(const QuantWeight& w, int64_t t, uint8_t* panel) {
  unpack_tile<kBits>(w, t, panel, [&w](const Tile& tile, int64_t g) {
    return [zero = zero_bytes(w, tile, g)](U8x64 codes) { return U8x64{_mm512_sub_epi8(codes.v, zero)}; };
  });
}

// what 16 tokens times one tile of 16 rows read
struct Operands {
  const int8_t* q;  // `stride` bytes between tokens
  int64_t stride;
  const uint8_t* panel;
  const float *token_scales, *token_offsets;  // [16][groups]
  int64_t groups;
};

// sums[token][row] of group g
template <int kGroup, int kSlot>
inline void multiply(const Operands& o, int64_t g, int32_t* sums) {
  // two pairs of operand tiles take turns, so that one is loaded while the other is multiplied
  constexpr int kA = 4 + kSlot % 2 * 2, kB = kA + 1, kNextA = 10 - kA, kNextB = kNextA + 1;
  const int8_t* q = o.q + g * kGroup;
  const uint8_t* panel = o.panel + g * (kGroup * 16 + kPanelLines);
  tile_zero<kSlot>();
  tile_load<kA>(q, o.stride);
  tile_load<kB>(panel, 64);
  tile_dot_s8<kSlot, kA, kB>();
  if constexpr (kGroup == 128) {
    tile_load<kNextA>(q + 64, o.stride);
    tile_load<kNextB>(panel + 1024, 64);
    tile_dot_s8<kSlot, kNextA, kNextB>();
  }
  tile_store<kSlot>(sums, 64);
}

template <int kGroup>
inline void add_group(const Operands& o, int64_t g, const int32_t* sums, F32x16 (&total)[16]) {
  const uint8_t* lines = o.panel + g * (kGroup * 16 + kPanelLines) + kGroup * 16;
  const F32x16 scale = load(reinterpret_cast<const float*>(lines)),
               values = load(reinterpret_cast<const float*>(lines) + 16);
#pragma GCC unroll 16
  for (int m = 0; m < 16; ++m) {
    const I32x16 sum{_mm512_load_si512(sums + 16 * m)};
    total[m] = fmadd(values, set1(o.token_offsets[m * o.groups + g]), total[m]);
    total[m] = fmadd(to_f32(sum), mul(scale, set1(o.token_scales[m * o.groups + g])), total[m]);
  }
}

// adds group g - kAhead and multiplies group g, where there are such
template <int kGroup, int kSlot>
inline void step(const Operands& o, int64_t g, int32_t (&sums)[kAhead][256], F32x16 (&total)[16]) {
  if (g >= kAhead && g - kAhead < o.groups) add_group<kGroup>(o, g - kAhead, sums[kSlot], total);
  if (g < o.groups) multiply<kGroup, kSlot>(o, g, sums[kSlot]);
}

// stores tokens [token + first, token + 16)
template <int kGroup>
void tile_product(const Operands& o, const Output& y, int64_t token, int first, int64_t row, int64_t rows) {
  alignas(64) int32_t sums[kAhead][256];
  F32x16 total[16];
#pragma GCC unroll 16
  for (int m = 0; m < 16; ++m) total[m] = zero_f32();
  for (int64_t g = 0; g < o.groups + kAhead; g += kAhead) {
    step<kGroup, 0>(o, g, sums, total);
    step<kGroup, 1>(o, g + 1, sums, total);
    step<kGroup, 2>(o, g + 2, sums, total);
    step<kGroup, 3>(o, g + 3, sums, total);
  }
  alignas(64) float out[16][16];
#pragma GCC unroll 16
  for (int m = 0; m < 16; ++m) store(out[m], total[m]);
  for (int m = first; m < 16; ++m) store_rows(y, token + m, row, rows, load(out[m]));
}

// the panel's tiles [begin, end) times all tokens
template <int kGroup>
void panel_product(const QuantWeight& w, const QuantTokens& x, int64_t tokens, int64_t begin, int64_t end,
                   const Output& y, const uint8_t* panel) {
  for (int64_t next = 0; next < tokens; next += 16) {
    // the last block is 16 tokens too; those it shares with the block before are stored already
    const int64_t token = next + 16 <= tokens ? next : tokens - 16;
    const int first = static_cast<int>(next - token);
    for (int64_t t = begin; t < end; ++t) {
      const Operands o{x.q + token * x.padded_cols,
                       x.padded_cols,
                       panel + (t - begin) * panel_tile_bytes(w),
                       x.scales + token * x.num_groups,
                       x.offsets + token * x.num_groups,
                       x.num_groups};
      tile_product<kGroup>(o, y, token, first, 16 * t, w.rows);
    }
  }
}

void tiled_product(const QuantWeight& w, const QuantTokens& x, int64_t tokens, int64_t tile_begin, int64_t tile_end,
                   const Output& y, uint8_t* panel) {
  // a byte minus a zero point other than 128 can need nine bits
  const bool fits = w.bits == 4 || !w.asymmetric;
  if (tokens < kLeastTokens || !fits)
    return linear_kernels_avx512().product(w, x, tokens, tile_begin, tile_end, y, panel);
  _tile_loadconfig(w.group == 32 ? &kShallowTiles : &kWholeTiles);
  const int64_t most = panel_tiles(w);
  for (int64_t t = tile_begin; t < tile_end; t += most) {
    const int64_t end = t + most < tile_end ? t + most : tile_end;
    for (int64_t i = t; i < end; ++i) {
      uint8_t* to = panel + (i - t) * panel_tile_bytes(w);
      w.bits == 4 ? unpack_signed<4>(w, i, to) : unpack_signed<8>(w, i, to);
    }
    written_for_tiles();
    if (w.group == 32) panel_product<32>(w, x, tokens, t, end, y, panel);
    if (w.group == 64) panel_product<64>(w, x, tokens, t, end, y, panel);
    if (w.group == 128) panel_product<128>(w, x, tokens, t, end, y, panel);
  }
  _tile_release();
}

}  // namespace

const LinearKernels& linear_kernels_amx() {
  static const LinearKernels kernels = [] {
    LinearKernels made = linear_kernels_avx512();
    made.product = tiled_product;
    made.panel_bytes = tiled_panel_bytes;
    return made;
  }();
  return kernels;
}

}  // namespace llmopt
