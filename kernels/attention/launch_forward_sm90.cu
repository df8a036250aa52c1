#include "kernels/attention/forward_sm90.cuh"
#include "kernels/attention/head_sizes.h"
#include "kernels/common/launch.h"

namespace pykern {
namespace {

// A box is a panel: 64 elements of `heads` heads of `tokens` tokens.
template <class T>
const char* make_map(TensorMap& map, const AttentionHeads& tensor, int size, int tensor_heads, int64_t tensor_tokens,
                     int heads, int tokens) {
  const TensorLayout layout{tensor.data,
                            3,
                            {size, tensor_heads, tensor_tokens},
                            {1, tensor.head_stride, tensor.token_stride},
                            {kPanelSize, heads, tokens},
                            ptx::Swizzle::bytes128};
  return make_tensor_map<T>(map, layout);
}

template <class Sizes>
const char* launch_forward(const PrefixAttentionForward& problem, Stream stream) {
  using T = typename Sizes::T;
  using Tiles = ForwardTiles<Sizes>;
  ForwardSm90 params(problem);
  const int packed = 1 << params.schedule.packed_log2;
  const char* error = make_map<T>(params.query_map, problem.q, problem.key_size, problem.query_heads, problem.tokens,
                                  packed, kGroupRows / packed);
  if (!error) {
    error = make_map<T>(params.key_map, problem.k, problem.key_size, problem.key_heads, problem.tokens, 1,
                        Tiles::kKeys);
  }
  if (!error) {
    error = make_map<T>(params.value_map, problem.v, problem.value_size, problem.key_heads, problem.tokens, 1,
                        Tiles::kKeys);
  }
  if (error) return error;
  const int most = multiprocessors(), tiles = params.schedule.tiles;
  const Grid grid{dim3(static_cast<unsigned>(tiles < most ? tiles : most)), kForwardThreads, Tiles::kSharedBytes};
  return launch(prefix_attention_forward_sm90_kernel<Sizes>, grid, stream, params);
}

}  // namespace

const char* launch_prefix_attention_forward_sm90(const PrefixAttentionForward& params, Stream stream) {
  // There are no tensor maps of empty tensors.
  if (params.key_size == 0 || params.value_size == 0) return launch_prefix_attention_forward_sm80(params, stream);
  return with_head_sizes(params, [&](auto sizes) { return launch_forward<decltype(sizes)>(params, stream); });
}

}  // namespace pykern
