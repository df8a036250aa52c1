// The optimal token baseline. A step is a column, or by_token the number of a token among the unmasked ones of its
// row; a tile of steps is one per four threads' worth. Everything is summed in one fixed order, in double.
#pragma once

#include <cmath>

#include "kernels/common/device.h"
#include "kernels/common/reduce.cuh"
#include "kernels/policy/token_baseline.h"
#include "kernels/policy/token_quads.cuh"

namespace pykern {

constexpr int kBaselineThreads = static_cast<int>(kBaselineTileSteps) / kQuad;

// --- groups ---------------------------------------------------------------------------------------------------------

// A warp per row looks for the next row of its group.
__global__ void __launch_bounds__(kBaselineThreads) link_rows_kernel(TokenBaselineParams p) {
  const int lane = threadIdx.x % kWarpSize;
  const int64_t row = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) / kWarpSize;
  if (row >= p.rows) return;
  const int64_t id = p.ids[row];
  int64_t next = -1;
  for (int64_t from = row + 1; from < p.rows && next < 0; from += kWarpSize) {
    const unsigned same = __ballot_sync(kFullWarp, from + lane < p.rows && p.ids[from + lane] == id);
    if (same) next = from + __ffs(static_cast<int>(same)) - 1;
  }
  if (lane != 0) return;
  p.of_rows[row].next = next;
  if (next >= 0) p.has_previous[next] = 1;
}

// --- steps of a row -------------------------------------------------------------------------------------------------

struct BaselineShared {
  WarpValues<double> reduced;
  double energies[2][kWarpSize];  // of warps, for two scans in turns
  int counts[2][kWarpSize];
};

// The sum over the threads before this one; `total` becomes that of all. All threads must call, with turns 0, 1, 0 ...
template <class V>
__device__ __forceinline__ V scan_block(V mine, V (&of_warps)[2][kWarpSize], int turn, V& total) {
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  V sum = mine;
#pragma unroll
  for (int distance = 1; distance < kWarpSize; distance *= 2) {
    const V left = __shfl_up_sync(kFullWarp, sum, distance);
    if (lane >= distance) sum += left;
  }
  if (lane == kWarpSize - 1) of_warps[turn][warp] = sum;
  __syncthreads();
  V before = 0;
  total = 0;
#pragma unroll
  for (int other = 0; other < kBaselineThreads / kWarpSize; ++other) {
    if (other == warp) before = total;
    total += of_warps[turn][other];
  }
  const V left = __shfl_up_sync(kFullWarp, sum, 1);
  return lane > 0 ? before + left : before;
}

// Four steps of a row, as a thread has them.
template <class T>
class BaselineSteps {
 public:
  __device__ __forceinline__ BaselineSteps(const TokenBaselineParams& p, bool packs, int64_t row, int64_t step,
                                           int64_t length)
      : p_(p), packs_(packs && !p.by_token) {
    const int64_t start = row * p.columns;
    valid_ = quad_inside(step, 0, p.by_token ? length : p.columns);
    inside_ = valid_;
    token_ = start + step;
    if (p.by_token) {
#pragma unroll
      for (int i = 0; i < kQuad; ++i) columns_[i] = valid_ >> i & 1 ? p.columns_of[start + step + i] : 0;
      token_ = start;
    } else if (p.mask && valid_) {
      valid_ = quad_unmasked(p.mask + token_, valid_, packs_);
    }
  }

  __device__ __forceinline__ bool valid(int i) const { return valid_ >> i & 1; }

  __device__ __forceinline__ void load(const void* from, T (&target)[kQuad]) const {
    const T* source = static_cast<const T*>(from) + token_;
    if (!p_.by_token) return load_quad(source, valid_, packs_, target);
#pragma unroll
    for (int i = 0; i < kQuad; ++i) target[i] = valid(i) ? source[columns_[i]] : T(0);
  }

  // Masked tokens get zero, but by_token, where they have none of the steps.
  __device__ __forceinline__ void store(void* to, const T (&source)[kQuad]) const {
    T* target = static_cast<T*>(to) + token_;
    if (!p_.by_token) return store_quad(target, inside_, packs_, source);
#pragma unroll
    for (int i = 0; i < kQuad; ++i) {
      if (valid(i)) target[columns_[i]] = source[i];
    }
  }

  // The squared norm of a token's score, 1 - 2 p + sum p^2, times the squared weight; zero where masked.
  __device__ __forceinline__ void energies(double (&target)[kQuad]) const {
    T logprobs[kQuad], sums[kQuad], weights[kQuad];
    load(p_.logprobs, logprobs);
    load(p_.sum_p2, sums);
    if (p_.weights) load(p_.weights, weights);
#pragma unroll
    for (int i = 0; i < kQuad; ++i) {
      const double probability = static_cast<double>(exp(logprobs[i]));
      double energy = 1 - 2 * probability + static_cast<double>(sums[i]);
      if (p_.weights) energy *= static_cast<double>(weights[i]) * static_cast<double>(weights[i]);
      target[i] = valid(i) ? energy : 0;
    }
  }

 private:
  const TokenBaselineParams& p_;
  const bool packs_;
  int64_t token_;
  unsigned valid_, inside_;
  int32_t columns_[kQuad];
};

// --- rows -----------------------------------------------------------------------------------------------------------

// Counts the unmasked tokens of a row, and lists their columns if steps go by token.
__device__ __forceinline__ int64_t list_tokens(const TokenBaselineParams& p, int64_t row, BaselineShared& shared) {
  if (!p.mask && !p.by_token) return p.columns;
  int64_t length = 0;
  int turn = 0;
  for (int64_t tile = 0; tile < p.columns; tile += kBaselineTileSteps, turn ^= 1) {
    const int64_t column = tile + kQuad * static_cast<int64_t>(threadIdx.x), token = row * p.columns + column;
    unsigned valid = quad_inside(column, 0, p.columns);
    if (p.mask) valid = quad_unmasked(p.mask + token, valid, false);
    int total;
    int64_t place = row * p.columns + length + scan_block(__popc(valid), shared.counts, turn, total);
    if (p.by_token) {
#pragma unroll
      for (int i = 0; i < kQuad; ++i) {
        if (valid >> i & 1) p.columns_of[place++] = static_cast<int32_t>(column + i);
      }
    }
    length += total;
  }
  return length;
}

// A block per row.
template <class T>
__global__ void __launch_bounds__(kBaselineThreads) measure_rows_kernel(TokenBaselineParams p, bool packs) {
  PYKERN_SHARED(BaselineShared, shared);
  const int64_t row = blockIdx.x;
  const int64_t length = list_tokens(p, row, shared);
  __syncthreads();
  double before = 0, check = 0;
  for (int64_t tile = 0; tile < p.tiles; ++tile) {
    if (threadIdx.x == 0) p.energy_before[row * p.tiles + tile] = before;
    const int64_t step = tile * kBaselineTileSteps + kQuad * static_cast<int64_t>(threadIdx.x);
    const BaselineSteps<T> steps(p, packs, row, step, length);
    double energies[kQuad], sum = 0;
    T returns[kQuad];
    steps.energies(energies);
    steps.load(p.returns, returns);
#pragma unroll
    for (int i = 0; i < kQuad; ++i) {
      sum += energies[i];
      check += static_cast<double>(returns[i]) * 0;
    }
    before += block_reduce(sum, 0.0, Sum{}, shared.reduced);
  }
  check = block_reduce(check, 0.0, Sum{}, shared.reduced);
  if (threadIdx.x != 0) return;
  const bool finite = before - before + check == 0;
  p.of_rows[row].length = finite ? length : -1;
  if (!finite) atomicAdd(p.left_out, 1ull);
}

// --- groups of rows -------------------------------------------------------------------------------------------------

struct LongestRow {
  int64_t row = -1, length = 0, second = 0, members = 0;

  __device__ __forceinline__ void add(int64_t candidate, int64_t of_candidate) {
    ++members;
    if (of_candidate > length) {
      second = length;
      length = of_candidate;
      row = candidate;
    } else if (of_candidate > second) {
      second = of_candidate;
    }
  }
};

// A block per tile of steps and row; those of a group's first row see to the group.
template <class T>
__global__ void __launch_bounds__(kBaselineThreads) token_baseline_kernel(TokenBaselineParams p, bool packs) {
  PYKERN_SHARED(BaselineShared, shared);
  const int64_t first_row = blockIdx.x / p.tiles, tile = blockIdx.x - first_row * p.tiles;
  if (p.has_previous[first_row]) return;
  const int64_t step = tile * kBaselineTileSteps + kQuad * static_cast<int64_t>(threadIdx.x);
  double weighted[kQuad] = {}, weight[kQuad] = {};
  T low[kQuad], high[kQuad];
#pragma unroll
  for (int i = 0; i < kQuad; ++i) {
    low[i] = static_cast<T>(HUGE_VAL);
    high[i] = -low[i];
  }
  LongestRow longest;
  int turn = 0;
  for (int64_t row = first_row; row >= 0;) {
    const BaselineRow of_row = p.of_rows[row];
    if (of_row.length > 0) {
      longest.add(row, of_row.length);
      const BaselineSteps<T> steps(p, packs, row, step, of_row.length);
      double energies[kQuad], sum = 0, total;
      T returns[kQuad];
      steps.energies(energies);
      steps.load(p.returns, returns);
#pragma unroll
      for (int i = 0; i < kQuad; ++i) sum += energies[i];
      double energy = p.energy_before[row * p.tiles + tile] + scan_block(sum, shared.energies, turn, total);
      turn ^= 1;
#pragma unroll
      for (int i = 0; i < kQuad; ++i) {
        energy += energies[i];
        if (!steps.valid(i)) continue;
        weighted[i] += energy * static_cast<double>(returns[i]);
        weight[i] += energy;
        low[i] = returns[i] < low[i] ? returns[i] : low[i];
        high[i] = returns[i] > high[i] ? returns[i] : high[i];
      }
    }
    row = of_row.next;
  }

  const bool alone = longest.members == 1;
#pragma unroll
  for (int i = 0; i < kQuad; ++i) weighted[i] /= weight[i] + p.eps;
  for (int64_t row = first_row; row >= 0;) {
    const BaselineRow of_row = p.of_rows[row];
    const bool takes_part = of_row.length > 0 && (!alone || p.singleton_self);
    const bool has_tail = p.zero_tail && row == longest.row && longest.length > longest.second;
    const BaselineSteps<T> steps(p, packs, row, step, of_row.length);
    T advantages[kQuad] = {};
    if (takes_part) steps.load(p.returns, advantages);
#pragma unroll
    for (int i = 0; i < kQuad; ++i) {
      const bool whole = alone || (has_tail && step + i >= longest.second);
      if (whole || !steps.valid(i) || !takes_part) continue;
      const double distance = static_cast<double>(advantages[i]) - weighted[i];
      advantages[i] = low[i] < high[i] ? static_cast<T>(distance) : T(0);
    }
    steps.store(p.advantages, advantages);
    row = of_row.next;
  }
}

}  // namespace pykern
