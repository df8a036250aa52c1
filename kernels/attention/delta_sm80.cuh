// What the gradients of logits need of a row: delta, the sum of grad_out * out less grad_lse. And the gradient of
// sinks, which is made of nothing else.
#pragma once

#include "kernels/attention/prefix_attention.h"
#include "kernels/attention/visibility.cuh"
#include "kernels/common/reduce.cuh"
#include "kernels/ptx/sm80.cuh"

namespace pykern {

constexpr int kDeltaThreads = 256;
// Rows that a thread has under way, two loads each.
constexpr int kDeltaRows = 4;

// A block for the rows of one head in kOrderTokens tokens; as many threads along a row as hold its packs, a power of
// two. Blocks of one token's heads follow each other, so that they share the pages of memory they read.
template <class T>
__global__ void __launch_bounds__(kDeltaThreads) prefix_attention_delta_kernel(PrefixAttentionBackward params) {
  PYKERN_SHARED(WarpValues<float>, sums);
  constexpr int kSize = Pack<T>::kSize;
  const int packs = params.value_size / kSize;
  int across = 1;
  while (across < packs) across *= 2;
  const int rows = kDeltaThreads / across, own_row = threadIdx.x / across, pack = threadIdx.x % across;
  const int head = blockIdx.x % params.query_heads;
  const int64_t block = blockIdx.x / params.query_heads, first = block * kOrderTokens;
  const int count =
      static_cast<int>(params.tokens - first < kOrderTokens ? params.tokens - first : int64_t{kOrderTokens});
  const T* grad_out = static_cast<const T*>(params.grad_out.data) + head * params.grad_out.head_stride + pack * kSize;
  const T* out = static_cast<const T*>(params.out.data) + head * params.out.head_stride + pack * kSize;
  const float sink = params.sinks ? params.sinks[head] : 0.0f;

  float share = 0.0f;
  for (int base = 0; base < count; base += kDeltaRows * rows) {
    Pack<T> gradients[kDeltaRows], values[kDeltaRows];
    float lse[kDeltaRows], grad_lse[kDeltaRows];
#pragma unroll
    for (int i = 0; i < kDeltaRows; ++i) {
      const int row = base + i * rows + own_row;
      const int64_t token = first + row;
      gradients[i] = values[i] = Pack<T>{};
      lse[i] = -INFINITY;
      grad_lse[i] = 0.0f;
      if (row >= count) continue;
      if (pack < packs) {
        gradients[i] = load_pack(grad_out + token * params.grad_out.token_stride);
        values[i] = ptx::load_once(out + token * params.out.token_stride);
      }
      if (pack == 0) {
        lse[i] = params.lse[token * params.query_heads + head];
        if (params.grad_lse) grad_lse[i] = params.grad_lse[token * params.query_heads + head];
      }
    }
#pragma unroll
    for (int i = 0; i < kDeltaRows; ++i) {
      float sum = 0.0f;
#pragma unroll
      for (int j = 0; j < kSize; ++j) sum += widen(gradients[i][j]) * widen(values[i][j]);
      for (int distance = across / 2; distance > 0; distance /= 2) {
        sum += __shfl_xor_sync(kFullWarp, sum, distance);
      }
      const int row = base + i * rows + own_row;
      if (pack != 0 || row >= count) continue;
      // A row that sees nothing may hold anything.
      const bool sees = lse[i] != -INFINITY;
      const float delta = sees ? sum - grad_lse[i] : 0.0f;
      params.delta[(first + row) * params.query_heads + head] = delta;
      if (params.sinks && sees) share -= expf(sink - lse[i]) * delta;
    }
  }
  if (!params.sinks) return;
  share = block_reduce(share, 0.0f, Sum(), sums);
  if (threadIdx.x == 0) params.sink_shares[blockIdx.x] = share;
}

constexpr int kSinksThreads = 128;

// A block per head, over the blocks of tokens.
__global__ void __launch_bounds__(kSinksThreads) prefix_attention_sinks_kernel(PrefixAttentionBackward params) {
  PYKERN_SHARED(WarpValues<float>, sums);
  const int64_t blocks = (params.tokens + kOrderTokens - 1) / kOrderTokens;
  float sum = 0.0f;
  for (int64_t block = threadIdx.x; block < blocks; block += kSinksThreads) {
    sum += params.sink_shares[block * params.query_heads + blockIdx.x];
  }
  sum = block_reduce(sum, 0.0f, Sum(), sums);
  if (threadIdx.x == 0) params.grad_sinks[blockIdx.x] = sum;
}

}  // namespace pykern
