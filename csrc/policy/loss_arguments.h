// The arguments of policy_loss's ops and their checks, which the CPU and the CUDA side share; `on_device` is
// check_cpu or its CUDA kin.
#pragma once

#include <optional>
#include <vector>

#include "common/checks.h"

namespace pykern {

// Each counts in a tuple of pykern/policy/losses.py; kl and anchor from 1, zero standing for none.
struct LossChoice {
  enum : int {
    ratio,
    rule,
    weight_negative_only,
    stabilisation,
    kl,
    kl_gradient,
    anchor,
    rollout_rule,
    aggregate,
    count_empty,
    count
  };
};

struct LossSetting {
  enum : int {
    ratio_low,  // 1 - clip_low, 1 + clip_high; for a clipped sequence bounds of the log-ratio, -clip_low, clip_high
    ratio_high,
    ratio_limit,
    dual_clip,
    shape0,  // temperatures of the gate for A > 0 and else; power and rate of the taper for A >= 0, for A < 0
    shape1,
    shape2,
    shape3,
    negative_scale,
    stabilisation_low,
    stabilisation_high,
    log_ratio_limit,
    sequence_log_ratio_low,
    sequence_log_ratio_high,
    kl_coef,
    kl_log_ratio_limit,
    kl_limit,
    anchor_coef,
    rollout_low,
    rollout_high,
    entropy_coef,
    denominator,  // zero: count the tokens or sequences of this call
    horizon,
    count
  };
};

// The tensors of policy_loss_forward, in its order.
struct LossTensors {
  Tensor logprobs, old_logprobs, advantages;
  std::optional<Tensor> mask, cu_seqlens, keep, ref_logprobs, anchor_logprobs, anchor_keep, rollout_logprobs,
      rollout_weights, entropy, clip_low, clip_high, second_advantages, advantage_weights, token_weights;
};

// Which of those that may be one per sequence are one per token.
struct LossShape {
  int64_t sequences;
  bool advantages_per_token, rollout_weights_per_token, second_advantages_per_token, advantage_weights_per_token;
};

// Checks what tells sequences apart, but not the values of the offsets.
inline int64_t check_sequences(const Tensor& logprobs, const std::optional<Tensor>& cu_seqlens,
                               DeviceCheck on_device) {
  if (!cu_seqlens) {
    check_dim(logprobs, 2, "logprobs");
    return logprobs.size(0);
  }
  check_dim(logprobs, 1, "logprobs");
  on_device(*cu_seqlens, "cu_seqlens");
  check_dim(*cu_seqlens, 1, "cu_seqlens");
  check_type(*cu_seqlens, ScalarType::Long, "cu_seqlens");
  check_contiguous(*cu_seqlens, "cu_seqlens");
  STD_TORCH_CHECK(cu_seqlens->numel() > 0, "cu_seqlens: expected at least one entry");
  return cu_seqlens->numel() - 1;
}

inline void check_tokens(const std::optional<Tensor>& tensor, const Tensor& logprobs, ScalarType type,
                         const char* name, DeviceCheck on_device) {
  if (!tensor) return;
  on_device(*tensor, name);
  check_type(*tensor, type, name);
  check_contiguous(*tensor, name);
  check_dim(*tensor, logprobs.dim(), name);
  for (int64_t dim = 0; dim < logprobs.dim(); ++dim) check_size(*tensor, dim, logprobs.size(dim), name);
}

// Returns whether there is a value for each token, rather than for each sequence. Where there are as many tokens as
// sequences, there is one for each sequence.
inline bool check_tokens_or_sequences(const std::optional<Tensor>& tensor, const Tensor& logprobs, int64_t sequences,
                                      const char* name, DeviceCheck on_device) {
  if (!tensor) return false;
  const bool per_token = tensor->dim() != 1 || tensor->size(0) != sequences;
  if (per_token) {
    check_tokens(tensor, logprobs, logprobs.scalar_type(), name, on_device);
    return true;
  }
  on_device(*tensor, name);
  check_type(*tensor, logprobs.scalar_type(), name);
  check_contiguous(*tensor, name);
  return false;
}

inline void check_floating(const Tensor& logprobs) {
  const ScalarType type = logprobs.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double, "logprobs: expected float32 or float64");
}

inline void check_aggregate(int64_t aggregate) {
  STD_TORCH_CHECK(aggregate >= 0 && aggregate <= 4, "aggregate: unknown");
}

inline LossShape check_loss(const LossTensors& tensors, const std::vector<int64_t>& choices,
                            const std::vector<double>& settings, DeviceCheck on_device) {
  using Choice = LossChoice;
  constexpr int64_t kHighest[Choice::count] = {3, 4, 1, 2, 4, 2, 4, 1, 4, 1};
  constexpr int64_t kClippedSequence = 3;
  STD_TORCH_CHECK(choices.size() == Choice::count, "choices: expected ", int(Choice::count), " values");
  STD_TORCH_CHECK(settings.size() == LossSetting::count, "settings: expected ", int(LossSetting::count), " values");
  for (int index = 0; index < Choice::count; ++index) {
    STD_TORCH_CHECK(choices[index] >= 0 && choices[index] <= kHighest[index], "choices: entry ", index,
                    " is in no table");
  }
  const Tensor& logprobs = tensors.logprobs;
  check_floating(logprobs);
  const ScalarType type = logprobs.scalar_type();
  STD_TORCH_CHECK(choices[Choice::kl] == 0 || tensors.ref_logprobs, "ref_logprobs: the KL estimate needs them");
  STD_TORCH_CHECK(choices[Choice::anchor] == 0 || tensors.anchor_logprobs, "anchor_logprobs: the anchor needs them");
  STD_TORCH_CHECK(tensors.second_advantages.has_value() == tensors.advantage_weights.has_value(),
                  "second_advantages: expected beside advantage_weights, and those beside them");
  STD_TORCH_CHECK(!tensors.second_advantages || choices[Choice::ratio] != kClippedSequence,
                  "second_advantages: a ratio of clipped sequences takes one advantage");
  check_tokens(logprobs, logprobs, type, "logprobs", on_device);
  check_tokens(tensors.old_logprobs, logprobs, type, "old_logprobs", on_device);
  check_tokens(tensors.mask, logprobs, ScalarType::Bool, "mask", on_device);
  check_tokens(tensors.keep, logprobs, ScalarType::Bool, "keep", on_device);
  check_tokens(tensors.ref_logprobs, logprobs, type, "ref_logprobs", on_device);
  check_tokens(tensors.anchor_logprobs, logprobs, type, "anchor_logprobs", on_device);
  check_tokens(tensors.anchor_keep, logprobs, ScalarType::Bool, "anchor_keep", on_device);
  check_tokens(tensors.rollout_logprobs, logprobs, type, "rollout_logprobs", on_device);
  check_tokens(tensors.entropy, logprobs, type, "entropy", on_device);
  check_tokens(tensors.clip_low, logprobs, type, "clip_low", on_device);
  check_tokens(tensors.clip_high, logprobs, type, "clip_high", on_device);
  check_tokens(tensors.token_weights, logprobs, type, "token_weights", on_device);
  const int64_t sequences = check_sequences(logprobs, tensors.cu_seqlens, on_device);
  const auto per_token = [&](const std::optional<Tensor>& tensor, const char* name) {
    return check_tokens_or_sequences(tensor, logprobs, sequences, name, on_device);
  };
  return {sequences, per_token(tensors.advantages, "advantages"),
          per_token(tensors.rollout_weights, "rollout_weights"),
          per_token(tensors.second_advantages, "second_advantages"),
          per_token(tensors.advantage_weights, "advantage_weights")};
}

}  // namespace pykern
