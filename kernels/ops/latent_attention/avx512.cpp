#include "simd_avx512.h"

namespace llmopt::avx512 {
constexpr int kBlockVecs = 4;  // of attention_math.h
// keys whose scores are in registers at once; rows and vectors of a block of values
constexpr int kKeyBlock = 24, kRowBlock = 8, kVecBlock = 2;
}  // namespace llmopt::avx512

#include "latent_attention_kernel.h"
#include "latent_pairs_kernel.h"

namespace llmopt {
namespace {

using namespace avx512;

// vdpbf16ps, weights rounded to bfloat16
class DotProduct {
 public:
  static constexpr bool kPacks = true;
  static constexpr int64_t kWeights = kPanel / 2;

  template <class Between>
  void scores(const StepKeys& keys, const uint16_t* query, int64_t steps, float* out, const Between& between) const {
    for (int64_t k = 0; k < kStepKeys; k += 16) {
      const uint16_t* at = keys.at + k * keys.stride;
      F32x16 sum[16];
#pragma GCC unroll 16
      for (int j = 0; j < 16; ++j) sum[j] = zero_f32();
      for (int64_t d = 0; d < 16 * steps; ++d) {
        const F32x16 q = load(reinterpret_cast<const float*>(query) + 16 * d);
#pragma GCC unroll 16
        for (int j = 0; j < 16; ++j) sum[j] = dot_bf16(sum[j], q, load_pair(at + j * keys.stride + 2 * d));
        if (d % 64 == 0) between();
      }
#pragma GCC unroll 16
      for (int j = 0; j < 16; ++j) store(out + (k + j) * kLanes, sum[j]);
    }
  }

  // [16 rows][32 keys]
  static void put_weights(const F32x16 (&x)[16], const F32x16 (&y)[16], uint16_t* out) {
    for (int64_t i = 0; i < 16; ++i) store_bf16(out + 32 * i, x[i], y[i]);
  }

  template <bool kAdd, class Between>
  void values(const uint16_t* weights, const uint16_t* packed, int64_t count, int64_t width, float* acc,
              const Between& between) const {
    for (int64_t d = 0; d < width; d += 32) {
      between();
      for (int64_t r = 0; r < kLanes; r += 8)
        dot_rows_bf16<kAdd>({weights + r * 32, 32, kPanel}, {packed + d / 16 * kPanel, kPanel, 32 * width}, count / 32,
                            acc + r * width + d, width);
    }
  }
};

}  // namespace

const LatentKernels& latent_kernels_avx512(int dtype) { return avx512::latent_kernels_for(dtype); }
const LatentKernels& latent_kernels_bf16_dots() { return avx512::latent_pairs_kernels<DotProduct>(); }

}  // namespace llmopt
