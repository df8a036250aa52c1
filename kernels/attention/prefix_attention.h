// What the host wrapper hands to the kernels of prefix attention: plain data.
#pragma once

#include <cstdint>

#include "kernels/common/numeric.h"
#include "kernels/common/stream.h"

namespace pykern {

// [tokens, heads, size] of 2-byte elements: data a multiple of 16 bytes, sizes and strides (in elements) multiples of
// 8, the elements of a head side by side; the token stride is less than 2^31, as some kernels take it as 32 bits.
struct AttentionHeads {
  const void* data;
  int64_t token_stride, head_stride;
};

// Key j is visible to query i iff j <= i < subtree_end[j] and, with a window, position[i] - position[j] < window.
struct PrefixAttentionProblem {
  DataType type;  // bf16 or f16
  int64_t tokens;
  int query_heads, key_heads;  // the first a multiple of the second
  int key_size, value_size;    // multiples of 8, at most 256

  float scale;    // of a product; then, in this order:
  float softcap;  // logit = softcap * tanh(logit / softcap); 0 for none
  // [query_heads] or null: logit -= slope * (position[query] - position[key])
  const float* alibi_slopes;
  const float* sinks;  // [query_heads] or null: one more logit of every row, which has no value
  int window;          // 0 for none

  const int32_t* subtree_end;  // [tokens]
  const int32_t* position;     // [tokens]
  // Of PrefixAttentionTiles: [ceil(tokens / 64), 4], and blocks of 128 tokens by falling work, as queries and as keys.
  const int32_t* bounds;
  const int32_t* query_order;
  const int32_t* key_order;

  AttentionHeads q, k, v;
};

struct PrefixAttentionForward : PrefixAttentionProblem {
  void* out;          // [tokens, query_heads, value_size], contiguous
  float* lse;         // [tokens, query_heads]; natural logarithm, sinks included, -inf for a row that sees nothing
  float* max_logits;  // [query_heads], holds -inf at first; or null
  // Null but in the order-invariant mode: a workspace [tokens, 2] for the path of every token.
  int32_t* paths;
};

struct PrefixAttentionBackward : PrefixAttentionProblem {
  AttentionHeads grad_out, out;
  const float* lse;       // [tokens, query_heads]
  const float* grad_lse;  // the same, or null
  float* delta;           // workspace [tokens, query_heads]: the sum of grad_out * out, less grad_lse
  void* grad_q;           // [tokens, query_heads, key_size], contiguous, as the next two
  void* grad_k;           // [tokens, key_heads, key_size]
  void* grad_v;           // [tokens, key_heads, value_size]
  float* grad_sinks;      // [query_heads], or null where there are no sinks
  // With sinks: workspace [ceil(tokens / 128), query_heads], the share of each block of tokens in grad_sinks.
  float* sink_shares;
  // Workspace of prefix_attention_key_shares() values: what several blocks add to the gradients of the same keys.
  float* key_shares;
};

const char* launch_prefix_attention_forward(const PrefixAttentionForward& params, Stream stream);
const char* launch_prefix_attention_backward(const PrefixAttentionBackward& params, Stream stream);
// By sizes alone.
int64_t prefix_attention_key_shares(const PrefixAttentionBackward& params);

// For every architecture from 8.0 on, and for 9.0 alone.
const char* launch_prefix_attention_forward_sm80(const PrefixAttentionForward& params, Stream stream);
const char* launch_prefix_attention_forward_sm90(const PrefixAttentionForward& params, Stream stream);
// delta and grad_sinks, before the gradients of queries, keys and values.
const char* launch_prefix_attention_delta(const PrefixAttentionBackward& params, Stream stream);
const char* launch_prefix_attention_backward_sm80(const PrefixAttentionBackward& params, Stream stream);
const char* launch_prefix_attention_backward_sm90(const PrefixAttentionBackward& params, Stream stream);
int64_t prefix_attention_key_shares_sm90(const PrefixAttentionBackward& params);

}  // namespace pykern
