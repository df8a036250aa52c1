// The pass over the tokens: loss, its gradient with respect to the log-probability, and the sums behind the
// metrics. A masked token is not read where a whole pack is masked, and taken for zeros elsewhere.
#pragma once

#include "kernels/policy/loss_tokens.cuh"

namespace pykern {

struct LossShared {
  BlockTotals<kBlockSums> totals;
  double sums[kBlockSums];
  bool last;
};

// exp(-d) + d - 1 and its derivative 1 - exp(-d). Near zero both cancel, so a series takes over.
__device__ __forceinline__ void k3_divergence(float d, float* value, float* derivative) {
  const float e = exponential(-d);
  float p = -1.0f / 362880;
  p = p * d + 1.0f / 40320;
  p = p * d - 1.0f / 5040;
  p = p * d + 1.0f / 720;
  p = p * d - 1.0f / 120;
  p = p * d + 1.0f / 24;
  p = p * d - 1.0f / 6;
  p = p * d + 0.5f;
  const float series = p * d * d;
  const bool near = d < 0.5f && d > -0.5f;
  *value = near ? series : e + (d - 1.0f);
  *derivative = near ? d - series : 1.0f - e;
}
__device__ __forceinline__ void k3_divergence(double d, double* value, double* derivative) {
  const double less_one = expm1(-d);
  *value = less_one + d;
  *derivative = -less_one;
}

template <class T>
__device__ __forceinline__ void divergence(KlDivergence kind, const LossBounds<T>& bounds, T raw, T* value,
                                           T* derivative) {
  if (kind == KlDivergence::k1) {
    *value = raw;
    *derivative = 1;
  } else if (kind == KlDivergence::k2) {
    *value = raw * raw * T(0.5);
    *derivative = raw;
  } else {
    const T limit = bounds.kl_log_ratio_limit;
    k3_divergence(clamp(raw, -limit, limit), value, derivative);
    const bool held = raw < -limit || raw > limit || *value > bounds.kl_limit;
    *derivative = held ? T(0) : *derivative;
    *value = *value > bounds.kl_limit ? bounds.kl_limit : *value;
  }
}

template <class T, bool sequence_ratio>
class PolicyLoss {
  // A thread's tokens fit 32 bits; those of a sequence are counted at once.
  template <bool wide, class Unused = void>
  struct Counts {
    int low = 0, high = 0, dual = 0;
  };
  template <class Unused>
  struct Counts<true, Unused> {
    double low = 0, high = 0, dual = 0;
  };

  struct Inputs {
    FourTokens<T> logprob, old;
  };

 public:
  __device__ __forceinline__ PolicyLoss(const LossArguments<T>& arguments, LossShared& shared)
      : arguments_(arguments), p_(arguments.params), bounds_(arguments.bounds), shared_(shared) {}

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
  __device__ __forceinline__ bool reads_tokens() const { return p_.kl != KlDivergence::none || p_.weight_clip; }

  __device__ __forceinline__ static double over(double denominator, double counted) {
    const double divisor = denominator > 0 ? denominator : counted;
    return divisor > 0 ? 1 / divisor : 0;
  }

  // What each token of the part's sequence counts in the loss, and what its tokens share.
  __device__ __forceinline__ void enter(const LossPart& part) {
    sequence_ = part.sequence;
    const double length = arguments_.counted ? length_of(sequence_) : static_cast<double>(part.sequence_tokens);
    const double sequences = static_cast<double>(
        arguments_.counted ? static_cast<int64_t>(p_.counters[kNonEmptySequences]) : p_.sequences);
    switch (p_.aggregate) {
      case LossAggregate::token_mean: weight_ = over(p_.denominator, tokens()); break;
      case LossAggregate::token_sum: weight_ = 1; break;
      case LossAggregate::sequence_sum: weight_ = over(p_.denominator, sequences); break;
      case LossAggregate::sequence_mean: weight_ = length > 0 ? over(p_.denominator, sequences) / length : 0; break;
      case LossAggregate::sequence_sum_norm: weight_ = over(p_.denominator, sequences) / p_.horizon; break;
    }
    token_weight_ = static_cast<T>(weight_);
    if (!p_.per_token_advantages) advantage_ = static_cast<const T*>(p_.advantages)[sequence_];
    // A sequence's first part comes before its others, in whichever block it is.
    if (sequence_ratio) find_ratio(part.index == 0 && threadIdx.x == 0);
  }

  __device__ __forceinline__ double length_of(int64_t sequence) const {
    return static_cast<double>(static_cast<int64_t>(p_.counters[kSequenceLengths + sequence]));
  }

  __device__ __forceinline__ double tokens() const {
    return static_cast<double>(arguments_.counted ? static_cast<int64_t>(p_.counters[kUnmaskedTokens]) : p_.tokens);
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

    const double length = length_of(sequence_), mean = length > 0 ? sums[kLogRatios] / length : 0;
    const auto limit = static_cast<double>(bounds_.sequence_log_ratio_limit);
    const bool limited = mean > limit;
    ratio_ = static_cast<T>(exp(limited ? limit : mean));
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
    if (p_.weight_clip) {
      counts_.low += clipped_low ? length : 0;
      counts_.high += clipped_high ? length : 0;
    } else {
      policy_ -= weight_ * (product(sums[kPositiveAdvantages], bounded < ratio_ ? bounded : ratio_) +
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

  __device__ __forceinline__ Inputs read(int64_t token, unsigned valid) const {
    Inputs inputs{};
    if (!sequence_ratio || reads_tokens()) inputs.logprob = read_tokens(arguments_, p_.logprobs, token, valid);
    if (!sequence_ratio) inputs.old = read_tokens(arguments_, p_.old_logprobs, token, valid);
    return inputs;
  }

  // The mask is read two tiles ahead and the log-probabilities one, so that loads wait for no other.
  __device__ __forceinline__ void run_part(const LossPart& part) {
    int64_t token = part.begin / kTileTokens * kTileTokens + kThreadTokens * static_cast<int64_t>(threadIdx.x);
    unsigned valid = tokens_unmasked(p_, part, token);
    unsigned next_valid = tokens_unmasked(p_, part, token + kTileTokens);
    Inputs inputs = read(token, valid);
    for (; token < part.end; token += kTileTokens) {
      const unsigned later_valid = tokens_unmasked(p_, part, token + 2 * kTileTokens);
      const Inputs next = read(token + kTileTokens, next_valid);
      add(part, token, valid, inputs);
      inputs = next;
      valid = next_valid;
      next_valid = later_valid;
    }
  }

  __device__ __forceinline__ void add(const LossPart& part, int64_t token, unsigned valid, const Inputs& inputs) {
    FourTokens<T> gradient;
#pragma unroll
    for (int i = 0; i < kThreadTokens; ++i) gradient[i] = sequence_ratio && !p_.weight_clip ? share_ : T(0);
    if (valid) {
      if (!sequence_ratio || p_.weight_clip) add_policy(token, valid, inputs, gradient);
      if (p_.kl != KlDivergence::none) add_divergence(token, valid, inputs, gradient);
    }
    if (!p_.coefficient) return;
#pragma unroll
    for (int i = 0; i < kThreadTokens; ++i) gradient[i] = valid >> i & 1 ? gradient[i] : T(0);
    write_tokens(arguments_, p_.coefficient, token, tokens_inside(part, token), gradient);
  }

  __device__ __forceinline__ void add_policy(int64_t token, unsigned valid, const Inputs& inputs,
                                             FourTokens<T>& gradient) {
    FourTokens<T> advantages, truncated;
    if (p_.per_token_advantages) {
      advantages = read_tokens(arguments_, p_.advantages, token, valid);
    } else {
#pragma unroll
      for (int i = 0; i < kThreadTokens; ++i) advantages[i] = valid >> i & 1 ? advantage_ : T(0);
    }
    if (p_.rollout_logprobs) {
      const FourTokens<T> rollout = read_tokens(arguments_, p_.rollout_logprobs, token, valid);
      FourTokens<T> old = inputs.old;
      if (sequence_ratio) old = read_tokens(arguments_, p_.old_logprobs, token, valid);
      T weights = 0;
#pragma unroll
      for (int i = 0; i < kThreadTokens; ++i) {
        truncated[i] = rollout_weight(old[i], rollout[i], bounds_.rollout_clip);
        weights += valid >> i & 1 ? truncated[i] : T(0);
      }
      if (!sequence_ratio) rollout_weights_ += static_cast<double>(weights);
    }
    T losses = 0, ratios = 0, log_ratios = 0;
#pragma unroll
    for (int i = 0; i < kThreadTokens; ++i) {
      const T advantage = advantages[i], logprob = inputs.logprob[i];
      T ratio = ratio_;
      bool outside = false;
      if (!sequence_ratio) {
        const T raw = logprob - inputs.old[i], limit = bounds_.log_ratio_limit;
        const T log_ratio = clamp(raw, -limit, limit);
        outside = raw < -limit || raw > limit;
        ratio = exponential(log_ratio);
        ratios += valid >> i & 1 ? ratio : T(0);
        log_ratios += log_ratio;
      }
      // The ratio's own clamp has no gradient beyond its limit; a clipped weight never has one.
      const T bounded = clamp(ratio, bounds_.ratio_low, bounds_.ratio_high);
      T loss, slope;
      bool clipped;
      if (p_.weight_clip) {
        loss = -bounded * advantage * logprob;
        slope = -bounded * advantage;
        clipped = ratio != bounded;
      } else {
        const T free = -advantage * ratio, held = -advantage * bounded, floor = -advantage * bounds_.dual_clip;
        clipped = held > free;
        loss = clipped ? held : free;
        const bool below = advantage < 0 && loss > floor;
        loss = below ? floor : loss;
        slope = clipped || outside || below ? T(0) : free;
        if (!sequence_ratio) counts_.dual += below;
      }
      if (p_.rollout_logprobs) {
        loss *= truncated[i];
        slope *= truncated[i];
      }
      losses += loss;
      gradient[i] = token_weight_ * slope;
      if (!sequence_ratio) {
        counts_.low += clipped && ratio < bounds_.ratio_low;
        counts_.high += clipped && ratio > bounds_.ratio_high;
      }
    }
    policy_ += weight_ * static_cast<double>(losses);
    ratios_ += static_cast<double>(ratios);
    log_ratios_ += static_cast<double>(log_ratios);
  }

  __device__ __forceinline__ void add_divergence(int64_t token, unsigned valid, const Inputs& inputs,
                                                 FourTokens<T>& gradient) {
    const FourTokens<T> reference = read_tokens(arguments_, p_.ref_logprobs, token, valid);
    const T factor = token_weight_ * bounds_.kl_coef;
    T values = 0;
#pragma unroll
    for (int i = 0; i < kThreadTokens; ++i) {
      T value, derivative;
      divergence(p_.kl, bounds_, inputs.logprob[i] - reference[i], &value, &derivative);
      values += value;
      gradient[i] += factor * derivative;
    }
    kl_ += static_cast<double>(values);
    weighted_kl_ += weight_ * static_cast<double>(values);
  }

  // The block that finishes last adds up the sums of all, in a fixed order.
  __device__ __forceinline__ void finish() {
    double sums[kBlockSums] = {policy_,
                               weighted_kl_,
                               kl_,
                               ratios_,
                               log_ratios_,
                               static_cast<double>(counts_.low),
                               static_cast<double>(counts_.high),
                               static_cast<double>(counts_.dual),
                               rollout_weights_};
    block_totals(sums, shared_.totals,
                 [&](int index, double sum) { p_.block_sums[int64_t{blockIdx.x} * kBlockSums + index] = sum; });
    if (threadIdx.x == 0) {
      __threadfence();
      shared_.last = atomicAdd(&p_.counters[kFinishedBlocks], 1ull) == gridDim.x - 1;
    }
    __syncthreads();
    if (!shared_.last) return;
    __threadfence();
#pragma unroll
    for (int i = 0; i < kBlockSums; ++i) sums[i] = 0;
    for (int64_t block = threadIdx.x; block < gridDim.x; block += kLossThreads) {
#pragma unroll
      for (int i = 0; i < kBlockSums; ++i) sums[i] += __ldcg(p_.block_sums + block * kBlockSums + i);
    }
    block_totals(sums, shared_.totals, [&](int index, double sum) { shared_.sums[index] = sum; });
    if (threadIdx.x == 0) write(shared_.sums);
  }

  __device__ __forceinline__ void write(const double* sums) const {
    const double count = tokens(), per_token = count > 0 ? 1 / count : 0;
    const double policy = sums[kWeightedPolicy], kl = sums[kWeightedKl] * static_cast<double>(p_.bounds.kl_coef);
    const double values[kLossMetrics] = {policy,
                                         kl,
                                         sums[kKl] * per_token,
                                         sums[kRatio] * per_token,
                                         -sums[kLogRatio] * per_token,
                                         (sums[kClippedLow] + sums[kClippedHigh]) * per_token,
                                         sums[kClippedLow] * per_token,
                                         sums[kClippedHigh] * per_token,
                                         sums[kDualClipped] * per_token,
                                         sums[kRolloutWeight] * per_token};
#pragma unroll
    for (int i = 0; i < kLossMetrics; ++i) static_cast<T*>(p_.metrics)[i] = static_cast<T>(values[i]);
    *static_cast<T*>(p_.loss) = static_cast<T>(policy + kl);
  }

  const LossArguments<T>& arguments_;
  const LossParams& p_;
  const LossBounds<T>& bounds_;
  LossShared& shared_;

  // Sums of a thread.
  double policy_ = 0, weighted_kl_ = 0, kl_ = 0, ratios_ = 0, log_ratios_ = 0, rollout_weights_ = 0;
  Counts<sequence_ratio> counts_;

  // Of the sequence that is being read.
  int64_t sequence_ = -1;
  double weight_ = 0;
  T token_weight_ = 0, advantage_ = 0;
  T ratio_ = 1, share_ = 0;  // where the ratio is that of the sequence: it, and each token's share of the gradient
};

// Blocks per multiprocessor: enough loads in flight within the registers there are.
template <class T, bool sequence_ratio>
constexpr int kLossBlocks = sizeof(T) == 8 ? 3 : sequence_ratio ? 6 : 8;

template <class T, bool sequence_ratio>
__global__ void __launch_bounds__(kLossThreads, kLossBlocks<T, sequence_ratio>) policy_loss_kernel(LossArguments<T> arguments) {
  PYKERN_SHARED(LossShared, shared);
  PolicyLoss<T, sequence_ratio>(arguments, shared).run();
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
      for (int i = 0; i < kPacks; ++i) pack[i] = load_pack<Reuse::stream>(source + token + i * kGradientThreads * kSize);
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
