// The inner rule and the residual's limit on CUDA, for the ops and for the whole step. Arguments are checked, the
// device is guarded, and the stream is torch's current one.
#pragma once

#include "common/cuda.h"
#include "kernels/lowrank/ratios.h"
#include "kernels/lowrank/rule.h"
#include "lowrank/parts_arguments.h"

namespace pykern::lowrank {

using OptionalTensor = std::optional<Tensor>;

// Counts the steps, and fills params.rules in the memory that it returns. The lists have at least one matrix.
Tensor resolve(ResolveParams& params, const Tensors& step, Stream stream);

void apply_rule(const RuleParams& params, const ResolvedRule* rules, const Tensors& low, const Tensors& exp_avg,
                const Tensors& exp_avg_sq, const Tensors& exp_avg_scale, const Tensors& exp_avg_sq_scale,
                const Tensors& direction, Stream stream);

// The lists of low_rank_ratios and low_rank_limit, and the memory that their kernels share.
class Ratios {
 public:
  Ratios(const RatioParams& params, const Tensors& low, Stream stream);

  // As low_rank_ratios, but without the sums of the matrices.
  void measure(const Tensors& low, const Tensors& direction, const Tensors& squares, const Tensors& low_gram,
               const Tensors& ratios);
  // The sums of the matrices, [matrices, 3].
  void add_up(const Tensor& sums);
  // As low_rank_limit. After measure() the sums are added up first.
  void limit(const Tensors& low, const Tensors& direction, const Tensors& ratios, const Tensor& sums,
             const Tensors& residual_norm);

 private:
  void set_sums(double* sums);

  const RatioParams params_;
  const Stream stream_;
  std::vector<RatioMatrix> matrices_;
  OptionalTensor strip_sums_, limits_;
};

}  // namespace pykern::lowrank
