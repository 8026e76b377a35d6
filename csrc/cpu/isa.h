// Which instruction sets are compiled in, and which one this process uses.
//
// A kernel file is compiled once per level into the namespace linattn::<level>. The best level of the machine is found
// at the first call; the environment variable LINATTN_CPU_ISA=<level> can lower it.
#pragma once

#if (defined(__x86_64__) || defined(_M_X64)) && !defined(LINATTN_ONLY_BASELINE)
#define LINATTN_FOR_EACH_ISA(X) X(baseline) X(avx2) X(avx512) X(avx512_bf16)
#else
#define LINATTN_FOR_EACH_ISA(X) X(baseline)
#endif

namespace linattn {

// Index into the list above, chosen once per process (or by linattn_cpu_set_isa).
int isa_level();

}  // namespace linattn

#if defined(_WIN32)
#define LINATTN_EXPORT extern "C" __declspec(dllexport)
#else
#define LINATTN_EXPORT extern "C" __attribute__((visibility("default")))
#endif

LINATTN_EXPORT const char* linattn_cpu_isa();              // the level in use
LINATTN_EXPORT const char* linattn_cpu_isas();             // every level compiled in, comma-separated
LINATTN_EXPORT int linattn_cpu_set_isa(const char* name);  // for tests: 0, or 1 if this machine cannot run it
