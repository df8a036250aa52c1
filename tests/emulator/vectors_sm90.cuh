// The kernels of vectors.cu that need sm_90a.
#pragma once

#include "kernels/common/launch.h"
#include "kernels/ptx/sm90.cuh"
#include "tests/emulator/vectors.h"

namespace pykern::vectors {
namespace {

using namespace pykern::ptx;

struct alignas(16) MatrixRows {
  Pack<uint16_t> rows[32];
};

// Input: registers [count][32]; lane l names row (5 l + 3) % 32; output: the 32 rows.
template <int count, bool transposed>
__global__ void store_matrices_kernel(const uint32_t* input, uint16_t* output) {
  PYKERN_SHARED(MatrixRows, shared);
  const int lane = threadIdx.x;
  shared.rows[lane] = Pack<uint16_t>{};
  __syncwarp();
  uint32_t registers[count];
  for (int i = 0; i < count; ++i) registers[i] = input[32 * i + lane];
  stmatrix<count, transposed>(&shared.rows[(5 * lane + 3) % 32], registers);
  __syncwarp();
  store_pack(output + 8 * lane, shared.rows[lane]);
}

const char* run_stmatrix(const VectorOptions& options, const char* input, int64_t, char* output, Stream stream) {
  const int count = static_cast<int>(options.values[0]);
  const bool transposed = options.values[1] != 0;
  const auto kernel = count == 1   ? (transposed ? store_matrices_kernel<1, true> : store_matrices_kernel<1, false>)
                      : count == 2 ? (transposed ? store_matrices_kernel<2, true> : store_matrices_kernel<2, false>)
                                   : (transposed ? store_matrices_kernel<4, true> : store_matrices_kernel<4, false>);
  return launch(kernel, Grid{1, 32}, stream, reinterpret_cast<const uint32_t*>(input),
                reinterpret_cast<uint16_t*>(output));
}

struct Barriers {
  uint64_t full[3], empty[3];
};

// A poll that fails because nobody else could make it succeed; then the thread itself does.
__global__ void poll_kernel(uint32_t* output) {
  PYKERN_SHARED(Barriers, barriers);
  uint64_t* mbarrier = &barriers.full[0];
  mbarrier_init(mbarrier, 2);
  mbarrier_arrive(mbarrier);
  output[0] = mbarrier_try_wait(mbarrier, 0);
  output[1] = mbarrier_try_wait(mbarrier, 1);  // the phase before the first counts as over
  mbarrier_arrive(mbarrier);
  mbarrier_wait(mbarrier, 0);
  output[2] = mbarrier_try_wait(mbarrier, 0);
  mbarrier_inval(mbarrier);
}

const char* run_poll(const VectorOptions&, const char*, int64_t, char* output, Stream stream) {
  return launch(poll_kernel, Grid{1, 1}, stream, reinterpret_cast<uint32_t*>(output));
}

// output = input + 1 of `chunks` chunks of 1024 bytes, through shared memory, with a bulk store for each.
__global__ void bulk_kernel(const char* input, int chunks, char* output) {
  PYKERN_DYNAMIC_SHARED(shared);
  PYKERN_SHARED(Barriers, barriers);
  const int thread = threadIdx.x;
  if (thread == 0) {
    for (int i = 0; i < 2; ++i) mbarrier_init(&barriers.full[i], 1);
    fence_mbarrier_init();
    for (int i = 0; i < 2 && i < chunks; ++i) {
      mbarrier_expect_tx(&barriers.full[i], 512);
      mbarrier_arrive_expect_tx(&barriers.full[i], 512);
      bulk_load(shared + 1024 * i, input + 1024 * i, 1024, &barriers.full[i]);
    }
  }
  __syncthreads();
  for (int chunk = 0; chunk < chunks; ++chunk) {
    const int stage = chunk % 2;
    mbarrier_wait(&barriers.full[stage], static_cast<uint32_t>(chunk / 2 % 2));
    auto* values = reinterpret_cast<uint32_t*>(shared + 1024 * stage);
    for (int i = thread; i < 256; i += blockDim.x) values[i] += 1;
    fence_proxy_async();
    __syncthreads();
    if (thread == 0) {
      bulk_store(output + 1024 * chunk, values, 1024);
      bulk_commit();
      bulk_wait_read<0>();
      if (chunk + 2 < chunks) {
        mbarrier_arrive_expect_tx(&barriers.full[stage], 1024);
        bulk_load(values, input + 1024 * (chunk + 2), 1024, &barriers.full[stage]);
      }
    }
  }
  if (thread == 0) {
    bulk_wait<0>();
    for (int i = 0; i < 2; ++i) mbarrier_inval(&barriers.full[i]);
  }
}

const char* run_bulk(const VectorOptions&, const char* input, int64_t bytes, char* output, Stream stream) {
  return launch(bulk_kernel, Grid{1, 64, 2048}, stream, input, static_cast<int>(bytes / 1024), output);
}

struct BoxCopy {
  TensorMap map;
  int at[5];
  int bytes, shift;
};

template <int rank>
__global__ void tensor_load_kernel(const __grid_constant__ BoxCopy copy, char* output) {
  PYKERN_DYNAMIC_SHARED(shared);
  PYKERN_SHARED(Barriers, barriers);
  char* tile = reinterpret_cast<char*>(shared) + copy.shift;
  if (threadIdx.x == 0) {
    prefetch_tensor_map(copy.map);
    mbarrier_init(&barriers.full[0], 1);
    fence_mbarrier_init();
    mbarrier_arrive_expect_tx(&barriers.full[0], static_cast<uint32_t>(copy.bytes));
    int at[rank];
    for (int d = 0; d < rank; ++d) at[d] = copy.at[d];
    tensor_load(tile, copy.map, at, &barriers.full[0]);
  }
  __syncthreads();
  mbarrier_wait(&barriers.full[0], 0);
  for (int i = threadIdx.x; i < copy.bytes; i += blockDim.x) output[i] = tile[i];
}

template <int rank>
__global__ void tensor_store_kernel(const __grid_constant__ BoxCopy copy, const char* input) {
  PYKERN_DYNAMIC_SHARED(shared);
  char* tile = reinterpret_cast<char*>(shared) + copy.shift;
  for (int i = threadIdx.x; i < copy.bytes; i += blockDim.x) tile[i] = input[i];
  fence_proxy_async();
  __syncthreads();
  if (threadIdx.x == 0) {
    int at[rank];
    for (int d = 0; d < rank; ++d) at[d] = copy.at[d];
    tensor_store(copy.map, at, tile);
    bulk_commit();
    bulk_wait<0>();
  }
}

// Options: element bytes (2 or 4), rank, swizzle, bytes by which the tile is shifted, sizes[5], strides[5], box[5],
// coordinates of the first element [5]. A store's output tensor is prepared by the kernel's caller.
const char* run_tensor(const VectorOptions& options, const void* tensor, BoxCopy& copy) {
  const int64_t* values = options.values;
  TensorLayout layout{};
  layout.data = tensor;
  layout.rank = static_cast<int>(values[1]);
  layout.swizzle = static_cast<Swizzle>(values[2]);
  copy.shift = static_cast<int>(values[3]);
  copy.bytes = static_cast<int>(values[0]);
  for (int d = 0; d < layout.rank; ++d) {
    layout.sizes[d] = values[4 + d];
    layout.strides[d] = values[9 + d];
    layout.box[d] = static_cast<int>(values[14 + d]);
    copy.at[d] = static_cast<int>(values[19 + d]);
    copy.bytes *= layout.box[d];
  }
  return values[0] == 2 ? make_tensor_map<bf16>(copy.map, layout) : make_tensor_map<float>(copy.map, layout);
}

const char* run_tensor_load(const VectorOptions& options, const char* input, int64_t, char* output, Stream stream) {
  BoxCopy copy{};
  if (const char* error = run_tensor(options, input, copy)) return error;
  const Grid grid{1, 32, static_cast<size_t>(copy.bytes + copy.shift)};
  switch (options.values[1]) {
    case 1:
      return launch(tensor_load_kernel<1>, grid, stream, copy, output);
    case 2:
      return launch(tensor_load_kernel<2>, grid, stream, copy, output);
    case 3:
      return launch(tensor_load_kernel<3>, grid, stream, copy, output);
    case 4:
      return launch(tensor_load_kernel<4>, grid, stream, copy, output);
    default:
      return launch(tensor_load_kernel<5>, grid, stream, copy, output);
  }
}

const char* run_tensor_store(const VectorOptions& options, const char* input, int64_t, char* output, Stream stream) {
  BoxCopy copy{};
  if (const char* error = run_tensor(options, output, copy)) return error;
  const Grid grid{1, 32, static_cast<size_t>(copy.bytes + copy.shift)};
  switch (options.values[1]) {
    case 1:
      return launch(tensor_store_kernel<1>, grid, stream, copy, input);
    case 2:
      return launch(tensor_store_kernel<2>, grid, stream, copy, input);
    case 3:
      return launch(tensor_store_kernel<3>, grid, stream, copy, input);
    case 4:
      return launch(tensor_store_kernel<4>, grid, stream, copy, input);
    default:
      return launch(tensor_store_kernel<5>, grid, stream, copy, input);
  }
}

// d += a b over `steps` steps of k = 16. Input: the image of a's tile in shared memory, or its registers
// [steps][4][128]; that of b's; accumulators [n / 2][128], as the output.
struct WgmmaTest {
  const char *a, *b;
  const float* initial;
  float* output;
  int a_bytes, b_bytes, b_begin, steps, a_step, b_step, accumulate, overlap;
  MatrixDescriptor a_tile, b_tile;
};

template <class T, int n, Major a_major, Major b_major, bool a_in_registers>
__global__ void __launch_bounds__(128) wgmma_kernel(const WgmmaTest test) {
  PYKERN_DYNAMIC_SHARED(shared);
  const int thread = threadIdx.x;
  for (int i = thread; i < test.a_bytes && !a_in_registers; i += 128) shared[i] = static_cast<unsigned char>(test.a[i]);
  for (int i = thread; i < test.b_bytes; i += 128) shared[test.b_begin + i] = static_cast<unsigned char>(test.b[i]);
  fence_proxy_async();
  __syncthreads();
  MatrixDescriptor a_tile = test.a_tile, b_tile = test.b_tile;
  a_tile.address = shared_address(shared);
  b_tile.address = shared_address(shared) + static_cast<uint32_t>(test.b_begin);
  float d[n / 2];
#pragma unroll
  for (int i = 0; i < n / 2; ++i) d[i] = test.initial[128 * i + thread];
  for (int step = 0; step < test.steps; ++step) {
    const bool accumulate = step > 0 || test.accumulate != 0;
    const uint64_t b = advance(encode(b_tile), static_cast<uint32_t>(step * test.b_step));
    if constexpr (a_in_registers) {
      uint32_t a[4];
      for (int i = 0; i < 4; ++i) a[i] = reinterpret_cast<const uint32_t*>(test.a)[(4 * step + i) * 128 + thread];
      keep_in_place(a);
      keep_in_place(d);
      wgmma_fence();
      wgmma<T, b_major>(d, a, b, accumulate);
      wgmma_commit();
      wgmma_wait<0>();
      keep_in_place(d);
    } else {
      keep_in_place(d);
      wgmma_fence();
      wgmma<T, a_major, b_major>(d, advance(encode(a_tile), static_cast<uint32_t>(step * test.a_step)), b, accumulate);
      wgmma_commit();
      if (test.overlap) wgmma_wait<1>();
    }
  }
  wgmma_wait<0>();
  keep_in_place(d);
#pragma unroll
  for (int i = 0; i < n / 2; ++i) test.output[128 * i + thread] = d[i];
}

template <class T, int n>
const char* launch_wgmma(const WgmmaTest& test, bool a_in_registers, bool a_mn, bool b_mn, const Grid& grid,
                         Stream stream) {
  constexpr Major k = Major::k, mn = Major::mn;
  const auto kernel = a_in_registers ? (b_mn ? wgmma_kernel<T, n, k, mn, true> : wgmma_kernel<T, n, k, k, true>)
                      : a_mn         ? (b_mn ? wgmma_kernel<T, n, mn, mn, false> : wgmma_kernel<T, n, mn, k, false>)
                                     : (b_mn ? wgmma_kernel<T, n, k, mn, false> : wgmma_kernel<T, n, k, k, false>);
  return launch(kernel, grid, stream, test);
}

// Options: type (0 bf16, 1 f16), n, a in registers, a's innermost index is m, b's is n, accumulate, steps; then for a
// and for b: swizzle, leading, stride, bytes, bytes of a step along k; then whether to wait for the product before the
// last.
const char* run_wgmma(const VectorOptions& options, const char* input, int64_t, char* output, Stream stream) {
  const int64_t* values = options.values;
  const auto tile = [&](int first) {
    MatrixDescriptor matrix;
    matrix.swizzle = static_cast<Swizzle>(values[first]);
    matrix.leading = static_cast<uint32_t>(values[first + 1]);
    matrix.stride = static_cast<uint32_t>(values[first + 2]);
    return matrix;
  };
  WgmmaTest test{};
  test.a_tile = tile(7);
  test.b_tile = tile(12);
  test.accumulate = static_cast<int>(values[5]);
  test.steps = static_cast<int>(values[6]);
  test.overlap = static_cast<int>(values[17]);
  test.a_bytes = static_cast<int>(values[10]);
  test.a_step = static_cast<int>(values[11]);
  test.b_bytes = static_cast<int>(values[15]);
  test.b_step = static_cast<int>(values[16]);
  test.b_begin = (test.a_bytes + 1023) / 1024 * 1024;
  test.a = input;
  test.b = input + test.a_bytes;
  test.initial = reinterpret_cast<const float*>(test.b + test.b_bytes);
  test.output = reinterpret_cast<float*>(output);
  const Grid grid{1, 128, static_cast<size_t>(test.b_begin + test.b_bytes)};
  const bool registers = values[2] != 0, a_mn = values[3] != 0, b_mn = values[4] != 0;
  const int64_t n = values[1];
  if (values[0] != 0) return launch_wgmma<f16, 64>(test, registers, a_mn, b_mn, grid, stream);
  return n == 8     ? launch_wgmma<bf16, 8>(test, registers, a_mn, b_mn, grid, stream)
         : n == 64  ? launch_wgmma<bf16, 64>(test, registers, a_mn, b_mn, grid, stream)
         : n == 128 ? launch_wgmma<bf16, 128>(test, registers, a_mn, b_mn, grid, stream)
                    : launch_wgmma<bf16, 256>(test, registers, a_mn, b_mn, grid, stream);
}

// c = a b^T as matrix kernels of sm_90a do it: one thread of the first warpgroup has tiles of 64 x 64 copied, three
// stages deep; the second warpgroup multiplies.
struct PipelinedGemm {
  TensorMap a, b;
  float* c;
  int m, n, k;
};

constexpr int kStages = 3, kTileBytes = 64 * 64 * 2;

__global__ void __launch_bounds__(256, 1) pipelined_gemm_kernel(const __grid_constant__ PipelinedGemm gemm) {
  PYKERN_DYNAMIC_SHARED(shared);
  PYKERN_SHARED(Barriers, barriers);
  const int thread = threadIdx.x, row = blockIdx.x * 64, column = blockIdx.y * 64;
  const int turns = (gemm.k + 63) / 64;
  if (thread == 0) {
    for (int i = 0; i < kStages; ++i) {
      mbarrier_init(&barriers.full[i], 1);
      mbarrier_init(&barriers.empty[i], 4);
    }
    fence_mbarrier_init();
  }
  __syncthreads();
  if (thread < 128) {
    decrease_registers<40>();
    if (thread == 0) {
      for (int turn = 0; turn < turns; ++turn) {
        const int stage = turn % kStages;
        mbarrier_wait(&barriers.empty[stage], static_cast<uint32_t>(turn / kStages % 2 ^ 1));
        mbarrier_arrive_expect_tx(&barriers.full[stage], 2 * kTileBytes);
        tensor_load(shared + 2 * stage * kTileBytes, gemm.a, {64 * turn, row}, &barriers.full[stage]);
        tensor_load(shared + (2 * stage + 1) * kTileBytes, gemm.b, {64 * turn, column}, &barriers.full[stage]);
      }
    }
  } else {
    increase_registers<232>();
    float d[32];
    for (int i = 0; i < 32; ++i) d[i] = 0;
    for (int turn = 0; turn < turns; ++turn) {
      const int stage = turn % kStages;
      mbarrier_wait(&barriers.full[stage], static_cast<uint32_t>(turn / kStages % 2));
      MatrixDescriptor tile;
      tile.swizzle = Swizzle::bytes128;
      tile.stride = 1024;
      tile.address = shared_address(shared + 2 * stage * kTileBytes);
      const uint64_t a = encode(tile);
      tile.address += kTileBytes;
      const uint64_t b = encode(tile);
      keep_in_place(d);
      wgmma_fence();
#pragma unroll
      for (uint32_t k = 0; k < 4; ++k) wgmma<bf16>(d, advance(a, 32 * k), advance(b, 32 * k), true);
      wgmma_commit();
      wgmma_wait<0>();
      keep_in_place(d);
      if (thread % 32 == 0) mbarrier_arrive(&barriers.empty[stage]);
    }
    const int lane = thread % 32, warp = thread / 32 - 4;
    for (int i = 0; i < 32; ++i) {
      const int r = row + 16 * warp + lane / 4 + i / 2 % 2 * 8, c = column + i / 4 * 8 + lane % 4 * 2 + i % 2;
      if (r < gemm.m && c < gemm.n) gemm.c[int64_t{r} * gemm.n + c] = d[i];
    }
  }
}

const char* run_pipelined_gemm(const VectorOptions& options, const char* input, int64_t, char* output, Stream stream) {
  PipelinedGemm gemm{};
  gemm.m = static_cast<int>(options.values[0]);
  gemm.n = static_cast<int>(options.values[1]);
  gemm.k = static_cast<int>(options.values[2]);
  gemm.c = reinterpret_cast<float*>(output);
  const int64_t pitch = (gemm.k + 7) / 8 * 8;
  TensorLayout layout{input, 2, {gemm.k, gemm.m}, {1, pitch}, {64, 64}, Swizzle::bytes128};
  if (const char* error = make_tensor_map<bf16>(gemm.a, layout)) return error;
  layout.data = input + 2 * gemm.m * pitch;
  layout.sizes[1] = gemm.n;
  if (const char* error = make_tensor_map<bf16>(gemm.b, layout)) return error;
  const dim3 blocks(static_cast<unsigned>(gemm.m + 63) / 64, static_cast<unsigned>(gemm.n + 63) / 64);
  return launch(pipelined_gemm_kernel, Grid{blocks, 256, 2 * kStages * kTileBytes}, stream, gemm);
}

}  // namespace

const Vector* vectors_sm90() {
  static const Vector table[] = {
      {"stmatrix", run_stmatrix},
      {"poll", run_poll},
      {"bulk", run_bulk},
      {"tensor_load", run_tensor_load},
      {"tensor_store", run_tensor_store},
      {"wgmma", run_wgmma},
      {"pipelined_gemm", run_pipelined_gemm},
      {nullptr, nullptr},
  };
  return table;
}

}  // namespace pykern::vectors
