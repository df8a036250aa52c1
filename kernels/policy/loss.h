// policy_loss on a GPU: what the host hands over.
//
// Tokens are told apart by their index in the flat tensors; sequence s holds those from its start to the
// next one's. A sequence is cut into a fixed number of parts, and blocks go over the parts of all sequences
// in turns. Up to three launches: counting, which also keeps the mask as one bit per token and adds up
// what a ratio of whole sequences needs; the pass over the tokens, whose last block adds up the loss; and for
// some losses over a ratio of sequences, a pass that adds each token's share in the ratio to its gradient.
#pragma once

#include <cstdint>

#include "kernels/common/numeric.h"
#include "kernels/common/stream.h"

namespace pykern {

// Each in the order of its tuple in pykern/policy/losses.py; where an argument may be left out, zero stands for none.
enum class LossRatio : int { token, sequence, product, clipped_sequence };
enum class LossRule : int { clip, weight, log, gate, taper };
enum class LossStabilisation : int { none, total_variation, binary_kl };
enum class KlDivergence : int { none, k1, k2, k3, absolute };
enum class KlGradient : int { value, straight_through, importance };
enum class RolloutRule : int { truncate, mask };
enum class LossAggregate : int { token_mean, token_sum, sequence_sum, sequence_mean, sequence_sum_norm };

template <class T>
struct LossBounds {
  T ratio_low, ratio_high, ratio_limit, dual_clip, shape[4], negative_scale;
  T stabilisation_low, stabilisation_high;
  T log_ratio_limit, sequence_log_ratio_low, sequence_log_ratio_high;
  T kl_coef, kl_log_ratio_limit, kl_limit, anchor_coef, rollout_low, rollout_high, entropy_coef;
};

// Integers of the whole call, then the unmasked tokens of each sequence; zero at first.
enum LossCounter : int { kFinishedBlocks, kUnmaskedTokens, kNonEmptySequences, kSequenceLengths };

// Sums over a part of a sequence that make up the ratio and the loss of the sequence. A clipped loss is linear in
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

// The same for losses of other parts: the ratio first, and what the loss changes with its logarithm.
enum ComposedSum : int { kTokenLogRatios, kAdvantages, kChain, kComposedSums };

// Sums of a block over its tokens; the weighted ones with what their tokens count in the aggregate. A clipped loss
// alone needs the first of them.
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
  kClipSums,
  kWeightedAnchor = kClipSums,
  kWeightedEntropy,
  kAnchor,
  kEntropy,
  kKept,
  kBlockSums
};

// Four parts of the loss, then means over the tokens; see METRICS in pykern/policy/losses.py.
constexpr int kLossMetrics = 15;

struct LossGrid {
  int64_t parts;   // of each sequence
  int64_t blocks;  // of the pass over the tokens
};

// One value for each sequence, or for each token.
struct LossValues {
  const void* values;
  bool per_token;
};

// Pointers to float32 or float64, all of one kind; null where absent.
struct LossParams {
  const void *logprobs, *old_logprobs, *ref_logprobs, *anchor_logprobs, *rollout_logprobs;
  const void *entropy, *clip_low, *clip_high, *token_weights;
  LossValues advantages, rollout_weights, second_advantages, advantage_weights;
  const uint8_t *mask, *keep, *anchor_keep;
  const int64_t* cu_seqlens;  // [sequences + 1]; null: `columns` tokens each
  void *loss, *coefficient, *entropy_coefficient, *metrics;
  int64_t tokens, sequences, columns;
  LossRatio ratio;
  LossRule rule;
  bool weight_negative_only;
  LossStabilisation stabilisation;
  KlDivergence kl;
  KlGradient kl_gradient;
  KlDivergence anchor;
  RolloutRule rollout_rule;
  LossAggregate aggregate;
  bool count_empty;
  double denominator;  // zero: count the tokens or sequences of this call
  double horizon;
  LossBounds<double> bounds;

  // Whose sizes depend on what stands above.
  LossGrid grid;
  unsigned long long* counters;  // [kSequenceLengths + sequences]
  uint32_t* mask_bits;           // [loss_mask_words()] if there is a mask
  double* part_sums;             // [sequences, grid.parts, loss_part_sums()]
  double* block_sums;            // [grid.blocks, kBlockSums]
};

// Words of the mask's bits: each sequence begins in one of its own.
inline int64_t loss_mask_words(int64_t tokens, int64_t sequences) { return tokens / 32 + sequences + 1; }

// Sums of each part of a sequence; none where the ratio is that of a token.
int loss_part_sums(const LossParams& params);
LossGrid loss_grid(DataType type, const LossParams& params);
const char* launch_policy_loss(DataType type, const LossParams& params, Stream stream);

struct LossGradientParams {
  const void *grad_loss, *coefficient;
  void* gradient;
  int64_t tokens;
};

const char* launch_policy_loss_gradient(DataType type, const LossGradientParams& params, Stream stream);

// What each token counts in the aggregate, to `coefficient`. Needs the mask, the sequences and the aggregate.
const char* launch_policy_loss_token_weights(DataType type, const LossParams& params, Stream stream);

}  // namespace pykern
