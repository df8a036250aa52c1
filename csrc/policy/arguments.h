// Checks of the ops' arguments that the CPU and the CUDA side share; `on_device` is check_cpu or its CUDA kin.
#pragma once

#include <optional>

#include "common/checks.h"

namespace pykern {

<<<<<<< HEAD
// --- group_advantages --------------------------------------------------------------------------------------

inline void check_row_values(const std::optional<Tensor>& tensor, int64_t rows, ScalarType type, const char* name,
                             DeviceCheck on_device) {
  if (!tensor) return;
  on_device(*tensor, name);
  check_dim(*tensor, 1, name);
  check_size(*tensor, 0, rows, name);
  check_type(*tensor, type, name);
  check_contiguous(*tensor, name);
}

// `baseline` and `scale` count in BASELINES and SCALES of pykern/policy/advantages.py.
inline void check_advantages(const Tensor& rewards, const Tensor& group_ids, const std::optional<Tensor>& lengths,
                             const std::optional<Tensor>& baseline_rewards, int64_t baseline, int64_t scale,
                             DeviceCheck on_device) {
  constexpr int64_t kLengthWeighted = 3, kGiven = 4, kTokenWhiten = 3;
  check_dim(rewards, 1, "rewards");
  const int64_t rows = rewards.size(0);
  const ScalarType type = rewards.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double, "rewards: expected float32 or float64");
  STD_TORCH_CHECK(baseline >= 0 && baseline <= 4 && scale >= 0 && scale <= 3, "baseline or scale: unknown");
  STD_TORCH_CHECK(lengths || (baseline != kLengthWeighted && scale != kTokenWhiten),
                  "lengths: this estimator needs them");
  STD_TORCH_CHECK(baseline_rewards.has_value() == (baseline == kGiven),
                  "baseline_rewards: needed by a given baseline, and by no other");
  check_row_values(rewards, rows, type, "rewards", on_device);
  check_row_values(group_ids, rows, ScalarType::Long, "group_ids", on_device);
  check_row_values(lengths, rows, ScalarType::Long, "lengths", on_device);
  check_row_values(baseline_rewards, rows, type, "baseline_rewards", on_device);
=======
// --- policy_loss -------------------------------------------------------------------------------------------

// In the order of the floats that pykern/policy/loss.py passes.
enum Setting : int {
  kRatioLow,
  kRatioHigh,
  kDualClip,
  kLogRatioLimit,
  kSequenceLogRatioLimit,
  kKlCoef,
  kKlLogRatioLimit,
  kKlLimit,
  kRolloutClip,
  kDenominator,  // zero: count the tokens or sequences of this call
  kHorizon,
  kSettings
};

inline void check_tokens(const std::optional<Tensor>& tensor, const Tensor& logprobs, ScalarType type,
                         const char* name, DeviceCheck on_device) {
  if (!tensor) return;
  on_device(*tensor, name);
  check_type(*tensor, type, name);
  check_contiguous(*tensor, name);
  check_dim(*tensor, logprobs.dim(), name);
  for (int64_t dim = 0; dim < logprobs.dim(); ++dim) check_size(*tensor, dim, logprobs.size(dim), name);
}

// All but the advantages, whose size depends on the sequences.
inline void check_loss(const Tensor& logprobs, const Tensor& old_logprobs, const std::optional<Tensor>& mask,
                       const std::optional<Tensor>& ref_logprobs, const std::optional<Tensor>& rollout_logprobs,
                       int64_t kl, int64_t aggregate, const std::vector<double>& settings, DeviceCheck on_device) {
  const ScalarType type = logprobs.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double, "logprobs: expected float32 or float64");
  STD_TORCH_CHECK(settings.size() == kSettings, "settings: expected ", int(kSettings), " values");
  STD_TORCH_CHECK(kl >= 0 && kl <= 3 && aggregate >= 0 && aggregate <= 4, "kl or aggregate: unknown");
  STD_TORCH_CHECK(kl == 0 || ref_logprobs, "ref_logprobs: the KL estimate needs them");
  check_tokens(logprobs, logprobs, type, "logprobs", on_device);
  check_tokens(old_logprobs, logprobs, type, "old_logprobs", on_device);
  check_tokens(ref_logprobs, logprobs, type, "ref_logprobs", on_device);
  check_tokens(rollout_logprobs, logprobs, type, "rollout_logprobs", on_device);
  check_tokens(mask, logprobs, ScalarType::Bool, "mask", on_device);
}

// Returns whether there is an advantage for each token, rather than for each sequence.
inline bool check_loss_advantages(const Tensor& advantages, const Tensor& logprobs, int64_t sequences,
                                  DeviceCheck on_device) {
  const bool per_token = advantages.dim() != 1 || advantages.size(0) != sequences;
  if (per_token) check_tokens(advantages, logprobs, logprobs.scalar_type(), "advantages", on_device);
  on_device(advantages, "advantages");
  check_type(advantages, logprobs.scalar_type(), "advantages");
  check_contiguous(advantages, "advantages");
  return per_token;
>>>>>>> advcpu
}

}  // namespace pykern
