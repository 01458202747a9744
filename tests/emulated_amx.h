// AMX in software, for testing the AMX kernels on a processor without it. Not part of any build: compile the library with
//   cmake -S . -B build-amx -DCMAKE_CXX_FLAGS="-include $PWD/tests/emulated_amx.h" && cmake --build build-amx
// and run the tests with LLMOPT_LIBRARY=build-amx/kernels/libllmopt_kernels.so. A tile that is touched before a
// configuration is loaded, or is not of the shape its instruction wants, ends the process.
#pragma once
#if defined(__x86_64__) && defined(__cplusplus)
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace emulated_amx {

struct State {
  uint8_t palette;
  uint16_t row_bytes[8];
  uint8_t rows[8];
  alignas(64) uint8_t data[8][16][64];
};

inline State& state() {
  static thread_local State s{};
  return s;
}

inline void expect(bool good, const char* what) {
  if (good) return;
  std::fprintf(stderr, "emulated AMX: %s\n", what);
  std::abort();
}

inline void load_config(const void* memory) {
  const uint8_t* config = static_cast<const uint8_t*>(memory);
  State& s = state();
  std::memset(&s, 0, sizeof(s));
  s.palette = config[0];
  expect(s.palette == 1, "palette");
  std::memcpy(s.row_bytes, config + 16, sizeof(s.row_bytes));
  std::memcpy(s.rows, config + 48, sizeof(s.rows));
  for (int t = 0; t < 8; ++t) expect(s.row_bytes[t] <= 64 && s.rows[t] <= 16, "tile shape");
}

inline void store_config(void* memory) {
  uint8_t* config = static_cast<uint8_t*>(memory);
  std::memset(config, 0, 64);
  config[0] = state().palette;
  std::memcpy(config + 16, state().row_bytes, sizeof(state().row_bytes));
  std::memcpy(config + 48, state().rows, sizeof(state().rows));
}

inline void release() { std::memset(&state(), 0, sizeof(State)); }

template <class... Arguments>
long permit(Arguments...) {
  return 0;
}

inline State& configured(int tile) {
  State& s = state();
  expect(s.palette == 1 && s.rows[tile] > 0 && s.row_bytes[tile] > 0, "tile used without a configuration");
  return s;
}

inline void zero(int tile) { std::memset(configured(tile).data[tile], 0, 1024); }

inline void load(int tile, const void* base, int64_t stride) {
  State& s = configured(tile);
  std::memset(s.data[tile], 0, 1024);
  for (int r = 0; r < s.rows[tile]; ++r)
    std::memcpy(s.data[tile][r], static_cast<const char*>(base) + r * stride, s.row_bytes[tile]);
}

inline void store(int tile, void* base, int64_t stride) {
  const State& s = configured(tile);
  for (int r = 0; r < s.rows[tile]; ++r)
    std::memcpy(static_cast<char*>(base) + r * stride, s.data[tile][r], s.row_bytes[tile]);
}

// sum(lane, x, y) adds what four bytes of a row of a and a column of b give to one lane
template <class Lane, class Sum>
inline void dot(int c, int a, int b, Sum sum) {
  State& s = configured(c);
  configured(a), configured(b);
  expect(s.rows[a] == s.rows[c] && s.row_bytes[b] == s.row_bytes[c] && s.row_bytes[a] == 4 * s.rows[b], "shapes");
  for (int m = 0; m < s.rows[c]; ++m) {
    for (int n = 0; n < s.row_bytes[c] / 4; ++n) {
      Lane lane;
      std::memcpy(&lane, s.data[c][m] + 4 * n, 4);
      for (int k = 0; k < s.rows[b]; ++k) lane = sum(lane, s.data[a][m] + 4 * k, s.data[b][k] + 4 * n);
      std::memcpy(s.data[c][m] + 4 * n, &lane, 4);
    }
  }
}

inline void dot_signed_bytes(int c, int a, int b) {
  dot<int32_t>(c, a, b, [](int32_t lane, const uint8_t* x, const uint8_t* y) {
    uint32_t total = static_cast<uint32_t>(lane);  // wraps, as the instruction does
    for (int i = 0; i < 4; ++i)
      total += static_cast<uint32_t>(static_cast<int8_t>(x[i]) * static_cast<int8_t>(y[i]));
    return static_cast<int32_t>(total);
  });
}

inline float bf16(const uint8_t* p) {
  uint16_t half;
  std::memcpy(&half, p, 2);
  const bool denormal = (half & 0x7f80) == 0;  // counts as zero
  const uint32_t bits = static_cast<uint32_t>(denormal ? half & 0x8000 : half) << 16;
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

inline void dot_bf16(int c, int a, int b) {
  dot<float>(c, a, b, [](float lane, const uint8_t* x, const uint8_t* y) {
    return lane + bf16(x) * bf16(y) + bf16(x + 2) * bf16(y + 2);
  });
}

}  // namespace emulated_amx

// in place of the instructions of kernels/cpu/tiles_amx.h
#define LLMOPT_EMULATED_AMX
namespace llmopt::amx {

template <int kTile>
inline void tile_zero() {
  emulated_amx::zero(kTile);
}
template <int kTile>
inline void tile_load(const void* p, int64_t stride) {
  emulated_amx::load(kTile, p, stride);
}
template <int kTile>
inline void tile_store(void* p, int64_t stride) {
  emulated_amx::store(kTile, p, stride);
}
template <int kC, int kA, int kB>
inline void tile_dot_s8() {
  emulated_amx::dot_signed_bytes(kC, kA, kB);
}
template <int kC, int kA, int kB>
inline void tile_dot_bf16() {
  emulated_amx::dot_bf16(kC, kA, kB);
}

}  // namespace llmopt::amx

#define _tile_loadconfig(p) emulated_amx::load_config(p)
#define _tile_storeconfig(p) emulated_amx::store_config(p)
#define _tile_release() emulated_amx::release()

// detection: the tiles are there, and Linux permits them
#define __builtin_cpu_supports(name) (std::strncmp(name, "amx-", 4) == 0 || __builtin_cpu_supports(name))
#define syscall(...) emulated_amx::permit(__VA_ARGS__)
#endif
