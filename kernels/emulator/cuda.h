// CUDA's language and built-in functions for the host compiler: what kernels/common/device.h lists.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "kernels/emulator/machine.h"
#include "kernels/emulator/numeric.h"

#define __global__
#define __device__
#define __host__
#define __constant__ static const
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __restrict__
#define __grid_constant__
#define __align__(bytes) alignas(bytes)

using dim3 = pykern::emulator::Dim3;

#define threadIdx (::pykern::emulator::thread_index())
#define blockIdx (::pykern::emulator::block_index())
#define blockDim (::pykern::emulator::block_size())
#define gridDim (::pykern::emulator::grid_size())

#define PYKERN_SHARED(type, name)                                                                            \
  static const char name##_site = 0;                                                                         \
  type& name = *static_cast<type*>(::pykern::emulator::static_shared(&name##_site, sizeof(type), alignof(type)))
#define PYKERN_DYNAMIC_SHARED(name) unsigned char* const name = ::pykern::emulator::dynamic_shared()

// Code of the emulator itself, which is not held to what kernels may touch. It is never inlined into them.
#define PYKERN_MACHINE __attribute__((no_sanitize("thread"), noinline))

// The caller's place in its source file.
#define PYKERN_SITE ::pykern::emulator::Site site = {__builtin_FILE(), __builtin_LINE()}

namespace pykern::emulator {

template <class Call>
PYKERN_MACHINE void invoke(const void* call) {
  (*static_cast<const Call*>(call))();
}

template <class V, class T>
PYKERN_MACHINE V load_vector(const T* source) {
  check_access(source, sizeof(V), AccessKind::read, __builtin_return_address(0));
  V value;
  std::memcpy(static_cast<void*>(&value), source, sizeof(V));
  return value;
}

template <class T, class V>
PYKERN_MACHINE void store_vector(T* target, const V& value) {
  check_access(target, sizeof(V), AccessKind::write, __builtin_return_address(0));
  std::memcpy(static_cast<void*>(target), &value, sizeof(V));
}

// --- warp collectives --------------------------------------------------------------------------------------

template <class T>
struct Shuffle {
  T value, result;
  int source;  // lane, or -1 for the lane's own value
};

template <class T>
PYKERN_MACHINE T shuffle(unsigned mask, T value, int source, const char* what, Site site) {
  static_assert(std::is_trivially_copyable<T>::value && (sizeof(T) == 4 || sizeof(T) == 8),
                "shuffles take 4 or 8 bytes");
  Shuffle<T> mine{value, value, source};
  meet(
      mask, &mine,
      [](void* const* lanes, unsigned, void*) {
        for (int lane = 0; lane < 32; ++lane) {
          auto* to = static_cast<Shuffle<T>*>(lanes[lane]);
          if (!to || to->source < 0) continue;
          const auto* from = static_cast<const Shuffle<T>*>(lanes[to->source]);
          // What a lane outside the mask holds is undefined.
          if (from) {
            to->result = from->value;
          } else {
            std::memset(static_cast<void*>(&to->result), 0xff, sizeof(T));
          }
        }
      },
      nullptr, what, site);
  return mine.result;
}

struct Vote {
  uint64_t value, result;
};

template <class Rule>
PYKERN_MACHINE uint64_t vote(unsigned mask, uint64_t value, Rule rule, const char* what, Site site) {
  Vote mine{value, 0};
  meet(
      mask, &mine,
      [](void* const* lanes, unsigned all, void* context) {
        for (int lane = 0; lane < 32; ++lane) {
          if (lanes[lane]) static_cast<Vote*>(lanes[lane])->result = (*static_cast<Rule*>(context))(lanes, all, lane);
        }
      },
      &rule, what, site);
  return mine.result;
}

inline uint64_t vote_of(void* lane) { return static_cast<const Vote*>(lane)->value; }

template <class Fold>
PYKERN_MACHINE uint64_t reduce_votes(unsigned mask, uint64_t value, Fold fold, const char* what, Site site) {
  return vote(
      mask, value,
      [fold](void* const* lanes, unsigned all, int) {
        uint64_t result = 0;
        bool first = true;
        for (int lane = 0; lane < 32; ++lane) {
          if (!(all >> lane & 1)) continue;
          result = first ? vote_of(lanes[lane]) : fold(result, vote_of(lanes[lane]));
          first = false;
        }
        return result;
      },
      what, site);
}

// --- atomics -----------------------------------------------------------------------------------------------

template <class T, class Change>
PYKERN_MACHINE T atomic(T* address, Change change) {
  maybe_yield();
  check_access(address, sizeof(T), AccessKind::atomic, __builtin_return_address(0));
  const T before = *address;
  *address = change(before);
  return before;
}

}  // namespace pykern::emulator

// --- synchronisation ---------------------------------------------------------------------------------------

inline void __syncthreads(PYKERN_SITE) { pykern::emulator::wait_barrier(0, 0, site, "__syncthreads"); }

namespace pykern::emulator {
int block_vote(int kind, int predicate, Site site);  // 0: or, 1: and, 2: count
}
inline int __syncthreads_or(int predicate, PYKERN_SITE) { return pykern::emulator::block_vote(0, predicate, site); }
inline int __syncthreads_and(int predicate, PYKERN_SITE) { return pykern::emulator::block_vote(1, predicate, site); }
inline int __syncthreads_count(int predicate, PYKERN_SITE) { return pykern::emulator::block_vote(2, predicate, site); }

inline void __syncwarp(unsigned mask = 0xffffffffu, PYKERN_SITE) {
  pykern::emulator::meet(mask, nullptr, nullptr, nullptr, "__syncwarp", site, true);
}
inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __threadfence_system() {}
inline void __nanosleep(unsigned) { pykern::emulator::yield(); }

// `width` splits the warp into segments of that many lanes.
template <class T>
PYKERN_MACHINE T __shfl_sync(unsigned mask, T value, int source, int width = 32, PYKERN_SITE) {
  const int base = pykern::emulator::lane() / width * width;
  return pykern::emulator::shuffle(mask, value, base + (source & (width - 1)), "__shfl_sync", site);
}
template <class T>
PYKERN_MACHINE T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, PYKERN_SITE) {
  const int lane = pykern::emulator::lane(), base = lane / width * width, from = lane - static_cast<int>(delta);
  return pykern::emulator::shuffle(mask, value, from >= base ? from : -1, "__shfl_up_sync", site);
}
template <class T>
PYKERN_MACHINE T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, PYKERN_SITE) {
  const int lane = pykern::emulator::lane(), base = lane / width * width, from = lane + static_cast<int>(delta);
  return pykern::emulator::shuffle(mask, value, from < base + width ? from : -1, "__shfl_down_sync", site);
}
template <class T>
PYKERN_MACHINE T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, PYKERN_SITE) {
  const int lane = pykern::emulator::lane(), base = lane / width * width, from = lane ^ bits;
  return pykern::emulator::shuffle(mask, value, from < base + width ? from : -1, "__shfl_xor_sync", site);
}

PYKERN_MACHINE inline unsigned __ballot_sync(unsigned mask, int predicate, PYKERN_SITE) {
  return static_cast<unsigned>(pykern::emulator::vote(
      mask, predicate != 0,
      [](void* const* lanes, unsigned all, int) {
        uint64_t ballot = 0;
        for (int lane = 0; lane < 32; ++lane) {
          if (all >> lane & 1) ballot |= pykern::emulator::vote_of(lanes[lane]) << lane;
        }
        return ballot;
      },
      "__ballot_sync", site));
}
inline int __any_sync(unsigned mask, int predicate, PYKERN_SITE) { return __ballot_sync(mask, predicate, site) != 0; }
inline int __all_sync(unsigned mask, int predicate, PYKERN_SITE) {
  return __ballot_sync(mask, predicate, site) == mask;
}

template <class T>
PYKERN_MACHINE unsigned __match_any_sync(unsigned mask, T value, PYKERN_SITE) {
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  return static_cast<unsigned>(pykern::emulator::vote(
      mask, bits,
      [](void* const* lanes, unsigned all, int lane) {
        uint64_t same = 0;
        for (int other = 0; other < 32; ++other) {
          if ((all >> other & 1) && pykern::emulator::vote_of(lanes[other]) == pykern::emulator::vote_of(lanes[lane])) {
            same |= uint64_t{1} << other;
          }
        }
        return same;
      },
      "__match_any_sync", site));
}

#define PYKERN_WARP_REDUCE(name, type, expression)                                                              \
  PYKERN_MACHINE inline type name(unsigned mask, type value, PYKERN_SITE) {                                     \
    return static_cast<type>(pykern::emulator::reduce_votes(                                                    \
        mask, static_cast<uint64_t>(value),                                                                     \
        [](uint64_t x, uint64_t y) {                                                                            \
          const type a = static_cast<type>(x), b = static_cast<type>(y);                                        \
          return static_cast<uint64_t>(expression);                                                             \
        },                                                                                                      \
        #name, site));                                                                                          \
  }
PYKERN_WARP_REDUCE(__reduce_add_sync, unsigned, a + b)
PYKERN_WARP_REDUCE(__reduce_add_sync, int, static_cast<int>(static_cast<unsigned>(a) + static_cast<unsigned>(b)))
PYKERN_WARP_REDUCE(__reduce_min_sync, unsigned, a < b ? a : b)
PYKERN_WARP_REDUCE(__reduce_min_sync, int, a < b ? a : b)
PYKERN_WARP_REDUCE(__reduce_max_sync, unsigned, a > b ? a : b)
PYKERN_WARP_REDUCE(__reduce_max_sync, int, a > b ? a : b)
PYKERN_WARP_REDUCE(__reduce_and_sync, unsigned, a & b)
PYKERN_WARP_REDUCE(__reduce_or_sync, unsigned, a | b)
PYKERN_WARP_REDUCE(__reduce_xor_sync, unsigned, a ^ b)
#undef PYKERN_WARP_REDUCE

// --- atomics -----------------------------------------------------------------------------------------------

#define PYKERN_ATOMIC(name, type, expression)                                                       \
  PYKERN_MACHINE inline type name(type* address, type value) {                                      \
    return pykern::emulator::atomic(address, [value](type old) { return static_cast<type>(expression); }); \
  }
#define PYKERN_ATOMICS(type)                             \
  PYKERN_ATOMIC(atomicExch, type, (void(old), value))    \
  PYKERN_ATOMIC(atomicMin, type, value < old ? value : old) \
  PYKERN_ATOMIC(atomicMax, type, value > old ? value : old) \
  PYKERN_ATOMIC(atomicAnd, type, old & value)            \
  PYKERN_ATOMIC(atomicOr, type, old | value)             \
  PYKERN_ATOMIC(atomicXor, type, old ^ value)            \
  PYKERN_MACHINE inline type atomicCAS(type* address, type compare, type value) { \
    return pykern::emulator::atomic(address, [=](type old) { return old == compare ? value : old; }); \
  }
PYKERN_ATOMICS(int)
PYKERN_ATOMICS(unsigned)
PYKERN_ATOMICS(unsigned long long)
PYKERN_ATOMIC(atomicMin, long long, value < old ? value : old)
PYKERN_ATOMIC(atomicMax, long long, value > old ? value : old)
PYKERN_ATOMIC(atomicExch, float, (void(old), value))
PYKERN_ATOMIC(atomicAdd, int, static_cast<unsigned>(old) + static_cast<unsigned>(value))
PYKERN_ATOMIC(atomicAdd, unsigned, old + value)
PYKERN_ATOMIC(atomicAdd, unsigned long long, old + value)
PYKERN_ATOMIC(atomicAdd, float, old + value)
PYKERN_ATOMIC(atomicAdd, double, old + value)
PYKERN_ATOMIC(atomicSub, int, static_cast<unsigned>(old) - static_cast<unsigned>(value))
PYKERN_ATOMIC(atomicSub, unsigned, old - value)
// Wraps to zero after `value`, so a counter of finished blocks is ready for the next launch.
PYKERN_ATOMIC(atomicInc, unsigned, old >= value ? 0u : old + 1u)
#undef PYKERN_ATOMICS
#undef PYKERN_ATOMIC

// --- loads and stores with cache hints ---------------------------------------------------------------------

template <class T>
inline T __ldg(const T* address) {
  return *address;
}
template <class T>
inline T __ldcs(const T* address) {
  return *address;
}
template <class T>
inline T __ldcg(const T* address) {
  return *address;
}
template <class T>
inline void __stcs(T* address, T value) {
  *address = value;
}
template <class T>
inline void __stcg(T* address, T value) {
  *address = value;
}

// --- bits and mathematics ----------------------------------------------------------------------------------

namespace pykern::emulator {
template <class To, class From>
inline To bits_as(From value) {
  static_assert(sizeof(To) == sizeof(From), "equal sizes");
  To result;
  __builtin_memcpy(&result, &value, sizeof(To));
  return result;
}
}  // namespace pykern::emulator

inline int __popc(unsigned value) { return __builtin_popcount(value); }
inline int __popcll(unsigned long long value) { return __builtin_popcountll(value); }
inline int __clz(int value) { return value ? __builtin_clz(static_cast<unsigned>(value)) : 32; }
inline int __clzll(long long value) { return value ? __builtin_clzll(static_cast<unsigned long long>(value)) : 64; }
inline int __ffs(int value) { return __builtin_ffs(value); }
inline int __ffsll(long long value) { return __builtin_ffsll(value); }
inline unsigned __brev(unsigned value) {
  unsigned result = 0;
  for (int bit = 0; bit < 32; ++bit) result |= (value >> bit & 1u) << (31 - bit);
  return result;
}
inline int __float_as_int(float value) { return pykern::emulator::bits_as<int>(value); }
inline unsigned __float_as_uint(float value) { return pykern::emulator::bits_as<unsigned>(value); }
inline float __int_as_float(int value) { return pykern::emulator::bits_as<float>(value); }
inline float __uint_as_float(unsigned value) { return pykern::emulator::bits_as<float>(value); }
inline long long __double_as_longlong(double value) { return pykern::emulator::bits_as<long long>(value); }
inline double __longlong_as_double(long long value) { return pykern::emulator::bits_as<double>(value); }
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(uint64_t{a} * b >> 32); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return static_cast<unsigned long long>(static_cast<unsigned __int128>(a) * b >> 64);
}

inline float __expf(float value) { return std::exp(value); }
inline float __logf(float value) { return std::log(value); }
inline float __log2f(float value) { return std::log2(value); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float value) { return 1.0f / value; }
inline float __fsqrt_rn(float value) { return std::sqrt(value); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline float rsqrtf(float value) { return 1.0f / std::sqrt(value); }
inline double rsqrt(double value) { return 1.0 / std::sqrt(value); }
inline float __saturatef(float value) { return value > 0 ? (value < 1 ? value : 1.0f) : 0.0f; }
inline int __float2int_rn(float value) { return static_cast<int>(std::nearbyint(value)); }
inline int __float2int_rz(float value) { return static_cast<int>(value); }
inline float __int2float_rn(int value) { return static_cast<float>(value); }
inline double __ll2double_rn(long long value) { return static_cast<double>(value); }

#define PYKERN_LESSER(type)                                      \
  inline type min(type a, type b) { return b < a ? b : a; }      \
  inline type max(type a, type b) { return a < b ? b : a; }
PYKERN_LESSER(int)
PYKERN_LESSER(unsigned)
PYKERN_LESSER(long)
PYKERN_LESSER(unsigned long)
PYKERN_LESSER(long long)
PYKERN_LESSER(unsigned long long)
#undef PYKERN_LESSER
inline float min(float a, float b) { return std::fmin(a, b); }
inline float max(float a, float b) { return std::fmax(a, b); }
inline double min(double a, double b) { return std::fmin(a, b); }
inline double max(double a, double b) { return std::fmax(a, b); }
