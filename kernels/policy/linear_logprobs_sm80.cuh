// What stands between the products of linear_token_logprobs: one read of a chunk's logits and one exponential each in
// the forward, one read and one write in the backward. All of it is bound by memory.
#pragma once

#include "kernels/common/device.h"
#include "kernels/common/reduce.cuh"
#include "kernels/common/vector.cuh"
#include "kernels/policy/linear_logprobs.h"
#include "kernels/policy/logprobs_sm80.cuh"

namespace pykern {

constexpr int kLinearThreads = 128;
constexpr int kLinearWarps = kLinearThreads / kWarpSize;
// Sixteen-byte loads that a thread of the forward has under way: a segment is in registers at once, so that its
// largest logit is known before the first exponential.
constexpr int kLinearUnroll = 4;

template <class Real>
constexpr int64_t kLinearSegment = int64_t{kLinearThreads} * kLinearUnroll * Pack<Real>::kSize;

__device__ __forceinline__ double row_inverse_temperature(const double* row_temperature, double inverse, int64_t row) {
  return row_temperature ? 1.0 / row_temperature[row] : inverse;
}

__device__ __forceinline__ float hyperbolic_tangent(float value) { return tanhf(value); }
__device__ __forceinline__ double hyperbolic_tangent(double value) { return tanh(value); }

// The softcap of a logit, and the factor that its gradient gets.
template <class Real, bool Softcap>
struct Cap {
  Real cap, inverse;

  __device__ __forceinline__ explicit Cap(double softcap)
      : cap(static_cast<Real>(softcap)), inverse(Softcap ? static_cast<Real>(1 / softcap) : 0) {}

  __device__ __forceinline__ Real operator()(Real logit) const {
    return Softcap ? cap * hyperbolic_tangent(logit * inverse) : logit;
  }
  __device__ __forceinline__ Real slope(Real capped) const {
    const Real t = capped * inverse;
    return Softcap ? 1 - t * t : 1;
  }
};

// `count` packs of a row, `step` elements apart, of which the first `left` elements are the row's: nothing has written
// what lies behind them. Without a branch between the loads of whole packs, they are under way together.
template <class Real, int count>
__device__ __forceinline__ void load_logits(const Real* logits, int step, int64_t left, Pack<Real> (&batch)[count]) {
  if ((count - 1) * step + Pack<Real>::kSize <= left) {
#pragma unroll
    for (int load = 0; load < count; ++load) batch[load] = load_pack<Reuse::stream>(logits + load * step);
    return;
  }
#pragma unroll
  for (int load = 0; load < count; ++load) {
#pragma unroll
    for (int i = 0; i < Pack<Real>::kSize; ++i) {
      batch[load][i] = load * step + i < left ? logits[load * step + i] : Real(0);
    }
  }
}

// --- forward ---------------------------------------------------------------------------------------------

// The first entry of a segment's pack that is this thread's.
template <class Real>
__device__ __forceinline__ int first_of(int pack) {
  return (pack * kLinearThreads + static_cast<int>(threadIdx.x)) * Pack<Real>::kSize;
}

template <class Real>
__device__ __forceinline__ void add_bias(const double* bias, int count, Pack<Real> (&batch)[kLinearUnroll]) {
#pragma unroll
  for (int u = 0; u < kLinearUnroll; ++u) {
#pragma unroll
    for (int i = 0; i < Pack<Real>::kSize; ++i) {
      const int entry = first_of<Real>(u) + i;
      if (entry < count) batch[u][i] += static_cast<Real>(bias[entry]);
    }
  }
}

// What was loaded past the end counts for nothing.
template <class Real>
__device__ __forceinline__ void close_segment(int count, Pack<Real> (&batch)[kLinearUnroll]) {
#pragma unroll
  for (int u = 0; u < kLinearUnroll; ++u) {
#pragma unroll
    for (int i = 0; i < Pack<Real>::kSize; ++i) {
      if (first_of<Real>(u) + i >= count) batch[u][i] = -Real(INFINITY);
    }
  }
}

template <class Real, bool Softcap, bool Entropy>
__global__ void __launch_bounds__(kLinearThreads) linear_logprobs_segments_kernel(const LinearLogprobsSegments params) {
  PYKERN_SHARED(WarpValues<Real>, shared_largest);
  PYKERN_SHARED(WarpValues<Real>, shared_sum);
  PYKERN_SHARED(WarpValues<Real>, shared_weighted);
  const LogitsChunk& chunk = params.chunk;
  const int64_t row = blockIdx.x, segment = blockIdx.y;
  const int64_t target = chunk.targets[row];
  if (target < 0) return;
  const int64_t first = segment * kLinearSegment<Real>;
  const int count = static_cast<int>(chunk.entries - first < kLinearSegment<Real> ? chunk.entries - first
                                                                                 : kLinearSegment<Real>);
  const Real* const logits = static_cast<const Real*>(chunk.logits) + row * chunk.stride + first;
  const double* const bias = chunk.bias ? chunk.bias + first : nullptr;
  const Cap<Real, Softcap> cap(chunk.softcap);
  const Real scale = static_cast<Real>(
      row_inverse_temperature(chunk.row_temperature, chunk.inverse_temperature, row) * Exponential<Real>::kUnit);

  const int64_t place = target - chunk.first_entry - first;
  if (threadIdx.x == 0 && place >= 0 && place < count) {
    static_cast<Real*>(params.target_logit)[row] =
        cap(logits[place] + (bias ? static_cast<Real>(bias[place]) : Real(0)));
  }

  Pack<Real> batch[kLinearUnroll];
  load_logits(logits + first_of<Real>(0), first_of<Real>(1) - first_of<Real>(0), count - first_of<Real>(0), batch);
  if (bias) add_bias(bias, count, batch);
  Real largest = Exponential<Real>::kLowest;
#pragma unroll
  for (int u = 0; u < kLinearUnroll; ++u) {
#pragma unroll
    for (int i = 0; i < Pack<Real>::kSize; ++i) batch[u][i] = cap(batch[u][i]);
  }
  if (count < kLinearSegment<Real>) close_segment(count, batch);
#pragma unroll
  for (int u = 0; u < kLinearUnroll; ++u) {
#pragma unroll
    for (int i = 0; i < Pack<Real>::kSize; ++i) largest = larger(largest, batch[u][i]);
  }
  largest = warp_reduce(largest, Largest());
  RowSums<Real, Entropy, false> sums;
#pragma unroll
  for (int u = 0; u < kLinearUnroll; ++u) {
#pragma unroll
    for (int i = 0; i < Pack<Real>::kSize; ++i) sums.add(batch[u][i], largest, scale);
  }
  sums.sum = warp_reduce(sums.sum, Sum());
  if (Entropy) sums.weighted = warp_reduce(sums.weighted, Sum());
  const int warp = threadIdx.x / kWarpSize;
  if (threadIdx.x % kWarpSize == 0) {
    shared_largest.values[warp] = largest;
    shared_sum.values[warp] = sums.sum;
    if (Entropy) shared_weighted.values[warp] = sums.weighted;
  }
  __syncthreads();
  if (threadIdx.x > 0) return;
#pragma unroll
  for (int other = 1; other < kLinearWarps; ++other) largest = larger(largest, shared_largest.values[other]);
  RowSums<Real, Entropy, false> total;
#pragma unroll
  for (int other = 0; other < kLinearWarps; ++other) {
    RowSums<Real, Entropy, false> part;
    part.sum = shared_sum.values[other];
    if (Entropy) part.weighted = shared_weighted.values[other];
    part.shift_reference((shared_largest.values[other] - largest) * scale);
    total.add(part);
  }
  const int64_t at = segment * chunk.rows + row;
  static_cast<Real*>(params.largest)[at] = largest;
  static_cast<Real*>(params.sum)[at] = total.sum;
  if (Entropy) static_cast<Real*>(params.weighted)[at] = total.weighted;
}

// One thread per row; there are few segments.
template <class Real>
__global__ void __launch_bounds__(kLinearThreads) linear_logprobs_join_kernel(const LinearLogprobsJoin params) {
  const int64_t row = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (row >= params.rows) return;
  const int64_t target = params.targets[row];
  Real* const logprob = static_cast<Real*>(params.logprobs) + row;
  Real* const entropy = params.entropy ? static_cast<Real*>(params.entropy) + row : nullptr;
  Real* const statistics = static_cast<Real*>(params.statistics) + 2 * row;
  if (target < 0) {
    statistics[0] = statistics[1] = *logprob = 0;
    if (entropy) *entropy = 0;
    return;
  }
  const Real* const largests = static_cast<const Real*>(params.largest) + row;
  const Real* const sums = static_cast<const Real*>(params.sum) + row;
  const Real* const weights = static_cast<const Real*>(params.weighted) + (entropy ? row : 0);
  Real largest = Exponential<Real>::kLowest;
  for (int64_t segment = 0; segment < params.segments; ++segment) {
    largest = larger(largest, largests[segment * params.rows]);
  }
  const double inverse = row_inverse_temperature(params.row_temperature, params.inverse_temperature, row);
  double sum = 0, weighted = 0;
  // Unrolled, it spills around the slow path of a division.
#pragma unroll 1
  for (int64_t segment = 0; segment < params.segments; ++segment) {
    const int64_t at = segment * params.rows;
    const double shift = larger((static_cast<double>(largests[at]) - largest) * inverse, double{kSmallestExponent});
    const double factor = exp(shift);
    sum += factor * sums[at];
    if (entropy) weighted += factor * (weights[at] / Exponential<Real>::kUnit + shift * sums[at]);
  }
  const double log_sum = log(sum);
  const int64_t place = target - params.first_entry;
  const double logit = place >= 0 && place < params.entries ? static_cast<const Real*>(params.target_logit)[row] : 0;
  statistics[0] = largest;
  statistics[1] = static_cast<Real>(log_sum);
  *logprob = static_cast<Real>((logit - largest) * inverse - log_sum);
  if (entropy) *entropy = static_cast<Real>(log_sum - weighted / sum);
}

// --- backward --------------------------------------------------------------------------------------------

// Of hidden states of type T, whose logits are float32 or float64.
template <class T>
struct RowGradient {
  LogitGradient<T> of;
  Real<T> of_target;
  int64_t place;  // of the target, counted from the chunk's first entry
  bool active;
};

template <class Real>
__device__ __forceinline__ bool takes_part(const LinearLogprobsRowGradients& given, const int64_t* targets,
                                           int64_t row) {
  const auto at = [row](const void* pointer) { return pointer ? static_cast<const Real*>(pointer)[row] : Real(0); };
  // A NaN is not zero.
  return targets[row] >= 0 && !(at(given.grad_logprobs) == 0 && at(given.grad_entropy) == 0);
}

template <class T>
__device__ __forceinline__ RowGradient<T> row_gradient(const LinearLogprobsGradient& params, int64_t row) {
  using Real = Real<T>;
  const LogitsChunk& chunk = params.chunk;
  const auto at = [row](const void* pointer) { return pointer ? static_cast<const Real*>(pointer)[row] : Real(0); };
  RowGradient<T> result{};
  result.active = takes_part<Real>(params.given, chunk.targets, row);
  if (!result.active) return result;
  const double inverse = row_inverse_temperature(chunk.row_temperature, chunk.inverse_temperature, row);
  const Real* const statistics = static_cast<const Real*>(params.given.statistics) + 2 * row;
  result.place = chunk.targets[row] - chunk.first_entry;
  result.of_target = at(params.given.grad_logprobs) * static_cast<Real>(inverse);
  result.of.reference = statistics[0];
  result.of.log_sum = statistics[1] * Real(Exponential<T>::kUnit);
  result.of.scale = static_cast<Real>(inverse * Exponential<T>::kUnit);
  result.of.entropy = params.given.grad_entropy ? at(params.given.entropy) : Real(0);
  result.of.from_logprob = -result.of_target;
  result.of.from_entropy = -at(params.given.grad_entropy) * static_cast<Real>(inverse);
  return result;
}

// A block has kLinearLogprobsRows rows; a thread has the same entries in all of them, so that their bias is read, and
// their sums over the rows are kept, in registers.
template <class T, bool Softcap>
__global__ void __launch_bounds__(kLinearThreads) linear_logprobs_gradient_kernel(const LinearLogprobsGradient params) {
  using Real = Real<T>;
  constexpr int kSize = Pack<T>::kSize, kLoads = kSize / Pack<Real>::kSize;
  struct Rows {
    RowGradient<T> row[kLinearLogprobsRows];
  };
  PYKERN_SHARED(Rows, shared);
  const LogitsChunk& chunk = params.chunk;
  const int64_t first_row = int64_t{blockIdx.x} * kLinearLogprobsRows;
  const int rows = static_cast<int>(chunk.rows - first_row < kLinearLogprobsRows ? chunk.rows - first_row
                                                                               : kLinearLogprobsRows);
  for (int r = threadIdx.x; r < rows; r += kLinearThreads) {
    shared.row[r] = row_gradient<T>(params, first_row + r);
  }
  __syncthreads();
  const int64_t entry = (int64_t{blockIdx.y} * kLinearThreads + threadIdx.x) * kSize;
  if (entry >= chunk.entries) return;

  const Cap<Real, Softcap> cap(chunk.softcap);
  Real bias[kSize], sums[kSize];
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    bias[i] = chunk.bias && entry + i < chunk.entries ? static_cast<Real>(chunk.bias[entry + i]) : Real(0);
    sums[i] = 0;
  }
  const Real* logits = static_cast<const Real*>(chunk.logits) + first_row * chunk.stride + entry;
  T* gradient = static_cast<T*>(params.gradient) + first_row * chunk.stride + entry;
  for (int r = 0; r < rows; ++r, logits += chunk.stride, gradient += chunk.stride) {
    Words<T> words;
    const RowGradient<T>& row = shared.row[r];
    if (!row.active) {
      fill<T>(words, 0);
      store_pack(reinterpret_cast<Word<T>*>(gradient), words);
      continue;
    }
    Pack<Real> batch[kLoads];
    load_logits(logits, Pack<Real>::kSize, chunk.entries - entry, batch);
    Real values[kSize], slopes[kSize];
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      const Real capped = cap(batch[i / Pack<Real>::kSize][i % Pack<Real>::kSize] + bias[i]);
      slopes[i] = cap.slope(capped);
      values[i] = row.of(capped);
    }
    const int64_t place = row.place - entry;
    if (place >= 0 && place < kSize) {
#pragma unroll
      for (int i = 0; i < kSize; ++i) {
        if (i == place) values[i] += row.of_target;
      }
    }
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      values[i] *= slopes[i];
      sums[i] += values[i];
    }
    set_elements(words, values);
    store_pack(reinterpret_cast<Word<T>*>(gradient), words);
  }
  if (!params.bias_shares) return;
  Real* const shares = static_cast<Real*>(params.bias_shares) + int64_t{blockIdx.x} * chunk.stride + entry;
#pragma unroll
  for (int load = 0; load < kLoads; ++load) {
    Pack<Real> pack;
#pragma unroll
    for (int i = 0; i < Pack<Real>::kSize; ++i) pack[i] = sums[load * Pack<Real>::kSize + i];
    store_pack(shares + load * Pack<Real>::kSize, pack);
  }
}

template <class Real>
__global__ void __launch_bounds__(kLinearThreads) linear_logprobs_bias_kernel(const LinearLogprobsBias params) {
  const int64_t entry = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (entry >= params.entries) return;
  const Real* const shares = static_cast<const Real*>(params.bias_shares) + entry;
  double sum = 0;
  for (int64_t share = 0; share < params.shares; ++share) sum += shares[share * params.stride];
  params.grad_bias[entry] = params.add ? params.grad_bias[entry] + sum : sum;
}

// --- hidden states ---------------------------------------------------------------------------------------

// One block per row.
template <class T>
__global__ void __launch_bounds__(kLinearThreads) linear_logprobs_accumulate_kernel(
    const LinearLogprobsAccumulate params) {
  using Real = Real<T>;
  constexpr int kSize = Pack<T>::kSize, kLoads = kSize / Pack<Real>::kSize;
  const int64_t row = blockIdx.x;
  // Not marked as restricted: the result may be the sum.
  const Real* const sum = static_cast<const Real*>(params.sum) + row * params.stride;
  const Real* const part = static_cast<const Real*>(params.part) + row * params.columns;
  T* const result = static_cast<T*>(params.result) + row * params.stride;
  const bool in_packs = allows_packs(sum) && allows_packs(part) && allows_packs(result);
  const int64_t packs = in_packs ? params.columns / kSize : int64_t{0};
  for (int64_t pack = threadIdx.x; pack < packs; pack += blockDim.x) {
    Real values[kSize];
#pragma unroll
    for (int load = 0; load < kLoads; ++load) {
      const int64_t at = pack * kSize + load * Pack<Real>::kSize;
      const Pack<Real> a = load_pack<Reuse::stream>(sum + at);
      const Pack<Real> b = load_pack<Reuse::stream>(part + at);
#pragma unroll
      for (int i = 0; i < Pack<Real>::kSize; ++i) values[load * Pack<Real>::kSize + i] = a[i] + b[i];
    }
    Words<T> words;
    set_elements(words, values);
    store_pack(reinterpret_cast<Word<T>*>(result + pack * kSize), words);
  }
  for (int64_t i = packs * kSize + threadIdx.x; i < params.columns; i += blockDim.x) {
    narrow(sum[i] + part[i], result[i]);
  }
}

// One block per row. Bits are copied, of unsigned integers as large as an element.
template <class Bits, class Real>
__global__ void __launch_bounds__(kLinearThreads) linear_logprobs_hidden_kernel(const LinearLogprobsHidden params) {
  const int64_t row = blockIdx.x;
  const Bits* const source = static_cast<const Bits*>(params.hidden) + row * params.stride;
  Bits* const copy = static_cast<Bits*>(params.copy) + row * params.hidden_size;
  const bool active = takes_part<Real>(params.given, params.targets, row);
  const int64_t packs =
      allows_packs(source) && allows_packs(copy) ? params.hidden_size / Pack<Bits>::kSize : int64_t{0};
  for (int64_t pack = threadIdx.x; pack < packs; pack += blockDim.x) {
    Pack<Bits> words;
    if (active) {
      words = load_pack(source + pack * Pack<Bits>::kSize);
    } else {
#pragma unroll
      for (int i = 0; i < Pack<Bits>::kSize; ++i) words[i] = 0;
    }
    store_pack(copy + pack * Pack<Bits>::kSize, words);
  }
  for (int64_t i = packs * Pack<Bits>::kSize + threadIdx.x; i < params.hidden_size; i += blockDim.x) {
    copy[i] = active ? source[i] : Bits{0};
  }
}

}  // namespace pykern
