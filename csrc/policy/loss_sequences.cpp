#include "policy/loss_sequences.h"

#include <torch/csrc/stable/library.h>

#include "common/parallel.h"

namespace pykern {
namespace {

std::vector<int64_t> sequence_starts(const Tensor& logprobs, const std::optional<Tensor>& cu_seqlens) {
  std::vector<int64_t> starts;
  const int64_t sequences = check_sequences(logprobs, cu_seqlens, check_cpu);
  if (!cu_seqlens) {
    starts.reserve(sequences + 1);
    for (int64_t row = 0; row <= sequences; ++row) starts.push_back(row * logprobs.size(1));
    return starts;
  }
  const int64_t* values = input<int64_t>(*cu_seqlens);
  starts.assign(values, values + cu_seqlens->numel());
  STD_TORCH_CHECK(starts.front() == 0 && starts.back() == logprobs.size(0),
                  "cu_seqlens: expected to begin with 0 and end with the number of tokens, ", logprobs.size(0));
  for (size_t i = 1; i < starts.size(); ++i) {
    STD_TORCH_CHECK(starts[i] >= starts[i - 1], "cu_seqlens: expected non-decreasing values, entry ", i, " is smaller");
  }
  return starts;
}

void count_tokens(LossTasks* tasks, const uint8_t* mask) {
  std::vector<int64_t> unmasked(tasks->segments.size());
  const auto count_mask = count_unmasked();
  const auto count = [&](int64_t task, int) {
    for (int64_t index = tasks->first[task]; index < tasks->first[task + 1]; ++index) {
      const LossSegment& segment = tasks->segments[index];
      const int64_t size = segment.end - segment.begin;
      unmasked[index] = mask ? count_mask(mask + segment.begin, size) : size;
    }
  };
  if (mask) {
    parallel_tasks(tasks->tasks(), count);
  } else {
    for (int64_t task = 0; task < tasks->tasks(); ++task) count(task, 0);
  }
  for (size_t index = 0; index < unmasked.size(); ++index) {
    tasks->lengths[tasks->segments[index].sequence] += unmasked[index];
  }
  for (const int64_t length : tasks->lengths) {
    tasks->tokens += length;
    tasks->nonempty_sequences += length > 0;
  }
}

// What each token counts, as a tensor; where it is masked, 0.
template <class T>
void write_weights(const LossTasks& tasks, const std::vector<double>& weights, const uint8_t* mask, T* target) {
  parallel_tasks(tasks.tasks(), [&](int64_t task, int) {
    for (int64_t index = tasks.first[task]; index < tasks.first[task + 1]; ++index) {
      const LossSegment& segment = tasks.segments[index];
      const T weight = static_cast<T>(weights[segment.sequence]);
      for (int64_t token = segment.begin; token < segment.end; ++token) {
        target[token] = !mask || mask[token] ? weight : T(0);
      }
    }
  });
}

Tensor token_weights(Tensor logprobs, std::optional<Tensor> mask, std::optional<Tensor> cu_seqlens, int64_t aggregate,
                     bool count_empty, double denominator, double horizon) {
  check_floating(logprobs);
  check_aggregate(aggregate);
  const ScalarType type = logprobs.scalar_type();
  check_tokens(logprobs, logprobs, type, "logprobs", check_cpu);
  check_tokens(mask, logprobs, ScalarType::Bool, "mask", check_cpu);
  const LossTasks tasks = share_loss(logprobs, mask, cu_seqlens, false);
  const std::vector<double> weights =
      sequence_weights(tasks, static_cast<Aggregate>(aggregate), count_empty, denominator, horizon);
  Tensor result = torch::stable::empty_like(logprobs);
  const auto* mask_data = mask ? input<uint8_t>(*mask) : nullptr;
  if (type == ScalarType::Double) {
    write_weights(tasks, weights, mask_data, output<double>(result));
  } else {
    write_weights(tasks, weights, mask_data, output<float>(result));
  }
  return result;
}

}  // namespace

LossTasks share_loss(const Tensor& logprobs, const std::optional<Tensor>& mask, const std::optional<Tensor>& cu_seqlens,
                     bool whole) {
  const std::vector<int64_t> starts = sequence_starts(logprobs, cu_seqlens);
  LossTasks tasks;
  tasks.lengths.assign(starts.size() - 1, 0);
  tasks.segments.reserve(starts.size() - 1);
  for (size_t sequence = 0; sequence + 1 < starts.size(); ++sequence) {
    const int64_t end = starts[sequence + 1];
    for (int64_t begin = starts[sequence]; begin < end;) {
      const int64_t stop = whole || end - begin <= kSegmentTokens ? end : begin + kSegmentTokens;
      tasks.segments.push_back({static_cast<int64_t>(sequence), begin, stop});
      begin = stop;
    }
  }
  tasks.first.push_back(0);
  int64_t tokens = 0;
  for (size_t index = 0; index < tasks.segments.size(); ++index) {
    tokens += tasks.segments[index].end - tasks.segments[index].begin;
    if (tokens >= kSegmentTokens || index + 1 == tasks.segments.size()) {
      tasks.first.push_back(static_cast<int64_t>(index) + 1);
      tokens = 0;
    }
  }
  count_tokens(&tasks, mask ? static_cast<const uint8_t*>(mask->const_data_ptr()) : nullptr);
  return tasks;
}

std::vector<double> sequence_weights(const LossTasks& tasks, Aggregate aggregate, bool count_empty, double denominator,
                                     double horizon) {
  const auto over = [&](int64_t counted) {
    const double divisor = denominator > 0 ? denominator : static_cast<double>(counted);
    return divisor > 0 ? 1 / divisor : 0;
  };
  const auto all = static_cast<int64_t>(tasks.lengths.size());
  const double by_token = over(tasks.tokens), by_sequence = over(count_empty ? all : tasks.nonempty_sequences);
  std::vector<double> weights;
  weights.reserve(tasks.lengths.size());
  for (const int64_t length : tasks.lengths) {
    switch (aggregate) {
      case Aggregate::token_mean: weights.push_back(by_token); break;
      case Aggregate::token_sum: weights.push_back(1); break;
      case Aggregate::sequence_sum: weights.push_back(by_sequence); break;
      case Aggregate::sequence_mean:
        weights.push_back(length > 0 ? by_sequence / static_cast<double>(length) : 0);
        break;
      case Aggregate::sequence_sum_norm: weights.push_back(by_sequence / horizon); break;
    }
  }
  return weights;
}

STABLE_TORCH_LIBRARY_IMPL(pykern, CPU, m) { m.impl("policy_loss_token_weights", TORCH_BOX(&token_weights)); }

}  // namespace pykern
