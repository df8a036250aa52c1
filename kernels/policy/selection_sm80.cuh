// Radix selection over ordered bits; see selection.h.
#pragma once

#include <cmath>
#include <type_traits>

#include "kernels/common/device.h"
#include "kernels/common/reduce.cuh"
#include "kernels/policy/last_block.cuh"
#include "kernels/policy/selection.h"

namespace pykern {

// --- keys ----------------------------------------------------------------------------------------------------

template <class T>
struct KeyOf;
template <>
struct KeyOf<float> {
  using Type = uint32_t;
};
template <>
struct KeyOf<double> {
  using Type = unsigned long long;
};

// Integers in the order of the values; both zeros are one value.
__device__ __forceinline__ uint32_t ordered_key(float value) {
  const auto bits = static_cast<uint32_t>(__float_as_int(value == 0 ? 0.0f : value));
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ unsigned long long ordered_key(double value) {
  const auto bits = static_cast<unsigned long long>(__double_as_longlong(value == 0 ? 0.0 : value));
  return bits >> 63 ? ~bits : bits | 1ull << 63;
}
__device__ __forceinline__ double value_of_key(uint32_t key) {
  return static_cast<double>(__int_as_float(static_cast<int>(key >> 31 ? key & 0x7fffffffu : ~key)));
}
__device__ __forceinline__ double value_of_key(unsigned long long key) {
  return __longlong_as_double(static_cast<long long>(key >> 63 ? key & ~(1ull << 63) : ~key));
}

// A bijection of the token for each seed, so no two tokens share a key.
__device__ __forceinline__ unsigned long long random_key(uint64_t seed, int64_t token) {
  uint64_t mixed = (static_cast<uint64_t>(token) + 1) * 0x9e3779b97f4a7c15u + seed * 0xd1342543de82ef95u;
  mixed = (mixed ^ (mixed >> 30)) * 0xbf58476d1ce4e5b9u;
  mixed = (mixed ^ (mixed >> 27)) * 0x94d049bb133111ebu;
  return mixed ^ (mixed >> 31);
}

// The tokens as the selection sees them. Smallest keys come first.
template <class T, SelectionOrder order>
class SelectionKeys {
 public:
  static constexpr bool kRandom = order == SelectionOrder::random;
  using Key = std::conditional_t<kRandom, unsigned long long, typename KeyOf<T>::Type>;
  static constexpr int kBits = 8 * sizeof(Key);
  static constexpr int kPasses = (kBits + kDigitBits - 1) / kDigitBits;

  __device__ __forceinline__ explicit SelectionKeys(const SelectionParams& params) : p_(params) {}

  __device__ __forceinline__ bool unmasked(int64_t token) const { return !p_.mask || p_.mask[token]; }
  // Whether a token may be selected, if it is not masked; its key. `number` is false for NaN.
  __device__ __forceinline__ bool candidate(int64_t token, Key& key, bool& number) const {
    number = true;
    if constexpr (kRandom) {
      key = random_key(p_.seed, token);
    } else {
      const T value = static_cast<const T*>(p_.values)[token];
      number = value == value;
      key = ordered_key(value);
      if (order == SelectionOrder::largest) key = ~key;
    }
    return number && (!p_.candidates || p_.candidates[token]);
  }
  __device__ __forceinline__ bool takes_part(int64_t token, Key& key) const {
    bool number;
    return unmasked(token) && candidate(token, key, number);
  }

 private:
  const SelectionParams& p_;
};

// Bits below the digit of a pass.
template <class Key>
__device__ __forceinline__ int digit_shift(int pass) {
  const int shift = static_cast<int>(8 * sizeof(Key)) - (pass + 1) * kDigitBits;
  return shift > 0 ? shift : 0;
}
template <class Key>
__device__ __forceinline__ unsigned digit_of(Key key, int pass) {
  const int left = static_cast<int>(8 * sizeof(Key)) - pass * kDigitBits;
  const Key rest = left < static_cast<int>(8 * sizeof(Key)) ? key & ((Key{1} << left) - 1) : key;
  return static_cast<unsigned>(rest >> digit_shift<Key>(pass));
}

// --- the digits of the wanted key --------------------------------------------------------------------------------

struct DigitsShared {
  unsigned digits[kDigits];
  unsigned long long of_warp[kWarpSize];
  unsigned long long rank, before, count;
  unsigned digit;
  bool last;
};

// Equal digits of a warp are counted by one of its lanes: many values may be the same. All lanes must call.
__device__ __forceinline__ void count_digit(bool active, unsigned digit, unsigned* digits) {
  const unsigned peers = __match_any_sync(kFullWarp, active ? digit : ~0u);
  if (active && static_cast<int>(threadIdx.x) % kWarpSize == __ffs(static_cast<int>(peers)) - 1) {
    atomicAdd(&digits[digit], static_cast<unsigned>(__popc(peers)));
  }
}

// The digit in which the rank lies, how many keys have a smaller one, and how many have it. The counts become zero.
__device__ __forceinline__ void find_digit(unsigned long long* digits, unsigned long long rank, DigitsShared& shared) {
  constexpr int kEach = kDigits / kSelectionThreads;
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize, warps = blockDim.x / kWarpSize;
  unsigned long long counts[kEach], sum = 0;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    unsigned long long* const place = digits + static_cast<int>(threadIdx.x) * kEach + i;
    counts[i] = __ldcg(place);
    *place = 0;
    sum += counts[i];
  }
  unsigned long long before = sum;
#pragma unroll
  for (int distance = 1; distance < kWarpSize; distance *= 2) {
    const unsigned long long other = __shfl_up_sync(kFullWarp, before, distance);
    if (lane >= distance) before += other;
  }
  if (lane == kWarpSize - 1) shared.of_warp[warp] = before;
  __syncthreads();
  before -= sum;
  for (int other = 0; other < warps; ++other) before += other < warp ? shared.of_warp[other] : 0;
  if (rank >= before && rank < before + sum) {
    int found = kEach - 1;
#pragma unroll
    for (int i = kEach - 1; i >= 0; --i) {
      unsigned long long smaller = before;
#pragma unroll
      for (int j = 0; j < i; ++j) smaller += counts[j];
      if (rank < smaller + counts[i] && rank >= smaller) {
        found = i;
        shared.before = smaller;
        shared.count = counts[i];
      }
    }
    shared.digit = threadIdx.x * kEach + static_cast<unsigned>(found);
  }
  __syncthreads();
}

// What the counts of all tokens decide: how many are selected, or where the quantile lies.
template <bool kQuantile>
__device__ __forceinline__ void begin_selection(const SelectionParams& p) {
  SelectionState& state = *p.state;
  const unsigned long long candidates = __ldcg(&state.candidates), unmasked = __ldcg(&state.unmasked);
  if constexpr (kQuantile) {
    const double position = candidates > 0 ? p.quantile * static_cast<double>(candidates - 1) : 0;
    double rank = floor(position);
    if (p.interpolation == Interpolation::nearest) rank = rint(position);
    if (p.interpolation == Interpolation::higher) rank = ceil(position);
    state.weight = p.interpolation == Interpolation::linear ? position - rank : 0;
    state.rank = static_cast<unsigned long long>(rank);
    state.wanted = candidates > 0;
  } else {
    auto wanted = static_cast<long long>(floor(p.share * static_cast<double>(unmasked)));
    if (wanted < p.minimum) wanted = p.minimum;
    if (wanted > static_cast<long long>(candidates)) wanted = static_cast<long long>(candidates);
    state.wanted = static_cast<unsigned long long>(wanted);
    state.rank = wanted > 0 ? static_cast<unsigned long long>(wanted - 1) : 0;
    p.counts[0] = wanted;
    p.counts[1] = static_cast<int64_t>(unmasked);
  }
}

template <class T, SelectionOrder order, bool kQuantile>
__global__ void __launch_bounds__(kSelectionThreads) selection_digits_kernel(SelectionParams p, int pass) {
  using Keys = SelectionKeys<T, order>;
  using Key = typename Keys::Key;
  PYKERN_SHARED(DigitsShared, shared);
  const Keys keys(p);
  SelectionState& state = *p.state;
  for (int digit = threadIdx.x; digit < kDigits; digit += blockDim.x) shared.digits[digit] = 0;
  __syncthreads();
  const auto prefix = static_cast<Key>(pass > 0 ? state.prefix : 0);
  unsigned unmasked = 0, candidates = 0, not_numbers = 0;
  // All lanes stay together for the count. Several tokens are read before the first is counted: reads overlap.
  constexpr int kAtOnce = 4;
  const int64_t step = int64_t{gridDim.x} * kSelectionThreads * kAtOnce;
  for (int64_t first = int64_t{blockIdx.x} * kSelectionThreads * kAtOnce; first < p.tokens; first += step) {
    Key key[kAtOnce];
    bool active[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int64_t token = first + i * kSelectionThreads + threadIdx.x;
      bool number = true, counted = token < p.tokens;
      key[i] = 0;
      active[i] = counted && keys.candidate(token, key[i], number);
      counted = counted && keys.unmasked(token);
      active[i] = active[i] && counted;
      unmasked += counted;
      candidates += active[i];
      not_numbers += counted && !number;
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const bool as_wanted = pass == 0 || (key[i] ^ prefix) >> digit_shift<Key>(pass - 1) == 0;
      count_digit(active[i] && as_wanted, digit_of(key[i], pass), shared.digits);
    }
  }
  if (pass == 0) {
    unmasked = __reduce_add_sync(kFullWarp, unmasked);
    candidates = __reduce_add_sync(kFullWarp, candidates);
    not_numbers = __reduce_add_sync(kFullWarp, not_numbers);
    if (threadIdx.x % kWarpSize == 0) {
      if (unmasked > 0) atomicAdd(&state.unmasked, static_cast<unsigned long long>(unmasked));
      if (candidates > 0) atomicAdd(&state.candidates, static_cast<unsigned long long>(candidates));
      if (not_numbers > 0) atomicAdd(&state.not_numbers, static_cast<unsigned long long>(not_numbers));
    }
  }
  __syncthreads();
  for (int digit = threadIdx.x; digit < kDigits; digit += blockDim.x) {
    const unsigned count = shared.digits[digit];
    if (count > 0) atomicAdd(&state.digits[digit], static_cast<unsigned long long>(count));
  }
  if (!is_last_block(&state.finished, shared.last)) return;
  if (threadIdx.x == 0) {
    if (pass == 0) begin_selection<kQuantile>(p);
    shared.rank = state.rank;
    shared.digit = 0;
    shared.before = shared.count = 0;
  }
  __syncthreads();
  find_digit(state.digits, shared.rank, shared);
  if (threadIdx.x == 0) {
    state.prefix = prefix | static_cast<Key>(static_cast<Key>(shared.digit) << digit_shift<Key>(pass));
    state.rank -= shared.before;
    state.equal = shared.count;
  }
}

// --- a share ---------------------------------------------------------------------------------------------------

// Tokens of a block, a chunk in their order.
__device__ __forceinline__ int64_t chunk_tokens(int64_t tokens) {
  const int64_t share = (tokens + gridDim.x - 1) / gridDim.x;
  return (share + kSelectionThreads - 1) / kSelectionThreads * kSelectionThreads;
}

// Whether some, but not all, of the tokens with the last key are selected: those that come first.
__device__ __forceinline__ bool has_ties(const SelectionState& state) {
  return state.wanted > 0 && state.rank + 1 < state.equal;
}

template <class T, SelectionOrder order>
__global__ void __launch_bounds__(kSelectionThreads) selection_ties_kernel(SelectionParams p) {
  using Keys = SelectionKeys<T, order>;
  if (!has_ties(*p.state)) return;
  PYKERN_SHARED(WarpValues<unsigned long long>, shared);
  const Keys keys(p);
  const auto last = static_cast<typename Keys::Key>(p.state->prefix);
  const int64_t chunk = chunk_tokens(p.tokens), begin = blockIdx.x * chunk;
  const int64_t end = begin + chunk < p.tokens ? begin + chunk : p.tokens;
  unsigned long long count = 0;
  for (int64_t token = begin + threadIdx.x; token < end; token += blockDim.x) {
    typename Keys::Key key = 0;
    count += keys.takes_part(token, key) && key == last;
  }
  count = block_reduce(count, 0ull, Sum{}, shared);
  if (threadIdx.x == 0) p.ties[blockIdx.x] = count;
}

struct SelectShared {
  WarpValues<unsigned long long> values;
  unsigned of_warp[kSelectionThreads / kWarpSize];
};

template <class T, SelectionOrder order>
__global__ void __launch_bounds__(kSelectionThreads) select_share_kernel(SelectionParams p) {
  using Keys = SelectionKeys<T, order>;
  PYKERN_SHARED(SelectShared, shared);
  const Keys keys(p);
  const SelectionState& state = *p.state;
  const auto last = static_cast<typename Keys::Key>(state.prefix);
  const bool any = state.wanted > 0, ties = has_ties(state);
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int64_t chunk = chunk_tokens(p.tokens), begin = blockIdx.x * chunk;
  const int64_t end = begin + chunk < p.tokens ? begin + chunk : p.tokens;
  unsigned long long before = 0;
  if (ties) {
    for (unsigned block = threadIdx.x; block < blockIdx.x; block += blockDim.x) before += p.ties[block];
    before = block_reduce(before, 0ull, Sum{}, shared.values);
  }
  for (int64_t first = begin; first < end; first += blockDim.x) {
    const int64_t token = first + threadIdx.x;
    typename Keys::Key key = 0;
    const bool takes_part = any && token < end && keys.takes_part(token, key);
    bool selected = takes_part && key <= last;
    if (ties) {
      const bool tie = takes_part && key == last;
      const unsigned lanes = __ballot_sync(kFullWarp, tie);
      if (lane == 0) shared.of_warp[warp] = static_cast<unsigned>(__popc(lanes));
      __syncthreads();
      unsigned in_front = static_cast<unsigned>(__popc(lanes & ((1u << lane) - 1))), all = 0;
#pragma unroll
      for (int other = 0; other < kSelectionThreads / kWarpSize; ++other) {
        in_front += other < warp ? shared.of_warp[other] : 0;
        all += shared.of_warp[other];
      }
      if (tie) selected = before + in_front <= state.rank;
      before += all;
      __syncthreads();
    }
    if (token < end) p.selected[token] = selected;
  }
}

// --- a quantile ------------------------------------------------------------------------------------------------

// The key that follows the wanted one, if it takes part, and the value.
template <class T>
__global__ void __launch_bounds__(kSelectionThreads) quantile_kernel(SelectionParams p) {
  using Keys = SelectionKeys<T, SelectionOrder::smallest>;
  using Key = typename Keys::Key;
  PYKERN_SHARED(bool, last_block);
  SelectionState& state = *p.state;
  const auto wanted = static_cast<Key>(state.prefix);
  const bool beyond = state.wanted > 0 && state.weight > 0 && state.rank + 1 >= state.equal;
  if (beyond) {
    const Keys keys(p);
    unsigned long long smallest = ~0ull;
    for (int64_t token = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; token < p.tokens;
         token += int64_t{gridDim.x} * blockDim.x) {
      Key key = 0;
      if (keys.takes_part(token, key) && key > wanted && key < smallest) smallest = key;
    }
    smallest = warp_reduce(smallest, Smallest{});
    // Complements, since the state begins with zeros.
    if (threadIdx.x % kWarpSize == 0 && smallest != ~0ull) atomicMax(&state.next, ~smallest);
  }
  if (!is_last_block(&state.finished, last_block)) return;
  if (threadIdx.x != 0) return;
  double result = value_of_key(wanted);
  if (state.weight > 0) {
    const unsigned long long next = ~__ldcg(&state.next);
    const double upper = beyond ? value_of_key(static_cast<Key>(next)) : result;
    if (upper != result) result = (1 - state.weight) * result + state.weight * upper;
  }
  if (state.wanted == 0 || state.not_numbers > 0) result = static_cast<double>(NAN);
  *static_cast<T*>(p.result) = static_cast<T>(result);
}

// --- moments ---------------------------------------------------------------------------------------------------

struct MomentsShared {
  WarpValues<double> values;
  bool last;
};

__device__ __forceinline__ void add_moments(double (&moments)[kMoments], MomentsShared& shared) {
  moments[kCount] = block_reduce(moments[kCount], 0.0, Sum{}, shared.values);
  moments[kMean] = block_reduce(moments[kMean], 0.0, Sum{}, shared.values);
  moments[kMeanSquare] = block_reduce(moments[kMeanSquare], 0.0, Sum{}, shared.values);
  moments[kSmallest] = block_reduce(moments[kSmallest], static_cast<double>(HUGE_VAL), Smallest{}, shared.values);
  moments[kLargest] = block_reduce(moments[kLargest], -static_cast<double>(HUGE_VAL), Largest{}, shared.values);
}

template <class T>
__global__ void __launch_bounds__(kSelectionThreads) masked_moments_kernel(MomentsParams p) {
  PYKERN_SHARED(MomentsShared, shared);
  const double centre = p.centre ? *p.centre : 0;
  double moments[kMoments] = {0, 0, 0, HUGE_VAL, -HUGE_VAL};
  for (int64_t token = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; token < p.tokens;
       token += int64_t{gridDim.x} * blockDim.x) {
    if (p.mask && !p.mask[token]) continue;
    const auto value = static_cast<double>(static_cast<const T*>(p.values)[token]);
    moments[kCount] += 1;
    moments[kMean] += value;
    moments[kMeanSquare] += (value - centre) * (value - centre);
    moments[kSmallest] = value < moments[kSmallest] ? value : moments[kSmallest];
    moments[kLargest] = value > moments[kLargest] ? value : moments[kLargest];
  }
  add_moments(moments, shared);
  if (threadIdx.x == 0) {
    double* partial = p.partial + int64_t{blockIdx.x} * kMoments;
#pragma unroll
    for (int moment = 0; moment < kMoments; ++moment) partial[moment] = moments[moment];
  }
  if (!is_last_block(p.finished, shared.last)) return;
  moments[kCount] = moments[kMean] = moments[kMeanSquare] = 0;
  moments[kSmallest] = HUGE_VAL;
  moments[kLargest] = -HUGE_VAL;
  for (unsigned block = threadIdx.x; block < gridDim.x; block += blockDim.x) {
    const double* partial = p.partial + int64_t{block} * kMoments;
    moments[kCount] += __ldcg(partial + kCount);
    moments[kMean] += __ldcg(partial + kMean);
    moments[kMeanSquare] += __ldcg(partial + kMeanSquare);
    moments[kSmallest] = Smallest{}(moments[kSmallest], __ldcg(partial + kSmallest));
    moments[kLargest] = Largest{}(moments[kLargest], __ldcg(partial + kLargest));
  }
  add_moments(moments, shared);
  if (threadIdx.x != 0) return;
  const double divisor = moments[kCount] > 0 ? moments[kCount] : 1;
  moments[kMean] /= divisor;
  moments[kMeanSquare] /= divisor;
#pragma unroll
  for (int moment = 0; moment < kMoments; ++moment) p.moments[moment] = moments[moment];
}

}  // namespace pykern
