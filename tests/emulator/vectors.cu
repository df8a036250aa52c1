#include "tests/emulator/vectors.h"

#include <cstring>

#include "kernels/common/launch.h"
#include "kernels/ptx/sm80.cuh"

// nvcc compiles this file for sm_80, and with PYKERN_VECTORS_SM90 for sm_90a.
#if !defined(__CUDACC__) || defined(PYKERN_VECTORS_SM90)
#include "tests/emulator/vectors_sm90.cuh"
#endif

namespace pykern::vectors {
namespace {

using namespace pykern::ptx;

// Compilers must agree on descriptors: bits 0-13, 16-29, 32-45, 49-51 and 62-63.
constexpr uint64_t kDescriptor = encode({0x12340, 0x80, 0x400, 5, Swizzle::bytes128});
static_assert(kDescriptor == 0x400A'0040'0008'1234u, "matrix descriptor");
static_assert(decode(kDescriptor).address == 0x12340 && decode(kDescriptor).leading == 0x80, "matrix descriptor");
static_assert(decode(kDescriptor).stride == 0x400 && decode(kDescriptor).base_offset == 5, "matrix descriptor");
static_assert(decode(kDescriptor).swizzle == Swizzle::bytes128, "matrix descriptor");

template <class T>
struct Pointers {
  const T* input;
  T* output;
  Pointers(const char* from, char* to) : input(reinterpret_cast<const T*>(from)), output(reinterpret_cast<T*>(to)) {}
};

struct Rows {
  Pack<uint16_t> rows[32];
};

// 32 rows of 16 bytes, of which lane l names row (5 l + 3) % 32; output [count][32].
template <int count, bool transposed>
__global__ void load_matrices_kernel(const uint16_t* input, uint32_t* output) {
  PYKERN_SHARED(Rows, shared);
  const int lane = threadIdx.x;
  shared.rows[lane] = load_pack(input + 8 * lane);
  __syncwarp();
  uint32_t registers[count];
  ldmatrix<count, transposed>(registers, &shared.rows[(5 * lane + 3) % 32]);
  for (int i = 0; i < count; ++i) output[32 * i + lane] = registers[i];
}

const char* run_ldmatrix(const VectorOptions& options, const char* input, int64_t, char* output, Stream stream) {
  const auto* from = reinterpret_cast<const uint16_t*>(input);
  auto* to = reinterpret_cast<uint32_t*>(output);
  const int count = static_cast<int>(options.values[0]);
  const bool transposed = options.values[1] != 0;
  const auto kernel = count == 1   ? (transposed ? load_matrices_kernel<1, true> : load_matrices_kernel<1, false>)
                      : count == 2 ? (transposed ? load_matrices_kernel<2, true> : load_matrices_kernel<2, false>)
                                   : (transposed ? load_matrices_kernel<4, true> : load_matrices_kernel<4, false>);
  return launch(kernel, Grid{1, 32}, stream, from, to);
}

// Input: registers a[4], b[2], d[4] of 32 lanes; output d[4]. type: 0 bf16, 1 f16, 2 tf32.
template <int type>
__global__ void mma_kernel(const uint32_t* input, float* output) {
  const int lane = threadIdx.x;
  uint32_t a[4], b[2];
  float d[4];
  for (int i = 0; i < 4; ++i) a[i] = input[32 * i + lane];
  for (int i = 0; i < 2; ++i) b[i] = input[32 * (4 + i) + lane];
  for (int i = 0; i < 4; ++i) d[i] = __uint_as_float(input[32 * (6 + i) + lane]);
  if constexpr (type == 0) {
    mma_m16n8k16<bf16>(d, a, b);
  } else if constexpr (type == 1) {
    mma_m16n8k16<f16>(d, a, b);
  } else {
    mma_m16n8k8_tf32(d, a, b);
  }
  for (int i = 0; i < 4; ++i) output[32 * i + lane] = d[i];
}

const char* run_mma(const VectorOptions& options, const char* input, int64_t, char* output, Stream stream) {
  const auto kernel = options.values[0] == 0 ? mma_kernel<0> : options.values[0] == 1 ? mma_kernel<1> : mma_kernel<2>;
  return launch(kernel, Grid{1, 32}, stream, reinterpret_cast<const uint32_t*>(input),
                reinterpret_cast<float*>(output));
}

// c = a b^T for a [m, k], b [n, k] with rows `pitch` elements apart, a multiple of 8; the tile of a warp is 16 x 8,
// that of the block 32 x 16. Two stages of cp.async.
struct Gemm {
  const bf16 *a, *b;
  float* c;
  int m, n, k, pitch;
};

struct GemmTiles {
  Pack<bf16> a[2][32][2], b[2][16][2];
};

__device__ void copy_gemm_stage(const Gemm& gemm, GemmTiles& tiles, int stage, int k) {
  const int thread = threadIdx.x, half = thread % 2, column = k + 8 * half;
  int left = 2 * (gemm.k - column);
  left = left < 0 ? 0 : left > 16 ? 16 : left;
  if (thread < 64) {
    const int row = thread / 2, m = blockIdx.x * 32 + row;
    const bool inside = m < gemm.m && left > 0;
    cp_async<16>(&tiles.a[stage][row][half], inside ? gemm.a + int64_t{m} * gemm.pitch + column : gemm.a,
                 inside ? left : 0);
  } else if (thread < 96) {
    const int row = (thread - 64) / 2, n = blockIdx.y * 16 + row;
    const bool inside = n < gemm.n && left > 0;
    cp_async<16>(&tiles.b[stage][row][half], inside ? gemm.b + int64_t{n} * gemm.pitch + column : gemm.b,
                 inside ? left : 0);
  }
  cp_async_commit();
}

__global__ void gemm_kernel(Gemm gemm) {
  PYKERN_SHARED(GemmTiles, tiles);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  float d[4] = {0, 0, 0, 0};
  copy_gemm_stage(gemm, tiles, 0, 0);
  for (int k = 0, stage = 0; k < gemm.k; k += 16, stage ^= 1) {
    copy_gemm_stage(gemm, tiles, stage ^ 1, k + 16);
    cp_async_wait<1>();
    __syncthreads();
    uint32_t a[4], b[2];
    ldmatrix(a, &tiles.a[stage][warp % 2 * 16 + lane % 16][lane / 16]);
    ldmatrix(b, &tiles.b[stage][warp / 2 * 8 + lane % 8][lane / 8 % 2]);
    mma_m16n8k16<bf16>(d, a, b);
    __syncthreads();
  }
  cp_async_wait_all();
  for (int i = 0; i < 4; ++i) {
    const int row = blockIdx.x * 32 + warp % 2 * 16 + lane / 4 + i / 2 * 8;
    const int column = blockIdx.y * 16 + warp / 2 * 8 + lane % 4 * 2 + i % 2;
    if (row < gemm.m && column < gemm.n) gemm.c[int64_t{row} * gemm.n + column] = d[i];
  }
}

const char* run_gemm(const VectorOptions& options, const char* input, int64_t, char* output, Stream stream) {
  const auto* values = options.values;
  const int m = static_cast<int>(values[0]), n = static_cast<int>(values[1]), k = static_cast<int>(values[2]);
  const int pitch = (k + 7) / 8 * 8;
  const auto* a = reinterpret_cast<const bf16*>(input);
  const Gemm gemm{a, a + int64_t{m} * pitch, reinterpret_cast<float*>(output), m, n, k, pitch};
  const dim3 blocks(static_cast<unsigned>(m + 31) / 32, static_cast<unsigned>(n + 15) / 16);
  return launch(gemm_kernel, Grid{blocks, 128}, stream, gemm);
}

// Every lane copies `bytes` bytes, of which it reads lane % (bytes + 1).
template <int bytes, CopyCache cache>
__global__ void copy_kernel(const char* input, char* output) {
  PYKERN_SHARED(Rows, shared);
  const int lane = threadIdx.x;
  char* target = reinterpret_cast<char*>(&shared) + bytes * lane;
  cp_async<bytes, cache>(target, input + bytes * lane, lane % (bytes + 1));
  cp_async_commit();
  cp_async_wait<0>();
  __syncwarp();
  for (int i = lane; i < 32 * bytes; i += 32) output[i] = reinterpret_cast<const char*>(&shared)[i];
}

const char* run_cp_async(const VectorOptions& options, const char* input, int64_t, char* output, Stream stream) {
  const auto kernel = options.values[0] == 4   ? copy_kernel<4, CopyCache::all>
                      : options.values[0] == 8 ? copy_kernel<8, CopyCache::all>
                      : options.values[1] != 0 ? copy_kernel<16, CopyCache::all>
                                               : copy_kernel<16, CopyCache::global>;
  return launch(kernel, Grid{1, 32}, stream, input, output);
}

// Warp 0 hands its values to warp 1 through barrier 1 while warp 2 goes its own way.
__global__ void named_barrier_kernel(const float* input, float* output) {
  PYKERN_SHARED(Rows, shared);
  auto* values = reinterpret_cast<float*>(&shared);
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  if (warp == 0) {
    values[lane] = 2 * input[lane];
    barrier_arrive(1, 64);
    output[lane] = 0;
  } else if (warp == 1) {
    barrier_sync(1, 64);
    output[thread] = values[31 - lane];
  } else {
    barrier_sync(2, 32);
    output[thread] = input[thread];
  }
}

const char* run_named_barrier(const VectorOptions&, const char* input, int64_t, char* output, Stream stream) {
  return launch(named_barrier_kernel, Grid{1, 96}, stream, reinterpret_cast<const float*>(input),
                reinterpret_cast<float*>(output));
}

template <int function>
__global__ void math_kernel(const float* input, int64_t size, float* output) {
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i >= size) return;
  const float x = input[i];
  output[i] = function == 0   ? fast_exp2(x)
              : function == 1 ? fast_log2(x)
              : function == 2 ? fast_tanh(x)
                              : __uint_as_float(round_tf32(x));
}

const char* run_math(const VectorOptions& options, const char* input, int64_t bytes, char* output, Stream stream) {
  const int64_t size = bytes / 4, function = options.values[0];
  const auto kernel = function == 0   ? math_kernel<0>
                      : function == 1 ? math_kernel<1>
                      : function == 2 ? math_kernel<2>
                                      : math_kernel<3>;
  return launch(kernel, Grid{static_cast<unsigned>((size + 63) / 64), 64}, stream,
                reinterpret_cast<const float*>(input), size, reinterpret_cast<float*>(output));
}

template <bool prefetch>
__global__ void load_once_kernel(const uint16_t* input, uint16_t* output) {
  const int i = 8 * threadIdx.x;
  prefetch_l2(input + i);
  store_pack(output + i, load_once<prefetch>(input + i));
}

const char* run_load_once(const VectorOptions& options, const char* input, int64_t, char* output, Stream stream) {
  return launch(options.values[0] != 0 ? load_once_kernel<true> : load_once_kernel<false>, Grid{1, 32}, stream,
                reinterpret_cast<const uint16_t*>(input), reinterpret_cast<uint16_t*>(output));
}

// `count` products in a row by one warp: how long does one take?
__global__ void mma_chain_kernel(int count, float* output) {
  const uint32_t a[4] = {0x3f803f80, 0x3f803f80, 0x3f803f80, 0x3f803f80}, b[2] = {0x3f803f80, 0x3f803f80};
  float d[4] = {0, 0, 0, 0};
  for (int i = 0; i < count; ++i) mma_m16n8k16<bf16>(d, a, b);
  output[threadIdx.x] = d[0];
}

const char* run_mma_chain(const VectorOptions& options, const char*, int64_t, char* output, Stream stream) {
  return launch(mma_chain_kernel, Grid{1, 32}, stream, static_cast<int>(options.values[0]),
                reinterpret_cast<float*>(output));
}

}  // namespace

const Vector* vectors_sm80() {
  static const Vector table[] = {
      {"ldmatrix", run_ldmatrix},
      {"mma", run_mma},
      {"gemm", run_gemm},
      {"cp_async", run_cp_async},
      {"named_barrier", run_named_barrier},
      {"math", run_math},
      {"load_once", run_load_once},
      {"mma_chain", run_mma_chain},
      {nullptr, nullptr},
  };
  return table;
}

#if defined(__CUDACC__)

#if !defined(PYKERN_VECTORS_SM90)
const Vector* vectors_sm90() { return nullptr; }
#endif

namespace {

const char* run_on_device(const Vector& vector, const VectorOptions& options, const char* input, int64_t input_bytes,
                          char* output, int64_t output_bytes) {
  char *from = nullptr, *to = nullptr;
  cudaError_t status = cudaMalloc(&from, static_cast<size_t>(input_bytes) + 16);
  if (status == cudaSuccess) status = cudaMalloc(&to, static_cast<size_t>(output_bytes) + 16);
  if (status == cudaSuccess) status = cudaMemcpy(from, input, static_cast<size_t>(input_bytes), cudaMemcpyHostToDevice);
  if (status == cudaSuccess) status = cudaMemset(to, 0xff, static_cast<size_t>(output_bytes));
  const char* error = status == cudaSuccess ? vector.run(options, from, input_bytes, to, nullptr) : nullptr;
  if (status == cudaSuccess && !error) status = cudaDeviceSynchronize();
  if (status == cudaSuccess && !error)
    status = cudaMemcpy(output, to, static_cast<size_t>(output_bytes), cudaMemcpyDeviceToHost);
  cudaFree(from);
  cudaFree(to);
  return error ? error : status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}

}  // namespace

#endif

}  // namespace pykern::vectors

#if defined(__CUDACC__)

// What tests/emulator/golden.py calls on a machine with a GPU.
extern "C" const char* pykern_run_vector(const char* name, const int64_t* values, const char* input,
                                         int64_t input_bytes, char* output, int64_t output_bytes) {
  using namespace pykern::vectors;
  VectorOptions options;
  std::memcpy(options.values, values, sizeof(options.values));
  for (const Vector* table : {vectors_sm80(), vectors_sm90()}) {
    for (const Vector* entry = table; entry && entry->name; ++entry) {
      if (std::strcmp(entry->name, name) == 0)
        return run_on_device(*entry, options, input, input_bytes, output, output_bytes);
    }
  }
  return "no such vector";
}

extern "C" const char* pykern_device_name() {
  static cudaDeviceProp properties;
  return cudaGetDeviceProperties(&properties, 0) == cudaSuccess ? properties.name : "";
}

extern "C" int pykern_driver_version() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

#endif
