// Instruction-set levels and the run-time choice between them.
//
// A *.simd.cpp file is compiled once per level inside `namespace pykern::PYKERN_SIMD`. A header
// declares each of its entry points for all levels with PYKERN_SIMD_FUNCTION(return, name, (args));
// the caller writes `name()(args...)` and gets the level in force.
#pragma once

namespace pykern {

enum class CpuLevel : int { portable, avx2, avx512, avx512_bf16, amx };

// The level in force: the fastest that the processor, the operating system and this build have,
// or lower where PYKERN_CPU_LEVEL or set_cpu_level asks for less.
CpuLevel cpu_level();
CpuLevel best_cpu_level();
const char* cpu_level_name(CpuLevel level);
// Whether this build has code for the level, and the number of levels there are.
bool cpu_level_built(CpuLevel level);
constexpr int kCpuLevels = 5;
// Returns false, and changes nothing, where this machine or build lacks the level.
bool set_cpu_level(CpuLevel level);

template <class Function>
Function select_level(Function portable, Function avx2, Function avx512, Function avx512_bf16, Function amx) {
  switch (cpu_level()) {
    case CpuLevel::amx: return amx;
    case CpuLevel::avx512_bf16: return avx512_bf16;
    case CpuLevel::avx512: return avx512;
    case CpuLevel::avx2: return avx2;
    default: return portable;
  }
}

}  // namespace pykern

// A level that this build leaves out is never in force, so its slot may hold any function.
#ifdef PYKERN_HAS_avx2
#define PYKERN_LEVEL_avx2(name) avx2::name
#else
#define PYKERN_LEVEL_avx2(name) portable::name
#endif
#ifdef PYKERN_HAS_avx512
#define PYKERN_LEVEL_avx512(name) avx512::name
#else
#define PYKERN_LEVEL_avx512(name) portable::name
#endif
#ifdef PYKERN_HAS_avx512_bf16
#define PYKERN_LEVEL_avx512_bf16(name) avx512_bf16::name
#else
#define PYKERN_LEVEL_avx512_bf16(name) portable::name
#endif
#ifdef PYKERN_HAS_amx
#define PYKERN_LEVEL_amx(name) amx::name
#else
#define PYKERN_LEVEL_amx(name) portable::name
#endif

#define PYKERN_SIMD_FUNCTION(result, name, arguments)                                          \
  namespace portable { result name arguments; }                                                \
  namespace avx2 { result name arguments; }                                                    \
  namespace avx512 { result name arguments; }                                                  \
  namespace avx512_bf16 { result name arguments; }                                             \
  namespace amx { result name arguments; }                                                     \
  using name##_function = result(*) arguments;                                                 \
  inline name##_function name() {                                                              \
    return select_level<name##_function>(portable::name, PYKERN_LEVEL_avx2(name),              \
                                         PYKERN_LEVEL_avx512(name),                            \
                                         PYKERN_LEVEL_avx512_bf16(name), PYKERN_LEVEL_amx(name)); \
  }
