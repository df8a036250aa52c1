// What the kernels of policy_loss share: parts of sequences, masks as bits, four tokens per thread.
#pragma once

#include <cfloat>
#include <cmath>

#include "kernels/common/device.h"
#include "kernels/common/vector.cuh"
#include "kernels/policy/loss.h"

namespace pykern {

constexpr int kLossThreads = 128;
constexpr int kThreadTokens = 4;
// Parts of a sequence meet at multiples of it, so that each word of the mask's bits belongs to one part.
constexpr int64_t kTileTokens = kLossThreads * kThreadTokens;

template <class T>
struct LossArguments {
  LossParams params;
  LossBounds<T> bounds;
  bool packs;    // all pointers to tokens allow sixteen-byte accesses
  bool counted;  // the counters hold what they are meant to
  bool limited_divergence;
};

// --- parts of sequences -------------------------------------------------------------------------------------

struct LossPart {
  int64_t sequence, index, begin, end;
  int64_t sequence_tokens;  // masked or not
};

__device__ __forceinline__ int64_t sequence_start(const LossParams& p, int64_t sequence) {
  if (!p.cu_seqlens) return sequence * p.columns;
  // Nobody has checked them: a wrong one may give a wrong loss, but no access elsewhere.
  const int64_t start = p.cu_seqlens[sequence];
  return start < 0 ? 0 : start < p.tokens ? start : p.tokens;
}

__device__ __forceinline__ LossPart find_part(const LossParams& p, int64_t item) {
  LossPart part;
  part.sequence = item / p.grid.parts;
  part.index = item - part.sequence * p.grid.parts;
  const int64_t start = sequence_start(p, part.sequence), stop = sequence_start(p, part.sequence + 1);
  const int64_t first_tile = start / kTileTokens, last_tile = (stop + kTileTokens - 1) / kTileTokens;
  const int64_t share = (last_tile - first_tile + p.grid.parts - 1) / p.grid.parts * kTileTokens;
  const int64_t from = first_tile * kTileTokens + part.index * share;
  part.begin = from > start ? from : start;
  part.end = from + share < stop ? from + share : stop;
  part.sequence_tokens = stop > start ? stop - start : 0;
  return part;
}

// --- four tokens of a thread -----------------------------------------------------------------------------------

// A bit for each of four tokens, and one that says that all four belong to the part and can be read at once.
using TokenBits = unsigned;
constexpr TokenBits kFourTokens = 0xfu, kWholePack = 0x10u;

__device__ __forceinline__ bool is_wanted(TokenBits bits, int index) { return (bits & (1u << index)) != 0; }

template <class T>
struct FourTokens {
  T values[kThreadTokens];
  __device__ __forceinline__ T& operator[](int index) { return values[index]; }
  __device__ __forceinline__ const T& operator[](int index) const { return values[index]; }
};

// Which of four bytes are not zero.
__device__ __forceinline__ TokenBits nonzero_bytes(uint32_t bytes) {
  const uint32_t ones = ((((bytes & 0x7f7f7f7fu) + 0x7f7f7f7fu) | bytes) & 0x80808080u) >> 7;
  return (ones * 0x01020408u) >> 24 & kFourTokens;
}

// Of the wanted ones among four tokens, those whose flag is set.
__device__ __forceinline__ TokenBits read_flags(const uint8_t* flags, int64_t token, TokenBits wanted) {
  const uint8_t* source = flags + token;
  if (wanted & kWholePack && reinterpret_cast<uintptr_t>(flags) % 4 == 0) {
    return nonzero_bytes(__ldcs(reinterpret_cast<const unsigned*>(source))) | kWholePack;
  }
  TokenBits bits = wanted & kWholePack;
#pragma unroll
  for (int i = 0; i < kThreadTokens; ++i) bits |= (is_wanted(wanted, i) && source[i] ? 1u : 0u) << i;
  return bits;
}

__device__ __forceinline__ uint32_t* mask_word(const LossParams& p, const LossPart& part, int64_t token) {
  return p.mask_bits + (token / 32 + part.sequence);
}

// The packs of four tokens of a part, counted from the tile in which it begins: 32 bits are enough for them.
class PartPacks {
 public:
  __device__ __forceinline__ PartPacks(const LossParams& p, const LossPart& part, bool aligned)
      : first_(part.begin / kTileTokens * kTileTokens),
        head_(part.begin - first_),
        tail_(part.end - first_),
        whole_begin_(static_cast<uint32_t>((head_ + kThreadTokens - 1) / kThreadTokens)),
        whole_state_(aligned ? kFourTokens | kWholePack : kFourTokens),
        bits_(p.mask ? mask_word(p, part, first_) : nullptr) {
    const auto whole_end = static_cast<uint32_t>(tail_ / kThreadTokens);
    whole_ = whole_end > whole_begin_ ? whole_end - whole_begin_ : 0;
    end_ = part.begin < part.end ? static_cast<uint32_t>((tail_ + kThreadTokens - 1) / kThreadTokens) : 0;
  }

  __device__ __forceinline__ uint32_t end() const { return end_; }
  __device__ __forceinline__ int64_t token_of(uint32_t pack) const { return first_ + int64_t{pack} * kThreadTokens; }

  __device__ __forceinline__ TokenBits inside(uint32_t pack) const {
    if (pack - whole_begin_ < whole_) return whole_state_;
    TokenBits bits = 0;
#pragma unroll 1
    for (int i = 0; i < kThreadTokens; ++i) {
      const int64_t token = int64_t{pack} * kThreadTokens + i;
      bits |= (token >= head_ && token < tail_ ? 1u : 0u) << i;
    }
    return bits;
  }
  // Needs the mask's bits.
  __device__ __forceinline__ TokenBits unmasked(uint32_t pack) const {
    const TokenBits bits = inside(pack);
    if (!bits_ || !bits) return bits;
    return bits & (bits_[pack / 8] >> (pack % 8 * kThreadTokens) | kWholePack);
  }

  // What is not wanted holds anything, and is read only where a whole pack is.
  template <class T>
  __device__ __forceinline__ FourTokens<T> read(const void* array, uint32_t pack, TokenBits wanted) const {
    FourTokens<T> result{};
    const T* source = static_cast<const T*>(array) + token_of(pack);
    if ((wanted & kFourTokens) == 0) return result;
    if (wanted & kWholePack) {
#pragma unroll
      for (int i = 0; i < kThreadTokens; i += Pack<T>::kSize) {
        const Pack<T> part = load_pack<Reuse::stream>(source + i);
#pragma unroll
        for (int j = 0; j < Pack<T>::kSize; ++j) result[i + j] = part[j];
      }
    } else {
#pragma unroll
      for (int i = 0; i < kThreadTokens; ++i) {
        if (is_wanted(wanted, i)) result[i] = source[i];
      }
    }
    return result;
  }

  template <class T>
  __device__ __forceinline__ void write(void* array, uint32_t pack, const FourTokens<T>& values) const {
    T* target = static_cast<T*>(array) + token_of(pack);
    const TokenBits bits = inside(pack);
    if (bits & kWholePack) {
#pragma unroll
      for (int i = 0; i < kThreadTokens; i += Pack<T>::kSize) {
        Pack<T> part;
#pragma unroll
        for (int j = 0; j < Pack<T>::kSize; ++j) part[j] = values[i + j];
        store_pack(target + i, part);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kThreadTokens; ++i) {
        if (is_wanted(bits, i)) target[i] = values[i];
      }
    }
  }

 private:
  int64_t first_, head_, tail_;
  uint32_t whole_begin_, whole_, end_;
  TokenBits whole_state_;
  const uint32_t* bits_;
};

// --- arithmetic -----------------------------------------------------------------------------------------------------

__device__ __forceinline__ float exponential(float value) { return expf(value); }
__device__ __forceinline__ double exponential(double value) { return exp(value); }

template <class T>
__host__ __device__ constexpr T largest_number() {
  return static_cast<T>(sizeof(T) == 4 ? FLT_MAX : DBL_MAX);
}

// The exponential `result` of a number is a number: what it is multiplied by may be 0.
template <class T>
__device__ __forceinline__ T finite(double result, double argument) {
  return result > largest_number<T>() && argument <= DBL_MAX ? largest_number<T>() : static_cast<T>(result);
}
template <class T>
__device__ __forceinline__ T finite_exponential(T value) {
  const T result = exponential(value);
  return result > largest_number<T>() && value <= largest_number<T>() ? largest_number<T>() : result;
}

// A NaN stays NaN in it.
template <class T>
__device__ __forceinline__ T clamp(T value, T low, T high) {
  value = value < low ? low : value;
  return value > high ? high : value;
}

// exp(old_logprob - rollout_logprob) within its bounds
template <class T>
__device__ __forceinline__ T rollout_weight(T distance, const LossBounds<T>& bounds) {
  return clamp(exponential(distance), bounds.rollout_low, bounds.rollout_high);
}

}  // namespace pykern
