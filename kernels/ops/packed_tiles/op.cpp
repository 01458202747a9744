// Packs weights into the kernels' tiles (quant_linear.h): codes that lie in a GPTQ file's words, or weights for which the
// nearest codes are looked up. Used while a checkpoint is loaded.
#include <omp.h>

#include <atomic>

#include "packed_tiles.h"
#include "tensor_check.h"
#include "threads.h"

namespace llmopt {
namespace {

constexpr int kRows = 16;
// tiles handed out at a time: other work shares the cores while a checkpoint is loaded
constexpr int kChunk = 4;

// A core is left to those who hash files and get memory meanwhile: threads that spin at the end of a region would take
// it from them.
int team_size(const QuantWeight& weight) {
  const int threads = threads_for(weight.num_tiles() * weight.tile_bytes(), 1 << 16);
  return threads > 1 && threads == omp_get_max_threads() ? threads - 1 : threads;
}

void check_format(int64_t rows, int64_t cols, int64_t group, int64_t bits) {
  if (group != 32 && group != 64 && group != 128)
    TVM_FFI_THROW(ValueError) << "group_size: expected 32, 64 or 128, got " << group;
  if (bits != 4 && bits != 8) TVM_FFI_THROW(ValueError) << "bits: expected 4 or 8, got " << bits;
  if (rows < 1 || cols < 1) TVM_FFI_THROW(ValueError) << "weight: expected at least one row and column";
}

// rows: of the tiles from `first` on; those before them, and whole tiles behind them, are left alone
PackedTiles checked_tiles(int64_t rows, int64_t cols, const TensorView& scales, const TensorView& zeros, int64_t group,
                          int64_t bits, const TensorView& out, int64_t first = 0) {
  check_format(rows, cols, group, bits);
  check_shape("out", out, {-1, -1});
  const int64_t behind = out.size(0) - first - (rows + kRows - 1) / kRows;
  if (first < 0 || behind < 0 || (behind > 0 && rows % kRows != 0))
    TVM_FFI_THROW(ValueError) << "first_tile: " << rows << " rows from tile " << first << " on do not fit in "
                              << out.size(0) << " tiles";
  const bool asymmetric = zeros.numel() > 0;
  const QuantWeight weight{
      nullptr, (first + behind) * kRows + rows, cols, static_cast<int>(group), static_cast<int>(bits), asymmetric};
  check_cpu("scales", scales), check_contiguous("scales", scales);
  check_shape("scales", scales, {rows, weight.num_groups()});
  if (float_dtype("scales", scales) != DType::kF16) TVM_FFI_THROW(ValueError) << "scales: expected dtype float16";
  check_cpu("zeros", zeros), check_contiguous("zeros", zeros), check_bytes("zeros", zeros);
  if (asymmetric) check_shape("zeros", zeros, {rows, weight.num_groups()});
  check_cpu("out", out), check_contiguous("out", out), check_bytes("out", out);
  check_shape("out", out, {weight.num_tiles(), weight.tile_bytes()});
  return {weight, static_cast<const uint16_t*>(scales.data_ptr()),
          asymmetric ? static_cast<const uint8_t*>(zeros.data_ptr()) : nullptr, static_cast<uint8_t*>(out.data_ptr()),
          first};
}

void packed_words(TensorView words, int64_t cols, TensorView scales, TensorView zeros, int64_t group, int64_t bits,
                  TensorView out) {
  check_cpu("words", words), check_shape("words", words, {-1, -1});
  if (words.dtype().code != kDLInt || words.dtype().bits != 32)
    TVM_FFI_THROW(ValueError) << "words: expected dtype int32";
  const PackedTiles tiles = checked_tiles(words.size(1), cols, scales, zeros, group, bits, out);
  check_shape("words", words, {(cols * bits + 31) / 32, -1});
  const auto* from = static_cast<const uint32_t*>(words.data_ptr());
  const int64_t count = tiles.weight.num_tiles(), stride = words.stride(0);
  const PackKernels& kernels = pack_kernels(active_isa());
#pragma omp parallel for schedule(dynamic, kChunk) num_threads(team_size(tiles.weight))
  for (int64_t tile = 0; tile < count; ++tile) kernels.words(tiles, from, stride, tile);
}

void packed_nearest(TensorView weight, TensorView scales, TensorView zeros, int64_t group, int64_t bits, TensorView out,
                    int64_t first) {
  check_cpu("weight", weight), check_shape("weight", weight, {-1, -1});
  const DType dtype = float_dtype("weight", weight);
  if (dtype == DType::kF16) TVM_FFI_THROW(ValueError) << "weight: expected dtype float32 or bfloat16";
  const PackedTiles tiles = checked_tiles(weight.size(0), weight.size(1), scales, zeros, group, bits, out, first);
  const int64_t end = first + (weight.size(0) + kRows - 1) / kRows, stride = weight.stride(0);
  const PackKernels& kernels = pack_kernels(active_isa());
  const auto nearest = dtype == DType::kF32 ? kernels.nearest_f32 : kernels.nearest_bf16;
  std::atomic<bool> finite{true};
#pragma omp parallel for schedule(dynamic, kChunk) num_threads(team_size(tiles.weight))
  for (int64_t tile = first; tile < end; ++tile)
    if (!nearest(tiles, weight.data_ptr(), stride, tile)) finite = false;
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
  const PackKernels& kernels = pack_kernels(active_isa());
  const PackedTiles all{weight, nullptr, nullptr, static_cast<uint8_t*>(tiles.data_ptr())};
#pragma omp parallel for schedule(static) num_threads(threads_for(tiles.size(0) * weight.tile_bytes(), 1 << 16))
  for (int64_t tile = 0; tile < weight.num_tiles(); ++tile) kernels.sums(all, tile);
}

}  // namespace
}  // namespace llmopt

TVM_FFI_DLL_EXPORT_TYPED_FUNC(packed_sums, llmopt::packed_sums);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(packed_words, llmopt::packed_words);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(packed_nearest, llmopt::packed_nearest);
