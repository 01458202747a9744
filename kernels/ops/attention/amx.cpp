#include "simd_avx512.h"
#include "tiles_amx.h"

#include "prefill_kernel.h"

namespace llmopt {
namespace {

// tiles 0 to 3: sums; 4 and 5: rows of a; 6 and 7: columns of b
class TileProduct {
 public:
  TileProduct() { _tile_loadconfig(&amx::kWholeTiles); }
  ~TileProduct() { _tile_release(); }
  TileProduct(const TileProduct&) = delete;
  TileProduct& operator=(const TileProduct&) = delete;

  template <bool kAdd>
  void block(const uint16_t* a, int64_t lda, const uint16_t* b, int64_t panel, int64_t step, int64_t steps, float* c,
             int64_t ldc) const {
    amx::written_for_tiles();
    if constexpr (kAdd) {
      amx::tile_load<0>(c, ldc * 4);
      amx::tile_load<1>(c + 16, ldc * 4);
      amx::tile_load<2>(c + 16 * ldc, ldc * 4);
      amx::tile_load<3>(c + 16 * ldc + 16, ldc * 4);
    } else {
      amx::tile_zero<0>();
      amx::tile_zero<1>();
      amx::tile_zero<2>();
      amx::tile_zero<3>();
    }
    for (int64_t i = 0; i < steps; ++i, a += kBlock, b += step) {
      amx::tile_load<6>(b, 64);
      amx::tile_load<4>(a, lda * 2);
      amx::tile_dot_bf16<0, 4, 6>();
      amx::tile_load<7>(b + panel, 64);
      amx::tile_dot_bf16<1, 4, 7>();
      amx::tile_load<5>(a + 16 * lda, lda * 2);
      amx::tile_dot_bf16<2, 5, 6>();
      amx::tile_dot_bf16<3, 5, 7>();
    }
    amx::tile_store<0>(c, ldc * 4);
    amx::tile_store<1>(c + 16, ldc * 4);
    amx::tile_store<2>(c + 16 * ldc, ldc * 4);
    amx::tile_store<3>(c + 16 * ldc + 16, ldc * 4);
  }
};

}  // namespace

const PrefillKernels& prefill_kernels_amx() { return avx512::prefill_kernels_of<TileProduct>(); }

}  // namespace llmopt
