#include "simd_avx512.h"

namespace llmopt::avx512 {
// rows and vectors of columns of one block of a product: 24 accumulators of the 32 registers
constexpr int kBlockRows = 6, kBlockVecs = 4;
}  // namespace llmopt::avx512

#include "attention_kernel.h"
#include "prefill_kernel.h"

namespace llmopt {
namespace {

// vdpbf16ps, eight rows of sums at a time
struct DotProduct {
  template <bool kAdd>
  void block(const uint16_t* a, int64_t lda, const uint16_t* b, int64_t panel, int64_t step, int64_t steps, float* c,
             int64_t ldc) const {
    for (int64_t r = 0; r < kBlock; r += 8) rows<kAdd>(a + r * lda, lda, b, panel, step, steps, c + r * ldc, ldc);
  }

 private:
  template <bool kAdd>
  static void rows(const uint16_t* a, int64_t lda, const uint16_t* b, int64_t panel, int64_t step, int64_t steps,
                   float* c, int64_t ldc) {
    using namespace avx512;
    F32x16 sum[8][2];
#pragma GCC unroll 8
    for (int r = 0; r < 8; ++r) {
      sum[r][0] = kAdd ? load(c + r * ldc) : zero_f32();
      sum[r][1] = kAdd ? load(c + r * ldc + 16) : zero_f32();
    }
    for (int64_t i = 0; i < steps; ++i, a += kBlock, b += step) {
      for (int64_t k = 0; k < 16; ++k) {
        const float* at = reinterpret_cast<const float*>(b) + 16 * k;
        const F32x16 x = load(at), y = load(at + panel / 2);
#pragma GCC unroll 8
        for (int r = 0; r < 8; ++r) {
          const F32x16 pair = load_pair(a + r * lda + 2 * k);
          sum[r][0] = dot_bf16(sum[r][0], pair, x);
          sum[r][1] = dot_bf16(sum[r][1], pair, y);
        }
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < 8; ++r) {
      store(c + r * ldc, sum[r][0]);
      store(c + r * ldc + 16, sum[r][1]);
    }
  }
};

}  // namespace

const AttentionKernels& attention_kernels_avx512(int dtype) { return avx512::kernels_for(dtype); }
const PrefillKernels& prefill_kernels_avx512() { return avx512::prefill_kernels_of<DotProduct>(); }

}  // namespace llmopt
