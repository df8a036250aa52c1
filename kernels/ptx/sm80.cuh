// PTX of compute capability 8.0 and newer. Thin functions: their names and operands are those of the PTX manual.
#pragma once

#include "kernels/common/vector.cuh"
#include "kernels/ptx/math.cuh"
#include "kernels/ptx/twin.h"

namespace pykern::ptx {

// --- registers ---------------------------------------------------------------------------------------------

// The value, of which the compiler doesn't know where it comes from: what is made of it in a loop is made again each
// time, instead of being kept in a register.
PYKERN_PTX int forget_origin(int value) {
#if defined(__CUDACC__)
  asm volatile("" : "+r"(value));
#endif
  return value;
}

// --- matrices of a warp ----------------------------------------------------------------------------------
// Fragments, with g = lane / 4 and t = lane % 4; a register holds two 16-bit elements, the lower column first:
//   A m16k16  a[0] (g, 2t)  a[1] (g + 8, 2t)  a[2] (g, 2t + 8)  a[3] (g + 8, 2t + 8)
//   B k16n8   b[0] (2t, g)  b[1] (2t + 8, g)
//   C m16n8   d[0] (g, 2t)  d[1] (g, 2t + 1)  d[2] (g + 8, 2t)  d[3] (g + 8, 2t + 1)
//   tf32      A m16k8: a[i] as above with columns t and t + 4; B k8n8: b[0] (t, g)  b[1] (t + 4, g)

// `count` 8x8 matrices of 16-bit elements; lane 8 i + r gives the address of row r of matrix i, a multiple of 16.
// Lane l receives (l / 4, 2 (l % 4)) and its right neighbour; transposed: (2 (l % 4), l / 4) and the one below.
template <int count, bool transposed = false>
PYKERN_PTX void ldmatrix(uint32_t (&r)[count], const void* row PYKERN_AND_CALLER) {
  static_assert(count == 1 || count == 2 || count == 4, "ldmatrix takes 1, 2 or 4 matrices");
#if defined(__CUDACC__)
  const uint32_t address = shared_address(row);
  if constexpr (count == 1 && !transposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];" : "=r"(r[0]) : "r"(address) : "memory");
  } else if constexpr (count == 1) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];" : "=r"(r[0]) : "r"(address) : "memory");
  } else if constexpr (count == 2 && !transposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(address)
                 : "memory");
  } else if constexpr (count == 2) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(address)
                 : "memory");
  } else if constexpr (!transposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
  }
#else
  emulator::load_matrices(r, count, transposed, row, site);
#endif
}

// d += a b for T = bf16 or f16.
template <class T>
PYKERN_PTX void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2] PYKERN_AND_CALLER) {
#if defined(__CUDACC__)
  if constexpr (std::is_same<T, bf16>::value) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, "
        "%2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    static_assert(std::is_same<T, f16>::value, "the element type is bf16 or f16");
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
        "%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
#else
  emulator::multiply(matrix_type<T>(), d, a, b, site);
#endif
}

// d += a b of floats whose low 13 bits are ignored.
PYKERN_PTX void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2] PYKERN_AND_CALLER) {
#if defined(__CUDACC__)
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  emulator::multiply(emulator::MatrixType::tf32, d, a, b, site);
#endif
}

// --- cp.async ----------------------------------------------------------------------------------------------

// Through which caches a copy goes: L1 and L2, or L2 only (16 bytes at a time).
enum class CopyCache { all, global };

// Copies `bytes` bytes, a multiple of which both addresses are. Only the first `source_bytes` are read; the rest
// becomes zero. The copying thread sees the result after cp_async_wait, others after a barrier besides.
template <int bytes, CopyCache cache = bytes == 16 ? CopyCache::global : CopyCache::all>
PYKERN_PTX void cp_async(void* shared, const void* global, int source_bytes = bytes) {
  static_assert(bytes == 4 || bytes == 8 || bytes == 16, "cp.async takes 4, 8 or 16 bytes");
  static_assert(bytes == 16 || cache == CopyCache::all, "only copies of 16 bytes may pass by L1");
#if defined(__CUDACC__)
  if constexpr (cache == CopyCache::global) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(shared)), "l"(global), "n"(bytes),
                 "r"(source_bytes)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(shared)), "l"(global), "n"(bytes),
                 "r"(source_bytes)
                 : "memory");
  }
#else
  emulator::cp_async(shared, global, bytes, source_bytes);
#endif
}

PYKERN_PTX void cp_async_commit() {
#if defined(__CUDACC__)
  asm volatile("cp.async.commit_group;" ::: "memory");
#else
  emulator::cp_async_commit();
#endif
}

// Waits for all groups but the last `groups_left` that the thread has committed.
template <int groups_left>
PYKERN_PTX void cp_async_wait() {
#if defined(__CUDACC__)
  asm volatile("cp.async.wait_group %0;" ::"n"(groups_left) : "memory");
#else
  emulator::cp_async_wait(groups_left);
#endif
}

// Waits for all copies, committed or not.
PYKERN_PTX void cp_async_wait_all() {
#if defined(__CUDACC__)
  asm volatile("cp.async.wait_all;" ::: "memory");
#else
  emulator::cp_async_wait_all();
#endif
}

// --- named barriers ----------------------------------------------------------------------------------------

// Barriers 1 to 15 for `threads` threads, whole warps; 0 is that of __syncthreads.
PYKERN_PTX void barrier_sync(int barrier, int threads PYKERN_AND_CALLER) {
#if defined(__CUDACC__)
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
#else
  emulator::wait_barrier(barrier, threads, site, "bar.sync");
#endif
}
PYKERN_PTX void barrier_arrive(int barrier, int threads PYKERN_AND_CALLER) {
#if defined(__CUDACC__)
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
#else
  emulator::arrive_barrier(barrier, threads, site);
#endif
}

// --- loads of data that is read once -----------------------------------------------------------------------

// Sixteen bytes that no kernel writes meanwhile, kept out of L1. `prefetch_256`: L2 fetches the 256 bytes around.
template <bool prefetch_256 = false, class T>
PYKERN_PTX Pack<T> load_once(const T* global) {
#if defined(__CUDACC__)
  union {
    uint4 bits;
    Pack<T> pack;
  } both;
  if constexpr (prefetch_256) {
    asm volatile("ld.global.nc.L1::no_allocate.L2::256B.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(both.bits.x), "=r"(both.bits.y), "=r"(both.bits.z), "=r"(both.bits.w)
                 : "l"(global));
  } else {
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(both.bits.x), "=r"(both.bits.y), "=r"(both.bits.z), "=r"(both.bits.w)
                 : "l"(global));
  }
  return both.pack;
#else
  return emulator::load_vector<Pack<T> >(global);
#endif
}

// Fetches the line into L2.
PYKERN_PTX void prefetch_l2(const void* global) {
#if defined(__CUDACC__)
  asm volatile("prefetch.global.L2 [%0];" ::"l"(global));
#else
  (void)global;
#endif
}

}  // namespace pykern::ptx
