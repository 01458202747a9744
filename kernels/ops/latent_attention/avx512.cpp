#include "simd_avx512.h"

namespace llmopt::avx512 {
constexpr int kBlockVecs = 4;  // of attention_math.h
// keys whose scores are in registers at once; rows and vectors of a block of values
constexpr int kKeyBlock = 24, kRowBlock = 8, kVecBlock = 2;
}  // namespace llmopt::avx512

#include "latent_attention_kernel.h"
#include "latent_codes_kernel.h"
#include "latent_pairs_kernel.h"

namespace llmopt {
namespace {

using namespace avx512;

// vdpbf16ps, weights rounded to bfloat16
class DotProduct {
 public:
  static constexpr bool kPacks = true, kQueryRows = true;
  static constexpr int64_t kWeights = kPanel / 2;

  // Four keys and four rows at a time, lanes for dimensions: half a load for each product. With lanes for rows it takes one,
  // a number broadcast to all of them, and waits for it twice as long as for the product.
  template <class Between>
  void scores(const StepKeys& keys, const uint16_t* query, int64_t steps, float* out, const Between& between) const {
    constexpr int kKeys = 4, kRows = 4;
    const int64_t depth = 32 * steps;
    for (int64_t k = 0; k < kStepKeys; k += kKeys) {
      const uint16_t* at = keys.at + k * keys.stride;
      for (int64_t r = 0; r < kLanes; r += kRows) {
        const uint16_t* q = query + r * depth;
        F32x16 sum[kKeys * kRows];
#pragma GCC unroll 16
        for (int i = 0; i < kKeys * kRows; ++i) sum[i] = zero_f32();
        for (int64_t d = 0; d < depth; d += 32) {
          // as many lines in all as the keys have
          if (d % (32 * kAhead) == 0) between();
          F32x16 x[kRows];
#pragma GCC unroll 4
          for (int i = 0; i < kRows; ++i) x[i] = load_bits<1>(q + i * depth, d);
#pragma GCC unroll 4
          for (int j = 0; j < kKeys; ++j) {
            const F32x16 y = load_bits<1>(at + j * keys.stride, d);
#pragma GCC unroll 4
            for (int i = 0; i < kRows; ++i) sum[j * kRows + i] = dot_bf16(sum[j * kRows + i], x[i], y);
          }
        }
        float each[kKeys * kRows];
        store(each, sum_each(sum));
        for (int64_t j = 0; j < kKeys; ++j)
          std::memcpy(out + (k + j) * kLanes + r, each + j * kRows, kRows * sizeof(float));
      }
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
const LatentKernels& latent_kernels_codes() {
  static const LatentKernels kernels = {
      64,
      kStretch,
      [](const LatentParams& p, int64_t rows) {
        const CodesLayout layout(p, rows);
        return LatentSizes{(layout.total + 3) / 4, rows * (layout.depth + 2)};
      },
      [](const LatentParams& p, const LatentJob& job, float* scratch) { LatentCodes(p, job, scratch).run(); },
      [](const LatentParams& p, const LatentJob& job, const float* from, int64_t begin, int64_t end) {
        LatentCodes(p, job, nullptr).merge(from, begin, end);
      },
      [](const LatentParams& p, const LatentJob& job, int64_t row, float* scratch) {
        LatentCodes(p, job, scratch).write_part(row);
      }};
  return kernels;
}
const LatentKernels& latent_kernels_bf16_dots() { return avx512::latent_pairs_kernels<DotProduct>(); }

}  // namespace llmopt
