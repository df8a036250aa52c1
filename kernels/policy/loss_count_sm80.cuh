// What must be known of all tokens before the first one's part in the loss is: how many there are, and for a
// ratio of whole sequences, the sums that make it up.
#pragma once

#include "kernels/policy/loss_totals.cuh"

namespace pykern {

// Adds counts of whole warps to the counters; they are integers, so their order does not matter.
class TokenCounter {
 public:
  __device__ __forceinline__ explicit TokenCounter(const LossParams& p) : counters_(p.counters) {}

  // All lanes must call.
  __device__ __forceinline__ void add(int64_t sequence, unsigned of_thread) {
    const unsigned count = __reduce_add_sync(kFullWarp, of_thread);
    if (threadIdx.x % kWarpSize != 0 || count == 0) return;
    tokens_ += count;
    // Whoever adds the first tokens of a sequence counts it.
    sequences_ += atomicAdd(&counters_[kSequenceLengths + sequence], static_cast<unsigned long long>(count)) == 0;
  }

  __device__ __forceinline__ void finish() {
    if (tokens_ > 0) atomicAdd(&counters_[kUnmaskedTokens], tokens_);
    if (sequences_ > 0) atomicAdd(&counters_[kNonEmptySequences], sequences_);
  }

 private:
  unsigned long long* counters_;
  unsigned long long tokens_ = 0, sequences_ = 0;  // of the first lanes
};

// Packed sequences without a mask: a thread each.
__global__ void __launch_bounds__(kLossThreads) count_sequences_kernel(LossParams p) {
  unsigned long long filled = 0;
  for (int64_t sequence = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; sequence < p.sequences;
       sequence += int64_t{gridDim.x} * blockDim.x) {
    const int64_t length = sequence_start(p, sequence + 1) - sequence_start(p, sequence);
    if (length <= 0) continue;
    p.counters[kSequenceLengths + sequence] = static_cast<unsigned long long>(length);
    ++filled;
  }
  filled = warp_reduce(filled, Sum{});
  if (threadIdx.x % kWarpSize == 0 && filled > 0) atomicAdd(&p.counters[kNonEmptySequences], filled);
  if (blockIdx.x == 0 && threadIdx.x == 0) p.counters[kUnmaskedTokens] = static_cast<unsigned long long>(p.tokens);
}

constexpr int kMaskBlocks = 12;

// A mask alone: sixteen bytes per thread, two threads to a word of bits.
__global__ void __launch_bounds__(kLossThreads, kMaskBlocks) pack_mask_kernel(LossParams p) {
  constexpr int kBytes = 16;
  const bool packs = allows_packs(p.mask);
  TokenCounter counter(p);
  for (int64_t item = blockIdx.x; item < p.sequences * p.grid.parts; item += gridDim.x) {
    const LossPart part = find_part(p, item);
    unsigned unmasked = 0;
    for (int64_t tile = part.begin / 32 * 32; tile < part.end; tile += kLossThreads * kBytes) {
      const int64_t token = tile + kBytes * static_cast<int64_t>(threadIdx.x);
      unsigned bits = 0;
      if (packs && token >= part.begin && token + kBytes <= part.end) {
        union {
          Pack<uint8_t> bytes;
          uint32_t words[4];
        } sixteen;
        sixteen.bytes = load_pack<Reuse::stream>(p.mask + token);
#pragma unroll
        for (int word = 0; word < 4; ++word) bits |= nonzero_bytes(sixteen.words[word]) << (4 * word);
      } else {
#pragma unroll 1
        for (int byte = 0; byte < kBytes; ++byte) {
          if (token + byte >= part.begin && token + byte < part.end && p.mask[token + byte]) bits |= 1u << byte;
        }
      }
      unmasked += __popc(bits);
      const unsigned upper = __shfl_down_sync(kFullWarp, bits, 1);
      const bool in_part = token + 32 > part.begin && token < part.end;
      if (threadIdx.x % 2 == 0 && in_part) *mask_word(p, part, token) = bits | upper << kBytes;
    }
    counter.add(part.sequence, unmasked);
  }
  counter.finish();
}

// Reads the mask of four tokens and keeps its bits, eight lanes to a word. All lanes must call.
__device__ __forceinline__ TokenBits keep_mask(const LossParams& p, const LossPart& part, const PartPacks& packs,
                                               uint32_t pack) {
  const int64_t token = packs.token_of(pack);
  const TokenBits valid = read_flags(p.mask, token, packs.inside(pack));
  unsigned word = (valid & kFourTokens) << (pack % 8 * kThreadTokens);
#pragma unroll
  for (int distance = 1; distance < 8; distance *= 2) word |= __shfl_xor_sync(kFullWarp, word, distance);
  const bool in_part = token + 32 > part.begin && token < part.end;
  if (pack % 8 == 0 && in_part) *mask_word(p, part, token) = word;
  return valid;
}

// A clipped ratio of whole sequences, with a mask or without.
template <class T>
class SequenceSums {
 public:
  __device__ __forceinline__ SequenceSums(const LossArguments<T>& arguments, const LossPart& part)
      : p_(arguments.params), bounds_(arguments.bounds), packs_(p_, part, arguments.packs), part_(part) {}

  // Sums of this thread; returns its unmasked tokens.
  __device__ __forceinline__ unsigned run(double (&sums)[kPartSums]) {
    const bool uniform = !p_.advantages.per_token && !p_.rollout_logprobs;
    unsigned unmasked = 0;
    // All threads take part in all turns, for the words of bits.
    for (uint32_t turn = 0; turn < packs_.end(); turn += kLossThreads) {
      const uint32_t pack = turn + threadIdx.x;
      const TokenBits valid = p_.mask ? keep_mask(p_, part_, packs_, pack) : packs_.inside(pack);
      unmasked += __popc(valid & kFourTokens);
      const FourTokens<T> logprob = packs_.template read<T>(p_.logprobs, pack, valid);
      const FourTokens<T> old = packs_.template read<T>(p_.old_logprobs, pack, valid);
      T distances = 0;
#pragma unroll
      for (int i = 0; i < kThreadTokens; ++i) distances += is_wanted(valid, i) ? logprob[i] - old[i] : T(0);
      sums[kLogRatios] += static_cast<double>(distances);
      if (!uniform) add_advantages(pack, valid, old, sums);
    }
    if (uniform && unmasked > 0) {
      const auto advantage = static_cast<double>(of_sequence());
      const bool below = advantage < 0;
      sums[kPositiveAdvantages] = below ? 0 : advantage * unmasked;
      sums[kNegativeAdvantages] = below ? advantage * unmasked : 0;
      sums[kPositives] = advantage > 0 ? unmasked : 0;
      sums[kNegatives] = below ? unmasked : 0;
    }
    return unmasked;
  }

 private:
  __device__ __forceinline__ T of_sequence() const {
    return static_cast<const T*>(p_.advantages.values)[part_.sequence];
  }

  __device__ __forceinline__ void add_advantages(uint32_t pack, TokenBits valid, const FourTokens<T>& old,
                                                 double (&sums)[kPartSums]) const {
    FourTokens<T> advantage, rollout;
    if (p_.advantages.per_token) {
      advantage = packs_.template read<T>(p_.advantages.values, pack, valid);
    } else {
      const T same = of_sequence();
#pragma unroll
      for (int i = 0; i < kThreadTokens; ++i) advantage[i] = same;
    }
    if (p_.rollout_logprobs) rollout = packs_.template read<T>(p_.rollout_logprobs, pack, valid);
    T positive = 0, negative = 0, weights = 0;
    int positives = 0, negatives = 0;
#pragma unroll
    for (int i = 0; i < kThreadTokens; ++i) {
      const T value = is_wanted(valid, i) ? advantage[i] : T(0);
      T weighted = value;
      if (p_.rollout_logprobs) {
        const T distance = is_wanted(valid, i) ? old[i] - rollout[i] : T(0), weight = rollout_weight(distance, bounds_);
        weighted *= weight;
        weights += is_wanted(valid, i) ? weight : T(0);
      }
      positive += value < 0 ? T(0) : weighted;
      negative += value < 0 ? weighted : T(0);
      positives += value > 0;
      negatives += value < 0;
    }
    sums[kPositiveAdvantages] += static_cast<double>(positive);
    sums[kNegativeAdvantages] += static_cast<double>(negative);
    sums[kPositives] += positives;
    sums[kNegatives] += negatives;
    sums[kRolloutWeights] += static_cast<double>(weights);
  }

  const LossParams& p_;
  const LossBounds<T>& bounds_;
  const PartPacks packs_;
  const LossPart& part_;
};

template <class T>
__global__ void __launch_bounds__(kLossThreads) sequence_sums_kernel(LossArguments<T> arguments) {
  PYKERN_SHARED(BlockTotals<kPartSums>, shared);
  const LossParams& p = arguments.params;
  TokenCounter counter(p);
  for (int64_t item = blockIdx.x; item < p.sequences * p.grid.parts; item += gridDim.x) {
    const LossPart part = find_part(p, item);
    double sums[kPartSums] = {};
    counter.add(part.sequence, SequenceSums<T>(arguments, part).run(sums));
    block_totals(sums, shared, [&](int index, double sum) { p.part_sums[item * kPartSums + index] = sum; });
  }
  counter.finish();
}

}  // namespace pykern
