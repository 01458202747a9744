#include "isa.h"

#include <tvm/ffi/tvm_ffi.h>

#include <atomic>

namespace llmopt {

Isa detect_isa() {
#if defined(__x86_64__)
  // gcc's builtin also checks that the operating system saves the wide registers
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni")) {
    return Isa::kAvx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
    return Isa::kAvx2;
  }
#endif
  return Isa::kPortable;
}

namespace {
std::atomic<int>& current() {
  static std::atomic<int> value{static_cast<int>(detect_isa())};
  return value;
}
}  // namespace

Isa active_isa() { return static_cast<Isa>(current().load(std::memory_order_relaxed)); }

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::kAvx512: return "avx512";
    case Isa::kAvx2: return "avx2";
    default: return "portable";
  }
}

void force_isa(const std::string& name) {
  const Isa best = detect_isa();
  Isa wanted = best;
  if (name == "portable") {
    wanted = Isa::kPortable;
  } else if (name == "avx2") {
    wanted = Isa::kAvx2;
  } else if (name == "avx512") {
    wanted = Isa::kAvx512;
  } else if (name != "auto") {
    TVM_FFI_THROW(ValueError) << "isa: expected auto | portable | avx2 | avx512, got '" << name << "'";
  }
  if (static_cast<int>(wanted) > static_cast<int>(best)) {
    TVM_FFI_THROW(ValueError) << "isa: this processor supports up to " << isa_name(best) << ", got '" << name << "'";
  }
  current().store(static_cast<int>(wanted), std::memory_order_relaxed);
}

}  // namespace llmopt

namespace {
void force_isa_export(const tvm::ffi::String& name) { llmopt::force_isa(std::string(name)); }
tvm::ffi::String active_isa_export() { return llmopt::isa_name(llmopt::active_isa()); }
tvm::ffi::String detected_isa_export() { return llmopt::isa_name(llmopt::detect_isa()); }
}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(force_isa, force_isa_export);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(active_isa, active_isa_export);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(detected_isa, detected_isa_export);
