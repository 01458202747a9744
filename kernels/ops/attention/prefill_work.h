// The work of many queries in bfloat16 for a team of threads: KV heads as units, whose keys and values are packed once and
// then shared by all their row tiles. What ops know is the list of units; they may differ in every size but the heads'.
#pragma once
#include <algorithm>
#include <atomic>
#include <vector>

#include "prefill.h"
#include "scratch.h"
#include "team.h"

namespace llmopt {

class PrefillWork {
 public:
  void clear() {
    params_.clear(), units_.clear(), batches_.clear();
    rows_ = 0;
  }
  bool empty() const { return units_.empty(); }

  // all KV heads of all of p's batch; what it points to has to stay until run() is over
  void add(const AttentionParams& p) {
    const int64_t blocks = (p.tk + kBlock - 1) / kBlock, index = static_cast<int64_t>(params_.size());
    params_.push_back(p);
    for (int64_t b = 0; b < p.batch; ++b)
      for (int64_t head = 0; head < p.kv_heads; ++head) units_.push_back({index, b, head, blocks, 0});
    rows_ += p.batch * p.kv_heads * p.rows();
  }

  // After the last add(): cuts rows into tiles, and units into batches whose packed keys are held at a time. No row's
  // numbers depend on either. The packed keys lie in memory of the thread that calls this, kept from call to call.
  void cut() {
    static thread_local Scratch memory;
    if (units_.empty()) return;
    const PrefillLayout layout(params_[0], 0);
    packed_ = layout.packed;
    tile_rows_ = std::min(round_up((rows_ + kWantedTiles - 1) / kWantedTiles, kBlock), kMostTileRows);
    scratch_ = PrefillLayout(params_[0], tile_rows_).total;
    const int64_t most = std::max<int64_t>(1, kPackedBytes / (packed_ * 2));
    int64_t largest = 0;
    for (int64_t i = 0; i < static_cast<int64_t>(units_.size()); ++i) {
      Unit& unit = units_[i];
      if (batches_.empty() || batches_.back().blocks + unit.blocks > most) batches_.push_back({i, i, 0, 0});
      Batch& batch = batches_.back();
      unit.first_block = batch.blocks;
      batch.end = i + 1;
      batch.blocks += unit.blocks;
      batch.tiles += tiles(unit);
      largest = std::max(largest, batch.blocks);
    }
    memory_ = reinterpret_cast<uint16_t*>(memory.get(static_cast<size_t>(largest * packed_) * 2));
    next_ = 0;
  }

  // One thread's part. The team has met since cut(); when the call returns on all threads everything is done.
  void run(const PrefillKernels& kernels, const Team& team) {
    static thread_local Scratch thread_scratch;
    float* scratch = reinterpret_cast<float*>(thread_scratch.get(static_cast<size_t>(scratch_) * sizeof(float)));
    for (const Batch& batch : batches_) {
      pack(kernels, batch, team);
      if (team.rank == 0) next_ = 0;
      team.sync();
      int64_t unit = batch.begin, before = 0;
      for (int64_t i; (i = next_.fetch_add(1)) < batch.tiles;) {
        while (i >= before + tiles(units_[unit])) before += tiles(units_[unit++]);
        attend(kernels, units_[unit], i - before, scratch);
      }
      team.sync();
    }
  }

 private:
  // row tiles to cut the work into: several for each of some ten threads, so that they end together
  static constexpr int64_t kWantedTiles = 32;
  // most rows of a tile: queries and accumulators must stay in L2 beside a stretch of keys
  static constexpr int64_t kMostTileRows = 256;
  // bytes of packed keys and values to have at a time: a few KV heads of some thousand keys
  static constexpr int64_t kPackedBytes = 16 << 20;

  struct Unit {
    int64_t params, b, kv_head, blocks;
    int64_t first_block;  // of the batch's packed memory
  };
  struct Batch {
    int64_t begin, end, blocks, tiles;
  };

  const AttentionParams& of(const Unit& unit) const { return params_[unit.params]; }
  int64_t tiles(const Unit& unit) const { return (of(unit).rows() + tile_rows_ - 1) / tile_rows_; }
  uint16_t* packed(int64_t block) const { return memory_ + block * packed_; }

  void pack(const PrefillKernels& kernels, const Batch& batch, const Team& team) {
    const Share mine = team.share(batch.blocks);
    for (int64_t i = batch.begin; i < batch.end; ++i) {
      const Unit& unit = units_[i];
      const AttentionParams& p = of(unit);
      const AttentionJob job{unit.b, unit.kv_head, 0, p.rows(), 0, p.tk, nullptr};
      const int64_t begin = std::max(mine.begin - unit.first_block, int64_t{0});
      const int64_t end = std::min(mine.end - unit.first_block, unit.blocks);
      for (int64_t block = begin; block < end; ++block)
        kernels.pack(p, job, block * kBlock, packed(unit.first_block + block));
    }
  }

  // later rows first, since a causal mask gives them the most keys
  void attend(const PrefillKernels& kernels, const Unit& unit, int64_t index, float* scratch) {
    const AttentionParams& p = of(unit);
    const int64_t row = (tiles(unit) - 1 - index) * tile_rows_;
    const AttentionJob job{unit.b, unit.kv_head, row, std::min(row + tile_rows_, p.rows()), 0, p.tk, nullptr};
    kernels.attend(p, job, packed(unit.first_block), scratch);
  }

  std::vector<AttentionParams> params_;
  std::vector<Unit> units_;
  std::vector<Batch> batches_;
  int64_t rows_ = 0, packed_ = 0, tile_rows_ = 0, scratch_ = 0;
  uint16_t* memory_ = nullptr;
  std::atomic<int64_t> next_{0};
};

}  // namespace llmopt
