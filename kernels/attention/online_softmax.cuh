// The softmax of rows whose logits come tile by tile, in the registers that scores.cuh describes.
#pragma once

#include "kernels/attention/scores.cuh"
#include "kernels/common/vector.cuh"

namespace pykern {

// The four lanes that hold a row.
__device__ __forceinline__ float largest_of_row(float value) {
  value = larger(value, __shfl_xor_sync(kFullWarp, value, 1));
  return larger(value, __shfl_xor_sync(kFullWarp, value, 2));
}
__device__ __forceinline__ float sum_of_row(float value) {
  value += __shfl_xor_sync(kFullWarp, value, 1);
  return value + __shfl_xor_sync(kFullWarp, value, 2);
}

// What a row comes to once all its keys have been taken.
struct SoftmaxRow {
  bool empty;   // it sees nothing
  float scale;  // of the sum of weighted values
  float lse;    // natural logarithm
};

// Of a thread's two rows. Weights are relative to a reference that follows the largest logit by steps of 2^8 at least,
// so that sums seldom have to be rescaled.
struct OnlineSoftmax {
  float largest[2] = {-INFINITY, -INFINITY};  // logit so far, in the rule's units before its factor
  float reference[2] = {-INFINITY, -INFINITY};
  float sum[2] = {0.0f, 0.0f};  // of weights, of this thread's columns only

  // In log2. Before any key it is 0, so that no infinities are subtracted from each other.
  __device__ __forceinline__ float base(int row, float factor) const {
    return reference[row] == -INFINITY ? 0.0f : reference[row] * factor;
  }

  // Logits become weights exp2(factor * logit - base). Whether some row of the warp has a new reference: then sums of
  // values that earlier weights have weighted are to be multiplied by `rescale`, which is 1 for other rows.
  template <int n>
  __device__ __forceinline__ bool take(float factor, float (&s)[n], float (&rescale)[2]) {
    bool moves = false;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int j = 0; j < n / 4; ++j) largest[i] = larger(largest[i], larger(s[4 * j + 2 * i], s[4 * j + 2 * i + 1]));
      largest[i] = largest_of_row(largest[i]);
      constexpr float kStep = 8.0f;
      const bool moves_row = (largest[i] - reference[i]) * factor > kStep;
      const float before = reference[i];
      reference[i] = moves_row ? largest[i] : before;
      const float own_base = base(i, factor);
      rescale[i] = moves_row ? fast_exp2(fmaf(before, factor, -own_base)) : 1.0f;
      moves = moves || moves_row;
      sum[i] *= rescale[i];
#pragma unroll
      for (int j = 0; j < n / 4; ++j) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          float& weight = s[4 * j + 2 * i + c];
          weight = fast_exp2(fmaf(weight, factor, -own_base));
          sum[i] += weight;
        }
      }
    }
    return __any_sync(kFullWarp, moves);
  }

  // All lanes call; `sink` is the logit of the row's sink, or null.
  __device__ __forceinline__ SoftmaxRow finish(int row, float factor, const float* sink) const {
    float total = sum_of_row(sum[row]), top = base(row, factor), weight = 1.0f;
    // The largest logit has at least weight 1, so only a row without keys sums to 0; NaN is not 0.
    if (total == 0.0f) return {true, 0.0f, -INFINITY};
    if (sink) {
      const float sink_log2 = __ldg(sink) * kLog2E, before = top;
      top = larger(top, sink_log2);
      weight = fast_exp2(before - top);
      total = fmaf(total, weight, fast_exp2(sink_log2 - top));
    }
    return {false, weight / total, (top + log2f(total)) * kLn2};
  }
};

// A larger value in any order of threads gives the same result. The address holds -inf at first; no NaN comes here.
__device__ __forceinline__ void atomic_largest(float* address, float value) {
  const int bits = __float_as_int(value);
  if (bits >= 0) {
    atomicMax(reinterpret_cast<int*>(address), bits);
  } else {
    atomicMin(reinterpret_cast<unsigned*>(address), static_cast<unsigned>(bits));
  }
}

// The largest logit of each head over a warp's 16 rows into max_logits. Row r of the warp is of head first_head + r %
// heads; a thread's rows that are no queries hold -inf. All lanes call.
__device__ __forceinline__ void store_max_logits(float* max_logits, int first_head, int heads, float (&largest)[2]) {
  const int lane = threadIdx.x % kWarpSize, row = lane / 4;
  if (heads < 16) largest[0] = larger(largest[0], largest[1]);
#pragma unroll
  for (int rows = 4; rows > 0; rows /= 2) {
    if (heads <= rows) largest[0] = larger(largest[0], __shfl_xor_sync(kFullWarp, largest[0], 4 * rows));
  }
  if (lane % 4 != 0 || row >= heads) return;
  if (largest[0] > -INFINITY) atomic_largest(max_logits + first_head + row, largest[0]);
  if (heads == 16 && largest[1] > -INFINITY) atomic_largest(max_logits + first_head + row + 8, largest[1]);
}

// A row of sums of weighted values, scaled, as 16-byte stores of the four lanes that hold it. All lanes call; `target`
// is null where nothing is to be stored. `size` is a multiple of 8.
template <class T, int n>
__device__ __forceinline__ void store_row(T* target, int size, const float (&o)[n], int row, const SoftmaxRow& result) {
  static_assert(n % 16 == 0, "columns come in blocks of 32");
  const int lane = threadIdx.x % 4;
  const bool odd = lane & 1, upper = lane & 2;
#pragma unroll
  for (int block = 0; block < n / 16; ++block) {
    // Pair j of the lanes together is columns 8 j to 8 j + 7; lane j is to have all of it.
    uint32_t pairs[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int at = 16 * block + 4 * j + 2 * row;
      // Selected: where a row sees nothing, its weights of 0 may have met values that are NaN.
      pairs[j] = result.empty ? 0u : narrow_pair(o[at] * result.scale, o[at + 1] * result.scale, T{}).bits;
    }
#pragma unroll
    for (int j = 0; j < 4; j += 2) {
      const uint32_t other = __shfl_xor_sync(kFullWarp, odd ? pairs[j] : pairs[j + 1], 1);
      pairs[j] = odd ? other : pairs[j];
      pairs[j + 1] = odd ? pairs[j + 1] : other;
    }
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const uint32_t other = __shfl_xor_sync(kFullWarp, upper ? pairs[j] : pairs[j + 2], 2);
      pairs[j] = upper ? other : pairs[j];
      pairs[j + 2] = upper ? pairs[j + 2] : other;
    }
    const int column = 32 * block + 8 * lane;
    if (target && column < size) {
      store_pack(reinterpret_cast<uint32_t*>(target + column),
                 Pack<uint32_t>{{pairs[0], pairs[1], pairs[2], pairs[3]}});
    }
  }
}

}  // namespace pykern
