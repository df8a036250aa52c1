// disco_loss on a GPU: what the host hands over. Three launches: a block per sequence adds up its score and divergence;
// each sequence finds its share in its group by a look at all others, and the last block adds up the loss; a block per
// sequence writes the gradients of its tokens.
#pragma once

#include <cstdint>

#include "kernels/common/numeric.h"
#include "kernels/common/stream.h"
#include "kernels/policy/token_batch.h"

namespace pykern {

// In the order of SCORES, NEGATIVES, POSITIVES and DIVERGENCES in pykern/policy/disco.py.
enum class DiscoScore : int { ratio, log };
enum class DiscoNegatives : int { dro, mean };
enum class DiscoPositives : int { uniform, length };
enum class DiscoDivergence : int { k3, k1 };

// In the order of METRICS in pykern/policy/disco.py.
enum DiscoMetric : int {
  kDiscoPolicy, kDiscoPenalty, kDiscoKl, kDiscoViolated, kDiscoGroups, kDiscoMixedGroups, kDiscoPositiveScore,
  kDiscoNegativeScore, kDiscoMetrics
};

// What is added up over the tokens of a sequence, and then over the sequences.
enum DiscoSum : int { kDiscoTokens, kDiscoScores, kDiscoDivergences, kDiscoSums };
enum DiscoTotal : int {
  kTotalTokens, kTotalDivergence, kTotalValue, kTotalGroups, kTotalMixed, kTotalPositives, kTotalPositiveScore,
  kTotalNegatives, kTotalNegativeScore, kDiscoTotals
};

struct DiscoRules {
  DiscoScore score;
  DiscoNegatives negatives;
  DiscoPositives positives;
  DiscoDivergence divergence;
  bool published;  // the value of the loss, not its gradient
  double tau, beta, delta, length_temperature, max_length;
};

struct DiscoParams {
  const void *logprobs, *old_logprobs, *rewards;  // float32 or float64, as are loss, coefficient and metrics
  const int64_t* group_ids;                       // [sequences]
  TokenBatch batch;
  DiscoRules rules;
  void *loss, *metrics;
  void* coefficient;             // of the tokens; null for no gradient
  double* sums;                  // [sequences, kDiscoSums]; the score becomes a mean
  double* shares;                // [sequences]: a sequence's share in its group, negative for a negative
  double* totals;                // [sequences, kDiscoTotals]
  double* factors;               // [2]: of the shares and of the divergence's gradient
  unsigned long long* finished;  // zero at first
};

const char* launch_disco_loss(DataType type, const DiscoParams& params, Stream stream);

}  // namespace pykern
