// Chooses the table of kernels by what processor and operating system can do.
#include <cstdlib>
#include <cstring>

#include "kernels.h"

#if defined(PALP_FAST_LEVELS) && defined(_MSC_VER)
#include <intrin.h>
#elif defined(PALP_FAST_LEVELS)
#include <cpuid.h>
#endif

namespace palp_fast::cpu {

namespace base {
extern const Kernels table;
}

#ifdef PALP_FAST_LEVELS  // x86-64, where the kernels are compiled three times
namespace v3 {
extern const Kernels table;
}
namespace v4 {
extern const Kernels table;
}
#endif

namespace {

#ifdef PALP_FAST_LEVELS

struct Registers {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
};

Registers cpuid(unsigned leaf) {
  Registers out;
#ifdef _MSC_VER
  int values[4];
  __cpuidex(values, int(leaf), 0);
  out = {unsigned(values[0]), unsigned(values[1]), unsigned(values[2]), unsigned(values[3])};
#else
  __cpuid_count(leaf, 0, out.eax, out.ebx, out.ecx, out.edx);
#endif
  return out;
}

// Which registers the operating system saves.
unsigned saved_registers() {
#ifdef _MSC_VER
  return unsigned(_xgetbv(0));
#else
  unsigned low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return low;
#endif
}

bool has(unsigned value, unsigned mask) { return (value & mask) == mask; }

// 1, 3 or 4: the x86-64 microarchitecture level.
int processor_level() {
  constexpr unsigned kOsXsave = 1u << 27;
  constexpr unsigned kFma = 1u << 12, kMovbe = 1u << 22, kPopcnt = 1u << 23, kAvx = 1u << 28, kF16c = 1u << 29;
  constexpr unsigned kBmi1 = 1u << 3, kAvx2 = 1u << 5, kBmi2 = 1u << 8, kLzcnt = 1u << 5;
  constexpr unsigned kAvx512 = 1u << 16 | 1u << 17 | 1u << 28 | 1u << 30 | 1u << 31;  // F, DQ, CD, BW, VL
  constexpr unsigned kYmm = 0x6, kZmm = 0xe6;
  if (cpuid(0).eax < 7 || cpuid(0x80000000u).eax < 0x80000001u) return 1;
  const unsigned first = cpuid(1).ecx, seventh = cpuid(7).ebx, extended = cpuid(0x80000001u).ecx;
  if (!has(first, kOsXsave | kFma | kMovbe | kPopcnt | kAvx | kF16c) || !has(seventh, kBmi1 | kAvx2 | kBmi2) ||
      !has(extended, kLzcnt) || !has(saved_registers(), kYmm)) {
    return 1;
  }
  return has(seventh, kAvx512) && has(saved_registers(), kZmm) ? 4 : 3;
}

const Kernels& choose() {
  int level = processor_level();
  if (const char* wanted = std::getenv("PALP_FAST_CPU_LEVEL")) {
    const int limit = !std::strcmp(wanted, "base") ? 1 : !std::strcmp(wanted, "v3") ? 3 : 4;
    level = limit < level ? limit : level;
  }
  return level == 4 ? v4::table : level == 3 ? v3::table : base::table;
}

#else

const Kernels& choose() { return base::table; }

#endif

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace palp_fast::cpu
