// next_token: greedy choice. advance: one step further in every sequence.
#include "next_token.h"

#include <cmath>
#include <memory>
#include <vector>

#include "cache_rows.h"

namespace llmopt {
namespace {

struct Best {
  float value;
  int64_t index;
};

void next_token(TensorView logits, TensorView ids) {
  check_cpu("ids", ids), check_i64("ids", ids), check_shape("ids", ids, {-1});
  const int64_t rows = ids.size(0);
  const float* x = check_floats("logits", logits, {rows, -1});
  const int64_t vocab = logits.size(1);
  if (vocab == 0) TVM_FFI_THROW(ValueError) << "logits: expected at least one column";
  const int64_t stride = logits.stride(0);
  auto* out = static_cast<int64_t*>(ids.data_ptr());
  auto found = std::make_shared<std::vector<Best>>();
  const int most = omp_get_max_threads();
  found->resize(static_cast<size_t>(rows * most));
  run_or_record(
      "next_token",
      [=](const Team& team) {
        const Share mine = team.share(vocab);
        for (int64_t r = 0; r < rows; ++r) {
          Best& best = (*found)[r * most + team.rank];
          best.index =
              mine.begin +
              next_token_kernels(active_isa()).argmax(x + r * stride + mine.begin, mine.end - mine.begin, &best.value);
        }
        team.sync();
        if (team.rank != 0) return;
        for (int64_t r = 0; r < rows; ++r) {
          const Best* parts = found->data() + r * most;
          int winner = 0;
          // shares follow each other: the first NaN, or else the first of the largest
          for (int i = 1; i < team.size && !std::isnan(parts[winner].value); ++i)
            winner = std::isnan(parts[i].value) || parts[i].value > parts[winner].value ? i : winner;
          out[r] = parts[winner].index;
        }
      },
      threads_for(rows * vocab, 65536));
}

void advance(TensorView position, TensorView slot) {
  check_shape("position", position, {-1});
  const int64_t rows = position.size(0);
  auto* p = const_cast<int32_t*>(check_i32("position", position, rows));
  auto* s = const_cast<int32_t*>(check_i32("slot", slot, rows));
  run_or_record(
      "advance",
      [=](const Team& team) {
        for (int64_t i = 0; team.rank == 0 && i < rows; ++i) ++p[i], ++s[i];
      },
      1);
}

}  // namespace
}  // namespace llmopt

TVM_FFI_DLL_EXPORT_TYPED_FUNC(next_token, llmopt::next_token);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(advance, llmopt::advance);
