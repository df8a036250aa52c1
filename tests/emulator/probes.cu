#include "tests/emulator/probes.h"

#include "kernels/common/launch.h"
#include "kernels/common/reduce.cuh"
#include "kernels/common/vector.cuh"

namespace pykern::emulator {
namespace {

__device__ int64_t global_thread() { return int64_t{blockIdx.x} * blockDim.x + threadIdx.x; }

struct ShuffleXor {
  __device__ float operator()(float value, int bits) const { return __shfl_xor_sync(kFullWarp, value, bits); }
};
struct ShuffleUp {
  __device__ float operator()(float value, int delta) const {
    return __shfl_up_sync(kFullWarp, value, static_cast<unsigned>(delta));
  }
};
struct ShuffleDown {
  __device__ float operator()(float value, int delta) const {
    return __shfl_down_sync(kFullWarp, value, static_cast<unsigned>(delta), 16);
  }
};
struct ShuffleIndex {
  __device__ float operator()(float value, int source) const { return __shfl_sync(kFullWarp, value, source, 8); }
};
struct Ballot {
  __device__ float operator()(float value, int bit) const {
    return static_cast<float>(__ballot_sync(kFullWarp, value > 0) >> bit & 0xffu);
  }
};
struct MatchAny {
  __device__ float operator()(float value, int bit) const {
    return static_cast<float>(__match_any_sync(kFullWarp, static_cast<int>(value)) >> bit & 0xffu);
  }
};
struct WarpSum {
  __device__ float operator()(float value, int) const { return warp_reduce(value, Sum()); }
};
struct IntegerMin {
  __device__ float operator()(float value, int) const {
    return static_cast<float>(__reduce_min_sync(kFullWarp, static_cast<int>(value)));
  }
};
struct BlockSum {
  __device__ float operator()(float value, int) const {
    PYKERN_SHARED(WarpValues<float>, shared);
    return block_reduce(value, 0.0f, Sum(), shared);
  }
};
struct BlockCount {
  __device__ float operator()(float value, int) const { return static_cast<float>(__syncthreads_count(value > 0)); }
};
struct BlockAll {
  __device__ float operator()(float value, int) const {
    return static_cast<float>(__syncthreads_and(value > -2) * 2 + __syncthreads_or(value > 2));
  }
};
struct ThroughBfloat16 {
  __device__ float operator()(float value, int) const {
    bf16 narrowed;
    narrow(value, narrowed);
    return widen(narrowed);
  }
};
struct ThroughFloat16 {
  __device__ float operator()(float value, int) const {
    f16 narrowed;
    narrow(value, narrowed);
    return widen(narrowed);
  }
};
// Each thread takes a ticket; the order is the scheduler's, the set is not.
struct Ticket {
  __device__ float operator()(float value, int) const {
    PYKERN_SHARED(WarpValues<int>, shared);
    if (threadIdx.x == 0) shared.values[0] = 0;
    __syncthreads();
    atomicAdd(&shared.values[0], static_cast<int>(value));
    __syncthreads();
    return static_cast<float>(shared.values[0]);
  }
};

template <class Body>
__global__ void probe(int64_t size, int argument, const float* input, float* output) {
  const int64_t i = global_thread();
  const float value = Body()(i < size ? input[i] : 0.0f, argument);
  if (i < size) output[i] = value;
}

template <class Body>
const char* run(int64_t size, int threads, int argument, const float* input, float* output) {
  const auto blocks = static_cast<unsigned>((size + threads - 1) / threads);
  return launch(probe<Body>, Grid{blocks, dim3(static_cast<unsigned>(threads))}, nullptr, size, argument, input,
                output);
}

}  // namespace

const Probe* probes() {
  static const Probe table[] = {
      {"shuffle_xor", run<ShuffleXor>},
      {"shuffle_up", run<ShuffleUp>},
      {"shuffle_down_16", run<ShuffleDown>},
      {"shuffle_index_8", run<ShuffleIndex>},
      {"ballot", run<Ballot>},
      {"match_any", run<MatchAny>},
      {"warp_sum", run<WarpSum>},
      {"integer_min", run<IntegerMin>},
      {"block_sum", run<BlockSum>},
      {"block_count", run<BlockCount>},
      {"block_all", run<BlockAll>},
      {"through_bfloat16", run<ThroughBfloat16>},
      {"through_float16", run<ThroughFloat16>},
      {"ticket", run<Ticket>},
      {nullptr, nullptr},
  };
  return table;
}

}  // namespace pykern::emulator
