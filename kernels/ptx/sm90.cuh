// PTX of compute capability 9.0a: mbarriers, bulk and tensor copies, stmatrix; wgmma is in sm90_wgmma.cuh.
// Only launch_*_sm90*.cu and what they include may see this file.
#pragma once

#include "kernels/common/tensor_map.cuh"
#include "kernels/ptx/sm80.cuh"

#if defined(__CUDA_ARCH__) && !defined(__CUDA_ARCH_FEAT_SM90_ALL)
#error "kernels/ptx/sm90.cuh is for sm_90a only"
#endif

namespace pykern::ptx {

// --- matrices of a warp ----------------------------------------------------------------------------------

// The inverse of ldmatrix. An ordinary write: what wgmma or a copy reads of it next needs fence_proxy_async.
template <int count, bool transposed = false>
PYKERN_PTX void stmatrix(void* row, const uint32_t (&r)[count] PYKERN_AND_CALLER) {
  static_assert(count == 1 || count == 2 || count == 4, "stmatrix takes 1, 2 or 4 matrices");
#if defined(__CUDACC__)
  const uint32_t address = shared_address(row);
  if constexpr (count == 1 && !transposed) {
    asm volatile("stmatrix.sync.aligned.m8n8.x1.shared.b16 [%0], {%1};" ::"r"(address), "r"(r[0]) : "memory");
  } else if constexpr (count == 1) {
    asm volatile("stmatrix.sync.aligned.m8n8.x1.trans.shared.b16 [%0], {%1};" ::"r"(address), "r"(r[0]) : "memory");
  } else if constexpr (count == 2 && !transposed) {
    asm volatile("stmatrix.sync.aligned.m8n8.x2.shared.b16 [%0], {%1, %2};" ::"r"(address), "r"(r[0]), "r"(r[1])
                 : "memory");
  } else if constexpr (count == 2) {
    asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(address), "r"(r[0]), "r"(r[1])
                 : "memory");
  } else if constexpr (!transposed) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(r[0]),
                 "r"(r[1]), "r"(r[2]), "r"(r[3])
                 : "memory");
  } else {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(r[0]),
                 "r"(r[1]), "r"(r[2]), "r"(r[3])
                 : "memory");
  }
#else
  emulator::store_matrices(row, count, transposed, r, site);
#endif
}

// --- mbarriers ---------------------------------------------------------------------------------------------
// A phase ends when `count` threads have arrived and as many bytes have landed as were expected.

PYKERN_PTX void mbarrier_init(uint64_t* mbarrier, uint32_t count) {
#if defined(__CUDACC__)
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(mbarrier)), "r"(count) : "memory");
#else
  emulator::mbarrier_init(mbarrier, count);
#endif
}

PYKERN_PTX void mbarrier_inval(uint64_t* mbarrier) {
#if defined(__CUDACC__)
  asm volatile("mbarrier.inval.shared::cta.b64 [%0];" ::"r"(shared_address(mbarrier)) : "memory");
#else
  emulator::mbarrier_invalidate(mbarrier);
#endif
}

// After mbarrier_init, by the thread that made it: copies may report to the mbarrier. Other threads still need a
// barrier.
PYKERN_PTX void fence_mbarrier_init() {
#if defined(__CUDACC__)
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#else
  emulator::mbarrier_init_fence();
#endif
}

// Makes the thread's ordinary accesses to shared memory visible to wgmma and copies that follow a barrier.
PYKERN_PTX void fence_proxy_async() {
#if defined(__CUDACC__)
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#else
  emulator::proxy_fence();
#endif
}

PYKERN_PTX void mbarrier_arrive(uint64_t* mbarrier) {
#if defined(__CUDACC__)
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(mbarrier)) : "memory");
#else
  emulator::mbarrier_arrive(mbarrier, 0);
#endif
}

// Arrives, and has the phase wait for `bytes` bytes more.
PYKERN_PTX void mbarrier_arrive_expect_tx(uint64_t* mbarrier, uint32_t bytes) {
#if defined(__CUDACC__)
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(mbarrier)), "r"(bytes)
               : "memory");
#else
  emulator::mbarrier_arrive(mbarrier, bytes);
#endif
}

// Has the phase wait for `bytes` bytes more, without arriving.
PYKERN_PTX void mbarrier_expect_tx(uint64_t* mbarrier, uint32_t bytes) {
#if defined(__CUDACC__)
  asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(shared_address(mbarrier)), "r"(bytes)
               : "memory");
#else
  emulator::mbarrier_expect(mbarrier, bytes);
#endif
}

// Whether the phase with this parity (0, 1, 0, ... from the first) has ended; may wait for a while first.
PYKERN_PTX bool mbarrier_try_wait(uint64_t* mbarrier, uint32_t parity PYKERN_AND_CALLER) {
#if defined(__CUDACC__)
  uint32_t done;
  asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
               : "=r"(done)
               : "r"(shared_address(mbarrier)), "r"(parity)
               : "memory");
  return done != 0;
#else
  return emulator::mbarrier_try_wait(mbarrier, parity, site);
#endif
}

PYKERN_PTX void mbarrier_wait(uint64_t* mbarrier, uint32_t parity PYKERN_AND_CALLER) {
#if defined(__CUDACC__)
  while (!mbarrier_try_wait(mbarrier, parity)) {
  }
#else
  while (!emulator::mbarrier_try_wait(mbarrier, parity, site)) {
  }
#endif
}

// --- bulk copies: one thread copies a multiple of 16 bytes -------------------------------------------------

PYKERN_PTX void bulk_load(void* shared, const void* global, uint32_t bytes, uint64_t* mbarrier PYKERN_AND_CALLER) {
#if defined(__CUDACC__)
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(shared)),
               "l"(global), "r"(bytes), "r"(shared_address(mbarrier))
               : "memory");
#else
  emulator::bulk_load(shared, global, bytes, mbarrier, site);
#endif
}

PYKERN_PTX void bulk_store(void* global, const void* shared, uint32_t bytes PYKERN_AND_CALLER) {
#if defined(__CUDACC__)
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(global), "r"(shared_address(shared)),
               "r"(bytes)
               : "memory");
#else
  emulator::bulk_store(global, shared, bytes, site);
#endif
}

// Groups of stores, of bulk_store and tensor_store, are those of the thread that started them.
PYKERN_PTX void bulk_commit() {
#if defined(__CUDACC__)
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
#else
  emulator::bulk_commit();
#endif
}

// Until all groups but the last `groups_left` have read shared memory, which may then be written or given back.
template <int groups_left>
PYKERN_PTX void bulk_wait_read() {
#if defined(__CUDACC__)
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(groups_left) : "memory");
#else
  emulator::bulk_wait(groups_left, true);
#endif
}

// Until they have written global memory.
template <int groups_left>
PYKERN_PTX void bulk_wait() {
#if defined(__CUDACC__)
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(groups_left) : "memory");
#else
  emulator::bulk_wait(groups_left, false);
#endif
}

// --- tensor copies: one thread copies a box; coordinates are those of its first element, innermost first -----
// Elements outside the tensor become zero in shared memory and are counted as bytes; a store leaves them out. The
// map is a `const __grid_constant__ TensorMap` parameter of the kernel.

template <int rank>
PYKERN_PTX void tensor_load(void* shared, const TensorMap& map, const int (&c)[rank],
                            uint64_t* mbarrier PYKERN_AND_CALLER) {
  static_assert(rank >= 1 && rank <= 5, "tensors have 1 to 5 dimensions");
#if defined(__CUDACC__)
  const uint32_t target = shared_address(shared), bar = shared_address(mbarrier);
  if constexpr (rank == 1) {
    asm volatile(
        "cp.async.bulk.tensor.1d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3}], [%2];" ::
            "r"(target),
        "l"(&map), "r"(bar), "r"(c[0])
        : "memory");
  } else if constexpr (rank == 2) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], "
        "[%2];" ::"r"(target),
        "l"(&map), "r"(bar), "r"(c[0]), "r"(c[1])
        : "memory");
  } else if constexpr (rank == 3) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], "
        "[%2];" ::"r"(target),
        "l"(&map), "r"(bar), "r"(c[0]), "r"(c[1]), "r"(c[2])
        : "memory");
  } else if constexpr (rank == 4) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(target),
        "l"(&map), "r"(bar), "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3])
        : "memory");
  } else {
    asm volatile(
        "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%3, %4, %5, %6, %7}], [%2];" ::"r"(target),
        "l"(&map), "r"(bar), "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]), "r"(c[4])
        : "memory");
  }
#else
  emulator::tensor_load(shared, &map, c, rank, mbarrier, site);
#endif
}

template <int rank>
PYKERN_PTX void tensor_store(const TensorMap& map, const int (&c)[rank], const void* shared PYKERN_AND_CALLER) {
  static_assert(rank >= 1 && rank <= 5, "tensors have 1 to 5 dimensions");
#if defined(__CUDACC__)
  const uint32_t source = shared_address(shared);
  if constexpr (rank == 1) {
    asm volatile("cp.async.bulk.tensor.1d.global.shared::cta.tile.bulk_group [%0, {%2}], [%1];" ::"l"(&map),
                 "r"(source), "r"(c[0])
                 : "memory");
  } else if constexpr (rank == 2) {
    asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%2, %3}], [%1];" ::"l"(&map),
                 "r"(source), "r"(c[0]), "r"(c[1])
                 : "memory");
  } else if constexpr (rank == 3) {
    asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(&map),
                 "r"(source), "r"(c[0]), "r"(c[1]), "r"(c[2])
                 : "memory");
  } else if constexpr (rank == 4) {
    asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(&map),
                 "r"(source), "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3])
                 : "memory");
  } else {
    asm volatile(
        "cp.async.bulk.tensor.5d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4, %5, %6}], [%1];" ::"l"(&map),
        "r"(source), "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]), "r"(c[4])
        : "memory");
  }
#else
  emulator::tensor_store(&map, c, rank, shared, site);
#endif
}

PYKERN_PTX void prefetch_tensor_map(const TensorMap& map) {
#if defined(__CUDACC__)
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
#else
  (void)map;
#endif
}

// --- a warpgroup's registers, and launches that overlap ------------------------------------------------------

// Every warp of the warpgroup calls; the kernel's launch bounds must name its threads and blocks.
template <int registers>
PYKERN_PTX void increase_registers() {
  static_assert(registers >= 24 && registers <= 256 && registers % 8 == 0, "a multiple of 8 from 24 to 256");
#if defined(__CUDACC__)
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(registers));
#endif
}
template <int registers>
PYKERN_PTX void decrease_registers() {
  static_assert(registers >= 24 && registers <= 256 && registers % 8 == 0, "a multiple of 8 from 24 to 256");
#if defined(__CUDACC__)
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(registers));
#endif
}

// Waits for the memory of the kernels before this one.
PYKERN_PTX void wait_for_dependencies() {
#if defined(__CUDACC__)
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// Lets the next kernel begin to start.
PYKERN_PTX void launch_dependents() {
#if defined(__CUDACC__)
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

}  // namespace pykern::ptx

#include "kernels/ptx/sm90_wgmma.cuh"
