// The pass over the tokens for every loss that loss_sm80.cuh does not know: other rules, masks of tokens, anchors,
// bounds per token, second advantages, weights, entropy. All that a call has of four tokens is read at once.
#pragma once

#include "kernels/policy/loss_divergence.cuh"
#include "kernels/policy/loss_ratio_sm80.cuh"
#include "kernels/policy/loss_rules.cuh"

namespace pykern {

template <class T>
struct ComposedInputs {
  FourTokens<T> logprob, old, advantage, lower, upper, second, second_share;
  FourTokens<T> reference, anchor, rollout, rollout_weight, entropy, weight;
  TokenBits kept, anchored;
};

struct ComposedShared {
  LossShared<kBlockSums> loss;
  BlockTotals<1> chain;
};

// Whether a call may have anchors, second advantages and bounds per token; what a kernel need not ask about saves
// registers.
enum class LossBreadth { usual, all };

template <class T, bool sequence_ratio, LossBreadth breadth>
class ComposedLoss {
 public:
  __device__ __forceinline__ ComposedLoss(const LossArguments<T>& arguments, ComposedShared& shared)
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
      run_part(part);
      if (sequence_ratio && p_.coefficient && moves_ratio(p_)) keep_chain(item);
    }
    finish();
  }

 private:
  static constexpr bool kAll = breadth == LossBreadth::all;
  __device__ __forceinline__ bool has_anchor() const { return kAll && p_.anchor != KlDivergence::none; }
  __device__ __forceinline__ bool has_second_advantages() const { return kAll && p_.second_advantages.values; }

  __device__ __forceinline__ void enter(const LossPart& part) {
    sequence_ = part.sequence;
    weight_ = p_.token_weights ? 1 : shares_.of_token(part);
    if (!sequence_ratio) return;
    // Not the chain, which other blocks may be writing.
    double sums[kChain];
    sequence_sums(p_, sequence_, sums);
    const SequenceRatio ratio(p_, sums, shares_.length_of(sequence_));
    log_ratio_ = static_cast<T>(ratio.logarithm);
    ratio_ = finite<T>(exp(ratio.logarithm), ratio.logarithm);
    advantage_ = static_cast<T>(ratio.advantage);
  }

  // One question for all tensors, so that no load waits behind a branch on another's; doubles have no registers for it.
  __device__ __forceinline__ ComposedInputs<T> read(const PartPacks& packs, uint32_t pack, TokenBits valid) const {
    if (sizeof(T) == 4 && valid & kWholePack) return read_wanted(packs, pack, kFourTokens | kWholePack);
    return read_wanted(packs, pack, valid);
  }

  __device__ __forceinline__ ComposedInputs<T> read_wanted(const PartPacks& packs, uint32_t pack,
                                                           TokenBits wanted) const {
    const auto read = [&](const void* array) {
      return array ? packs.template read<T>(array, pack, wanted) : FourTokens<T>{};
    };
    ComposedInputs<T> in;
    in.logprob = read(p_.logprobs);
    in.old = read(p_.old_logprobs);
    in.reference = read(p_.ref_logprobs);
    in.rollout = read(p_.rollout_logprobs);
    if (has_anchor()) in.anchor = read(p_.anchor_logprobs);
    in.entropy = read(p_.entropy);
    in.weight = read(p_.token_weights);
    // What must be spread or packed as it arrives comes last.
    in.advantage = read_values<T>(packs, p_.advantages, sequence_, pack, wanted);
    in.rollout_weight = read_values<T>(packs, p_.rollout_weights, sequence_, pack, wanted);
    if (has_second_advantages()) {
      in.second = read_values<T>(packs, p_.second_advantages, sequence_, pack, wanted);
      in.second_share = read_values<T>(packs, p_.advantage_weights, sequence_, pack, wanted);
    }
    read_clips<kAll>(p_, bounds_, packs, pack, wanted, in.lower, in.upper);
    const int64_t token = packs.token_of(pack);
    in.kept = p_.keep ? read_flags(p_.keep, token, wanted) : wanted;
    if (has_anchor()) in.anchored = p_.anchor_keep ? read_flags(p_.anchor_keep, token, wanted) : wanted;
    return in;
  }

  __device__ __forceinline__ void run_part(const LossPart& part) {
    const PartPacks packs(p_, part, arguments_.packs);
    uint32_t pack = threadIdx.x;
    TokenBits valid = packs.unmasked(pack);
    for (; pack < packs.end(); pack += kLossThreads) {
      const TokenBits next_valid = packs.unmasked(pack + kLossThreads);
      FourTokens<T> gradient{}, entropy_gradient{};
      if (valid & kFourTokens) {
        ComposedInputs<T> in = read(packs, pack, valid);
#pragma unroll
        for (int i = 0; i < kThreadTokens; ++i) {
          in.weight[i] = p_.token_weights ? in.weight[i] : static_cast<T>(weight_);
          entropy_gradient[i] = -bounds_.entropy_coef * in.weight[i];
        }
        add_policy(in, valid, gradient);
        if (has_anchor()) add_anchor(in, valid, gradient);
        if (p_.entropy) add_entropy(in, valid);
      }
      if (p_.coefficient) write(packs, pack, valid, p_.coefficient, gradient);
      if (p_.entropy_coefficient) write(packs, pack, valid, p_.entropy_coefficient, entropy_gradient);
      valid = next_valid;
    }
  }

  __device__ __forceinline__ void write(const PartPacks& packs, uint32_t pack, TokenBits valid, void* target,
                                        FourTokens<T>& values) const {
#pragma unroll
    for (int i = 0; i < kThreadTokens; ++i) values[i] = is_wanted(valid, i) ? values[i] : T(0);
    packs.write(target, pack, values);
  }

  __device__ __forceinline__ void add_policy(ComposedInputs<T>& in, TokenBits valid, FourTokens<T>& gradient) {
    TokenRatios<T> ratios;
    TokenBits moving = 0, clipped_before = 0, below = 0;
    T sum_of_ratios = 0, log_ratios = 0;
#pragma unroll
    for (int i = 0; i < kThreadTokens; ++i) {
      const bool here = is_wanted(valid, i);
      const T distance = here ? in.logprob[i] - in.old[i] : T(0), limit = bounds_.log_ratio_limit;
      if (sequence_ratio) {
        ratios.value[i] = ratio_;
        ratios.logarithm[i] = log_ratio_;
        log_ratios += distance;
      } else {
        ratios.logarithm[i] = clamp(distance, -limit, limit);
        ratios.value[i] = finite_exponential(ratios.logarithm[i]);
        log_ratios += ratios.logarithm[i];
        moving |= (distance < -limit || distance > limit ? 0u : 1u) << i;
      }
      if (sequence_ratio && p_.ratio == LossRatio::clipped_sequence) {
        // What is clipped lies in the ratio already; all tokens share the mean of the advantages.
        const bool clipped = !ratio_term(p_, bounds_, distance, in.advantage[i], in.lower[i], in.upper[i]).moving;
        clipped_before |= (clipped ? 1u : 0u) << i;
        below |= (distance < 0 ? 1u : 0u) << i;
        in.advantage[i] = advantage_;
        in.lower[i] = -static_cast<T>(HUGE_VAL);
        in.upper[i] = static_cast<T>(HUGE_VAL);
      } else {
        below |= (ratios.value[i] < in.lower[i] ? 1u : 0u) << i;
      }
      ratios.lower[i] = in.lower[i];
      ratios.upper[i] = in.upper[i];
      sum_of_ratios += here ? ratios.value[i] : T(0);
    }
    ratios_ += static_cast<double>(sum_of_ratios);
    log_ratios_ += static_cast<double>(log_ratios);

    RuleTerms<T> terms = rule_terms(p_, bounds_, ratios, in.logprob, in.advantage);
    if (has_second_advantages()) {
      const RuleTerms<T> second = rule_terms(p_, bounds_, ratios, in.logprob, in.second);
#pragma unroll
      for (int i = 0; i < kThreadTokens; ++i) {
        const T share = in.second_share[i];
        terms.loss[i] = share * terms.loss[i] + (1 - share) * second.loss[i];
        terms.slope[i] = share * terms.slope[i] + (1 - share) * second.slope[i];
      }
    }
    const TokenBits clipped = (terms.clipped | clipped_before) & valid;
    lower_clips_ += __popc(clipped & below & kFourTokens);
    upper_clips_ += __popc(clipped & ~below & kFourTokens);
    dual_clips_ += __popc(terms.dual & valid & kFourTokens);

    TokenBits kept = in.kept & valid;
    if (p_.stabilisation != LossStabilisation::none) {
#pragma unroll
      for (int i = 0; i < kThreadTokens; ++i) {
        const bool stay = stays(p_.stabilisation, bounds_, in.logprob[i], in.old[i], in.advantage[i]);
        kept &= ~((stay ? 0u : 1u) << i);
      }
    }
    kept_ += __popc(kept & kFourTokens);
    weigh_by_rollout(in, valid, terms);

    const bool by_ratio = moves_with_ratio(p_.rule);
    T losses = 0, chain = 0;
#pragma unroll
    for (int i = 0; i < kThreadTokens; ++i) {
      const bool here = is_wanted(kept, i);
      losses += here ? in.weight[i] * terms.loss[i] : T(0);
      const T slope = here ? in.weight[i] * terms.slope[i] : T(0);
      if (sequence_ratio) {
        gradient[i] = by_ratio ? T(0) : slope;
        chain += by_ratio ? slope : T(0);
      } else {
        gradient[i] = by_ratio && !is_wanted(moving, i) ? T(0) : slope;
      }
    }
    weighted_policy_ += static_cast<double>(losses);
    if (p_.kl != KlDivergence::none) add_divergence(in, valid, ratios, moving, gradient, chain);
    if (sequence_ratio) chain_ += static_cast<double>(chain);
  }

  __device__ __forceinline__ void weigh_by_rollout(const ComposedInputs<T>& in, TokenBits valid, RuleTerms<T>& terms) {
    FourTokens<T> weight{};
    if (p_.rollout_logprobs && !starts_at_rollout(p_)) {
#pragma unroll
      for (int i = 0; i < kThreadTokens; ++i) {
        const T raw = exponential(in.old[i] - in.rollout[i]), low = bounds_.rollout_low, high = bounds_.rollout_high;
        const bool drops = p_.rollout_rule == RolloutRule::mask && !(raw >= low && raw <= high);
        weight[i] = drops ? T(0) : clamp(raw, low, high);
        terms.loss[i] *= weight[i];
        terms.slope[i] *= weight[i];
      }
    }
    if (p_.rollout_weights.values) {
#pragma unroll
      for (int i = 0; i < kThreadTokens; ++i) {
        weight[i] = in.rollout_weight[i];
        terms.loss[i] *= weight[i];
        terms.slope[i] *= weight[i];
      }
    }
    T sum = 0;
#pragma unroll
    for (int i = 0; i < kThreadTokens; ++i) sum += is_wanted(valid, i) ? weight[i] : T(0);
    rollout_weights_ += static_cast<double>(sum);
  }

  __device__ __forceinline__ void add_divergence(const ComposedInputs<T>& in, TokenBits valid,
                                                 const TokenRatios<T>& ratios, TokenBits moving,
                                                 FourTokens<T>& gradient, T& chain) {
    FourTokens<T> raw, value, derivative;
#pragma unroll
    for (int i = 0; i < kThreadTokens; ++i) raw[i] = is_wanted(valid, i) ? in.logprob[i] - in.reference[i] : T(0);
    divergence(p_.kl, bounds_, arguments_.limited_divergence, raw, value, derivative);
    if (p_.kl_gradient == KlGradient::straight_through) {
      // The gradient of k2.
      derivative = raw;
    } else if (p_.kl_gradient == KlGradient::importance && p_.ratio == LossRatio::product) {
      // A product over the sequence is no weight for a token's estimate: that takes the token's ratio.
#pragma unroll
      for (int i = 0; i < kThreadTokens; ++i) {
        const T apart = in.logprob[i] - in.old[i];
        const T bounded = clamp(apart, -bounds_.log_ratio_limit, bounds_.log_ratio_limit);
        const T ratio = finite_exponential(bounded);
        value[i] *= ratio;
        derivative[i] = derivative[i] * ratio + (is_wanted(valid, i) && apart == bounded ? value[i] : T(0));
      }
    } else if (p_.kl_gradient == KlGradient::importance) {
#pragma unroll
      for (int i = 0; i < kThreadTokens; ++i) {
        value[i] *= ratios.value[i];
        derivative[i] *= ratios.value[i];
        // By the ratio: of the token, or of all the sequence's.
        if (sequence_ratio) {
          chain += is_wanted(valid, i) ? in.weight[i] * bounds_.kl_coef * value[i] : T(0);
        } else {
          derivative[i] += is_wanted(moving, i) ? value[i] : T(0);
        }
      }
    }
    kl_ += add_part(in, valid, value, derivative, bounds_.kl_coef, gradient, weighted_kl_);
  }

  __device__ __forceinline__ void add_anchor(const ComposedInputs<T>& in, TokenBits valid, FourTokens<T>& gradient) {
    const TokenBits anchored = in.anchored & valid;
    FourTokens<T> raw, value, derivative;
#pragma unroll
    for (int i = 0; i < kThreadTokens; ++i) raw[i] = is_wanted(anchored, i) ? in.logprob[i] - in.anchor[i] : T(0);
    divergence(p_.anchor, bounds_, false, raw, value, derivative);
    anchor_ += add_part(in, anchored, value, derivative, bounds_.anchor_coef, gradient, weighted_anchor_);
  }

  // Adds an estimate to the loss; returns its sum.
  __device__ __forceinline__ double add_part(const ComposedInputs<T>& in, TokenBits wanted,
                                             const FourTokens<T>& value, const FourTokens<T>& derivative, T factor,
                                             FourTokens<T>& gradient, double& weighted) const {
    T sum = 0, weighted_sum = 0;
#pragma unroll
    for (int i = 0; i < kThreadTokens; ++i) {
      const bool here = is_wanted(wanted, i);
      sum += here ? value[i] : T(0);
      weighted_sum += here ? in.weight[i] * value[i] : T(0);
      gradient[i] += here ? in.weight[i] * factor * derivative[i] : T(0);
    }
    weighted += static_cast<double>(weighted_sum);
    return static_cast<double>(sum);
  }

  __device__ __forceinline__ void add_entropy(const ComposedInputs<T>& in, TokenBits valid) {
    T sum = 0, weighted = 0;
#pragma unroll
    for (int i = 0; i < kThreadTokens; ++i) {
      sum += is_wanted(valid, i) ? in.entropy[i] : T(0);
      weighted += is_wanted(valid, i) ? in.weight[i] * in.entropy[i] : T(0);
    }
    entropy_ += static_cast<double>(sum);
    weighted_entropy_ += static_cast<double>(weighted);
  }

  // For the pass that brings it to the tokens.
  __device__ __forceinline__ void keep_chain(int64_t item) {
    double chain[1] = {chain_};
    block_totals(chain, shared_.chain, [&](int, double sum) { p_.part_sums[item * kComposedSums + kChain] = sum; });
    chain_ = 0;
  }

  __device__ __forceinline__ void finish() {
    double sums[kBlockSums];
    sums[kWeightedPolicy] = weighted_policy_;
    sums[kWeightedKl] = weighted_kl_;
    sums[kKl] = kl_;
    sums[kRatio] = ratios_;
    sums[kLogRatio] = log_ratios_;
    sums[kClippedLow] = lower_clips_;
    sums[kClippedHigh] = upper_clips_;
    sums[kDualClipped] = dual_clips_;
    sums[kRolloutWeight] = rollout_weights_;
    sums[kWeightedAnchor] = weighted_anchor_;
    sums[kWeightedEntropy] = weighted_entropy_;
    sums[kAnchor] = anchor_;
    sums[kEntropy] = entropy_;
    sums[kKept] = kept_;
    finish_loss(arguments_, sums, shared_.loss);
  }

  const LossArguments<T>& arguments_;
  const LossParams& p_;
  const LossBounds<T>& bounds_;
  const LossShares<T> shares_;
  ComposedShared& shared_;

  // Sums of a thread, whose tokens fit 32 bits.
  double weighted_policy_ = 0, weighted_kl_ = 0, weighted_anchor_ = 0, weighted_entropy_ = 0;
  double kl_ = 0, anchor_ = 0, entropy_ = 0, ratios_ = 0, log_ratios_ = 0, rollout_weights_ = 0;
  int lower_clips_ = 0, upper_clips_ = 0, dual_clips_ = 0, kept_ = 0;
  double chain_ = 0;  // of a part: what the loss changes with the logarithm of the sequence's ratio

  // Of the sequence that is being read.
  int64_t sequence_ = -1;
  double weight_ = 0;
  T ratio_ = 1, log_ratio_ = 0, advantage_ = 0;
};

// Blocks per multiprocessor: what is read of four tokens needs registers, and is much in flight at once.
template <class T, LossBreadth breadth>
constexpr int kComposedBlocks = sizeof(T) == 8 ? 2 : breadth == LossBreadth::usual ? 4 : 3;

template <class T, bool sequence_ratio, LossBreadth breadth>
__global__ void __launch_bounds__(kLossThreads, kComposedBlocks<T, breadth>)
    composed_loss_kernel(LossArguments<T> arguments) {
  PYKERN_SHARED(ComposedShared, shared);
  ComposedLoss<T, sequence_ratio, breadth>(arguments, shared).run();
}

}  // namespace pykern
