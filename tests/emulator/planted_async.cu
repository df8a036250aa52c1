#include "kernels/common/launch.h"
#include "kernels/ptx/sm90.cuh"
#include "tests/emulator/planted.h"

namespace pykern::vectors {
namespace {

using namespace pykern::ptx;
using emulator::Planted;

constexpr int kThreads = 64, kChunk = kThreads * 4;  // floats of a thread: 4

struct Ring {
  float values[2][kChunk];
};
struct Signals {
  uint64_t full[2], empty[2];
};

enum class CopyBug { none, no_wait, no_commit, no_barrier, no_second_barrier };

// output = input, chunk by chunk, each read by the neighbours of the threads that copied it.
template <CopyBug bug>
__global__ void small_copies(const float* input, int64_t size, float* output) {
  PYKERN_SHARED(Ring, ring);
  const int thread = threadIdx.x, other = (thread + 33) % kThreads;
  const int64_t chunks = size / kChunk;
  const auto copy = [&](int64_t chunk) {
    const bool inside = chunk < chunks;
    const int64_t from = inside ? chunk * kChunk + 4 * thread : 0;
    cp_async<16>(&ring.values[chunk % 2][4 * thread], input + from, inside ? 16 : 0);
    if (bug != CopyBug::no_commit) cp_async_commit();
  };
  copy(0);
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    copy(chunk + 1);
    if (bug != CopyBug::no_wait) cp_async_wait<1>();
    if (bug != CopyBug::no_barrier) __syncthreads();
    for (int i = 0; i < 4; ++i) output[chunk * kChunk + 4 * other + i] = ring.values[chunk % 2][4 * other + i];
    if (bug != CopyBug::no_second_barrier) __syncthreads();
  }
  cp_async_wait_all();
}

enum class BulkBug {
  none,
  no_wait,
  ignored_result,
  too_many_bytes,
  too_few_arrivals,
  no_empty_wait,
  no_init_fence,
  no_store_fence,
  no_store_wait,
  early_arrival
};

// output = 2 input: thread 0 has chunks copied, two stages deep; the second warp doubles them and stores.
template <BulkBug bug>
__global__ void bulk_ring(const float* input, int64_t size, float* output) {
  PYKERN_DYNAMIC_SHARED(bytes);
  PYKERN_SHARED(Signals, signals);
  auto& ring = *reinterpret_cast<Ring*>(bytes);
  const int thread = threadIdx.x, chunks = static_cast<int>(size / kChunk);
  constexpr uint32_t kBytes = kChunk * sizeof(float);
  if (thread == 0) {
    for (int i = 0; i < 2; ++i) {
      mbarrier_init(&signals.full[i], 1);
      mbarrier_init(&signals.empty[i], bug == BulkBug::too_few_arrivals ? 2 : 1);
    }
    if (bug != BulkBug::no_init_fence) fence_mbarrier_init();
  }
  __syncthreads();
  if (thread == 0) {
    for (int chunk = 0; chunk < chunks; ++chunk) {
      const int stage = chunk % 2;
      if (bug != BulkBug::no_empty_wait) mbarrier_wait(&signals.empty[stage], static_cast<uint32_t>(chunk / 2 % 2 ^ 1));
      mbarrier_arrive_expect_tx(&signals.full[stage], kBytes + (bug == BulkBug::too_many_bytes ? 16 : 0));
      bulk_load(ring.values[stage], input + chunk * kChunk, kBytes, &signals.full[stage]);
    }
  } else if (thread >= 32) {
    const int lane = thread - 32;
    float* results = ring.values[0] + 2 * kChunk;
    for (int chunk = 0; chunk < chunks; ++chunk) {
      const int stage = chunk % 2;
      const auto parity = static_cast<uint32_t>(chunk / 2 % 2);
      if (bug == BulkBug::ignored_result) {
        mbarrier_try_wait(&signals.full[stage], parity);
      } else if (bug != BulkBug::no_wait) {
        mbarrier_wait(&signals.full[stage], parity);
      }
      for (int i = lane; i < kChunk; i += 32) results[i] = 2 * ring.values[stage][i];
      if (bug != BulkBug::early_arrival) __syncwarp();
      if (lane == 0) mbarrier_arrive(&signals.empty[stage]);
      if (bug != BulkBug::no_store_fence) fence_proxy_async();
      __syncwarp();
      if (lane == 0) {
        bulk_store(output + chunk * kChunk, results, kBytes);
        bulk_commit();
        if (bug != BulkBug::no_store_wait) bulk_wait_read<0>();
      }
      __syncwarp();
    }
    if (lane == 0 && bug != BulkBug::no_store_wait) bulk_wait<0>();
  }
}

// output[16][8] = a[16][16] b[8][16]^T
template <bool buggy>
__global__ void wrong_fragment(const float* input, float* output) {
  const int lane = threadIdx.x, g = lane / 4, t = lane % 4;
  const auto element = [&](int offset) {
    bf16 value;
    narrow(input[offset], value);
    return uint32_t{value.bits};
  };
  const auto pair = [&](int offset) { return element(offset) | element(offset + 1) << 16; };
  uint32_t a[4], b[2];
  for (int i = 0; i < 4; ++i) {
    const int down = buggy ? i / 2 : i % 2, right = buggy ? i % 2 : i / 2;
    a[i] = pair((g + 8 * down) * 16 + 2 * t + 8 * right);
  }
  for (int i = 0; i < 2; ++i) b[i] = pair(256 + g * 16 + 2 * t + 8 * i);
  float d[4] = {0, 0, 0, 0};
  mma_m16n8k16<bf16>(d, a, b);
  for (int i = 0; i < 4; ++i) output[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = d[i];
}

enum class ProductBug { none, no_proxy_fence, other_swizzle, no_wait, no_fence, early_write, one_warp_only };

// output[64][8] = a[64][64] b[8][64]^T
template <ProductBug bug>
__global__ void __launch_bounds__(128) product(const float* input, float* output) {
  PYKERN_DYNAMIC_SHARED(shared);
  const int thread = threadIdx.x;
  constexpr int kTile = 64 * 128;
  for (int i = thread; i < 72 * 64; i += 128) {
    const uint32_t offset = static_cast<uint32_t>(2 * i);
    narrow(input[i], *reinterpret_cast<bf16*>(shared + swizzled(offset, Swizzle::bytes128)));
  }
  if (bug != ProductBug::no_proxy_fence) fence_proxy_async();
  __syncthreads();
  MatrixDescriptor tile;
  tile.swizzle = bug == ProductBug::other_swizzle ? Swizzle::bytes64 : Swizzle::bytes128;
  tile.stride = 1024;
  tile.address = shared_address(shared);
  const uint64_t a = encode(tile);
  tile.address += kTile;
  const uint64_t b = encode(tile);
  float d[4] = {0, 0, 0, 0};
  if (bug != ProductBug::one_warp_only || thread < 32) {
    if (bug != ProductBug::no_fence) wgmma_fence();
    for (uint32_t k = 0; k < 4; ++k) wgmma<bf16>(d, advance(a, 32 * k), advance(b, 32 * k), k > 0);
    wgmma_commit();
    if (bug == ProductBug::early_write && thread == 127) shared[0] = 0;
    if (bug != ProductBug::no_wait) wgmma_wait<0>();
  }
  const int lane = thread % 32, warp = thread / 32;
  for (int i = 0; i < 4; ++i) output[(16 * warp + lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = d[i];
  wgmma_wait<0>();
}

template <CopyBug bug>
const char* run_copies(bool buggy, const float* input, int64_t size, float* output) {
  return launch(buggy ? small_copies<bug> : small_copies<CopyBug::none>, Grid{1, kThreads}, nullptr, input, size,
                output);
}
template <BulkBug bug>
const char* run_bulk_ring(bool buggy, const float* input, int64_t size, float* output) {
  return launch(buggy ? bulk_ring<bug> : bulk_ring<BulkBug::none>, Grid{1, kThreads, 3 * kChunk * sizeof(float)},
                nullptr, input, size, output);
}
const char* run_wrong_fragment(bool buggy, const float* input, int64_t, float* output) {
  return launch(buggy ? wrong_fragment<true> : wrong_fragment<false>, Grid{1, 32}, nullptr, input, output);
}
template <ProductBug bug>
const char* run_product(bool buggy, const float* input, int64_t, float* output) {
  return launch(buggy ? product<bug> : product<ProductBug::none>, Grid{1, 128, 72 * 128}, nullptr, input, output);
}

}  // namespace
}  // namespace pykern::vectors

namespace pykern::emulator {

const Planted* planted_async_kernels() {
  using namespace pykern::vectors;
  static const Planted table[] = {
      {"copy_read_before_wait", run_copies<CopyBug::no_wait>},
      {"copy_not_committed", run_copies<CopyBug::no_commit>},
      {"copy_read_by_others", run_copies<CopyBug::no_barrier>},
      {"copy_over_what_is_read", run_copies<CopyBug::no_second_barrier>},
      {"bulk_read_before_wait", run_bulk_ring<BulkBug::no_wait>},
      {"bulk_wait_without_result", run_bulk_ring<BulkBug::ignored_result>},
      {"bulk_expects_too_much", run_bulk_ring<BulkBug::too_many_bytes>},
      {"bulk_arrival_missing", run_bulk_ring<BulkBug::too_few_arrivals>},
      {"bulk_arrival_too_early", run_bulk_ring<BulkBug::early_arrival>},
      {"bulk_over_what_is_read", run_bulk_ring<BulkBug::no_empty_wait>},
      {"bulk_mbarrier_unknown", run_bulk_ring<BulkBug::no_init_fence>},
      {"bulk_store_without_fence", run_bulk_ring<BulkBug::no_store_fence>},
      {"bulk_store_without_wait", run_bulk_ring<BulkBug::no_store_wait>},
      {"wrong_fragment", run_wrong_fragment},
      {"product_without_proxy_fence", run_product<ProductBug::no_proxy_fence>},
      {"product_of_other_swizzle", run_product<ProductBug::other_swizzle>},
      {"product_read_before_wait", run_product<ProductBug::no_wait>},
      {"product_without_fence", run_product<ProductBug::no_fence>},
      {"product_tile_overwritten", run_product<ProductBug::early_write>},
      {"product_of_one_warp", run_product<ProductBug::one_warp_only>},
      {nullptr, nullptr},
  };
  return table;
}

}  // namespace pykern::emulator
