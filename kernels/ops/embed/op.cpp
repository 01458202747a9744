// embed: rows of the embedding table, packed or not, as float32.
#include <cstring>

#include "linear_job.h"

namespace llmopt {
namespace {

struct Table {
  LinearWeight weight;
  int64_t cols;
};

float half_to_float(uint16_t bits, bool bfloat) {
  if (bfloat) {
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float x;
    std::memcpy(&x, &wide, 4);
    return x;
  }
  // float16: through the exponent's bias, subnormals included
  const uint32_t sign = (bits & 0x8000u) << 16, rest = bits & 0x7fffu;
  uint32_t wide = rest >= 0x7c00u ? 0x7f800000u | (rest & 0x3ffu) << 13 : (rest << 13);
  float x;
  std::memcpy(&x, &wide, 4);
  if (rest < 0x7c00u) x *= 0x1p112f;
  std::memcpy(&wide, &x, 4);
  wide |= sign;
  std::memcpy(&x, &wide, 4);
  return x;
}

void copy_row(const Table& table, int64_t row, float* out) {
  const LinearWeight& w = table.weight;
  if (w.quantized) return linear_kernels(active_isa()).dequantize_row(w.quant, row, out);
  const auto dtype = static_cast<DType>(w.dense.dtype);
  if (dtype == DType::kF32) {
    std::memcpy(out, static_cast<const float*>(w.dense.data) + row * table.cols, static_cast<size_t>(table.cols) * 4);
    return;
  }
  const auto* from = static_cast<const uint16_t*>(w.dense.data) + row * table.cols;
  for (int64_t k = 0; k < table.cols; ++k) out[k] = half_to_float(from[k], dtype == DType::kBF16);
}

void embed(TensorView ids, TensorView table, int64_t rows, int64_t bits, int64_t group, TensorView y) {
  check_cpu("ids", ids), check_i64("ids", ids), check_shape("ids", ids, {-1});
  check_cpu("out", y), check_shape("out", y, {ids.size(0), -1});
  if (float_dtype("out", y) != DType::kF32) TVM_FFI_THROW(ValueError) << "out: expected dtype float32";
  if (rows < 1) TVM_FFI_THROW(ValueError) << "rows: expected at least 1, got " << rows;
  if (bits != 4 && bits != 8 && bits != 16 && bits != 32)
    TVM_FFI_THROW(ValueError) << "bits: expected 4, 8, 16 or 32, got " << bits;
  Table t{{}, y.size(1)};
  t.weight.quantized = bits <= 8;
  if (t.weight.quantized) {
    t.weight.quant = quant_weight("table", table, rows, t.cols, group, static_cast<int>(bits), false);
    check_shape("table", table, {t.weight.quant.num_tiles(), t.weight.quant.tile_bytes()});
  } else {
    check_cpu("table", table), check_contiguous("table", table), check_shape("table", table, {rows, t.cols});
    t.weight.dense = {table.data_ptr(), static_cast<int>(float_dtype("table", table)), rows, t.cols};
  }
  const auto* index = static_cast<const int64_t*>(ids.data_ptr());
  auto* out = static_cast<float*>(y.data_ptr());
  const int64_t count = ids.size(0), stride = y.stride(0);
  // in a program the ids change from run to run, and whoever writes them keeps them inside the table
  for (int64_t i = 0; !recording() && i < count; ++i)
    if (index[i] < 0 || index[i] >= rows)
      TVM_FFI_THROW(IndexError) << "ids: expected values in [0, " << rows << "), got " << index[i];
  run_or_record(
      "embed",
      [=](const Team& team) {
        const Share mine = team.share(count);
        for (int64_t i = mine.begin; i < mine.end; ++i) copy_row(t, index[i], out + i * stride);
      },
      threads_for(count * t.cols, 16384));
}

}  // namespace
}  // namespace llmopt

TVM_FFI_DLL_EXPORT_TYPED_FUNC(embed, llmopt::embed);
