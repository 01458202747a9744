// Run-time choice of the instruction set. Each op compiles its loops once per ISA and looks the function up here.
#pragma once
#include <string>

namespace llmopt {

// in order: each has everything the ones before it have, so an op without loops of its own for one uses those below
enum class Isa : int { kPortable = 0, kAvx2 = 1, kAvx512 = 2, kAmx = 3 };

// Best ISA this processor and operating system support. The first call asks Linux for the AMX tile registers, which a
// process may not touch without: from then on every thread of the process may.
Isa supported_isa();
// ISA in force: the best supported unless force_isa() chose another.
Isa active_isa();
// Forces an ISA ("portable", "avx2", "avx512", "amx") or, with "auto", returns to the best. Throws if unsupported.
void force_isa(const std::string& name);
const char* isa_name(Isa isa);

// Whether products of bfloat16 pairs (vdpbf16ps of AVX512_BF16) beat float32 ones: twice as fast on AMD's processors,
// slower than float32 on the Intel ones that have it, whose fast way is AMX. Go by the maker; tests may say otherwise.
bool fast_bf16_dots();
// "on", "off" or, with "auto", as the processor suggests. Throws where there is no such instruction.
void force_bf16_dots(const std::string& name);

}  // namespace llmopt
