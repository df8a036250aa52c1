#include "kernels/common/launch.h"
#include "kernels/lowrank/resolve_sm80.cuh"
#include "kernels/lowrank/rule_8bit_sm80.cuh"
#include "kernels/lowrank/rule_sm80.cuh"

namespace pykern::lowrank {
namespace {

int64_t blocks_for(int64_t count, int64_t per_block) { return (count + per_block - 1) / per_block; }

RuleMatrix prepared(RuleMatrix matrix) {
  const auto aligned = [](const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; };
  matrix.packs = aligned(matrix.low) && aligned(matrix.direction) && aligned(matrix.exp_avg) &&
                 aligned(matrix.exp_avg_sq);
  return matrix;
}

template <class C, class M>
const char* launch_wide(const RuleParams& params, const RuleMatrix* matrices, int64_t count, Stream stream) {
  RuleTable table;
  return launch_grouped(
      table, count, [&](int64_t i) { return prepared(matrices[i]); },
      [&](int64_t i) {
        return blocks_for(matrices[i].rank * matrices[i].length, kRuleThreads * int64_t{Pack<M>::kSize});
      },
      [&](const RuleTable& filled) {
        return launch(inner_rule_kernel<C, M>, Grid{dim3(filled.tiles), dim3(kRuleThreads)}, stream, filled, params);
      });
}

template <bool kSecond>
const char* launch_8bit(const RuleParams& params, const RuleMatrix* matrices, int64_t count, Stream stream) {
  RuleTable table;
  return launch_grouped(
      table, count,
      [&](int64_t i) {
        RuleMatrix matrix = prepared(matrices[i]);
        matrix.packs = matrix.packs && matrix.length % kLaneValues == 0;
        return matrix;
      },
      [&](int64_t i) { return blocks_for(matrices[i].rank * quant_blocks(matrices[i].length), kQuantWarps); },
      [&](const RuleTable& filled) {
        const int64_t resident = int64_t{multiprocessors()} * kQuantResident;
        const dim3 blocks(static_cast<unsigned>(filled.tiles < resident ? filled.tiles : resident));
        return launch(inner_rule_8bit_kernel<kSecond>, Grid{blocks, dim3(kQuantThreads)}, stream, filled, params);
      });
}

}  // namespace

const char* launch_resolve(const ResolveParams& params, float* const* steps, int64_t count, Stream stream) {
  for (int64_t begin = 0; begin < count; begin += kStepsPerLaunch) {
    StepTable table;
    table.count = static_cast<int>(count - begin < kStepsPerLaunch ? count - begin : kStepsPerLaunch);
    for (int i = 0; i < table.count; ++i) table.steps[i] = steps[begin + i];
    ResolveParams part = params;
    part.rules += begin;
    if (part.step_factor != nullptr) part.step_factor += begin;
    const char* error =
        launch(resolve_steps_kernel, Grid{dim3(1), dim3(kResolveThreads)}, stream, table, part);
    if (error != nullptr) return error;
  }
  return nullptr;
}

const char* launch_rule(const RuleParams& params, const RuleMatrix* matrices, int64_t count, Stream stream) {
  if (params.type == DataType::f64) return launch_wide<double, double>(params, matrices, count, stream);
  switch (params.storage) {
    case MomentStorage::wide: return launch_wide<float, float>(params, matrices, count, stream);
    case MomentStorage::bfloat16: return launch_wide<float, bf16>(params, matrices, count, stream);
    case MomentStorage::eight_bit:
      return has_second(params.rule) ? launch_8bit<true>(params, matrices, count, stream)
                                     : launch_8bit<false>(params, matrices, count, stream);
  }
  return "unknown storage of the moments";
}

}  // namespace pykern::lowrank
