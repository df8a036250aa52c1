#include "kernels/common/launch.h"
#include "kernels/lowrank/adam_8bit_sm80.cuh"
#include "kernels/lowrank/adam_sm80.cuh"
#include "kernels/lowrank/rule_sm80.cuh"

namespace pykern::lowrank {
namespace {

unsigned blocks_for(int64_t count, int64_t per_block) {
  return static_cast<unsigned>((count + per_block - 1) / per_block);
}

// Elements before the first that is aligned to sixteen bytes.
template <class T>
int unaligned_head(const void* pointer) {
  return static_cast<int>((16 - reinterpret_cast<uintptr_t>(pointer) % 16) % 16 / sizeof(T));
}

template <class T, bool kWeights>
const char* launch_typed(const AdamParams& params, Stream stream) {
  using C = Compute<T>;
  const int head = unaligned_head<T>(params.target);
  const bool aligned = allows_packs(static_cast<const T*>(params.target) + head) &&
                       allows_packs(static_cast<const T*>(params.grad) + head) &&
                       allows_packs(static_cast<const C*>(params.exp_avg) + head) &&
                       allows_packs(static_cast<const C*>(params.exp_avg_sq) + head);
  const int64_t packs = aligned && params.size > head ? (params.size - head) / Pack<T>::kSize : 0;
  if (packs > 0) {
    return launch(adam_packs_kernel<T, kWeights>, Grid{dim3(blocks_for(packs, kAdamThreads)), dim3(kAdamThreads)},
                  stream, params, head, packs);
  }
  return launch(adam_scalars_kernel<T, kWeights>,
                Grid{dim3(blocks_for(params.size, kAdamThreads * kAdamScalars)), dim3(kAdamThreads)}, stream, params);
}

template <class T>
const char* launch_either(const AdamParams& params, Stream stream) {
  return params.updates_weights ? launch_typed<T, true>(params, stream) : launch_typed<T, false>(params, stream);
}

template <class T>
const char* launch_8bit(const Adam8BitParams& params, Stream stream) {
  const bool aligned = params.length % kLaneValues == 0 && allows_packs(static_cast<const T*>(params.low)) &&
                       allows_packs(static_cast<const T*>(params.direction)) && allows_packs(params.exp_avg) &&
                       allows_packs(params.exp_avg_sq);
  const int64_t blocks = params.rank * quant_blocks(params.length);
  constexpr int kPerBlock = kQuantThreads / kWarpSize;
  // Blocks that stay fill the tables of the maps once.
  const int64_t resident = int64_t{multiprocessors()} * kQuantResident;
  const int64_t wanted = (blocks + kPerBlock - 1) / kPerBlock;
  const Grid grid{dim3(static_cast<unsigned>(wanted < resident ? wanted : resident)), dim3(kQuantThreads)};
  return aligned ? launch(adam_8bit_kernel<T, true>, grid, stream, params, QuantMaps{kSignedMap, kUnsignedMap})
                 : launch(adam_8bit_kernel<T, false>, grid, stream, params, QuantMaps{kSignedMap, kUnsignedMap});
}

}  // namespace

const char* launch_adam_rule(const AdamRuleParams& params, Stream stream) {
  return launch(adam_rule_kernel, Grid{dim3(1), dim3(1)}, stream, params);
}

const char* launch_adam(const AdamParams& params, Stream stream) {
  switch (params.type) {
    case DataType::f32: return launch_either<float>(params, stream);
    case DataType::f64: return launch_either<double>(params, stream);
    case DataType::bf16: return launch_either<bf16>(params, stream);
    case DataType::f16: return launch_either<f16>(params, stream);
  }
  return "unknown data type";
}

const char* launch_adam_8bit(const Adam8BitParams& params, Stream stream) {
  switch (params.type) {
    case DataType::f32: return launch_8bit<float>(params, stream);
    case DataType::bf16: return launch_8bit<bf16>(params, stream);
    case DataType::f16: return launch_8bit<f16>(params, stream);
    case DataType::f64: break;
  }
  return "8-bit moments with float64 gradients";
}

}  // namespace pykern::lowrank
