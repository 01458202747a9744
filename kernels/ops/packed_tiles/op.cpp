// Packs weights into the kernels' tiles (quant_linear.h): codes that lie in a GPTQ file's words, or weights for which the
// nearest codes are looked up. Used while a checkpoint is loaded. One plain source for every processor: the loops
// vectorize as they stand, and wait for memory.
#include <omp.h>

#include <atomic>
#include <cstring>

#include "quant_linear.h"
#include "tensor_check.h"
#include "threads.h"

namespace llmopt {
namespace {

constexpr int kRows = 16, kMostGroup = 128;
// tiles handed out at a time: other work shares the cores while a checkpoint is loaded
constexpr int kChunk = 4;

// A core is left to those who hash files and get memory meanwhile: threads that spin at the end of a region would take
// it from them.
int team_size(const QuantWeight& weight) {
  const int threads = threads_for(weight.num_tiles() * weight.tile_bytes(), 1 << 16);
  return threads > 1 && threads == omp_get_max_threads() ? threads - 1 : threads;
}

// Codes of one group of one tile: [row][column], and where they go.
struct Block {
  uint8_t q[kRows][kMostGroup];
};

struct Tiles {
  QuantWeight weight;
  const uint16_t* scales;  // [rows, groups] float16
  const uint8_t* zeros;    // [rows, groups], or null
  uint8_t* out;

  int middle() const { return weight.bits == 4 ? 8 : 128; }
  int64_t real_rows(int64_t tile) const {
    return weight.rows - tile * kRows < kRows ? weight.rows - tile * kRows : kRows;
  }
  int64_t real_cols(int64_t group) const {
    const int64_t left = weight.cols - group * weight.group;
    return left < weight.group ? left : weight.group;
  }
  uint8_t* header(int64_t tile) const { return out + tile * weight.step_bytes(); }
  // the first plane's vectors of a group; those of an 8-bit weight's second plane lie weight.low_plane(tile) behind
  uint8_t* vectors(int64_t tile, int64_t group) const {
    return header(tile) + weight.header_bytes() + group * weight.group * 8;
  }

  // Scales, sums and zeros of a tile whose vectors are there already; those of rows that are padding are 0.
  void write_header(int64_t tile) const {
    const int64_t groups = weight.num_groups(), rows = real_rows(tile);
    uint8_t* to = header(tile);
    std::memset(to, 0, static_cast<size_t>(weight.header_bytes()));
    for (int64_t g = 0; g < groups; ++g)
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t from = (tile * kRows + r) * groups + g;
        std::memcpy(to + (g * kRows + r) * 2, scales + from, 2);
        if (zeros) to[groups * kRows * 4 + g * kRows + r] = zeros[from];
      }
    for (int64_t g = 0; g < groups; ++g) write_sums(tile, g);
  }

  // a group's sums of codes, row by row
  void sum_codes(int64_t tile, int64_t group, int32_t (&sum)[kRows]) const {
    const uint8_t* from = vectors(tile, group);
    std::memset(sum, 0, sizeof(sum));
    for (int plane = 0; plane < weight.bits / 4; ++plane, from += weight.low_plane(tile)) {
      // bytes hold the sums of sixteen nibbles
      uint32_t low[kRows] = {}, high[kRows] = {};
      for (int v = 0; v < weight.group / 8; ++v)
        for (int r = 0; r < kRows; ++r) {
          uint32_t lane;
          std::memcpy(&lane, from + (v * kRows + r) * 4, 4);
          low[r] += lane & 0x0f0f0f0fu;
          high[r] += lane >> 4 & 0x0f0f0f0fu;
        }
      const int32_t unit = weight.bits == 8 && plane == 0 ? 16 : 1;
      for (int r = 0; r < kRows; ++r) {
        const uint32_t pairs = (low[r] & 0x00ff00ffu) + (low[r] >> 8 & 0x00ff00ffu) + (high[r] & 0x00ff00ffu) +
                               (high[r] >> 8 & 0x00ff00ffu);
        sum[r] += unit * static_cast<int32_t>((pairs & 0xffffu) + (pairs >> 16));
      }
    }
  }

  void write_sums(int64_t tile, int64_t group) const {
    int32_t sum[kRows];
    sum_codes(tile, group, sum);
    uint8_t* base = header(tile);
    const uint8_t* zero_points = base + weight.num_groups() * kRows * 4 + group * kRows;
    for (int64_t r = 0; r < kRows; ++r) {
      const int zero = weight.asymmetric ? zero_points[r] : middle();
      const auto value = static_cast<int16_t>(sum[r] - zero * weight.group);
      std::memcpy(base + ((weight.num_groups() + group) * kRows + r) * 2, &value, 2);
    }
  }

  // fills what is padding in a block with codes that stand for 0
  void pad(Block& block, int64_t tile, int64_t group) const {
    const int64_t rows = real_rows(tile), cols = real_cols(group);
    for (int64_t r = 0; r < kRows; ++r) {
      const int zero = !zeros ? middle() : (r < rows ? zeros[(tile * kRows + r) * weight.num_groups() + group] : 0);
      const int64_t from = r < rows ? cols : 0;
      std::memset(block.q[r] + from, zero, static_cast<size_t>(weight.group - from));
    }
  }

  // one row's part of a vector: eight codes, as two quads of bytes; `low_plane`: weight.low_plane() of its tile
  void write_quads(uint8_t* to, int64_t low_plane, uint32_t quad, uint32_t next) const {
    constexpr uint32_t kLow = 0x0f0f0f0fu, kHigh = 0xf0f0f0f0u;
    const bool whole = weight.bits == 4;
    const uint32_t first = whole ? quad | next << 4 : (quad >> 4 & kLow) | (next & kHigh);
    const uint32_t second = (quad & kLow) | (next << 4 & kHigh);
    std::memcpy(to, &first, 4);
    if (!whole) std::memcpy(to + low_plane, &second, 4);
  }

  void write_block(const Block& block, int64_t tile, int64_t group) const {
    uint8_t* to = vectors(tile, group);
    const int64_t low_plane = weight.low_plane(tile);
    for (int64_t k = 0; k < weight.group; k += 8)
      for (int r = 0; r < kRows; ++r, to += 4) {
        uint32_t quad, next;
        std::memcpy(&quad, block.q[r] + k, 4);
        std::memcpy(&next, block.q[r] + k + 4, 4);
        write_quads(to, low_plane, quad, next);
      }
  }
};

// Four codes of four bits, the first in the lowest bits, as four bytes.
inline uint32_t spread(uint32_t x) {
  x = (x | x << 8) & 0x00ff00ffu;
  return (x | x << 4) & 0x0f0f0f0fu;
}

// words [ceil(cols * bits / 32), stride]: a word holds consecutive columns of a row, the first in the lowest bits
void pack_words(const Tiles& t, const uint32_t* words, int64_t stride, int64_t tile) {
  const int bits = t.weight.bits, per_word = 32 / bits;
  const int64_t rows = t.real_rows(tile), low_plane = t.weight.low_plane(tile);
  for (int64_t g = 0; g < t.weight.num_groups(); ++g) {
    const uint32_t* from = words + g * t.weight.group / per_word * stride + tile * kRows;
    const int64_t cols = t.real_cols(g);
    if (rows == kRows && cols == t.weight.group) {
      uint8_t* to = t.vectors(tile, g);
      for (int64_t k = 0; k < cols; k += 8, from += 8 / per_word * stride, to += 64)
        for (int r = 0; r < kRows; ++r)
          bits == 8 ? t.write_quads(to + 4 * r, low_plane, from[r], from[stride + r])
                    : t.write_quads(to + 4 * r, low_plane, spread(from[r] & 0xffffu), spread(from[r] >> 16));
      continue;
    }
    Block block;
    for (int64_t k = 0; k < cols; ++k)
      for (int64_t r = 0; r < rows; ++r)
        block.q[r][k] =
            static_cast<uint8_t>(from[k / per_word * stride + r] >> (k % per_word * bits) & ((1u << bits) - 1));
    t.pad(block, tile, g);
    t.write_block(block, tile, g);
  }
  t.write_header(tile);
}

inline float value(const float* from, int64_t k) { return from[k]; }
inline float value(const uint16_t* from, int64_t k) {
  const uint32_t wide = static_cast<uint32_t>(from[k]) << 16;
  float x;
  std::memcpy(&x, &wide, 4);
  return x;
}

// Rounds one row of one group; false if a weight is NaN or Inf. The operations and their order are the reference's.
template <typename T>
bool round_row(const T* from, int64_t n, float scale, float zero, float top, uint8_t* codes) {
  uint32_t worst = 0;
  for (int64_t k = 0; k < n; ++k) {
    const float x = value(from, k);
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    bits &= 0x7fffffffu;
    worst = bits > worst ? bits : worst;
    float q = x / scale + zero;
    q = q < 0.0f ? 0.0f : q;
    q = q > top ? top : q;
    // adding 1.5 * 2^23 leaves the nearest integer, ties to even, in the low bits
    q += 12582912.0f;
    std::memcpy(&bits, &q, 4);
    codes[k] = static_cast<uint8_t>(bits);
  }
  return worst < 0x7f800000u;
}

float half_to_float(uint16_t bits) {
  const uint32_t sign = (bits & 0x8000u) << 16, rest = bits & 0x7fffu;
  uint32_t wide = rest << 13;
  float x;
  std::memcpy(&x, &wide, 4);
  x *= 0x1p112f;
  return sign ? -x : x;
}

template <typename T>
bool pack_nearest(const Tiles& t, const T* weight, int64_t stride, int64_t tile) {
  const int64_t rows = t.real_rows(tile), groups = t.weight.num_groups();
  bool finite = true;
  for (int64_t g = 0; g < groups; ++g) {
    Block block;
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t row = tile * kRows + r, at = row * groups + g;
      const auto zero = static_cast<float>(t.zeros ? t.zeros[at] : t.middle());
      finite &= round_row(weight + row * stride + g * t.weight.group, t.real_cols(g), half_to_float(t.scales[at]), zero,
                          t.weight.bits == 4 ? 15.0f : 255.0f, block.q[r]);
    }
    t.pad(block, tile, g);
    t.write_block(block, tile, g);
  }
  t.write_header(tile);
  return finite;
}

void check_format(int64_t rows, int64_t cols, int64_t group, int64_t bits) {
  if (group != 32 && group != 64 && group != 128)
    TVM_FFI_THROW(ValueError) << "group_size: expected 32, 64 or 128, got " << group;
  if (bits != 4 && bits != 8) TVM_FFI_THROW(ValueError) << "bits: expected 4 or 8, got " << bits;
  if (rows < 1 || cols < 1) TVM_FFI_THROW(ValueError) << "weight: expected at least one row and column";
}

Tiles checked_tiles(int64_t rows, int64_t cols, const TensorView& scales, const TensorView& zeros, int64_t group,
                    int64_t bits, const TensorView& out) {
  check_format(rows, cols, group, bits);
  const bool asymmetric = zeros.numel() > 0;
  const QuantWeight weight{nullptr, rows, cols, static_cast<int>(group), static_cast<int>(bits), asymmetric};
  check_cpu("scales", scales), check_contiguous("scales", scales);
  check_shape("scales", scales, {rows, weight.num_groups()});
  if (float_dtype("scales", scales) != DType::kF16) TVM_FFI_THROW(ValueError) << "scales: expected dtype float16";
  check_cpu("zeros", zeros), check_contiguous("zeros", zeros), check_bytes("zeros", zeros);
  if (asymmetric) check_shape("zeros", zeros, {rows, weight.num_groups()});
  check_cpu("out", out), check_contiguous("out", out), check_bytes("out", out);
  check_shape("out", out, {weight.num_tiles(), weight.tile_bytes()});
  return {weight, static_cast<const uint16_t*>(scales.data_ptr()),
          asymmetric ? static_cast<const uint8_t*>(zeros.data_ptr()) : nullptr, static_cast<uint8_t*>(out.data_ptr())};
}

void packed_words(TensorView words, int64_t cols, TensorView scales, TensorView zeros, int64_t group, int64_t bits,
                  TensorView out) {
  check_cpu("words", words), check_shape("words", words, {-1, -1});
  if (words.dtype().code != kDLInt || words.dtype().bits != 32)
    TVM_FFI_THROW(ValueError) << "words: expected dtype int32";
  const Tiles tiles = checked_tiles(words.size(1), cols, scales, zeros, group, bits, out);
  check_shape("words", words, {(cols * bits + 31) / 32, -1});
  const auto* from = static_cast<const uint32_t*>(words.data_ptr());
  const int64_t count = tiles.weight.num_tiles(), stride = words.stride(0);
#pragma omp parallel for schedule(dynamic, kChunk) num_threads(team_size(tiles.weight))
  for (int64_t tile = 0; tile < count; ++tile) pack_words(tiles, from, stride, tile);
}

void packed_nearest(TensorView weight, TensorView scales, TensorView zeros, int64_t group, int64_t bits,
                    TensorView out) {
  check_cpu("weight", weight), check_shape("weight", weight, {-1, -1});
  const DType dtype = float_dtype("weight", weight);
  if (dtype == DType::kF16) TVM_FFI_THROW(ValueError) << "weight: expected dtype float32 or bfloat16";
  const Tiles tiles = checked_tiles(weight.size(0), weight.size(1), scales, zeros, group, bits, out);
  const int64_t count = tiles.weight.num_tiles(), stride = weight.stride(0);
  std::atomic<bool> finite{true};
#pragma omp parallel for schedule(dynamic, kChunk) num_threads(team_size(tiles.weight))
  for (int64_t tile = 0; tile < count; ++tile) {
    const bool ok = dtype == DType::kF32
                        ? pack_nearest(tiles, static_cast<const float*>(weight.data_ptr()), stride, tile)
                        : pack_nearest(tiles, static_cast<const uint16_t*>(weight.data_ptr()), stride, tile);
    if (!ok) finite = false;
  }
  if (!finite) TVM_FFI_THROW(ValueError) << "weight: expected finite values, got NaN or Inf";
}

// Fills in the sums of symmetric tiles [T, tile_bytes] that have scales and codes.
void packed_sums(TensorView tiles, int64_t cols, int64_t group, int64_t bits) {
  check_cpu("tiles", tiles), check_contiguous("tiles", tiles), check_bytes("tiles", tiles);
  check_shape("tiles", tiles, {-1, -1});
  check_format(tiles.size(0), cols, group, bits);
  const QuantWeight weight{nullptr, tiles.size(0) * kRows, cols, static_cast<int>(group), static_cast<int>(bits),
                           false};
  check_shape("tiles", tiles, {-1, weight.tile_bytes()});
  const Tiles all{weight, nullptr, nullptr, static_cast<uint8_t*>(tiles.data_ptr())};
#pragma omp parallel for schedule(static) num_threads(threads_for(tiles.size(0) * weight.tile_bytes(), 1 << 16))
  for (int64_t tile = 0; tile < weight.num_tiles(); ++tile)
    for (int64_t g = 0; g < weight.num_groups(); ++g) all.write_sums(tile, g);
}

}  // namespace
}  // namespace llmopt

TVM_FFI_DLL_EXPORT_TYPED_FUNC(packed_sums, llmopt::packed_sums);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(packed_words, llmopt::packed_words);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(packed_nearest, llmopt::packed_nearest);
