// Token log-probabilities: one block per row, one read of the logits, one exponential per logit.
//
// At the rate of a copy, 9 bfloat16 logits per clock go through a multiprocessor of an H200, which issues 128
// instructions and 16 exponentials in that time. The forward's loop has 6 instructions per logit, 9 with the entropy
// and the sum of squares: neither limit is near, so all exponentials are the special-function unit's.
#pragma once

#include <type_traits>

#include "kernels/common/device.h"
#include "kernels/common/reduce.cuh"
#include "kernels/common/vector.cuh"
#include "kernels/policy/logprobs.h"
#include "kernels/ptx/math.cuh"

namespace pykern {

// Sixteen-byte loads that a thread has under way.
constexpr int kLogprobsUnroll = 4;
constexpr int kLogprobsThreads = 384;
// Blocks of a multiprocessor at least: it goes on reading while one of them is at the end of its row.
template <class T>
constexpr int kLogprobsBlocks = sizeof(T) == 8 ? 1 : 3;

// Below this an exponential is 0 in every type. Exponents that are multiplied stop here, so that a masked
// entry (-inf) contributes 0 * finite instead of 0 * inf.
constexpr float kSmallestExponent = -1e4f;

// How the exponentials of a type of logits are computed: `raise(kUnit * x)` is e^x.
// Sixteen-bit logits come twice as fast, and take the special-function unit as it is.
template <class T>
struct Exponential {
  using Real = float;
  static constexpr double kUnit = 1.4426950408889634;
  static constexpr float kLowest = -3.402823466e38f;
  static __device__ __forceinline__ float raise(float exponent) { return fast_exp2(exponent); }
};
template <>
struct Exponential<float> {
  using Real = float;
  static constexpr double kUnit = 1;
  static constexpr float kLowest = -3.402823466e38f;
  static __device__ __forceinline__ float raise(float exponent) { return expf(exponent); }
};
template <>
struct Exponential<double> {
  using Real = double;
  static constexpr double kUnit = 1;
  static constexpr double kLowest = -1.7976931348623157e308;
  static __device__ __forceinline__ double raise(double exponent) { return exp(exponent); }
};
template <class T>
using Real = typename Exponential<T>::Real;

// --- logits in registers ---------------------------------------------------------------------------------

// Sixteen-bit logits stay pairs: taken one by one, each of them would first be moved out of its register.
template <class T>
using Word = std::conditional_t<sizeof(T) == 2, Pair<T>, T>;
template <class T>
using Words = Pack<Word<T>>;

__device__ __forceinline__ float element(const Pack<float>& words, int index) { return words[index]; }
__device__ __forceinline__ double element(const Pack<double>& words, int index) { return words[index]; }
template <class T>
__device__ __forceinline__ float element(const Pack<Pair<T>>& words, int index) {
  return index % 2 ? second(words[index / 2]) : first(words[index / 2]);
}

__device__ __forceinline__ void set_elements(Pack<float>& words, const float (&values)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) words[i] = values[i];
}
__device__ __forceinline__ void set_elements(Pack<double>& words, const double (&values)[2]) {
  words[0] = values[0];
  words[1] = values[1];
}
template <class T>
__device__ __forceinline__ void set_elements(Pack<Pair<T>>& words, const float (&values)[8]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) words[i] = narrow_pair(values[2 * i], values[2 * i + 1], T{});
}

template <class T>
__device__ __forceinline__ void fill(Words<T>& words, Real<T> value) {
  Real<T> values[Pack<T>::kSize];
#pragma unroll
  for (int i = 0; i < Pack<T>::kSize; ++i) values[i] = value;
  set_elements(words, values);
}

__device__ __forceinline__ float largest_element(float word) { return word; }
__device__ __forceinline__ double largest_element(double word) { return word; }
template <class T>
__device__ __forceinline__ float largest_element(Pair<T> word) {
  return larger(first(word), second(word));
}

template <class T>
__device__ __forceinline__ Words<T> load_words(const T* logits) {
  return load_pack<Reuse::stream>(reinterpret_cast<const Word<T>*>(logits));
}
template <class T>
__device__ __forceinline__ void store_words(T* gradient, const Words<T>& words) {
  store_pack<Reuse::stream>(reinterpret_cast<Word<T>*>(gradient), words);
}

// --- where a row lies, and which of its elements a thread has --------------------------------------------

__device__ __forceinline__ int64_t row_offset(const TokenLogprobsRows& rows, uint32_t row) {
  int64_t offset = 0;
#pragma unroll 1
  for (int dimension = rows.dimensions - 1; dimension > 0; --dimension) {
    const uint32_t outer = row / rows.size[dimension];
    offset += (row - outer * rows.size[dimension]) * rows.stride[dimension];
    row = outer;
  }
  return offset + row * rows.stride[0];
}

__device__ __forceinline__ double inverse_temperature(const TokenLogprobsRows& rows, uint32_t row) {
  return rows.row_temperature ? 1.0 / rows.row_temperature[row] : rows.inverse_temperature;
}

// A row as packs, which begin at the first aligned address; the elements before and after them, fewer than
// two packs, go to one thread each.
template <class T>
struct RowParts {
  int64_t head, packs, single;  // `single` is this thread's element outside the packs, or -1

  __device__ __forceinline__ RowParts(const T* aligned_after_head, int64_t vocabulary) {
    const int misaligned = static_cast<int>(reinterpret_cast<uintptr_t>(aligned_after_head) % 16 / sizeof(T));
    head = (Pack<T>::kSize - misaligned) % Pack<T>::kSize;
    head = head < vocabulary ? head : vocabulary;
    packs = (vocabulary - head) / Pack<T>::kSize;
    const int64_t tail = vocabulary - head - packs * Pack<T>::kSize;
    const int64_t thread = threadIdx.x;
    single = thread < head ? thread : thread < head + tail ? thread + packs * Pack<T>::kSize : -1;
  }
};

// Packs `first`, `first` + blockDim.x, ... of a row, with -inf past its end.
template <class T>
__device__ __forceinline__ void load_batch(const T* packs, int64_t first, int64_t count,
                                           Words<T> (&batch)[kLogprobsUnroll]) {
  const int64_t step = blockDim.x;
  if (first + (kLogprobsUnroll - 1) * step < count) {
#pragma unroll
    for (int u = 0; u < kLogprobsUnroll; ++u) batch[u] = load_words(packs + (first + u * step) * Pack<T>::kSize);
    return;
  }
#pragma unroll
  for (int u = 0; u < kLogprobsUnroll; ++u) {
    const int64_t pack = first + u * step;
    if (pack < count) {
      batch[u] = load_words(packs + pack * Pack<T>::kSize);
    } else {
      fill<T>(batch[u], -Real<T>(INFINITY));
    }
  }
}

// --- forward ---------------------------------------------------------------------------------------------

// Sums over exponentials relative to a reference, the largest logit so far. `weighted` gathers e * log e, whose
// terms stay small at any offset of the logits, where p * logit would cancel.
template <class T, bool Entropy, bool SumP2>
struct RowSums {
  Real<T> sum = 0, weighted = 0, squares = 0;

  __device__ __forceinline__ void add(Real<T> logit, Real<T> reference, Real<T> scale) {
    const Real<T> exponent = (logit - reference) * scale;
    const Real<T> e = Exponential<T>::raise(exponent);
    sum += e;
    if (Entropy) weighted += e * larger(exponent, Real<T>(kSmallestExponent));
    if (SumP2) squares += e * e;
  }

  __device__ __forceinline__ void add(const RowSums& other) {
    sum += other.sum;
    if (Entropy) weighted += other.weighted;
    if (SumP2) squares += other.squares;
  }

  // `shift` is the old reference minus the new one, as an exponent.
  __device__ __forceinline__ void shift_reference(Real<T> shift) {
    shift = larger(shift, Real<T>(kSmallestExponent));
    const Real<T> factor = Exponential<T>::raise(shift);
    if (Entropy) weighted = factor * (weighted + shift * sum);
    if (SumP2) squares *= factor * factor;
    sum *= factor;
  }
};

// Sums of the warps, of which there are too few for their precision to cost anything.
template <class T>
struct RowShared {
  WarpValues<Real<T>> largest;
  WarpValues<double> sum, weighted, squares;
};

template <class Value>
__device__ __forceinline__ void put_warp_sum(Value value, WarpValues<double>& shared) {
  value = warp_reduce(value, Sum());
  if (threadIdx.x % kWarpSize == 0) shared.values[threadIdx.x / kWarpSize] = value;
}
// By the first warp, after a barrier.
__device__ __forceinline__ double sum_of_warps(const WarpValues<double>& shared) {
  return warp_reduce(threadIdx.x < blockDim.x / kWarpSize ? shared.values[threadIdx.x] : 0.0, Sum());
}

template <class T, bool Entropy, bool SumP2>
__global__ void __launch_bounds__(kLogprobsThreads, kLogprobsBlocks<T>)
    token_logprobs_kernel(const TokenLogprobsParams params) {
  PYKERN_SHARED(RowShared<T>, shared);
  const uint32_t row = blockIdx.x;
  const int64_t target = params.rows.targets[row];
  Real<T>* const statistics = static_cast<Real<T>*>(params.statistics) + 2 * int64_t{row};
  Real<T>* const logprob = static_cast<Real<T>*>(params.logprobs) + row;
  Real<T>* const entropy = static_cast<Real<T>*>(params.entropy) + (Entropy ? row : 0);
  Real<T>* const sum_p2 = static_cast<Real<T>*>(params.sum_p2) + (SumP2 ? row : 0);
  if (target < 0) {
    if (threadIdx.x == 0) {
      statistics[0] = statistics[1] = *logprob = 0;
      if (Entropy) *entropy = 0;
      if (SumP2) *sum_p2 = 0;
    }
    return;
  }
  const int64_t vocabulary = params.rows.vocabulary;
  const T* const logits = static_cast<const T*>(params.rows.logits) + row_offset(params.rows, row);
  const double inverse = inverse_temperature(params.rows, row);
  const Real<T> scale = static_cast<Real<T>>(inverse * Exponential<T>::kUnit);
  const RowParts<T> parts(logits, vocabulary);
  Real<T> target_logit = NAN;
  if (threadIdx.x == 0 && target < vocabulary) target_logit = widen(logits[target]);

  Real<T> reference = Exponential<T>::kLowest;
  RowSums<T, Entropy, SumP2> sums[kLogprobsUnroll];
  if (parts.single >= 0) {
    const Real<T> logit = widen(logits[parts.single]);
    reference = larger(logit, reference);
    sums[0].add(logit, reference, scale);
  }
  for (int64_t first = threadIdx.x; first < parts.packs; first += kLogprobsUnroll * int64_t{blockDim.x}) {
    Words<T> batch[kLogprobsUnroll];
    load_batch(logits + parts.head, first, parts.packs, batch);
    Word<T> largest = batch[0][0];
#pragma unroll
    for (int i = 1; i < kLogprobsUnroll * Words<T>::kSize; ++i) {
      largest = larger(largest, batch[i / Words<T>::kSize][i % Words<T>::kSize]);
    }
    if (largest_element(largest) > reference) {
#pragma unroll
      for (int u = 0; u < kLogprobsUnroll; ++u) {
        sums[u].shift_reference((reference - largest_element(largest)) * scale);
      }
      reference = largest_element(largest);
    }
#pragma unroll
    for (int u = 0; u < kLogprobsUnroll; ++u) {
#pragma unroll
      for (int i = 0; i < Pack<T>::kSize; ++i) sums[u].add(element(batch[u], i), reference, scale);
    }
  }
#pragma unroll
  for (int u = 1; u < kLogprobsUnroll; ++u) sums[0].add(sums[u]);

  const Real<T> largest = block_reduce(reference, Real<T>(Exponential<T>::kLowest), Largest(), shared.largest);
  sums[0].shift_reference((reference - largest) * scale);
  put_warp_sum(sums[0].sum, shared.sum);
  if (Entropy) put_warp_sum(sums[0].weighted, shared.weighted);
  if (SumP2) put_warp_sum(sums[0].squares, shared.squares);
  __syncthreads();
  if (threadIdx.x >= kWarpSize) return;
  const double sum = sum_of_warps(shared.sum);
  const double weighted = Entropy ? sum_of_warps(shared.weighted) : 0.0;
  const double squares = SumP2 ? sum_of_warps(shared.squares) : 0.0;
  if (threadIdx.x > 0) return;
  const double log_sum = log(sum);
  statistics[0] = largest;
  statistics[1] = static_cast<Real<T>>(log_sum);
  *logprob = static_cast<Real<T>>((static_cast<double>(target_logit) - largest) * inverse - log_sum);
  if (Entropy) *entropy = static_cast<Real<T>>(log_sum - weighted / (sum * Exponential<T>::kUnit));
  if (SumP2) *sum_p2 = static_cast<Real<T>>(squares / (sum * sum));
}

// --- backward --------------------------------------------------------------------------------------------

// d loss / d logit = (g_l ([v = target] - p) - g_H p (log p + H) + 2 g_S p (p - S)) / T, without [v = target].
template <class T>
struct LogitGradient {
  Real<T> reference, log_sum, scale, entropy, sum_p2, from_logprob, from_entropy, from_squares;

  __device__ __forceinline__ Real<T> operator()(Real<T> logit) const {
    const Real<T> exponent = (logit - reference) * scale - log_sum;
    const Real<T> log_p = larger(exponent, Real<T>(kSmallestExponent)) * Real<T>(1 / Exponential<T>::kUnit);
    const Real<T> p = Exponential<T>::raise(exponent);
    return p * (from_logprob + from_entropy * (log_p + entropy) + from_squares * (p - sum_p2));
  }
};

template <class T>
__global__ void __launch_bounds__(kLogprobsThreads, kLogprobsBlocks<T>)
    token_logprobs_backward_kernel(const TokenLogprobsBackwardParams params) {
  const uint32_t row = blockIdx.x;
  const auto at = [row](const void* pointer) { return pointer ? static_cast<const Real<T>*>(pointer)[row] : 0; };
  const int64_t vocabulary = params.rows.vocabulary, offset = row_offset(params.rows, row);
  const int64_t target = params.rows.targets[row];
  // Not marked as restricted: in place both are the same memory, of which each thread has its own packs.
  const T* const logits = static_cast<const T*>(params.rows.logits) + offset;
  T* const gradient = static_cast<T*>(params.grad_logits) + (params.in_place ? offset : row * vocabulary);
  const RowParts<T> parts(gradient, vocabulary);
  const int64_t step = blockDim.x;

  const Real<T> g_logprob = at(params.grad_logprobs);
  const Real<T> g_entropy = at(params.grad_entropy), g_squares = at(params.grad_sum_p2);
  if (target < 0 || (g_logprob == 0 && g_entropy == 0 && g_squares == 0)) {
    Words<T> zeros;
    fill<T>(zeros, 0);
    if (parts.single >= 0) narrow(Real<T>(0), gradient[parts.single]);
    for (int64_t pack = threadIdx.x; pack < parts.packs; pack += step) {
      store_words(gradient + parts.head + pack * Pack<T>::kSize, zeros);
    }
    return;
  }

  const double inverse = inverse_temperature(params.rows, row);
  const Real<T>* const statistics = static_cast<const Real<T>*>(params.statistics) + 2 * int64_t{row};
  LogitGradient<T> gradient_of;
  gradient_of.reference = statistics[0];
  gradient_of.log_sum = statistics[1] * Real<T>(Exponential<T>::kUnit);
  gradient_of.scale = static_cast<Real<T>>(inverse * Exponential<T>::kUnit);
  gradient_of.entropy = params.grad_entropy ? at(params.entropy) : 0;
  gradient_of.sum_p2 = params.grad_sum_p2 ? at(params.sum_p2) : 0;
  const Real<T> of_target = target < vocabulary ? g_logprob * static_cast<Real<T>>(inverse) : Real<T>(NAN);
  gradient_of.from_logprob = -of_target;
  gradient_of.from_entropy = -g_entropy * static_cast<Real<T>>(inverse);
  gradient_of.from_squares = 2 * g_squares * static_cast<Real<T>>(inverse);

  if (parts.single >= 0) {
    const Real<T> value = gradient_of(widen(logits[parts.single]));
    narrow(parts.single == target ? value + of_target : value, gradient[parts.single]);
  }
  const int64_t target_pack = target < parts.head ? -1 : (target - parts.head) / Pack<T>::kSize;
  const int target_element = static_cast<int>((target - parts.head) % Pack<T>::kSize);
  // Rows of the logits and of their gradient may be aligned differently where the logits are a view.
  const bool logits_are_aligned = allows_packs(logits + parts.head);
  for (int64_t first = threadIdx.x; first < parts.packs; first += kLogprobsUnroll * step) {
    Words<T> batch[kLogprobsUnroll];
    if (logits_are_aligned) {
      load_batch(logits + parts.head, first, parts.packs, batch);
    } else {
#pragma unroll
      for (int u = 0; u < kLogprobsUnroll; ++u) {
        const int64_t pack = first + u * step < parts.packs ? first + u * step : first;
        Real<T> values[Pack<T>::kSize];
#pragma unroll
        for (int i = 0; i < Pack<T>::kSize; ++i) values[i] = widen(logits[parts.head + pack * Pack<T>::kSize + i]);
        set_elements(batch[u], values);
      }
    }
#pragma unroll
    for (int u = 0; u < kLogprobsUnroll; ++u) {
      const int64_t pack = first + u * step;
      if (pack >= parts.packs) break;
      Real<T> values[Pack<T>::kSize];
#pragma unroll
      for (int i = 0; i < Pack<T>::kSize; ++i) values[i] = gradient_of(element(batch[u], i));
      if (pack == target_pack) {
#pragma unroll
        for (int i = 0; i < Pack<T>::kSize; ++i) {
          if (i == target_element) values[i] += of_target;
        }
      }
      set_elements(batch[u], values);
      store_words(gradient + parts.head + pack * Pack<T>::kSize, batch[u]);
    }
  }
}

}  // namespace pykern
