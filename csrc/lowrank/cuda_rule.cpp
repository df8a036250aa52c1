// Host side of the inner rules on CUDA.
#include "lowrank/cuda_rule.h"

namespace pykern {
namespace lowrank {

Tensor resolve(ResolveParams& params, const Tensors& step, Stream stream) {
  const int64_t count = static_cast<int64_t>(step.size());
  const Tensor rules =
      cuda::empty(step[0], {count * static_cast<int64_t>(sizeof(ResolvedRule))}, ScalarType::Byte);
  params.rules = cuda::workspace<ResolvedRule>(rules);
  std::vector<float*> steps;
  steps.reserve(step.size());
  for (const Tensor& one : step) steps.push_back(cuda::output<float>(one));
  cuda::check_launch(launch_resolve(params, steps.data(), count, stream), "the count of the steps");
  return rules;
}

void apply_rule(const RuleParams& params, const ResolvedRule* rules, const Tensors& low, const Tensors& exp_avg,
                const Tensors& exp_avg_sq, const Tensors& exp_avg_scale, const Tensors& exp_avg_sq_scale,
                const Tensors& direction, Stream stream) {
  std::vector<RuleMatrix> matrices(low.size());
  for (size_t i = 0; i < low.size(); ++i) {
    RuleMatrix& matrix = matrices[i];
    matrix.rule = rules + i;
    matrix.low = cuda::input(low[i]);
    matrix.exp_avg = cuda::output(exp_avg[i]);
    matrix.exp_avg_sq = exp_avg_sq.empty() ? nullptr : cuda::output(exp_avg_sq[i]);
    matrix.exp_avg_scale = exp_avg_scale.empty() ? nullptr : cuda::output<float>(exp_avg_scale[i]);
    matrix.exp_avg_sq_scale = exp_avg_sq_scale.empty() ? nullptr : cuda::output<float>(exp_avg_sq_scale[i]);
    matrix.direction = cuda::output(direction[i]);
    matrix.rank = low[i].size(0);
    matrix.length = low[i].size(1);
  }
  cuda::check_launch(launch_rule(params, matrices.data(), static_cast<int64_t>(matrices.size()), stream),
                     "low_rank_rule");
}

}  // namespace lowrank

namespace {

using lowrank::OptionalTensor;
using lowrank::Tensors;

void run_rule(Tensors low, Tensors exp_avg, Tensors exp_avg_sq, Tensors exp_avg_scale, Tensors exp_avg_sq_scale,
              Tensors step, Tensors direction, Tensor step_factor, OptionalTensor found_inf, int64_t rule,
              double beta1, double beta2, double eps, bool corrected_eps) {
  const lowrank::MomentStorage storage =
      lowrank::check_rule(low, exp_avg, exp_avg_sq, exp_avg_scale, exp_avg_sq_scale, step, direction, step_factor,
                          found_inf, rule, cuda::check_device);
  if (low.empty()) return;
  const cuda::DeviceGuard guard(low[0]);
  const Stream stream = cuda::current_stream(low[0]);

  lowrank::RuleParams params{};
  params.type = data_type(low[0], "low");
  params.storage = storage;
  params.rule = lowrank::checked_rule(rule);
  params.found_inf = cuda::input<float>(found_inf);

  lowrank::ResolveParams resolve{};
  resolve.found_inf = params.found_inf;
  resolve.beta1 = beta1;
  resolve.beta2 = beta2;
  resolve.eps = eps;
  resolve.corrected_eps = corrected_eps;
  resolve.adaptive = params.rule == lowrank::InnerRule::adamw || params.rule == lowrank::InnerRule::adabelief;
  resolve.step_factor = cuda::output<double>(step_factor);
  const Tensor rules = lowrank::resolve(resolve, step, stream);
  lowrank::apply_rule(params, resolve.rules, low, exp_avg, exp_avg_sq, exp_avg_scale, exp_avg_sq_scale, direction,
                      stream);
}

}  // namespace

PYKERN_CUDA_IMPL(m) { m.impl("low_rank_rule", TORCH_BOX(&run_rule)); }

}  // namespace pykern
