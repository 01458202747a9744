#include "simd_avx512.h"

namespace llmopt::avx512 {
// rows and vectors of columns of one block of a product: 24 accumulators of the 32 registers
constexpr int kBlockRows = 6, kBlockVecs = 4;
}  // namespace llmopt::avx512

#include "attention_kernel.h"
#include "decode_dots.h"
#include "prefill_kernel.h"

namespace llmopt {
namespace {

// vdpbf16ps, eight rows of sums at a time
struct DotProduct {
  template <bool kAdd>
  void block(const uint16_t* a, int64_t lda, const uint16_t* b, int64_t panel, int64_t step, int64_t steps, float* c,
             int64_t ldc) const {
    for (int64_t r = 0; r < kBlock; r += 8)
      avx512::dot_rows_bf16<kAdd>({a + r * lda, lda, kBlock}, {b, panel, step}, steps, c + r * ldc, ldc);
  }
};

}  // namespace

const AttentionKernels& attention_kernels_avx512(int dtype) {
  constexpr int kBf16 = 1;
  return dtype == kBf16 && fast_bf16_dots() ? avx512::kernels_of<kBf16, avx512::PairDots>()
                                            : avx512::kernels_for(dtype);
}
const PrefillKernels& prefill_kernels_avx512() { return avx512::prefill_kernels_of<DotProduct>(); }

}  // namespace llmopt
