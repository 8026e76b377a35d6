#include "isa.h"

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace linattn {
namespace {

#define LINATTN_NAME(level) #level,
constexpr const char* kNames[] = {LINATTN_FOR_EACH_ISA(LINATTN_NAME)};
#undef LINATTN_NAME
constexpr int kLevels = sizeof(kNames) / sizeof(kNames[0]);

int find(const char* name) {
  for (int i = 0; i < kLevels; ++i)
    if (strcmp(kNames[i], name) == 0) return i;
  return -1;
}

// The best level that the processor and the operating system support.
int best_level() {
#if (defined(__x86_64__) || defined(_M_X64)) && !defined(LINATTN_ONLY_BASELINE)
  __builtin_cpu_init();
  if (!(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))) return 0;
  if (!(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq")))
    return 1;
  return __builtin_cpu_supports("avx512bf16") ? 3 : 2;
#else
  return 0;
#endif
}

int first_level() {
  int best = best_level();
  const char* wanted = getenv("LINATTN_CPU_ISA");
  if (!wanted || !*wanted) return best;
  int level = find(wanted);
  if (level < 0) fprintf(stderr, "linattn: LINATTN_CPU_ISA=%s is none of %s; ignored\n", wanted, linattn_cpu_isas());
  return level < 0 || level > best ? best : level;
}

std::atomic<int>& current_level() {
  static std::atomic<int> level{first_level()};
  return level;
}

}  // namespace

int isa_level() { return current_level().load(std::memory_order_relaxed); }

}  // namespace linattn

const char* linattn_cpu_isa() { return linattn::kNames[linattn::isa_level()]; }

const char* linattn_cpu_isas() {
#define LINATTN_NAME(level) "," #level
  static const char names[] = "" LINATTN_FOR_EACH_ISA(LINATTN_NAME);
#undef LINATTN_NAME
  return names + 1;
}

int linattn_cpu_set_isa(const char* name) {
  int level = linattn::find(name);
  if (level < 0 || level > linattn::best_level()) return 1;
  linattn::current_level().store(level, std::memory_order_relaxed);
  return 0;
}
