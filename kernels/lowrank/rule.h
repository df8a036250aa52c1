// The inner rules and plain AdamW on the GPU, over lists, as plain parameters.
//
// Step counts, learning rate, gradient scale and found_inf live on the device. One small kernel resolves them into
// the constants of each matrix's update and advances the counts; the kernels after it on the stream only read those.
// So a count advances exactly once for a call, whether eager or replayed from a graph.
#pragma once

#include <cstdint>

#include "kernels/common/numeric.h"
#include "kernels/common/stream.h"
#include "kernels/lowrank/parts_kinds.h"

namespace pykern::lowrank {

// N = first * m / (second * sqrt(v) + eps), w <- w - (shrink * w + step_size * N). Aligned, so that a thread reads it
// in a few wide loads.
template <class C>
struct alignas(16) RuleFactors {
  C beta1, rest1, beta2, rest2, first, second, eps, gradient, shrink, step_size;
};

struct ResolvedRule {
  RuleFactors<float> single;
  RuleFactors<double> wide;
};

struct ResolveParams {
  const float* grad_scale;  // null: 1
  const float* found_inf;   // null: 0; where it is not zero, the counts stay
  const void* lr;           // null: a rate of 1
  bool lr_is_double;
  double beta1, beta2, eps, weight_decay;
  bool decay_after, corrected_eps, maximize;
  ResolvedRule* rules;  // [count]
  // [count], or null: the factor on the learning rate. It is in the rules' step_size, too.
  double* step_factor;
  bool adaptive;  // with bias corrections; else the factor is 1
};

// steps: `count` pointers to one element each.
const char* launch_resolve(const ResolveParams& params, float* const* steps, int64_t count, Stream stream);

// One matrix [rank, length] without gaps, of float32, or float64 with moments of that. A rule without a second moment
// has no exp_avg_sq.
struct RuleMatrix {
  const ResolvedRule* rule;
  const void* low;
  void* exp_avg;
  void* exp_avg_sq;
  float* exp_avg_scale;  // [rank, quant_blocks(length)], 8-bit moments only
  float* exp_avg_sq_scale;
  void* direction;
  int64_t rank, length;
  bool packs;  // sixteen-byte accesses are possible; the launcher sets it
};

struct RuleParams {
  DataType type;  // f32 or f64
  MomentStorage storage;
  InnerRule rule;
  const float* found_inf;  // where it is not zero, moments stay and directions are zero
};

const char* launch_rule(const RuleParams& params, const RuleMatrix* matrices, int64_t count, Stream stream);

// One tensor without gaps, and three like it. Moments are float64 where the type is, else float32.
struct AdamWTensor {
  const ResolvedRule* rule;
  void* param;
  const void* grad;
  void* exp_avg;
  void* exp_avg_sq;
  int64_t size;
  // The launcher's: elements before the first that is aligned to sixteen bytes in all four, and packs of sixteen
  // bytes of the weight from there on; none where they are aligned differently.
  int64_t packs;
  int head;
};

struct AdamWParams {
  DataType type;
  const float* found_inf;
};

const char* launch_adamw(const AdamWParams& params, const AdamWTensor* tensors, int64_t count, Stream stream);

}  // namespace pykern::lowrank
