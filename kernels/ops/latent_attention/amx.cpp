#include "simd_avx512.h"
#include "tiles_amx.h"

namespace llmopt::avx512 {
constexpr int kBlockVecs = 4;  // of attention_math.h
}  // namespace llmopt::avx512

#include "latent_pairs_kernel.h"

namespace llmopt {
namespace {

using namespace amx;
using avx512::F32x16;
using avx512::kPanel;
using avx512::kStepKeys;
using avx512::StepKeys;

// Keys are read where they lie, as values too. A tile product adds up pairs of terms, and of a key's row those are pairs of
// dimensions; so a weight goes in as (weight, 0), which leaves the even dimensions, and as (0, weight), which leaves the odd
// ones. Half of the multiplications are by zero, which costs less than packing the keys in pairs. Weights are rounded to
// bfloat16, as eager attention rounds them.
class TileProduct {
 public:
  static constexpr bool kPacks = false, kQueryRows = false;
  static constexpr int64_t kWeights = 2 * kPanel;

  TileProduct() { _tile_loadconfig(&kWholeTiles); }
  ~TileProduct() { _tile_release(); }
  TileProduct(const TileProduct&) = delete;
  TileProduct& operator=(const TileProduct&) = delete;

  // tiles 0 to 3: sums of sixteen keys each; 4: queries; the rest: keys
  template <class Between>
  void scores(const StepKeys& keys, const uint16_t* query, int64_t steps, float* out, const Between& between) const {
    const int64_t stride = 2 * keys.stride, apart = 16 * keys.stride;
    const uint16_t* k = keys.at;
    written_for_tiles();
    tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
    for (int64_t i = 0; i < steps; ++i, k += 32, query += kPanel) {
      tile_load<4>(query, 64);
      tile_load<5>(k, stride);
      tile_dot_bf16<0, 5, 4>();
      tile_load<6>(k + apart, stride);
      tile_dot_bf16<1, 6, 4>();
      tile_load<7>(k + 2 * apart, stride);
      tile_dot_bf16<2, 7, 4>();
      tile_load<5>(k + 3 * apart, stride);
      tile_dot_bf16<3, 5, 4>();
      between();
    }
    tile_store<0>(out, 64), tile_store<1>(out + 256, 64), tile_store<2>(out + 512, 64), tile_store<3>(out + 768, 64);
  }

  // for 16 keys: (weight, 0) and (0, weight)
  static void put_weights(const F32x16 (&x)[16], const F32x16 (&y)[16], uint16_t* out) {
    put(x, reinterpret_cast<float*>(out));
    put(y, reinterpret_cast<float*>(out + kWeights));
  }

  template <bool kAdd, class Between>
  void values(const uint16_t* weights, const StepKeys* keys, int64_t count, int64_t width, float* acc,
              const Between& between) const {
    written_for_tiles();
    int64_t d = 0;
    for (; d + 64 <= width; d += 64) columns<kAdd, true>(weights, keys, count, d, acc + d, width, between);
    if (d < width) columns<kAdd, false>(weights, keys, count, d, acc + d, width, between);
  }

 private:
  static void put(const F32x16 (&x)[16], float* out) {
    using namespace avx512;
    for (int64_t i = 0; i < 16; ++i, out += 16) {
      const F32x16 rounded = rounded_upper_half(x[i]);
      store(out, lower_of_upper(rounded));
      store(out + 256, rounded);
    }
  }

  // 64 dimensions, or the last 32. tiles 0 to 3: sums of the even, the odd ones of either half; 4 and 5: weights; 6 and 7:
  // keys
  template <bool kAdd, bool kBoth, class Between>
  static void columns(const uint16_t* weights, const StepKeys* keys, int64_t count, int64_t d, float* acc,
                      int64_t width, const Between& between) {
    tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
    if constexpr (kAdd) {
      tile_load<0>(acc, 4 * width), tile_load<1>(acc + 16, 4 * width);
      if constexpr (kBoth) tile_load<2>(acc + 32, 4 * width), tile_load<3>(acc + 48, 4 * width);
    }
    for (int64_t k = 0; k < count; k += 16, weights += kWeights) {
      const StepKeys& step = keys[k / kStepKeys];
      const uint16_t* b = step.at + k % kStepKeys * step.stride + d;
      tile_load<6>(b, 2 * step.stride);
      if constexpr (kBoth) tile_load<7>(b + 32, 2 * step.stride);
      multiply<kBoth>(weights);
      between();
    }
    tile_store<0>(acc, 4 * width), tile_store<1>(acc + 16, 4 * width);
    if constexpr (kBoth) tile_store<2>(acc + 32, 4 * width), tile_store<3>(acc + 48, 4 * width);
  }

  template <bool kBoth>
  static void multiply(const uint16_t* weights) {
    tile_load<4>(weights, 64);
    tile_dot_bf16<0, 4, 6>();
    if constexpr (kBoth) tile_dot_bf16<2, 4, 7>();
    tile_load<5>(weights + kPanel, 64);
    tile_dot_bf16<1, 5, 6>();
    if constexpr (kBoth) tile_dot_bf16<3, 5, 7>();
  }
};

}  // namespace

const LatentKernels& latent_kernels_amx() { return avx512::latent_pairs_kernels<TileProduct>(); }

}  // namespace llmopt
