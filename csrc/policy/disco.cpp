// disco_loss on the CPU: scores by a task per sequence, groups in one pass over the sequences in the order of their
// ids, gradients by a task per sequence.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <optional>
#include <tuple>
#include <vector>

#include "common/parallel.h"
#include "policy/disco_arguments.h"
#include "policy/disco_tokens.h"

namespace pykern {
namespace {

struct Sequence {
  double tokens = 0, score = 0, divergence = 0;  // score: the mean over its tokens
  double share = 0;                              // in its group; negative for a negative
};

struct Totals {
  double tokens = 0, divergence = 0, value = 0, groups = 0, mixed = 0;
  double positives = 0, positive_score = 0, negatives = 0, negative_score = 0;
};

double over(double sum, double count) { return count > 0 ? sum / count : 0; }

template <class T>
class Disco {
 public:
  Disco(const T* logprobs, const T* old_logprobs, const T* rewards, const int64_t* group_ids, const TokenBatch& batch,
        const DiscoRules& rules)
      : logprobs_(logprobs),
        old_(old_logprobs),
        rewards_(rewards),
        ids_(group_ids),
        batch_(batch),
        rules_(rules),
        sequences_(batch.sequences) {}

  void run(T* loss, T* metrics, T* coefficient) {
    parallel_tasks(batch_.sequences, [&](int64_t index, int) { measure(index); });
    add_up_groups();
    for (const Sequence& sequence : sequences_) {
      totals_.tokens += sequence.tokens;
      totals_.divergence += sequence.divergence;
    }
    const double kl = over(totals_.divergence, totals_.tokens), excess = kl - rules_.delta;
    const double slope = excess > 0 ? rules_.beta * excess : std::isnan(excess) ? excess : 0;
    const double policy = -over(totals_.value, totals_.groups);
    const double penalty = rules_.published ? slope * kl : slope * excess / 2;
    const double values[kDiscoMetrics] = {policy, penalty, kl, excess > 0 ? 1.0 : 0.0, totals_.groups, totals_.mixed,
                                          over(totals_.positive_score, totals_.positives),
                                          over(totals_.negative_score, totals_.negatives)};
    std::transform(values, values + kDiscoMetrics, metrics, [](double value) { return static_cast<T>(value); });
    *loss = static_cast<T>(policy + penalty);
    if (!coefficient) return;
    const double of_divergence = over(slope, totals_.tokens);
    parallel_tasks(batch_.sequences, [&](int64_t index, int) { differentiate(index, of_divergence, coefficient); });
  }

 private:
  bool is_ratio() const { return rules_.score == DiscoScore::ratio; }
  bool is_k3() const { return rules_.divergence == DiscoDivergence::k3; }

  void measure(int64_t index) {
    const int64_t begin = sequence_begin(batch_, index), count = sequence_begin(batch_, index + 1) - begin;
    const uint8_t* mask = batch_.mask ? batch_.mask + begin : nullptr;
    DiscoTokens tokens;
    if constexpr (sizeof(T) == 4) {
      tokens = disco_tokens_f32()(logprobs_ + begin, old_ + begin, mask, count, is_ratio(), is_k3());
    } else {
      tokens = disco_tokens_f64()(logprobs_ + begin, old_ + begin, mask, count, is_ratio(), is_k3());
    }
    sequences_[index] = {tokens.count, over(tokens.scores, tokens.count), tokens.divergences, 0};
  }

  double logit(const Sequence& sequence, bool positive) const {
    if (positive) {
      return rules_.positives == DiscoPositives::uniform
                 ? 0
                 : (1 - sequence.tokens / rules_.max_length) / rules_.length_temperature;
    }
    return rules_.negatives == DiscoNegatives::mean ? 0 : sequence.score / rules_.tau;
  }

  // Of a class of a group: sets the shares, returns the logarithm of the mean of exp(logit) as largest and sum.
  std::pair<double, double> share_out(const std::vector<int64_t>& members, bool positive) {
    double largest = -HUGE_VAL, sum = 0;
    for (const int64_t index : members) {
      const double value = logit(sequences_[index], positive);
      largest = value > largest || std::isnan(value) ? value : largest;
    }
    for (const int64_t index : members) sum += std::exp(logit(sequences_[index], positive) - largest);
    for (const int64_t index : members) {
      const double share = std::exp(logit(sequences_[index], positive) - largest) / sum;
      sequences_[index].share = positive ? share : -share;
    }
    return {largest, sum};
  }

  void add_group(const std::vector<int64_t>& positives, const std::vector<int64_t>& negatives) {
    totals_.groups += 1;
    if (positives.empty() || negatives.empty()) return;
    totals_.mixed += 1;
    share_out(positives, true);
    const auto [largest, sum] = share_out(negatives, false);
    const auto add = [&](int64_t index) { totals_.value += sequences_[index].share * sequences_[index].score; };
    std::for_each(positives.begin(), positives.end(), add);
    if (rules_.negatives == DiscoNegatives::mean) {
      std::for_each(negatives.begin(), negatives.end(), add);
      return;
    }
    totals_.value -= rules_.tau * (rules_.published ? sum / (sum + std::numeric_limits<T>::epsilon())
                                                    : largest + std::log(sum / static_cast<double>(negatives.size())));
  }

  void add_up_groups() {
    std::vector<int64_t> order(sequences_.size()), positives, negatives;
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return ids_[a] < ids_[b]; });
    for (size_t place = 0; place < order.size(); ++place) {
      const int64_t index = order[place];
      const Sequence& sequence = sequences_[index];
      // One without tokens, or whose reward is neither one nor zero, has no class.
      if (sequence.tokens > 0 && rewards_[index] == 1) {
        positives.push_back(index);
        totals_.positives += 1;
        totals_.positive_score += sequence.score;
      } else if (sequence.tokens > 0 && rewards_[index] == 0) {
        negatives.push_back(index);
        totals_.negatives += 1;
        totals_.negative_score += sequence.score;
      }
      if (place + 1 < order.size() && ids_[order[place + 1]] == ids_[index]) continue;
      add_group(positives, negatives);
      positives.clear();
      negatives.clear();
    }
  }

  void differentiate(int64_t index, double of_divergence, T* coefficient) const {
    const Sequence& sequence = sequences_[index];
    const double of_score = -over(over(1, totals_.groups) * sequence.share, sequence.tokens);
    const int64_t begin = sequence_begin(batch_, index), count = sequence_begin(batch_, index + 1) - begin;
    const uint8_t* mask = batch_.mask ? batch_.mask + begin : nullptr;
    const auto write = [&](auto kernel) {
      kernel(logprobs_ + begin, old_ + begin, mask, count, is_ratio(), is_k3(), of_score, of_divergence,
             coefficient + begin);
    };
    if constexpr (sizeof(T) == 4) {
      write(disco_gradient_f32());
    } else {
      write(disco_gradient_f64());
    }
  }

  const T *logprobs_, *old_, *rewards_;
  const int64_t* ids_;
  TokenBatch batch_;
  DiscoRules rules_;
  std::vector<Sequence> sequences_;
  Totals totals_;
};

std::tuple<Tensor, Tensor, Tensor> forward(Tensor logprobs, Tensor old_logprobs, Tensor rewards, Tensor group_ids,
                                           std::optional<Tensor> mask, std::optional<Tensor> cu_seqlens, int64_t score,
                                           int64_t negatives, int64_t positives, int64_t divergence, bool published,
                                           std::vector<double> settings, bool with_gradient) {
  const int64_t sequences = check_batch(logprobs, mask, cu_seqlens, "logprobs", check_cpu);
  check_like(old_logprobs, logprobs, "old_logprobs", check_cpu);
  check_of_sequences(rewards, sequences, logprobs.scalar_type(), "rewards", check_cpu);
  check_of_sequences(group_ids, sequences, ScalarType::Long, "group_ids", check_cpu);
  const DiscoRules rules = disco_rules(score, negatives, positives, divergence, published, settings);
  const TokenBatch batch = cpu_batch(logprobs, mask, cu_seqlens, sequences);
  Tensor loss = torch::stable::new_empty(logprobs, {});
  Tensor metrics = torch::stable::new_empty(logprobs, {kDiscoMetrics});
  Tensor coefficient = with_gradient ? torch::stable::empty_like(logprobs) : torch::stable::new_empty(logprobs, {0});
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    Disco<T>(input<T>(logprobs), input<T>(old_logprobs), input<T>(rewards), input<int64_t>(group_ids), batch, rules)
        .run(output<T>(loss), output<T>(metrics), with_gradient ? output<T>(coefficient) : nullptr);
  };
  if (logprobs.scalar_type() == ScalarType::Double) {
    run(double{});
  } else {
    run(float{});
  }
  return {loss, coefficient, metrics};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pykern, CPU, m) { m.impl("disco_loss_forward", TORCH_BOX(&forward)); }

}  // namespace pykern
