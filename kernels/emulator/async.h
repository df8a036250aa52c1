// Twins of the asynchronous instructions in kernels/ptx: copies that land late, mbarriers, fences.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/emulator/machine.h"
#include "kernels/ptx/descriptor.h"

namespace pykern::emulator {

// The address of a shared object within its block's window of shared memory, as 32-bit PTX addresses are.
uint32_t window_address(const void* shared);
// And back; null where the block has no object.
char* window_pointer(uint32_t address);

// --- cp.async: at issue the target becomes poison; it is filled at a wait at the latest
void cp_async(void* shared, const void* global, int bytes, int source_bytes);
void cp_async_commit();
void cp_async_wait(int groups_left);
void cp_async_wait_all();

// --- mbarriers
void mbarrier_init(uint64_t* mbarrier, uint32_t count);
void mbarrier_invalidate(uint64_t* mbarrier);
void mbarrier_arrive(uint64_t* mbarrier, uint32_t bytes);
void mbarrier_expect(uint64_t* mbarrier, uint32_t bytes);
// Waits for the end of the phase of that parity. False only when nothing else in the block can go on: the thread
// may have other work, but a loop over it is then a hang.
bool mbarrier_try_wait(uint64_t* mbarrier, uint32_t parity, Site site);
void mbarrier_init_fence();
void proxy_fence();

// --- bulk copies
void bulk_load(void* shared, const void* global, uint32_t bytes, uint64_t* mbarrier, Site site);
void bulk_store(void* global, const void* shared, uint32_t bytes, Site site);
void bulk_commit();
void bulk_wait(int groups_left, bool reads_only);

// --- tensor maps: what a CUtensorMap says, in the open
struct alignas(64) TensorMap {
  char* base;
  int rank, element_bytes;
  ptx::Swizzle swizzle;
  int64_t sizes[5];    // elements, innermost first
  int64_t strides[5];  // bytes; strides[0] is element_bytes
  int box[5];          // elements
};

void tensor_load(void* shared, const TensorMap* map, const int* coordinates, int rank, uint64_t* mbarrier, Site site);
void tensor_store(const TensorMap* map, const int* coordinates, int rank, const void* shared, Site site);

}  // namespace pykern::emulator
