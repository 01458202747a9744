#include "isa.h"

#include <tvm/ffi/tvm_ffi.h>

#include <atomic>

#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace llmopt {
namespace {

#if defined(__x86_64__)
// gcc's builtin also checks that the operating system saves the wide registers
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}

bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vnni");
}

bool has_bf16_dots() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }

bool has_amx() {
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return has_bf16_dots() && __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-int8") &&
         __builtin_cpu_supports("amx-bf16") && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#else
bool has_bf16_dots() { return false; }
#endif

Isa find_isa() {
#if defined(__x86_64__)
  if (has_avx512()) return has_amx() ? Isa::kAmx : Isa::kAvx512;
  if (has_avx2()) return Isa::kAvx2;
#endif
  return Isa::kPortable;
}

std::atomic<int>& current() {
  static std::atomic<int> value{static_cast<int>(supported_isa())};
  return value;
}

bool prefers_bf16_dots() {
#if defined(__x86_64__)
  return has_bf16_dots() && __builtin_cpu_is("amd");
#else
  return false;
#endif
}

std::atomic<bool>& bf16_dots() {
  static std::atomic<bool> value{prefers_bf16_dots()};
  return value;
}

}  // namespace

Isa supported_isa() {
  static const Isa best = find_isa();
  return best;
}

Isa active_isa() { return static_cast<Isa>(current().load(std::memory_order_relaxed)); }

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::kAmx: return "amx";
    case Isa::kAvx512: return "avx512";
    case Isa::kAvx2: return "avx2";
    default: return "portable";
  }
}

void force_isa(const std::string& name) {
  const Isa best = supported_isa();
  Isa wanted = best;
  if (name == "portable") {
    wanted = Isa::kPortable;
  } else if (name == "avx2") {
    wanted = Isa::kAvx2;
  } else if (name == "avx512") {
    wanted = Isa::kAvx512;
  } else if (name == "amx") {
    wanted = Isa::kAmx;
  } else if (name != "auto") {
    TVM_FFI_THROW(ValueError) << "isa: expected auto | portable | avx2 | avx512 | amx, got '" << name << "'";
  }
  if (static_cast<int>(wanted) > static_cast<int>(best)) {
    TVM_FFI_THROW(ValueError) << "isa: this processor supports up to " << isa_name(best) << ", got '" << name << "'";
  }
  current().store(static_cast<int>(wanted), std::memory_order_relaxed);
}

bool fast_bf16_dots() { return bf16_dots().load(std::memory_order_relaxed); }

void force_bf16_dots(const std::string& name) {
  if (name != "on" && name != "off" && name != "auto")
    TVM_FFI_THROW(ValueError) << "bf16_dots: expected auto | on | off, got '" << name << "'";
  if (name == "on" && !has_bf16_dots())
    TVM_FFI_THROW(ValueError) << "bf16_dots: this processor has no AVX512_BF16, got 'on'";
  bf16_dots().store(name == "auto" ? prefers_bf16_dots() : name == "on", std::memory_order_relaxed);
}

}  // namespace llmopt

namespace {
void force_isa_export(const tvm::ffi::String& name) { llmopt::force_isa(std::string(name)); }
tvm::ffi::String active_isa_export() { return llmopt::isa_name(llmopt::active_isa()); }
tvm::ffi::String supported_isa_export() { return llmopt::isa_name(llmopt::supported_isa()); }
void force_bf16_dots_export(const tvm::ffi::String& name) { llmopt::force_bf16_dots(std::string(name)); }
bool fast_bf16_dots_export() { return llmopt::fast_bf16_dots(); }
}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(force_isa, force_isa_export);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(active_isa, active_isa_export);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(supported_isa, supported_isa_export);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(force_bf16_dots, force_bf16_dots_export);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(fast_bf16_dots, fast_bf16_dots_export);
