#include "kernels/attention/backward_keys_sm90.cuh"
#include "kernels/attention/backward_queries_sm90.cuh"
#include "kernels/common/launch.h"

namespace pykern {
namespace {

// Boxes of 64 rows: `heads` heads of 64 / heads tokens, 64 columns each.
template <class T>
const char* make_map(TensorMap& map, const AttentionHeads& heads, int head_count, int size, int64_t tokens,
                     int packed) {
  TensorLayout layout{};
  layout.data = heads.data;
  layout.rank = 3;
  layout.sizes[0] = size;
  layout.sizes[1] = head_count;
  layout.sizes[2] = tokens;
  layout.strides[0] = 1;
  layout.strides[1] = heads.head_stride;
  layout.strides[2] = heads.token_stride;
  layout.box[0] = kPanelColumns;
  layout.box[1] = packed;
  layout.box[2] = kBoxRows / packed;
  layout.swizzle = ptx::Swizzle::bytes128;
  return make_tensor_map<T>(map, layout);
}

AttentionHeads contiguous(const void* data, int heads, int size) { return {data, int64_t{heads} * size, size}; }

template <class T>
const char* make_maps(PrefixAttentionBackwardSm90& call) {
  const PrefixAttentionBackward& params = call.params;
  const int query_heads = params.query_heads, key_heads = params.key_heads;
  const int packed = packed_heads(query_heads, key_heads);
  const auto make = [&](TensorMap& map, const AttentionHeads& heads, bool queries, int size) {
    return make_map<T>(map, heads, queries ? query_heads : key_heads, size, params.tokens, queries ? packed : 1);
  };
  const char* error = make(call.q, params.q, true, params.key_size);
  if (!error) error = make(call.grad_out, params.grad_out, true, params.value_size);
  if (!error) error = make(call.k, params.k, false, params.key_size);
  if (!error) error = make(call.v, params.v, false, params.value_size);
  const auto make_gradient = [&](TensorMap& map, const void* data, bool queries, int size) {
    return make(map, contiguous(data, queries ? query_heads : key_heads, size), queries, size);
  };
  if (!error) error = make_gradient(call.grad_q, params.grad_q, true, params.key_size);
  if (!error) error = make_gradient(call.grad_k, params.grad_k, false, params.key_size);
  if (!error) error = make_gradient(call.grad_v, params.grad_v, false, params.value_size);
  return error;
}

// As many of the longest blocks of the order as it takes to give every multiprocessor one; none where too short.
int shared_blocks(const PrefixAttentionBackward& params) {
  if (params.tokens < 2 * kLeastShare) return 0;
  const int64_t blocks = (params.tokens + kOrderTokens - 1) / kOrderTokens;
  const int wanted = (multiprocessors() + params.key_heads - 1) / params.key_heads;
  return blocks < wanted ? static_cast<int>(blocks) : wanted;
}

template <class T>
const char* join_shares(const PrefixAttentionBackwardSm90& call, Stream stream) {
  if (call.shared_blocks == 0) return nullptr;
  const dim3 blocks(static_cast<unsigned>(call.shared_blocks * call.params.key_heads), kOrderTokens / kJoinRows);
  return launch(prefix_attention_join_shares_sm90_kernel<T>, Grid{blocks, kJoinThreads}, stream, call);
}

}  // namespace

int64_t prefix_attention_key_shares_sm90(const PrefixAttentionBackward& params) {
  return int64_t{shared_blocks(params)} * kOrderTokens * params.key_heads * kKeyShares *
         (params.key_size + params.value_size);
}

const char* launch_prefix_attention_backward_sm90(const PrefixAttentionBackward& params, Stream stream) {
  // Tensor maps have no size of 0.
  if (params.key_size == 0 || params.value_size == 0) return launch_prefix_attention_backward_sm80(params, stream);
  return with_head_sizes(params, [&](auto sizes) -> const char* {
    using Sizes = decltype(sizes);
    using Keys = KeysTiling<Sizes>;
    using Queries = QueriesTiling<Sizes>;
    PrefixAttentionBackwardSm90 call{};
    call.params = params;
    call.group = params.query_heads / params.key_heads;
    const int packed = packed_heads(params.query_heads, params.key_heads);
    while (1 << call.heads_shift < packed) ++call.heads_shift;
    if (const char* error = make_maps<typename Sizes::T>(call)) return error;
    call.shared_blocks = shared_blocks(params);

    const int64_t blocks = (params.tokens + kOrderTokens - 1) / kOrderTokens;
    const int64_t tiles = (blocks + int64_t{call.shared_blocks} * (kKeyShares - 1)) * (kOrderTokens / Keys::kKeys);
    const Grid keys{dim3(static_cast<unsigned>(tiles * params.key_heads)), kBackwardThreads, Keys::kSharedBytes};
    const char* error = launch(prefix_attention_backward_keys_sm90_kernel<Sizes>, keys, stream, call);
    if (!error) error = join_shares<typename Sizes::T>(call, stream);
    if (error) return error;
    const Grid queries{dim3(static_cast<unsigned>(blocks * params.query_heads)), kBackwardThreads,
                       Queries::kSharedBytes};
    return launch(prefix_attention_backward_queries_sm90_kernel<Sizes>, queries, stream, call);
  });
}

}  // namespace pykern
