// Measures the machine's ceilings on the threads the kernels use (see ceilings.h). Exported:
//   ceiling_threads() -> int                      threads of a parallel region here
//   ceiling_touch(buffer uint8[n])                fills the buffer from the threads that will read it
//   ceiling_read(buffer uint8[n], ms) -> GB/s     reads all of it at least once, then again until `ms` have passed
//   ceiling_compute(kind, ms) -> 10^12 op/s       "int8" | "bf16" | "fp32"; 0 where there is no such instruction
#include "ceilings.h"

#include <chrono>
#include <cstring>
#include <string>

#include "huge_pages.h"
#include "isa.h"
#include "tensor_check.h"
#include "threads.h"

namespace llmopt {
namespace {

constexpr int64_t kPage = 4096;
constexpr int64_t kReadChunk = 2048 * kPage;

double seconds() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

CeilingLoops loops_of(Isa isa) {
#if defined(LLMOPT_X86)
  if (isa == Isa::kAmx) return amx_ceilings();
  if (isa == Isa::kAvx512) return avx512_ceilings();
  if (isa == Isa::kAvx2) return avx2_ceilings();
#endif
  (void)isa;
  return portable_ceilings();
}

// the part of the buffer that is read: whole pages
struct Pages {
  uint8_t* data;
  int64_t count;
};

Pages pages_of(const TensorView& buffer) {
  check_cpu("buffer", buffer);
  check_bytes("buffer", buffer);
  check_shape("buffer", buffer, {-1});
  const uintptr_t begin = reinterpret_cast<uintptr_t>(buffer.data_ptr());
  const uintptr_t first = (begin + kPage - 1) / kPage * kPage;
  const int64_t count = (static_cast<int64_t>(begin) + buffer.numel() - static_cast<int64_t>(first)) / kPage;
  if (count < omp_get_max_threads()) {
    TVM_FFI_THROW(ValueError) << "buffer: expected at least a page a thread, got " << buffer.numel() << " bytes";
  }
  return {reinterpret_cast<uint8_t*>(first), count};
}

void touch(const TensorView& buffer) {
  const Pages pages = pages_of(buffer);
  // without huge pages the page walks, not the memory, would be measured
  advise_huge_pages(pages.data, static_cast<size_t>(pages.count * kPage));
#pragma omp parallel
  {
    const Share share = share_of(pages.count, omp_get_thread_num(), omp_get_num_threads());
    std::memset(pages.data + share.begin * kPage, 1, static_cast<size_t>((share.end - share.begin) * kPage));
  }
}

double read(const TensorView& buffer, double ms) {
  const Pages pages = pages_of(buffer);
  // memory is the same whichever instruction set the kernels were told to use
  const auto loop = loops_of(supported_isa()).read;
  int64_t total = 0;
  uint64_t checksum = 0;
  double begin = 0.0;
#pragma omp parallel reduction(+ : total, checksum)
  {
    const Share share = share_of(pages.count, omp_get_thread_num(), omp_get_num_threads());
    const int64_t length = (share.end - share.begin) * kPage;
    // where a virtual machine's host has taken back what lay idle, the first pass waits for pages
    checksum += loop(pages.data + share.begin * kPage, length);
#pragma omp barrier
#pragma omp single
    begin = seconds();  // waking the threads is not part of the rate
    const double deadline = begin + ms / 1e3;
    int64_t at = 0;
    while (total < length || seconds() < deadline) {
      const int64_t chunk = length - at < kReadChunk ? length - at : kReadChunk;
      checksum += loop(pages.data + share.begin * kPage + at, chunk);
      total += chunk;
      at = at + chunk == length ? 0 : at + chunk;
    }
  }
  const double elapsed = seconds() - begin;
  __asm__ volatile("" : : "r"(checksum));
  return static_cast<double>(total) / elapsed / 1e9;
}

int64_t threads() { return omp_get_max_threads(); }

double compute(const tvm::ffi::String& name, double ms) {
  const std::string kind(name);
  const CeilingLoops loops = loops_of(active_isa());
  double (*loop)(int64_t) = nullptr;
  if (kind == "int8") {
    loop = loops.dot_int8;
  } else if (kind == "bf16") {
    loop = loops.dot_bf16;
  } else if (kind == "fp32") {
    loop = loops.fma_fp32;
  } else {
    TVM_FFI_THROW(ValueError) << "kind: expected int8 | bf16 | fp32, got '" << kind << "'";
  }
  if (loop == nullptr) return 0.0;
  double total = 0.0;
  double begin = 0.0;
#pragma omp parallel reduction(+ : total)
  {
#pragma omp barrier
#pragma omp single
    begin = seconds();  // waking the threads is not part of the rate
    const double deadline = begin + ms / 1e3;
    do {
      total += loop(1000);
    } while (seconds() < deadline);
  }
  return total / (seconds() - begin) / 1e12;
}

}  // namespace
}  // namespace llmopt

TVM_FFI_DLL_EXPORT_TYPED_FUNC(ceiling_threads, llmopt::threads);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(ceiling_touch, llmopt::touch);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(ceiling_read, llmopt::read);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(ceiling_compute, llmopt::compute);
