// policy_loss on a GPU: what the host hands over.
//
// Tokens are told apart by their index in the flat tensors; sequence s holds those from its start to the
// next one's. A sequence is cut into a fixed number of parts, and blocks go over the parts of all sequences
// in turns. Up to three launches: counting, which also keeps the mask as one bit per token and adds up
// what a ratio of whole sequences needs; the pass over the tokens, whose last block adds up the loss.
#pragma once

#include <cstdint>

#include "kernels/common/numeric.h"
#include "kernels/common/stream.h"

namespace pykern {

// In the order of KL_ESTIMATORS in pykern/policy/loss.py; zero stands for none.
enum class KlDivergence : int { none, k1, k2, k3 };

// In the order of AGGREGATES in pykern/policy/loss.py.
enum class LossAggregate : int { token_mean, token_sum, sequence_sum, sequence_mean, sequence_sum_norm };

template <class T>
struct LossBounds {
  T ratio_low, ratio_high, dual_clip, log_ratio_limit, sequence_log_ratio_limit;
  T kl_coef, kl_log_ratio_limit, kl_limit, rollout_clip;
};

// Integers of the whole call, then the unmasked tokens of each sequence; zero at first.
enum LossCounter : int { kFinishedBlocks, kUnmaskedTokens, kNonEmptySequences, kSequenceLengths };

// Sums over a part of a sequence that make up the ratio and the loss of the sequence. A loss is linear in
// the advantage, but for its sign; rollout weights are in the advantages.
enum PartSum : int {
  kLogRatios,
  kPositiveAdvantages,
  kNegativeAdvantages,
  kPositives,
  kNegatives,
  kRolloutWeights,
  kPartSums
};

// Sums of a block over its tokens; the first two with what their sequences count in the aggregate.
enum BlockSum : int {
  kWeightedPolicy,
  kWeightedKl,
  kKl,
  kRatio,
  kLogRatio,
  kClippedLow,
  kClippedHigh,
  kDualClipped,
  kRolloutWeight,
  kBlockSums
};

// Policy loss, KL loss, then means over the tokens; see METRICS in pykern/policy/loss.py.
constexpr int kLossMetrics = 10;

struct LossGrid {
  int64_t parts;   // of each sequence
  int64_t blocks;  // of the pass over the tokens
};

// Pointers to float32 or float64, all of one kind; null where absent.
struct LossParams {
  const void *logprobs, *old_logprobs, *advantages, *ref_logprobs, *rollout_logprobs;
  const uint8_t* mask;
  const int64_t* cu_seqlens;  // [sequences + 1]; null: `columns` tokens each
  void *loss, *coefficient, *metrics;
  int64_t tokens, sequences, columns;
  bool per_token_advantages, sequence_ratio, weight_clip;
  KlDivergence kl;
  LossAggregate aggregate;
  double denominator;  // zero: count the tokens or sequences of this call
  double horizon;
  LossBounds<double> bounds;

  // Whose sizes depend on what stands above.
  LossGrid grid;
  unsigned long long* counters;  // [kSequenceLengths + sequences]
  uint32_t* mask_bits;           // [loss_mask_words()] if there is a mask
  double* part_sums;             // [sequences, grid.parts, kPartSums] for a ratio of sequences
  double* block_sums;            // [grid.blocks, kBlockSums]
};

// Words of the mask's bits: each sequence begins in one of its own.
inline int64_t loss_mask_words(int64_t tokens, int64_t sequences) { return tokens / 32 + sequences + 1; }

LossGrid loss_grid(DataType type, const LossParams& params);
const char* launch_policy_loss(DataType type, const LossParams& params, Stream stream);

struct LossGradientParams {
  const void *grad_loss, *coefficient;
  void* gradient;
  int64_t tokens;
};

const char* launch_policy_loss_gradient(DataType type, const LossGradientParams& params, Stream stream);

}  // namespace pykern
