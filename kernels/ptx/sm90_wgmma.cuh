// wgmma of sm_90a: 64 x n += (64 x 16) (16 x n) by the four warps of a warpgroup.
#pragma once

#include "kernels/ptx/twin.h"

namespace pykern::ptx {

// Before the first product, and before each that takes registers which the thread has touched since the last wait.
PYKERN_PTX void wgmma_fence(PYKERN_CALLER) {
#if defined(__CUDACC__)
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#else
  emulator::product_fence(site);
#endif
}

// The compiler sees no link between registers and wgmma_fence or wgmma_wait, and may move arithmetic across them. Call
// this for accumulators, and for a in registers, before wgmma_fence, and for accumulators after wgmma_wait.
template <int registers>
PYKERN_PTX void keep_in_place(float (&d)[registers]) {
#if defined(__CUDACC__)
#pragma unroll
  for (int i = 0; i < registers; ++i) asm volatile("" : "+f"(d[i])::"memory");
#else
  (void)d;
#endif
}
template <int registers>
PYKERN_PTX void keep_in_place(uint32_t (&a)[registers]) {
#if defined(__CUDACC__)
#pragma unroll
  for (int i = 0; i < registers; ++i) asm volatile("" : "+r"(a[i])::"memory");
#else
  (void)a;
#endif
}

PYKERN_PTX void wgmma_commit(PYKERN_CALLER) {
#if defined(__CUDACC__)
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#else
  emulator::product_commit(site);
#endif
}

// Waits for all groups but the last `groups_left`. Until then accumulators must not be touched, nor tiles written.
template <int groups_left>
PYKERN_PTX void wgmma_wait(PYKERN_CALLER) {
#if defined(__CUDACC__)
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(groups_left) : "memory");
#else
  emulator::product_wait(groups_left, site);
#endif
}

#if defined(__CUDACC__)

// Sixteen accumulators: their names in the instruction, and the operands themselves.
#define PYKERN_NAMES_0 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define PYKERN_NAMES_1 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define PYKERN_NAMES_2 "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define PYKERN_NAMES_3 "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define PYKERN_NAMES_4 "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"
#define PYKERN_NAMES_5 "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define PYKERN_NAMES_6 "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111"
#define PYKERN_NAMES_7 "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define PYKERN_4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define PYKERN_8(i) PYKERN_4(i), PYKERN_4(i + 4)
#define PYKERN_16(i) PYKERN_4(i), PYKERN_4(i + 4), PYKERN_4(i + 8), PYKERN_4(i + 12)

#define PYKERN_NAMES_TO_2 PYKERN_NAMES_0 ", " PYKERN_NAMES_1
#define PYKERN_NAMES_TO_3 PYKERN_NAMES_TO_2 ", " PYKERN_NAMES_2
#define PYKERN_NAMES_TO_4 PYKERN_NAMES_TO_3 ", " PYKERN_NAMES_3
#define PYKERN_NAMES_TO_5 PYKERN_NAMES_TO_4 ", " PYKERN_NAMES_4
#define PYKERN_NAMES_TO_6 PYKERN_NAMES_TO_5 ", " PYKERN_NAMES_5
#define PYKERN_NAMES_TO_7 PYKERN_NAMES_TO_6 ", " PYKERN_NAMES_6
#define PYKERN_NAMES_TO_8 PYKERN_NAMES_TO_7 ", " PYKERN_NAMES_7
#define PYKERN_32(i) PYKERN_16(i), PYKERN_16(i + 16)
#define PYKERN_48(i) PYKERN_32(i), PYKERN_16(i + 32)
#define PYKERN_64(i) PYKERN_48(i), PYKERN_16(i + 48)
#define PYKERN_80(i) PYKERN_64(i), PYKERN_16(i + 64)
#define PYKERN_96(i) PYKERN_80(i), PYKERN_16(i + 80)
#define PYKERN_112(i) PYKERN_96(i), PYKERN_16(i + 96)
#define PYKERN_128(i) PYKERN_112(i), PYKERN_16(i + 112)

// o0 to o6 are the numbers of the operands that follow the accumulators.
#define PYKERN_WGMMA_SHARED(n, type, names, accumulators, o0, o1, o2, o3, o4)                                  \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #o2                                                        \
               ", 0;\n"                                                                                        \
               "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type " {" names "}, %" #o0 ", %" #o1 \
               ", p, 1, 1, %" #o3 ", %" #o4 ";\n}"                                                             \
               : accumulators(0)                                                                               \
               : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)), "n"(a_transposed), "n"(b_transposed)       \
               : "memory")
#define PYKERN_WGMMA_REGISTERS(n, type, names, accumulators, o0, o1, o2, o3, o4, o5, o6)                        \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #o5                                                         \
               ", 0;\n"                                                                                         \
               "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type " {" names "}, {%" #o0 ", %" #o1 \
               ", %" #o2 ", %" #o3 "}, %" #o4 ", p, 1, 1, %" #o6 ";\n}"                                         \
               : accumulators(0)                                                                                \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(accumulate)),         \
                 "n"(b_transposed)                                                                              \
               : "memory")
#define PYKERN_WGMMA_CASE(n, names, accumulators, o0, o1, o2, o3, o4, o5, o6)   \
  if constexpr (registers * 2 == n) {                                           \
    if constexpr (std::is_same<T, bf16>::value) {                               \
      PYKERN_WGMMA(n, "bf16", names, accumulators, o0, o1, o2, o3, o4, o5, o6); \
    } else {                                                                    \
      PYKERN_WGMMA(n, "f16", names, accumulators, o0, o1, o2, o3, o4, o5, o6);  \
    }                                                                           \
  }
#define PYKERN_WGMMA_CASES                                                                    \
  PYKERN_WGMMA_CASE(8, "%0, %1, %2, %3", PYKERN_4, 4, 5, 6, 7, 8, 9, 10)                      \
  PYKERN_WGMMA_CASE(16, "%0, %1, %2, %3, %4, %5, %6, %7", PYKERN_8, 8, 9, 10, 11, 12, 13, 14) \
  PYKERN_WGMMA_CASE(32, PYKERN_NAMES_0, PYKERN_16, 16, 17, 18, 19, 20, 21, 22)                \
  PYKERN_WGMMA_CASE(64, PYKERN_NAMES_TO_2, PYKERN_32, 32, 33, 34, 35, 36, 37, 38)             \
  PYKERN_WGMMA_CASE(96, PYKERN_NAMES_TO_3, PYKERN_48, 48, 49, 50, 51, 52, 53, 54)             \
  PYKERN_WGMMA_CASE(128, PYKERN_NAMES_TO_4, PYKERN_64, 64, 65, 66, 67, 68, 69, 70)            \
  PYKERN_WGMMA_CASE(160, PYKERN_NAMES_TO_5, PYKERN_80, 80, 81, 82, 83, 84, 85, 86)            \
  PYKERN_WGMMA_CASE(192, PYKERN_NAMES_TO_6, PYKERN_96, 96, 97, 98, 99, 100, 101, 102)         \
  PYKERN_WGMMA_CASE(224, PYKERN_NAMES_TO_7, PYKERN_112, 112, 113, 114, 115, 116, 117, 118)    \
  PYKERN_WGMMA_CASE(256, PYKERN_NAMES_TO_8, PYKERN_128, 128, 129, 130, 131, 132, 133, 134)

#endif

// Whether n = 2 registers has an instance here.
template <class T, int registers>
constexpr bool kHasWgmma =
    (std::is_same<T, bf16>::value || std::is_same<T, f16>::value) &&
    (registers == 4 || registers == 8 || (registers % 16 == 0 && registers > 0 && registers <= 128));

// d (+)= a b with both tiles in shared memory. d[4 j + 2 i + c] is row 16 (warp of the warpgroup) + lane / 4 + 8 i and
// column 8 j + 2 (lane % 4) + c. n, twice the number of accumulators: 8, 16 or a multiple of 32 up to 256.
template <class T, Major a_major = Major::k, Major b_major = Major::k, int registers>
PYKERN_PTX void wgmma(float (&d)[registers], uint64_t a, uint64_t b, bool accumulate PYKERN_AND_CALLER) {
  static_assert(kHasWgmma<T, registers>, "wgmma: bf16 or f16, and n of 8, 16 or a multiple of 32");
  constexpr int a_transposed = a_major == Major::mn, b_transposed = b_major == Major::mn;
#if defined(__CUDACC__)
#define PYKERN_WGMMA(n, type, names, accumulators, o0, o1, o2, o3, o4, o5, o6) \
  PYKERN_WGMMA_SHARED(n, type, names, accumulators, o0, o1, o2, o3, o4)
  PYKERN_WGMMA_CASES
#undef PYKERN_WGMMA
#else
  emulator::product_issue({matrix_type<T>(), registers * 2, false, a_transposed != 0, b_transposed != 0, accumulate}, d,
                          nullptr, a, b, site);
#endif
}

// The same with a in registers: each warp's 16 rows as in mma_m16n8k16.
template <class T, Major b_major = Major::k, int registers>
PYKERN_PTX void wgmma(float (&d)[registers], const uint32_t (&a)[4], uint64_t b, bool accumulate PYKERN_AND_CALLER) {
  static_assert(kHasWgmma<T, registers>, "wgmma: bf16 or f16, and n of 8, 16 or a multiple of 32");
  constexpr int b_transposed = b_major == Major::mn;
#if defined(__CUDACC__)
#define PYKERN_WGMMA(n, type, names, accumulators, o0, o1, o2, o3, o4, o5, o6) \
  PYKERN_WGMMA_REGISTERS(n, type, names, accumulators, o0, o1, o2, o3, o4, o5, o6)
  PYKERN_WGMMA_CASES
#undef PYKERN_WGMMA
#else
  emulator::product_issue({matrix_type<T>(), registers * 2, true, false, b_transposed != 0, accumulate}, d, a, 0, b,
                          site);
#endif
}

}  // namespace pykern::ptx

#if defined(__CUDACC__)
#undef PYKERN_NAMES_0
#undef PYKERN_NAMES_1
#undef PYKERN_NAMES_2
#undef PYKERN_NAMES_3
#undef PYKERN_NAMES_4
#undef PYKERN_NAMES_5
#undef PYKERN_NAMES_6
#undef PYKERN_NAMES_7
#undef PYKERN_4
#undef PYKERN_8
#undef PYKERN_16
#undef PYKERN_NAMES_TO_2
#undef PYKERN_NAMES_TO_3
#undef PYKERN_NAMES_TO_4
#undef PYKERN_NAMES_TO_5
#undef PYKERN_NAMES_TO_6
#undef PYKERN_NAMES_TO_7
#undef PYKERN_NAMES_TO_8
#undef PYKERN_32
#undef PYKERN_48
#undef PYKERN_64
#undef PYKERN_80
#undef PYKERN_96
#undef PYKERN_112
#undef PYKERN_128
#undef PYKERN_WGMMA_SHARED
#undef PYKERN_WGMMA_REGISTERS
#undef PYKERN_WGMMA_CASE
#undef PYKERN_WGMMA_CASES
#endif
