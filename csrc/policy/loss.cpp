// Host side of policy_loss on the CPU.
#include "policy/loss.h"

#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>
#include <vector>

#include "common/parallel.h"
#include "policy/arguments.h"

namespace pykern {
namespace {

// In the order of AGGREGATES in pykern/policy/loss.py.
enum class Aggregate : int64_t { token_mean, token_sum, sequence_sum, sequence_mean, sequence_sum_norm };

// Policy loss, KL loss, then means over the tokens; see METRICS in pykern/policy/loss.py.
constexpr int64_t kMetrics = 10;

// A long sequence is cut, unless its ratio needs all of it; short ones share a task.
constexpr int64_t kSegmentTokens = 8192;

std::vector<int64_t> sequence_starts(const Tensor& logprobs, const std::optional<Tensor>& cu_seqlens) {
  std::vector<int64_t> starts;
  if (!cu_seqlens) {
    check_dim(logprobs, 2, "logprobs");
    for (int64_t row = 0; row <= logprobs.size(0); ++row) starts.push_back(row * logprobs.size(1));
    return starts;
  }
  check_dim(logprobs, 1, "logprobs");
  check_cpu(*cu_seqlens, "cu_seqlens");
  check_dim(*cu_seqlens, 1, "cu_seqlens");
  check_type(*cu_seqlens, ScalarType::Long, "cu_seqlens");
  check_contiguous(*cu_seqlens, "cu_seqlens");
  const int64_t* values = input<int64_t>(*cu_seqlens);
  starts.assign(values, values + cu_seqlens->numel());
  STD_TORCH_CHECK(!starts.empty() && starts.front() == 0 && starts.back() == logprobs.size(0),
                  "cu_seqlens: expected to begin with 0 and end with the number of tokens, ", logprobs.size(0));
  for (size_t i = 1; i < starts.size(); ++i) {
    STD_TORCH_CHECK(starts[i] >= starts[i - 1], "cu_seqlens: expected non-decreasing values, entry ", i, " is smaller");
  }
  return starts;
}

std::vector<LossSegment> cut(const std::vector<int64_t>& starts, bool whole) {
  std::vector<LossSegment> segments;
  for (size_t sequence = 0; sequence + 1 < starts.size(); ++sequence) {
    const int64_t end = starts[sequence + 1];
    for (int64_t begin = starts[sequence]; begin < end;) {
      const int64_t stop = whole || end - begin <= kSegmentTokens ? end : begin + kSegmentTokens;
      segments.push_back({static_cast<int64_t>(sequence), begin, stop});
      begin = stop;
    }
  }
  return segments;
}

// First segment of each task, and one past the last.
std::vector<int64_t> share(const std::vector<LossSegment>& segments) {
  std::vector<int64_t> first{0};
  int64_t tokens = 0;
  for (size_t index = 0; index < segments.size(); ++index) {
    tokens += segments[index].end - segments[index].begin;
    if (tokens >= kSegmentTokens || index + 1 == segments.size()) {
      first.push_back(static_cast<int64_t>(index) + 1);
      tokens = 0;
    }
  }
  return first;
}

struct Counts {
  std::vector<int64_t> lengths;
  int64_t tokens = 0, sequences = 0;
};

Counts count(const std::vector<int64_t>& starts, const std::vector<LossSegment>& segments,
             const std::vector<int64_t>& tasks, const uint8_t* mask) {
  Counts counts;
  std::vector<int64_t> unmasked(segments.size());
  const auto count_mask = count_unmasked();
  parallel_tasks(static_cast<int64_t>(tasks.size()) - 1, [&](int64_t task, int) {
    for (int64_t index = tasks[task]; index < tasks[task + 1]; ++index) {
      const LossSegment& segment = segments[index];
      const int64_t size = segment.end - segment.begin;
      unmasked[index] = mask ? count_mask(mask + segment.begin, size) : size;
    }
  });
  counts.lengths.assign(starts.size() - 1, 0);
  for (size_t index = 0; index < segments.size(); ++index) counts.lengths[segments[index].sequence] += unmasked[index];
  for (const int64_t length : counts.lengths) {
    counts.tokens += length;
    counts.sequences += length > 0;
  }
  return counts;
}

// What each token of a sequence counts in the loss.
std::vector<double> sequence_weights(const Counts& counts, Aggregate aggregate, double denominator, double horizon) {
  const auto over = [&](int64_t counted) {
    const double divisor = denominator > 0 ? denominator : static_cast<double>(counted);
    return divisor > 0 ? 1 / divisor : 0;
  };
  std::vector<double> weights;
  for (const int64_t length : counts.lengths) {
    switch (aggregate) {
      case Aggregate::token_mean: weights.push_back(over(counts.tokens)); break;
      case Aggregate::token_sum: weights.push_back(1); break;
      case Aggregate::sequence_sum: weights.push_back(over(counts.sequences)); break;
      case Aggregate::sequence_mean:
        weights.push_back(length > 0 ? over(counts.sequences) / static_cast<double>(length) : 0);
        break;
      case Aggregate::sequence_sum_norm: weights.push_back(over(counts.sequences) / horizon); break;
    }
  }
  return weights;
}

void write_scalar(Tensor& target, int64_t index, double value) {
  if (target.scalar_type() == ScalarType::Double) {
    output<double>(target)[index] = value;
  } else {
    output<float>(target)[index] = static_cast<float>(value);
  }
}

std::tuple<Tensor, Tensor, Tensor> forward(Tensor logprobs, Tensor old_logprobs, Tensor advantages,
                                           std::optional<Tensor> mask, std::optional<Tensor> cu_seqlens,
                                           std::optional<Tensor> ref_logprobs, std::optional<Tensor> rollout_logprobs,
                                           bool sequence_ratio, bool weight_clip, int64_t kl, int64_t aggregate,
                                           std::vector<double> settings, bool with_gradient) {
  const ScalarType type = logprobs.scalar_type();
  check_loss(logprobs, old_logprobs, mask, ref_logprobs, rollout_logprobs, kl, aggregate, settings, check_cpu);
  const std::vector<int64_t> starts = sequence_starts(logprobs, cu_seqlens);
  const auto sequences = static_cast<int64_t>(starts.size()) - 1;
  const bool per_token = check_loss_advantages(advantages, logprobs, sequences, check_cpu);

  Tensor loss = torch::stable::new_empty(logprobs, {});
  Tensor metrics = torch::stable::new_empty(logprobs, {kMetrics});
  Tensor coefficient = with_gradient ? torch::stable::empty_like(logprobs) : torch::stable::new_empty(logprobs, {0});

  const auto pointer = [](const std::optional<Tensor>& tensor) { return tensor ? tensor->const_data_ptr() : nullptr; };
  const auto* mask_data = static_cast<const uint8_t*>(pointer(mask));
  const std::vector<LossSegment> segments = cut(starts, sequence_ratio);
  const std::vector<int64_t> tasks = share(segments);
  const Counts counts = count(starts, segments, tasks, mask_data);
  const std::vector<double> weights = sequence_weights(counts, static_cast<Aggregate>(aggregate),
                                                       settings[kDenominator], settings[kHorizon]);
  std::vector<double> sums(segments.size() * kLossSums);
  const PolicyLossParams params{logprobs.const_data_ptr(),
                                old_logprobs.const_data_ptr(),
                                advantages.const_data_ptr(),
                                pointer(ref_logprobs),
                                pointer(rollout_logprobs),
                                mask_data,
                                with_gradient ? coefficient.mutable_data_ptr() : nullptr,
                                segments.data(),
                                counts.lengths.data(),
                                weights.data(),
                                sums.data(),
                                per_token,
                                sequence_ratio,
                                weight_clip,
                                static_cast<KlEstimator>(kl),
                                settings[kRatioLow],
                                settings[kRatioHigh],
                                settings[kDualClip],
                                settings[kLogRatioLimit],
                                settings[kSequenceLogRatioLimit],
                                settings[kKlCoef],
                                settings[kKlLogRatioLimit],
                                settings[kKlLimit],
                                settings[kRolloutClip]};
  const auto kernel = type == ScalarType::Double ? policy_loss_f64() : policy_loss_f32();
  parallel_tasks(static_cast<int64_t>(tasks.size()) - 1, [&](int64_t task, int) {
    for (int64_t index = tasks[task]; index < tasks[task + 1]; ++index) kernel(params, index);
  });

  double policy_loss = 0, kl_loss = 0, totals[kLossSums] = {};
  for (size_t index = 0; index < segments.size(); ++index) {
    const double* of_segment = sums.data() + index * kLossSums;
    const double weight = weights[segments[index].sequence];
    policy_loss += weight * of_segment[kPolicySum];
    kl_loss += weight * of_segment[kKlSum] * settings[kKlCoef];
    for (int sum = 0; sum < kLossSums; ++sum) totals[sum] += of_segment[sum];
  }
  const double per_token_share = counts.tokens > 0 ? 1 / static_cast<double>(counts.tokens) : 0;
  const double values[kMetrics] = {policy_loss,
                                   kl_loss,
                                   totals[kKlSum] * per_token_share,
                                   totals[kRatioSum] * per_token_share,
                                   -totals[kLogRatioSum] * per_token_share,
                                   (totals[kClippedLow] + totals[kClippedHigh]) * per_token_share,
                                   totals[kClippedLow] * per_token_share,
                                   totals[kClippedHigh] * per_token_share,
                                   totals[kDualClipped] * per_token_share,
                                   totals[kRolloutWeightSum] * per_token_share};
  for (int64_t index = 0; index < kMetrics; ++index) write_scalar(metrics, index, values[index]);
  write_scalar(loss, 0, policy_loss + kl_loss);
  return {loss, coefficient, metrics};
}

Tensor backward(Tensor grad_loss, Tensor coefficient) {
  const ScalarType type = coefficient.scalar_type();
  check_cpu(grad_loss, "grad_loss");
  check_type(grad_loss, type, "grad_loss");
  STD_TORCH_CHECK(grad_loss.numel() == 1, "grad_loss: expected one element");
  check_contiguous(coefficient, "coefficient");
  Tensor gradient = torch::stable::empty_like(coefficient);
  const int64_t count = coefficient.numel(), tasks = (count + kSegmentTokens - 1) / kSegmentTokens;
  const auto scale = scale_f32();
  parallel_tasks(tasks, [&](int64_t task, int) {
    const int64_t begin = task * kSegmentTokens, end = begin + kSegmentTokens < count ? begin + kSegmentTokens : count;
    if (type == ScalarType::Float) {
      scale(input<float>(coefficient) + begin, *input<float>(grad_loss), output<float>(gradient) + begin, end - begin);
    } else {
      const double factor = *input<double>(grad_loss);
      for (int64_t i = begin; i < end; ++i) output<double>(gradient)[i] = input<double>(coefficient)[i] * factor;
    }
  });
  return gradient;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pykern, CPU, m) {
  m.impl("policy_loss_forward", TORCH_BOX(&forward));
  m.impl("policy_loss_backward", TORCH_BOX(&backward));
}

}  // namespace pykern
