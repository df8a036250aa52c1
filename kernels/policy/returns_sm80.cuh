// Discounted returns and generalised advantages as a scan of affine maps, from the right. Each token takes the
// advantage A to its right to b + a A; maps of neighbours combine, in threads, warps, blocks, and parts of a sequence.
#pragma once

#include <cmath>

#include "kernels/common/device.h"
#include "kernels/common/reduce.cuh"
#include "kernels/policy/returns.h"
#include "kernels/policy/token_quads.cuh"

namespace pykern {

constexpr int kScanThreads = 256;

// A -> offset + factor A.
struct AffineMap {
  double factor, offset;

  __device__ __forceinline__ double operator()(double advantage) const { return offset + factor * advantage; }
  // This one after the one to its right.
  __device__ __forceinline__ AffineMap after(const AffineMap& right) const {
    return {factor * right.factor, (*this)(right.offset)};
  }
};

struct ScanShared {
  AffineMap maps[2][kWarpSize];  // of a tile's warps; two tiles in turns
  double values[2][kWarpSize];   // of the leftmost token of a warp that moves the state
  bool has_value[2][kWarpSize];
  WarpValues<int> reduced;
  unsigned long long ticket;
  double passed;
};

template <class T>
struct ScanTokens {
  T rewards[kQuad], values[kQuad];
  unsigned inside, counts;  // a bit each: belongs to the part; is not masked, too
};

template <class T, bool HasValues>
class DiscountedScan {
 public:
  __device__ __forceinline__ DiscountedScan(const DiscountedScanParams& params, bool packs, ScanShared& shared)
      : p_(params), packs_(packs), shared_(shared) {}

  __device__ __forceinline__ void run() {
    const int64_t item = take();
    const int64_t index = item / p_.sequences;  // of the part, from the right
    sequence_ = item - index * p_.sequences;
    const int64_t start = sequence_start(sequence_);
    stop_ = sequence_start(sequence_ + 1);
    const int64_t tile = kQuad * static_cast<int64_t>(blockDim.x);
    const int64_t first_tile = start / tile, last_tile = (stop_ + tile - 1) / tile;
    const int64_t share = (last_tile - first_tile + p_.parts - 1) / p_.parts * tile;
    const int64_t to = last_tile * tile - index * share;
    end_ = to < stop_ ? to : stop_;
    begin_ = to - share > start ? to - share : start;
    if (begin_ >= end_) return;
    decay_ = p_.gamma * (p_.lambdas ? p_.lambdas[sequence_] : p_.lambda);
    next_value_ = HasValues && end_ < stop_ ? find_next_value() : 0;
    carry_ = 0;
    if (p_.parts > 1) {
      const double next_value = next_value_;
      const AffineMap whole = sweep<false>();
      next_value_ = next_value;
      carry_ = pass_on(whole, index);
    }
    sweep<true>();
  }

 private:
  __device__ __forceinline__ int64_t take() {
    if (p_.parts == 1) return blockIdx.x;
    if (threadIdx.x == 0) shared_.ticket = atomicAdd(p_.progress, 1ull);
    __syncthreads();
    return static_cast<int64_t>(shared_.ticket);
  }

  __device__ __forceinline__ int64_t sequence_start(int64_t sequence) const {
    if (!p_.cu_seqlens) return sequence * p_.columns;
    // Nobody has checked them: a wrong one may give wrong results, but no access elsewhere.
    const int64_t start = p_.cu_seqlens[sequence];
    return start < 0 ? 0 : start < p_.tokens ? start : p_.tokens;
  }

  // Of the next token behind the part that moves the state. All threads must call.
  __device__ __forceinline__ double find_next_value() {
    const T* values = static_cast<const T*>(p_.values);
    if (!p_.mask || p_.decay) return p_.mask && !p_.mask[end_] ? 0 : static_cast<double>(values[end_]);
    const int threads = static_cast<int>(blockDim.x);
    for (int64_t from = end_; from < stop_; from += threads) {
      const int64_t token = from + threadIdx.x;
      const int mine = token < stop_ && p_.mask[token] ? static_cast<int>(threadIdx.x) : threads;
      const int first = block_reduce(mine, threads, Smallest{}, shared_.reduced);
      if (first < threads) return static_cast<double>(values[from + first]);
    }
    return 0;
  }

  // Waits for the part to the right, tells the one to the left, and returns the advantage at this part's end.
  __device__ __forceinline__ double pass_on(const AffineMap& whole, int64_t index) {
    const int64_t place = sequence_ * p_.parts + index;
    if (threadIdx.x == 0) {
      double advantage = 0;
      if (end_ < stop_) {
        while (atomicAdd(p_.progress + place, 0ull) == 0) __nanosleep(40);
        __threadfence();
        advantage = __ldcg(p_.passed + place - 1);
      }
      __stcg(p_.passed + place, whole(advantage));
      __threadfence();
      atomicExch(p_.progress + 1 + place, 1ull);
      shared_.passed = advantage;
    }
    __syncthreads();
    return shared_.passed;
  }

  __device__ __forceinline__ ScanTokens<T> load(int64_t tile) const {
    ScanTokens<T> four;
    const int64_t token = tile + kQuad * static_cast<int64_t>(threadIdx.x);
    four.inside = quad_inside(token, begin_, end_);
    four.counts = p_.mask && four.inside ? quad_unmasked(p_.mask + token, four.inside, packs_) : four.inside;
    load_quad(static_cast<const T*>(p_.rewards) + token, four.counts, packs_, four.rewards);
    if (HasValues) load_quad(static_cast<const T*>(p_.values) + token, four.counts, packs_, four.values);
    return four;
  }

  // What moves the state: a token that counts, or any step of the sequence.
  __device__ __forceinline__ unsigned moves(const ScanTokens<T>& four) const {
    return p_.decay ? four.inside : four.counts;
  }

  // Runs over the four tokens from the right: `visit(i, advantage)`; `advantage` is that behind them.
  template <class Visit>
  __device__ __forceinline__ double walk(const ScanTokens<T>& four, double next_value, double advantage,
                                         Visit visit) const {
    const unsigned moving = moves(four);
#pragma unroll
    for (int i = kQuad - 1; i >= 0; --i) {
      double here = static_cast<double>(four.rewards[i]) + decay_ * advantage;
      if (HasValues) here += p_.gamma * next_value - static_cast<double>(four.values[i]);
      if (moving >> i & 1) {
        advantage = here;
        if (HasValues) next_value = static_cast<double>(four.values[i]);
      }
      visit(i, here);
    }
    return advantage;
  }

  // The value that each thread's tokens have behind them; moves next_value_ on to the tile's beginning.
  __device__ __forceinline__ double spread_values(const ScanTokens<T>& four, int turn) {
    if (!HasValues) return 0;
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
    const unsigned moving = moves(four);
    T first = 0;
#pragma unroll
    for (int i = kQuad - 1; i >= 0; --i) first = moving >> i & 1 ? four.values[i] : first;
    const unsigned all = __ballot_sync(kFullWarp, moving != 0);
    const unsigned right = lane == kWarpSize - 1 ? 0 : all >> (lane + 1) << (lane + 1);
    const int source = right ? __ffs(static_cast<int>(right)) - 1 : lane;
    const double in_warp = static_cast<double>(__shfl_sync(kFullWarp, first, source));
    const double leftmost = static_cast<double>(
        __shfl_sync(kFullWarp, first, all ? __ffs(static_cast<int>(all)) - 1 : 0));
    if (lane == 0) {
      shared_.values[turn][warp] = leftmost;
      shared_.has_value[turn][warp] = all != 0;
    }
    __syncthreads();
    double behind = next_value_;
#pragma unroll 1
    for (int other = static_cast<int>(blockDim.x) / kWarpSize - 1; other >= 0; --other) {
      if (other == warp) behind = next_value_;
      if (shared_.has_value[turn][other]) next_value_ = shared_.values[turn][other];
    }
    return right ? in_warp : behind;
  }

  // Over the tiles of the part. Returns the map of the whole part, carry_ left out.
  template <bool Write>
  __device__ __forceinline__ AffineMap sweep() {
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
    const int64_t tile_tokens = kQuad * static_cast<int64_t>(blockDim.x);
    double factor = 1;
    int turn = 0;
    int64_t tile = (end_ - 1) / tile_tokens * tile_tokens;
    ScanTokens<T> next = load(tile);
    for (; tile + tile_tokens > begin_; tile -= tile_tokens, turn ^= 1) {
      const ScanTokens<T> four = next;
      if (tile > begin_) next = load(tile - tile_tokens);
      const double next_value = spread_values(four, turn);
      AffineMap map{1, 0};
      map.offset = walk(four, next_value, 0, [](int, double) {});
#pragma unroll
      for (int i = 0; i < kQuad; ++i) map.factor *= moves(four) >> i & 1 ? decay_ : 1;
#pragma unroll
      for (int distance = 1; distance < kWarpSize; distance *= 2) {
        const AffineMap right{__shfl_down_sync(kFullWarp, map.factor, distance),
                              __shfl_down_sync(kFullWarp, map.offset, distance)};
        if (lane + distance < kWarpSize) map = map.after(right);
      }
      if (lane == 0) shared_.maps[turn][warp] = map;
      __syncthreads();
      double behind = carry_;
#pragma unroll 1
      for (int other = static_cast<int>(blockDim.x) / kWarpSize - 1; other >= 0; --other) {
        if (other == warp) behind = carry_;
        carry_ = shared_.maps[turn][other](carry_);
        factor *= shared_.maps[turn][other].factor;
      }
      if (!Write) continue;
      const AffineMap right{__shfl_down_sync(kFullWarp, map.factor, 1), __shfl_down_sync(kFullWarp, map.offset, 1)};
      if (lane < kWarpSize - 1) behind = right(behind);
      T advantages[kQuad], returns[kQuad];
      walk(four, next_value, behind, [&](int i, double advantage) {
        const bool counts = four.counts >> i & 1;
        if (HasValues) advantages[i] = counts ? static_cast<T>(advantage) : T(0);
        const double value = HasValues ? static_cast<double>(four.values[i]) : 0;
        returns[i] = counts ? static_cast<T>(advantage + value) : T(0);
      });
      const int64_t token = tile + kQuad * static_cast<int64_t>(threadIdx.x);
      if (HasValues) store_quad(static_cast<T*>(p_.advantages) + token, four.inside, packs_, advantages);
      store_quad(static_cast<T*>(p_.returns) + token, four.inside, packs_, returns);
    }
    return {factor, carry_};
  }

  const DiscountedScanParams& p_;
  const bool packs_;
  ScanShared& shared_;
  int64_t sequence_ = 0, begin_ = 0, end_ = 0, stop_ = 0;
  double decay_ = 0;
  // At the right border of the next tile.
  double next_value_ = 0, carry_ = 0;
};

template <class T, bool HasValues>
__global__ void __launch_bounds__(kScanThreads) discounted_scan_kernel(DiscountedScanParams params, bool packs) {
  PYKERN_SHARED(ScanShared, shared);
  DiscountedScan<T, HasValues>(params, packs, shared).run();
}

}  // namespace pykern
