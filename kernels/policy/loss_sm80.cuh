// The pass over the tokens for clipped ratios and clipped weights, with a KL estimate or without: loss, its gradient
// with respect to the log-probability, and the sums behind the metrics. Four masked tokens side by side are not even
// read. Losses of other parts are in loss_composed_sm80.cuh.
#pragma once

#include <type_traits>

#include "kernels/policy/loss_divergence.cuh"
#include "kernels/policy/loss_totals.cuh"

namespace pykern {

// What a call has beside clipped ratios and advantages of sequences: nothing; a KL estimate; anything. What a
// kernel need not ask about saves instructions and registers.
enum class LossExtras { none, divergence, any };

template <class T, bool sequence_ratio, LossExtras extras>
class PolicyLoss {
  // A thread's tokens fit 32 bits; those of a sequence are counted at once.
  using Count = std::conditional_t<sequence_ratio, double, int>;
  struct Counts {
    Count low = 0, high = 0, dual = 0;
  };

  struct Inputs {
    FourTokens<T> logprob, old;
  };
  // How often a ratio met the bounds of its advantage.
  struct Hits {
    int lower = 0, upper = 0, upper_of_negative = 0;
  };

 public:
  __device__ __forceinline__ PolicyLoss(const LossArguments<T>& arguments, LossShared<kClipSums>& shared)
      : arguments_(arguments),
        p_(arguments.params),
        bounds_(arguments.bounds),
        shares_(arguments),
        shared_(shared) {}

  __device__ __forceinline__ void run() {
    for (int64_t item = blockIdx.x; item < p_.sequences * p_.grid.parts; item += gridDim.x) {
      const LossPart part = find_part(p_, item);
      if (part.begin >= part.end) continue;
      if (part.sequence != sequence_) enter(part);
      if (!sequence_ratio || reads_tokens() || p_.coefficient) run_part(part);
    }
    finish();
  }

 private:
  static constexpr bool kAny = extras == LossExtras::any;
  __device__ __forceinline__ bool has_divergence() const {
    return extras == LossExtras::divergence || (kAny && p_.kl != KlDivergence::none);
  }
  __device__ __forceinline__ bool clips_weight() const { return kAny && p_.rule == LossRule::weight; }
  __device__ __forceinline__ bool has_token_advantages() const { return kAny && p_.advantages.per_token; }
  __device__ __forceinline__ bool has_rollout() const { return kAny && p_.rollout_logprobs; }
  __device__ __forceinline__ bool reads_tokens() const { return has_divergence() || clips_weight(); }

  // What each token of the part's sequence counts in the loss, and what its tokens share.
  __device__ __forceinline__ void enter(const LossPart& part) {
    sequence_ = part.sequence;
    weight_ = shares_.of_token(part);
    token_weight_ = static_cast<T>(weight_);
    if (!has_token_advantages()) {
      advantage_ = static_cast<const T*>(p_.advantages.values)[sequence_];
      find_range(advantage_, lower_, upper_);
    }
    // A sequence's first part comes before its others, in whichever block it is.
    if (sequence_ratio) find_ratio(part.index == 0 && threadIdx.x == 0);
  }

  // The ratio of the sequence, exp of its mean log-ratio, from the sums of its parts in a fixed order.
  __device__ __forceinline__ void find_ratio(bool report) {
    const double* of_parts = p_.part_sums + sequence_ * p_.grid.parts * kPartSums;
    double sums[kPartSums] = {};
    for (int64_t part = threadIdx.x % kWarpSize; part < p_.grid.parts; part += kWarpSize) {
#pragma unroll
      for (int i = 0; i < kPartSums; ++i) sums[i] += of_parts[part * kPartSums + i];
    }
#pragma unroll
    for (int i = 0; i < kPartSums; ++i) sums[i] = warp_reduce(sums[i], Sum{});

    const double length = shares_.length_of(sequence_), mean = length > 0 ? sums[kLogRatios] / length : 0;
    const double log_ratio = clamp(mean, p_.bounds.sequence_log_ratio_low, p_.bounds.sequence_log_ratio_high);
    const bool limited = log_ratio < mean || log_ratio > mean;
    ratio_ = finite<T>(exp(log_ratio), log_ratio);
    const T bounded = clamp(ratio_, bounds_.ratio_low, bounds_.ratio_high);
    // What advantages of either sign are multiplied with in the loss, and in its derivative.
    const bool clipped_high = bounded < ratio_, clipped_low = bounded > ratio_;
    const T below = clipped_low ? bounded : ratio_;
    const bool dual_clipped = below > bounds_.dual_clip;
    const double positive_slope = limited || clipped_high ? 0 : ratio_;
    const double negative_slope = limited || clipped_low || dual_clipped ? 0 : ratio_;
    // The ratio depends on each of its tokens by one over their number.
    const double chain = -product(sums[kPositiveAdvantages], positive_slope) -
                         product(sums[kNegativeAdvantages], negative_slope);
    share_ = static_cast<T>(length > 0 ? chain / length * weight_ : 0);
    if (!report) return;
    ratios_ += length > 0 ? length * static_cast<double>(ratio_) : 0;
    log_ratios_ += sums[kLogRatios];
    rollout_weights_ += sums[kRolloutWeights];
    if (clips_weight()) {
      counts_.low += clipped_low ? length : 0;
      counts_.high += clipped_high ? length : 0;
    } else {
      policy_ -= weight_ * (product(sums[kPositiveAdvantages], clipped_high ? bounded : ratio_) +
                            product(sums[kNegativeAdvantages], dual_clipped ? bounds_.dual_clip : below));
      counts_.low += clipped_low ? sums[kNegatives] : 0;
      counts_.high += clipped_high ? sums[kPositives] : 0;
      counts_.dual += dual_clipped ? sums[kNegatives] : 0;
    }
  }

  // No advantage of this sign: nothing, even if the ratio is infinite.
  __device__ __forceinline__ static double product(double advantages, double factor) {
    return advantages != 0 ? advantages * factor : 0;
  }

  // Where a ratio may lie before it is clipped. A loss max(-A ratio, -A clipped) has one bound only, by the
  // sign of its advantage, and the dual clip is the other for a negative one.
  __device__ __forceinline__ void find_range(T advantage, T& lower, T& upper) const {
    const T infinity = static_cast<T>(HUGE_VAL);
    const bool both = clips_weight();
    lower = both || advantage < 0 ? bounds_.ratio_low : -infinity;
    upper = both || advantage > 0 ? bounds_.ratio_high : advantage < 0 ? bounds_.dual_clip : infinity;
  }

  __device__ __forceinline__ Inputs read(const PartPacks& packs, uint32_t pack, TokenBits valid) const {
    Inputs inputs{};
    if (!sequence_ratio || reads_tokens()) inputs.logprob = packs.template read<T>(p_.logprobs, pack, valid);
    if (!sequence_ratio) inputs.old = packs.template read<T>(p_.old_logprobs, pack, valid);
    return inputs;
  }

  // The mask is read two tiles ahead and the log-probabilities one, so that loads wait for no other.
  __device__ __forceinline__ void run_part(const LossPart& part) {
    const PartPacks packs(p_, part, arguments_.packs);
    Hits hits;
    uint32_t pack = threadIdx.x;
    TokenBits valid = packs.unmasked(pack), next_valid = packs.unmasked(pack + kLossThreads);
    Inputs inputs = read(packs, pack, valid);
    for (; pack < packs.end(); pack += kLossThreads) {
      const TokenBits later_valid = packs.unmasked(pack + 2 * kLossThreads);
      const Inputs next = read(packs, pack + kLossThreads, next_valid);
      FourTokens<T> gradient, reference;
      // Long before it is needed.
      if (has_divergence()) reference = packs.template read<T>(p_.ref_logprobs, pack, valid);
#pragma unroll
      for (int i = 0; i < kThreadTokens; ++i) gradient[i] = share_;
      if (valid & kFourTokens) {
        const bool token_by_token = !sequence_ratio || clips_weight();
        if (token_by_token && has_token_advantages()) {
          add_policy<true>(packs, pack, valid, inputs, gradient, hits);
        } else if (token_by_token) {
          add_policy<false>(packs, pack, valid, inputs, gradient, hits);
        }
        if (has_divergence()) add_divergence(valid, inputs, reference, gradient);
      }
      if (p_.coefficient) {
#pragma unroll
        for (int i = 0; i < kThreadTokens; ++i) gradient[i] = is_wanted(valid, i) ? gradient[i] : T(0);
        packs.write(p_.coefficient, pack, gradient);
      }
      inputs = next;
      valid = next_valid;
      next_valid = later_valid;
    }
    if (sequence_ratio) return;
    const bool all_negative = !clips_weight() && !has_token_advantages() && advantage_ < 0;
    const int dual = all_negative ? hits.upper : hits.upper_of_negative;
    counts_.low += hits.lower;
    counts_.high += hits.upper - dual;
    counts_.dual += dual;
  }

  template <bool per_token>
  __device__ __forceinline__ void add_policy(const PartPacks& packs, uint32_t pack, TokenBits valid,
                                             const Inputs& inputs, FourTokens<T>& gradient, Hits& hits) {
    FourTokens<T> advantages, weights;
    if (per_token) advantages = packs.template read<T>(p_.advantages.values, pack, valid);
    const bool weighted = has_rollout();
    if (weighted) weights = read_weights(packs, pack, valid, inputs);
    T losses = 0, ratios = 0, log_ratios = 0;
#pragma unroll
    for (int i = 0; i < kThreadTokens; ++i) {
      const bool here = is_wanted(valid, i);
      T ratio = ratio_;
      bool stopped = false;
      if (!sequence_ratio) {
        const T raw = here ? inputs.logprob[i] - inputs.old[i] : T(0), limit = bounds_.log_ratio_limit;
        const bool below = raw < -limit, above = raw > limit;
        const T log_ratio = below ? -limit : above ? limit : raw;
        stopped = below || above;
        ratio = finite_exponential(log_ratio);
        ratios += here ? ratio : T(0);
        log_ratios += log_ratio;
      }
      const T advantage = per_token ? advantages[i] : advantage_;
      T lower = lower_, upper = upper_;
      if (per_token) find_range(advantage, lower, upper);
      // A NaN passes both.
      const bool too_low = ratio < lower, too_high = ratio > upper;
      const T factor = too_low ? lower : too_high ? upper : ratio;
      if (!sequence_ratio) {
        // A masked token's ratio is one, which lies within any range.
        hits.lower += too_low;
        hits.upper += too_high;
        if (per_token) hits.upper_of_negative += too_high && advantage < 0 && !clips_weight();
      }
      T slope = -advantage * factor, loss = slope;
      if (clips_weight()) {
        // A constant weight: its clip stops no gradient.
        loss *= inputs.logprob[i];
      } else {
        slope = too_low || too_high || stopped ? T(0) : slope;
      }
      if (weighted) {
        loss *= weights[i];
        slope *= weights[i];
      }
      losses += here ? loss : T(0);
      gradient[i] = token_weight_ * slope;
    }
    policy_ += weight_ * static_cast<double>(losses);
    if (!sequence_ratio) {
      ratios_ += static_cast<double>(ratios);
      log_ratios_ += static_cast<double>(log_ratios);
    }
  }

  __device__ __forceinline__ FourTokens<T> read_weights(const PartPacks& packs, uint32_t pack, TokenBits valid,
                                                        const Inputs& inputs) {
    const FourTokens<T> rollout = packs.template read<T>(p_.rollout_logprobs, pack, valid);
    const FourTokens<T> old = sequence_ratio ? packs.template read<T>(p_.old_logprobs, pack, valid) : inputs.old;
    FourTokens<T> weights;
    T sum = 0;
#pragma unroll
    for (int i = 0; i < kThreadTokens; ++i) {
      weights[i] = rollout_weight(old[i] - rollout[i], bounds_);
      sum += is_wanted(valid, i) ? weights[i] : T(0);
    }
    // Those of a ratio of sequences are among the sums of the sequence.
    if (!sequence_ratio) rollout_weights_ += static_cast<double>(sum);
    return weights;
  }

  __device__ __forceinline__ void add_divergence(TokenBits valid, const Inputs& inputs, const FourTokens<T>& reference,
                                                 FourTokens<T>& gradient) {
    const T factor = token_weight_ * bounds_.kl_coef;
    FourTokens<T> raw, value, derivative;
#pragma unroll
    for (int i = 0; i < kThreadTokens; ++i) {
      raw[i] = is_wanted(valid, i) ? inputs.logprob[i] - reference[i] : T(0);
    }
    divergence(p_.kl, bounds_, arguments_.limited_divergence, raw, value, derivative);
    T values = 0;
#pragma unroll
    for (int i = 0; i < kThreadTokens; ++i) {
      values += value[i];
      gradient[i] += factor * derivative[i];
    }
    kl_ += static_cast<double>(values);
    weighted_kl_ += weight_ * static_cast<double>(values);
  }

  __device__ __forceinline__ void finish() {
    double sums[kClipSums] = {policy_,
                              weighted_kl_,
                              kl_,
                              ratios_,
                              log_ratios_,
                              static_cast<double>(counts_.low),
                              static_cast<double>(counts_.high),
                              static_cast<double>(counts_.dual),
                              rollout_weights_};
    finish_loss(arguments_, sums, shared_);
  }

  const LossArguments<T>& arguments_;
  const LossParams& p_;
  const LossBounds<T>& bounds_;
  const LossShares<T> shares_;
  LossShared<kClipSums>& shared_;

  // Sums of a thread.
  double policy_ = 0, weighted_kl_ = 0, kl_ = 0, ratios_ = 0, log_ratios_ = 0, rollout_weights_ = 0;
  Counts counts_;

  // Of the sequence that is being read.
  int64_t sequence_ = -1;
  double weight_ = 0;
  T token_weight_ = 0;
  T advantage_ = 0, lower_ = 0, upper_ = 0;  // where all its tokens have the same advantage
  T ratio_ = 1, share_ = 0;  // where the ratio is that of the sequence: it, and each token's share of the gradient
};

// Blocks per multiprocessor: enough loads in flight within the registers there are.
template <class T, bool sequence_ratio, LossExtras extras>
constexpr int kLossBlocks = sizeof(T) == 8               ? 2
                            : extras == LossExtras::any ? 4
                            : sequence_ratio || extras == LossExtras::divergence ? 6
                                                                                 : 8;

template <class T, bool sequence_ratio, LossExtras extras>
__global__ void __launch_bounds__(kLossThreads, kLossBlocks<T, sequence_ratio, extras>)
    policy_loss_kernel(LossArguments<T> arguments) {
  PYKERN_SHARED(LossShared<kClipSums>, shared);
  PolicyLoss<T, sequence_ratio, extras>(arguments, shared).run();
}

constexpr int kGradientThreads = 256;

template <class T>
__global__ void __launch_bounds__(kGradientThreads) policy_loss_gradient_kernel(LossGradientParams p, bool packs) {
  constexpr int kPacks = 2, kSize = Pack<T>::kSize;
  const T factor = *static_cast<const T*>(p.grad_loss);
  const T* source = static_cast<const T*>(p.coefficient);
  T* target = static_cast<T*>(p.gradient);
  constexpr int64_t kBlockTokens = int64_t{kGradientThreads} * kPacks * kSize;
  for (int64_t tile = blockIdx.x * kBlockTokens; tile < p.tokens; tile += gridDim.x * kBlockTokens) {
    if (packs && tile + kBlockTokens <= p.tokens) {
      Pack<T> pack[kPacks];
      const int64_t token = tile + static_cast<int64_t>(threadIdx.x) * kSize;
#pragma unroll
      for (int i = 0; i < kPacks; ++i) {
        pack[i] = load_pack<Reuse::stream>(source + token + i * kGradientThreads * kSize);
      }
#pragma unroll
      for (int i = 0; i < kPacks; ++i) {
#pragma unroll
        for (int j = 0; j < kSize; ++j) pack[i][j] *= factor;
        store_pack(target + token + i * kGradientThreads * kSize, pack[i]);
      }
    } else {
      const int64_t end = tile + kBlockTokens < p.tokens ? tile + kBlockTokens : p.tokens;
      for (int64_t token = tile + threadIdx.x; token < end; token += kGradientThreads) {
        target[token] = source[token] * factor;
      }
    }
  }
}

}  // namespace pykern
