#include "common/cpu_level.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>

#include "common/tile_check.h"

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace pykern {
namespace {

constexpr const char* kNames[kCpuLevels] = {"portable", "avx2", "avx512", "avx512_bf16", "amx"};

#if defined(__x86_64__)

unsigned long long enabled_state() {
  unsigned low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<unsigned long long>(high) << 32) | low;
}

// Linux hands a process its tile registers only on request.
bool tile_permission() {
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023;
  constexpr long kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

CpuLevel processor_level() {
  unsigned a, b, c, d, a7, b7, c7, d7;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return CpuLevel::portable;
  if (!__get_cpuid_count(7, 0, &a7, &b7, &c7, &d7)) return CpuLevel::portable;
  unsigned a71 = 0, ignored;
  if (a7 >= 1) __cpuid_count(7, 1, a71, ignored, ignored, ignored);
  const bool saves_state = c & (1u << 27);
  const unsigned long long state = saves_state ? enabled_state() : 0;
  const bool ymm = (state & 0x6) == 0x6;
  const bool zmm = (state & 0xe6) == 0xe6;
  const bool tiles = (state & 0x60000) == 0x60000;
  const bool fma_f16c = (c & (1u << 12)) && (c & (1u << 29));
  const bool avx2 = ymm && fma_f16c && (b7 & (1u << 5));
  if (!avx2) return CpuLevel::portable;
  if (!(zmm && (b7 & (1u << 16)) && (b7 & (1u << 17)) && (b7 & (1u << 30)) && (b7 & (1u << 31)))) return CpuLevel::avx2;
  if (!(a71 & (1u << 5))) return CpuLevel::avx512;
  if (!(tiles && (d7 & (1u << 22)) && (d7 & (1u << 24)) && tile_permission())) return CpuLevel::avx512_bf16;
  return CpuLevel::amx;
}

#else

CpuLevel processor_level() { return CpuLevel::portable; }

#endif

// The fastest level of this processor that may be used. Asked once: in a virtual machine every
// question to the processor costs tens of microseconds.
CpuLevel usable_level() {
  static const CpuLevel level = [] {
    const CpuLevel found = processor_level();
#ifdef PYKERN_HAS_amx
    if (found == CpuLevel::amx && !amx::tiles_work()) return CpuLevel::avx512_bf16;
#endif
    return found;
  }();
  return level;
}

CpuLevel highest_up_to(CpuLevel limit) {
  for (int level = std::min(static_cast<int>(limit), static_cast<int>(usable_level())); level > 0; --level) {
    if (cpu_level_built(static_cast<CpuLevel>(level))) return static_cast<CpuLevel>(level);
  }
  return CpuLevel::portable;
}

CpuLevel initial_level() {
  CpuLevel limit = CpuLevel::amx;
  if (const char* wanted = std::getenv("PYKERN_CPU_LEVEL")) {
    for (int level = 0; level < kCpuLevels; ++level) {
      if (std::strcmp(wanted, kNames[level]) == 0) limit = static_cast<CpuLevel>(level);
    }
  }
  return highest_up_to(limit);
}

std::atomic<int>& current() {
  static std::atomic<int> level{static_cast<int>(initial_level())};
  return level;
}

}  // namespace

bool cpu_level_built(CpuLevel level) {
  switch (level) {
    case CpuLevel::portable: return true;
#ifdef PYKERN_HAS_avx2
    case CpuLevel::avx2: return true;
#endif
#ifdef PYKERN_HAS_avx512
    case CpuLevel::avx512: return true;
#endif
#ifdef PYKERN_HAS_avx512_bf16
    case CpuLevel::avx512_bf16: return true;
#endif
#ifdef PYKERN_HAS_amx
    case CpuLevel::amx: return true;
#endif
    default: return false;
  }
}

CpuLevel cpu_level() { return static_cast<CpuLevel>(current().load(std::memory_order_relaxed)); }

CpuLevel best_cpu_level() { return highest_up_to(CpuLevel::amx); }

const char* cpu_level_name(CpuLevel level) { return kNames[static_cast<int>(level)]; }

bool set_cpu_level(CpuLevel level) {
  if (highest_up_to(level) != level) return false;
  current().store(static_cast<int>(level), std::memory_order_relaxed);
  return true;
}

}  // namespace pykern
