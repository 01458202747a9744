// int4 times a few rows on an NVIDIA GPU in CUDA C++: weights in the order in which mma.m16n8k16 takes its operand.
// Not yet an op: benchmarks/cuda_gemm.py builds, checks and times it, docs/decisions/0011 says what for.
//
// y[n, m] = sum over k of x[n, k] * w[m, k]: weights are the operand A, sixteen of their rows a tile, and eight tokens
// are the columns of B. A lane's word holds its eight codes of a 16 x 16 tile, so a 16-byte load is 16 x 64 weights of a
// warp (the layout idea is MARLIN's, Frantar et al. 2024, arXiv 2408.11743). Which k a column of A is does not matter as
// long as B agrees: lane t of four has the sixteen inputs from 16 * t of every 64, for all four tiles.
#include <cooperative_groups.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace {

constexpr int kGroup = 128;  // inputs that share a scale: two loads

struct Fragment {
  __half2 a[4];
};

// Eight codes of a word as four pairs of code - 8. A code in the low bits of 0x6400 is the number 1024 + code, 4 bits higher
// it is 1024 + 16 * code (Kim et al. 2022, arXiv 2211.10017).
__device__ __forceinline__ Fragment unpack(uint32_t word) {
  uint32_t v[4];
  const uint32_t high = word >> 8;
  asm("lop3.b32 %0, %1, 0x000f000f, 0x64006400, 0xea;" : "=r"(v[0]) : "r"(word));
  asm("lop3.b32 %0, %1, 0x00f000f0, 0x64006400, 0xea;" : "=r"(v[1]) : "r"(word));
  asm("lop3.b32 %0, %1, 0x000f000f, 0x64006400, 0xea;" : "=r"(v[2]) : "r"(high));
  asm("lop3.b32 %0, %1, 0x00f000f0, 0x64006400, 0xea;" : "=r"(v[3]) : "r"(high));
  const __half2 low = __halves2half2(__ushort_as_half(0x6408), __ushort_as_half(0x6408));
  const __half2 sixteenth = __halves2half2(__ushort_as_half(0x2c00), __ushort_as_half(0x2c00));
  const __half2 off = __halves2half2(__ushort_as_half(0xd480), __ushort_as_half(0xd480));
  Fragment f;
  const __half2* p = reinterpret_cast<const __half2*>(v);
  f.a[0] = __hsub2(p[0], low);
  f.a[1] = __hfma2(p[1], sixteenth, off);
  f.a[2] = __hsub2(p[2], low);
  f.a[3] = __hfma2(p[3], sixteenth, off);
  return f;
}

__device__ __forceinline__ void mma(float (&c)[4], const Fragment& a, uint32_t b0, uint32_t b1) {
  const uint32_t* r = reinterpret_cast<const uint32_t*>(a.a);
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ uint4 load_once(const uint4* p) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p));
  return v;
}

__device__ __forceinline__ void add(float4& a, const float4& b) { a.x += b.x, a.y += b.y, a.z += b.z, a.w += b.w; }

__device__ __forceinline__ void wait_for_inputs() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
__device__ __forceinline__ void let_next_start() { asm volatile("griddepcontrol.launch_dependents;"); }

struct Shape {
  int m, k;
};

// A block's sums, [warp][tile][eight tokens][lane] in shared memory, added up over its warps, then over the cluster; into y.
template <int kTiles, int kCols, int kWarps, int kSplit>
__device__ __forceinline__ void add_up(const float (&sum)[kTiles][kCols][4], int row, __half* y, int m) {
  constexpr int kStep = kWarps * kSplit, kSums = kTiles * kCols * 32;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, part = blockIdx.x % kSplit;
  extern __shared__ float4 shared[];
#pragma unroll
  for (int i = 0; i < kTiles; ++i)
#pragma unroll
    for (int c = 0; c < kCols; ++c)
      shared[warp * kSums + (i * kCols + c) * 32 + lane] =
          make_float4(sum[i][c][0], sum[i][c][1], sum[i][c][2], sum[i][c][3]);
  __syncthreads();
  for (int j = threadIdx.x; j < kSums; j += 32 * kWarps)
    for (int v = 1; v < kWarps; ++v) add(shared[j], shared[v * kSums + j]);
  if (kSplit > 1) cooperative_groups::this_cluster().sync();
  for (int j = part * 32 * kWarps + threadIdx.x; j < kSums; j += 32 * kStep) {
    float4 all = make_float4(0, 0, 0, 0);
    for (int v = 0; v < kSplit; ++v)
      add(all, kSplit > 1 ? *cooperative_groups::this_cluster().map_shared_rank(shared + j, v) : shared[j]);
    const int tile = j / (kCols * 32), column = j / 32 % kCols, of = j % 32;
    __half* out = y + static_cast<int64_t>(8 * column + of % 4 * 2) * m + row + 16 * tile + of / 4;
    out[0] = __float2half(all.x), out[m] = __float2half(all.y);
    out[8] = __float2half(all.z), out[m + 8] = __float2half(all.w);
  }
  if (kSplit > 1) cooperative_groups::this_cluster().sync();  // others may still read what is here
}

// kTiles sixteens of weight rows and 8 * kCols tokens a block; inputs of a warp are one group of 128 in kWarps * kSplit,
// kAhead of them in flight. kSplit blocks, a cluster, share the inputs of the same rows. More rows a block mean fewer
// reads of x, which come from the L2: 4 * tokens / rows bytes for every byte of the weights.
// `w`: [M / 16][K / 64][32 lanes] uint4. `scale`: [K / 128][M] half. `x`: [K / 64][kCols][2][32 lanes] uint4, likewise.
// `y`: [8 * kCols][M] half.
template <int kTiles, int kCols, int kWarps, int kAhead, int kSplit>
__global__ void __launch_bounds__(32 * kWarps) gemm(const uint4* __restrict__ w, const __half* __restrict__ scale,
                                                    const uint4* __restrict__ x, __half* __restrict__ y, Shape shape) {
  constexpr int kStep = kWarps * kSplit;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4;
  const int rows = blockIdx.x / kSplit, part = blockIdx.x % kSplit;
  const int row = rows * 16 * kTiles, chunks = shape.k / 64, groups = shape.k / kGroup;
  const uint4* at = w + static_cast<int64_t>(rows) * kTiles * chunks * 32 + lane;
  uint4 word[kAhead][kTiles][2];
  __half2 s[kAhead][kTiles];
  const auto fetch = [&](int slot, int i, int group) {
#pragma unroll
    for (int h = 0; h < 2; ++h) word[slot][i][h] = load_once(at + (i * chunks + 2 * group + h) * 32);
    const __half* p = scale + static_cast<int64_t>(group) * shape.m + row + 16 * i + g;
    s[slot][i] = __halves2half2(p[0], p[8]);
  };
  let_next_start();
#pragma unroll
  for (int slot = 0; slot < kAhead; ++slot)
#pragma unroll
    for (int i = 0; i < kTiles; ++i)
      if (part * kWarps + warp + slot * kStep < groups) fetch(slot, i, part * kWarps + warp + slot * kStep);
  wait_for_inputs();
  float sum[kTiles][kCols][4] = {};
  for (int first = part * kWarps + warp; first < groups; first += kAhead * kStep) {
#pragma unroll
    for (int slot = 0; slot < kAhead; ++slot) {
      const int group = first + slot * kStep;
      if (group >= groups) break;
      uint32_t b[kCols][2][8];
#pragma unroll
      for (int c = 0; c < kCols; ++c)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const uint4* from = x + ((2 * group + h) * kCols + c) * 64 + lane;
          reinterpret_cast<uint4*>(b[c][h])[0] = from[0], reinterpret_cast<uint4*>(b[c][h])[1] = from[32];
        }
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
        float of_group[kCols][4] = {};
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const uint4 four = word[slot][i][h];
          const uint32_t words[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            const Fragment a = unpack(words[j]);
#pragma unroll
            for (int c = 0; c < kCols; ++c) mma(of_group[c], a, b[c][h][2 * j], b[c][h][2 * j + 1]);
          }
        }
        const float2 by = __half22float2(s[slot][i]);
        if (group + kAhead * kStep < groups) fetch(slot, i, group + kAhead * kStep);
#pragma unroll
        for (int c = 0; c < kCols; ++c) {
          sum[i][c][0] += by.x * of_group[c][0], sum[i][c][1] += by.x * of_group[c][1];
          sum[i][c][2] += by.y * of_group[c][2], sum[i][c][3] += by.y * of_group[c][3];
        }
      }
    }
  }
  add_up<kTiles, kCols, kWarps, kSplit>(sum, row, y, shape.m);
}

template <int kTiles, int kCols, int kWarps, int kAhead, int kSplit>
int launch(const void* w, const void* scale, const void* x, void* y, Shape shape, int dependent, cudaStream_t stream) {
  auto* kernel = gemm<kTiles, kCols, kWarps, kAhead, kSplit>;
  const size_t bytes = sizeof(float4) * kWarps * kTiles * kCols * 32;
  if (shape.m % (16 * kTiles) || shape.k % kGroup) return -1;
  if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)) != cudaSuccess)
    return -2;
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = dependent;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim = {kSplit, 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = kSplit * shape.m / (16 * kTiles), config.blockDim = 32 * kWarps;
  config.dynamicSmemBytes = bytes, config.stream = stream, config.attrs = attributes, config.numAttrs = 2;
  return static_cast<int>(cudaLaunchKernelEx(&config, kernel, static_cast<const uint4*>(w),
                                             static_cast<const __half*>(scale), static_cast<const uint4*>(x),
                                             static_cast<__half*>(y), shape));
}

}  // namespace

#define CASE(T, W, A, S)                                                                    \
  if (tiles == T && warps == W && ahead == A && split == S) {                               \
    if (cols == 1) return launch<T, 1, W, A, S>(w, scale, x, y, {m, k}, dependent, stream); \
    if (cols == 2) return launch<T, 2, W, A, S>(w, scale, x, y, {m, k}, dependent, stream); \
    if (cols == 4) return launch<T, 4, W, A, S>(w, scale, x, y, {m, k}, dependent, stream); \
  }

// 0, or a CUDA error, or below 0: not a case
extern "C" int int4_gemm(int tiles, int cols, int warps, int ahead, int split, const void* w, const void* scale,
                         const void* x, void* y, int m, int k, int dependent, cudaStream_t stream) {
  CASE(1, 4, 2, 1)
  CASE(1, 8, 1, 1)
  CASE(1, 8, 2, 1)
  CASE(1, 8, 4, 1)
  CASE(1, 16, 1, 1)
  CASE(1, 16, 2, 1)
  CASE(2, 4, 1, 1)
  CASE(2, 4, 2, 1)
  CASE(2, 4, 4, 1)
  CASE(2, 8, 1, 1)
  CASE(2, 8, 2, 1)
  CASE(2, 16, 1, 1)
  CASE(2, 16, 2, 1)
  CASE(2, 8, 1, 2)
  CASE(2, 8, 2, 2)
  CASE(4, 4, 1, 1)
  CASE(4, 4, 2, 1)
  CASE(4, 8, 1, 1)
  CASE(4, 16, 1, 1)
  CASE(4, 4, 2, 2)
  CASE(4, 8, 1, 2)
  CASE(8, 4, 1, 1)
  CASE(8, 8, 1, 1)
  CASE(8, 4, 1, 2)
  return -3;
}
