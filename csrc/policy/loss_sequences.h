// Sequences of a policy loss on the CPU: their bounds, their shares of the work, what their tokens count.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "policy/loss.h"
#include "policy/loss_arguments.h"

namespace pykern {

// A long sequence is cut, unless its ratio needs all of it; short ones share a task.
constexpr int64_t kSegmentTokens = 8192;

// In the order of AGGREGATES in pykern/policy/losses.py.
enum class Aggregate : int64_t { token_mean, token_sum, sequence_sum, sequence_mean, sequence_sum_norm };

struct LossTasks {
  std::vector<LossSegment> segments;
  std::vector<int64_t> first;     // segment of each task, and one past the last
  std::vector<int64_t> lengths;   // unmasked tokens of each sequence
  int64_t tokens = 0;             // unmasked, of all of them
  int64_t nonempty_sequences = 0;

  int64_t tasks() const { return static_cast<int64_t>(first.size()) - 1; }
};

// Checks the offsets' values. `whole` keeps sequences in one piece.
LossTasks share_loss(const Tensor& logprobs, const std::optional<Tensor>& mask, const std::optional<Tensor>& cu_seqlens,
                     bool whole);

// What each token of a sequence counts in the loss.
std::vector<double> sequence_weights(const LossTasks& tasks, Aggregate aggregate, bool count_empty, double denominator,
                                     double horizon);

}  // namespace pykern
