// What must be known of all tokens before the first one's part in the loss is: how many there are, and for a
// ratio of whole sequences, the sums that make it up.
#pragma once

#include "kernels/policy/loss_tokens.cuh"

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

// A bit for each of the wanted ones among four bytes of the mask.
__device__ __forceinline__ unsigned read_mask(const LossParams& p, int64_t token, unsigned wanted) {
  const uint8_t* source = p.mask + token;
  if (wanted == 0xfu && reinterpret_cast<uintptr_t>(p.mask) % 4 == 0) {
    return nonzero_bytes(__ldcs(reinterpret_cast<const unsigned*>(source)));
  }
  unsigned bits = 0;
#pragma unroll
  for (int i = 0; i < kThreadTokens; ++i) bits |= (wanted >> i & 1 && source[i] ? 1u : 0u) << i;
  return bits;
}

// A ratio of whole sequences, with a mask or without.
template <class T>
__global__ void __launch_bounds__(kLossThreads) sequence_sums_kernel(LossArguments<T> arguments) {
  PYKERN_SHARED(BlockTotals<kPartSums>, shared);
  const LossParams& p = arguments.params;
  TokenCounter counter(p);
  for (int64_t item = blockIdx.x; item < p.sequences * p.grid.parts; item += gridDim.x) {
    const LossPart part = find_part(p, item);
    double sums[kPartSums] = {};
    unsigned unmasked = 0;
    for (int64_t tile = part.begin / kTileTokens * kTileTokens; tile < part.end; tile += kTileTokens) {
      const int64_t token = tile + kThreadTokens * static_cast<int64_t>(threadIdx.x);
      unsigned valid = tokens_inside(part, token);
      if (p.mask) {
        valid &= read_mask(p, token, valid);
        // Eight lanes to a word.
        unsigned word = valid << (token % 32);
#pragma unroll
        for (int distance = 1; distance < 8; distance *= 2) word |= __shfl_xor_sync(kFullWarp, word, distance);
        const bool in_part = token + 32 > part.begin && token < part.end;
        if (threadIdx.x % 8 == 0 && in_part) *mask_word(p, part, token) = word;
      }
      unmasked += __popc(valid);
      const FourTokens<T> logprob = read_tokens(arguments, p.logprobs, token, valid);
      const FourTokens<T> old = read_tokens(arguments, p.old_logprobs, token, valid);
      T distances = 0;
#pragma unroll
      for (int i = 0; i < kThreadTokens; ++i) distances += logprob[i] - old[i];
      sums[kLogRatios] += static_cast<double>(distances);
      if (!p.per_token_advantages && !p.rollout_logprobs) continue;
      FourTokens<T> advantage, rollout;
      if (p.per_token_advantages) {
        advantage = read_tokens(arguments, p.advantages, token, valid);
      } else {
        const T shared_advantage = static_cast<const T*>(p.advantages)[part.sequence];
#pragma unroll
        for (int i = 0; i < kThreadTokens; ++i) advantage[i] = valid >> i & 1 ? shared_advantage : T(0);
      }
      if (p.rollout_logprobs) rollout = read_tokens(arguments, p.rollout_logprobs, token, valid);
      T positive = 0, negative = 0, weights = 0;
#pragma unroll
      for (int i = 0; i < kThreadTokens; ++i) {
        T weighted = advantage[i];
        if (p.rollout_logprobs) {
          const T weight = rollout_weight(old[i], rollout[i], arguments.bounds.rollout_clip);
          weighted *= weight;
          weights += valid >> i & 1 ? weight : T(0);
        }
        const bool below = advantage[i] < 0;
        positive += below ? T(0) : weighted;
        negative += below ? weighted : T(0);
        sums[kPositives] += advantage[i] > 0;
        sums[kNegatives] += below;
      }
      sums[kPositiveAdvantages] += static_cast<double>(positive);
      sums[kNegativeAdvantages] += static_cast<double>(negative);
      sums[kRolloutWeights] += static_cast<double>(weights);
    }
    if (!p.per_token_advantages && !p.rollout_logprobs) {
      const auto advantage = static_cast<double>(static_cast<const T*>(p.advantages)[part.sequence]);
      const bool below = advantage < 0;
      const double total = unmasked > 0 ? advantage * unmasked : 0;
      sums[kPositiveAdvantages] = below ? 0 : total;
      sums[kNegativeAdvantages] = below ? total : 0;
      sums[kPositives] = advantage > 0 ? unmasked : 0;
      sums[kNegatives] = below ? unmasked : 0;
    }
    counter.add(part.sequence, unmasked);
    block_totals(sums, shared, [&](int index, double sum) { p.part_sums[item * kPartSums + index] = sum; });
  }
  counter.finish();
}

}  // namespace pykern
