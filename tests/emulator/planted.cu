#include "tests/emulator/planted.h"

#include "kernels/common/launch.h"
#include "kernels/common/reduce.cuh"
#include "kernels/common/vector.cuh"

namespace pykern::emulator {
namespace {

struct Neighbours {
  float values[256];
};

// output[i] = input[i] + input[i + 1 around the block]
template <bool buggy>
__global__ void missing_barrier(const float* input, float* output) {
  PYKERN_SHARED(Neighbours, shared);
  const int i = threadIdx.x;
  shared.values[i] = input[i];
  if (!buggy) __syncthreads();
  output[i] = shared.values[i] + shared.values[(i + 1) % blockDim.x];
}

// The barrier that keeps the second turn's writes from the first turn's reads.
template <bool buggy>
__global__ void missing_second_barrier(const float* input, float* output) {
  PYKERN_SHARED(Neighbours, shared);
  const int i = threadIdx.x;
  float sum = 0;
  for (int turn = 0; turn < 3; ++turn) {
    shared.values[i] = input[i] * static_cast<float>(turn);
    __syncthreads();
    sum += shared.values[(i + 1) % blockDim.x];
    if (!buggy) __syncthreads();
  }
  output[i] = sum;
}

template <bool buggy>
__global__ void global_tail(const float* input, int64_t size, float* output) {
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (buggy ? i <= size : i < size) output[i] = 2 * input[i];
}

template <bool buggy>
__global__ void shared_tail(const float* input, float* output) {
  PYKERN_SHARED(Neighbours, shared);
  const int i = threadIdx.x;
  shared.values[i] = input[i];
  __syncthreads();
  output[i] = buggy ? shared.values[i + 1] : shared.values[i];
}

// Half a warp reduces; the other half has gone elsewhere.
template <bool buggy>
__global__ void lane_mask(const float* input, float* output) {
  const int lane = threadIdx.x;
  float value = input[lane];
  if (lane < 16) {
    const unsigned mask = buggy ? 0xffffffffu : 0x0000ffffu;
    for (int distance = 8; distance > 0; distance /= 2) value += __shfl_xor_sync(mask, value, distance);
  } else {
    __syncwarp(0xffff0000u);
    value = 0;
    __syncwarp(0xffff0000u);
  }
  output[lane] = value;
}

template <bool buggy>
__global__ void misaligned_load(const float* input, float* output) {
  const Pack<float> pack = load_pack(input + (buggy ? 1 : 4) * (threadIdx.x + 1));
  output[threadIdx.x] = pack[0];
}

// A row of 2^20 elements, and rows far apart: the product of two ints.
template <bool buggy>
__global__ void overflowing_index(const float* input, float* output) {
  const int stride = 1 << 20;
  const int row = static_cast<int>(blockIdx.x) * 4096;
  const int64_t offset = buggy ? row * stride : int64_t{row} * stride;
  output[blockIdx.x] = input[blockIdx.x] + static_cast<float>(offset >> 40);
}

// Tiles of 64 elements, a block each in turn.
template <bool buggy>
__global__ void last_tile(const float* input, int64_t size, float* output) {
  const int64_t tiles = buggy ? size / 64 : (size + 63) / 64;
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const int64_t i = tile * 64 + threadIdx.x;
    if (i < size) output[i] = -input[i];
  }
}

// Only threads whose value is positive write.
template <bool buggy>
__global__ void unwritten_output(const float* input, int64_t size, float* output) {
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i >= size) return;
  if (input[i] > 0) {
    output[i] = input[i];
  } else if (!buggy) {
    output[i] = 0;
  }
}

template <bool buggy>
__global__ void divergent_barrier(const float* input, float* output) {
  const int i = threadIdx.x;
  if (buggy && i < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  output[i] = input[i];
}

// Half of the block waits for a flag that nobody sets.
template <bool buggy>
__global__ void waits_for_ever(const float* input, float* output) {
  PYKERN_SHARED(Neighbours, shared);
  const int i = threadIdx.x;
  if (i == 0) shared.values[0] = 0;
  __syncthreads();
  if (!buggy && i == 0) atomicExch(&shared.values[0], 1.0f);
  while (i > 0 && atomicAdd(&shared.values[0], 0.0f) == 0.0f) __nanosleep(100);
  output[i] = input[i];
}

// The order in which blocks come decides how the sum rounds.
template <bool buggy>
__global__ void order_dependent_sum(const float* input, int64_t size, float* output) {
  if (!buggy) {
    if (blockIdx.x > 0) return;
    float sum = 0;
    for (int64_t i = 0; i < size; ++i) sum += input[i];
    if (threadIdx.x == 0) output[0] = sum;
    return;
  }
  if (blockIdx.x == 0 && threadIdx.x == 0) atomicExch(&output[0], 0.0f);
  if (threadIdx.x == 0) atomicAdd(&output[0], input[blockIdx.x]);
}

template <bool buggy>
__global__ void writes_to_input(const float* input, float* output) {
  const int i = threadIdx.x;
  if (buggy) const_cast<float*>(input)[i] = 0;
  output[i] = 1;
}

template <bool buggy>
__global__ void too_much_shared(const float* input, float* output) {
  PYKERN_DYNAMIC_SHARED(bytes);
  auto* values = reinterpret_cast<float*>(bytes);
  values[threadIdx.x] = input[threadIdx.x];
  output[threadIdx.x] = values[threadIdx.x];
}

#define PYKERN_CHOOSE(kernel) (buggy ? kernel<true> : kernel<false>)

const char* run_missing_barrier(bool buggy, const float* input, int64_t, float* output) {
  return launch(PYKERN_CHOOSE(missing_barrier), Grid{1, 256}, nullptr, input, output);
}
const char* run_missing_second_barrier(bool buggy, const float* input, int64_t, float* output) {
  return launch(PYKERN_CHOOSE(missing_second_barrier), Grid{1, 256}, nullptr, input, output);
}
const char* run_global_tail(bool buggy, const float* input, int64_t size, float* output) {
  return launch(PYKERN_CHOOSE(global_tail), Grid{static_cast<unsigned>(size / 64 + 1), 64}, nullptr, input, size,
                output);
}
const char* run_shared_tail(bool buggy, const float* input, int64_t, float* output) {
  return launch(PYKERN_CHOOSE(shared_tail), Grid{1, 256}, nullptr, input, output);
}
const char* run_lane_mask(bool buggy, const float* input, int64_t, float* output) {
  return launch(PYKERN_CHOOSE(lane_mask), Grid{1, 32}, nullptr, input, output);
}
const char* run_misaligned_load(bool buggy, const float* input, int64_t, float* output) {
  return launch(PYKERN_CHOOSE(misaligned_load), Grid{1, 32}, nullptr, input, output);
}
const char* run_overflowing_index(bool buggy, const float* input, int64_t, float* output) {
  return launch(PYKERN_CHOOSE(overflowing_index), Grid{4, 1}, nullptr, input, output);
}
const char* run_last_tile(bool buggy, const float* input, int64_t size, float* output) {
  return launch(PYKERN_CHOOSE(last_tile), Grid{2, 64}, nullptr, input, size, output);
}
const char* run_unwritten_output(bool buggy, const float* input, int64_t size, float* output) {
  return launch(PYKERN_CHOOSE(unwritten_output), Grid{static_cast<unsigned>((size + 63) / 64), 64}, nullptr, input,
                size, output);
}
const char* run_divergent_barrier(bool buggy, const float* input, int64_t, float* output) {
  return launch(PYKERN_CHOOSE(divergent_barrier), Grid{1, 64}, nullptr, input, output);
}
const char* run_waits_for_ever(bool buggy, const float* input, int64_t, float* output) {
  return launch(PYKERN_CHOOSE(waits_for_ever), Grid{1, 64}, nullptr, input, output);
}
const char* run_order_dependent_sum(bool buggy, const float* input, int64_t size, float* output) {
  return launch(PYKERN_CHOOSE(order_dependent_sum), Grid{static_cast<unsigned>(size), 32}, nullptr, input, size,
                output);
}
const char* run_writes_to_input(bool buggy, const float* input, int64_t, float* output) {
  return launch(PYKERN_CHOOSE(writes_to_input), Grid{1, 64}, nullptr, input, output);
}
const char* run_too_much_shared(bool buggy, const float* input, int64_t, float* output) {
  return launch(PYKERN_CHOOSE(too_much_shared), Grid{1, 64, buggy ? size_t{228} * 1024 : size_t{227} * 1024}, nullptr,
                input, output);
}
const char* run_too_many_threads(bool buggy, const float* input, int64_t, float* output) {
  return launch(writes_to_input<false>, Grid{1, dim3(buggy ? 1025 : 64)}, nullptr, input, output);
}

}  // namespace

const Planted* planted_kernels() {
  static const Planted table[] = {
      {"missing_barrier", run_missing_barrier},
      {"missing_second_barrier", run_missing_second_barrier},
      {"global_tail", run_global_tail},
      {"shared_tail", run_shared_tail},
      {"lane_mask", run_lane_mask},
      {"misaligned_load", run_misaligned_load},
      {"overflowing_index", run_overflowing_index},
      {"last_tile", run_last_tile},
      {"unwritten_output", run_unwritten_output},
      {"divergent_barrier", run_divergent_barrier},
      {"waits_for_ever", run_waits_for_ever},
      {"order_dependent_sum", run_order_dependent_sum},
      {"writes_to_input", run_writes_to_input},
      {"too_much_shared", run_too_much_shared},
      {"too_many_threads", run_too_many_threads},
      {nullptr, nullptr},
  };
  return table;
}

}  // namespace pykern::emulator
