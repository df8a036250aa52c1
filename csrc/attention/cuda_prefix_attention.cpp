// Host side of prefix attention on CUDA.
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <limits>
#include <optional>
#include <tuple>

#include "attention/arguments.h"
#include "common/cuda.h"
#include "kernels/attention/prefix_attention.h"

namespace pykern {
namespace {

constexpr int64_t kAlignment = 8;  // elements of two bytes

int64_t round_up(int64_t size) { return (size + kAlignment - 1) / kAlignment * kAlignment; }

bool is_aligned(const Tensor& tensor) {
  if (reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16) return false;
  if (tensor.size(2) % kAlignment || (tensor.size(2) > 1 && tensor.stride(2) != 1)) return false;
  for (int64_t dim = 0; dim < 2; ++dim) {
    if (tensor.size(dim) > 1 && (tensor.stride(dim) <= 0 || tensor.stride(dim) % kAlignment)) return false;
  }
  return tensor.size(0) < 2 || tensor.stride(0) <= INT32_MAX;
}

// The tensor as kernels read it: a copy where its memory isn't aligned for them, with zeros behind a head whose size
// is no multiple of 8. They change no product.
Tensor aligned(const Tensor& tensor) {
  if (is_aligned(tensor)) return tensor;
  const int64_t size = tensor.size(2);
  Tensor copy = cuda::new_zeros(tensor, {tensor.size(0), tensor.size(1), round_up(size)});
  Tensor heads = torch::stable::narrow(copy, 2, 0, size);
  torch::stable::copy_(heads, tensor);
  return copy;
}

// Without what aligned() has added.
Tensor without_padding(Tensor& tensor, int64_t size) {
  if (tensor.size(2) == size) return tensor;
  return torch::stable::contiguous(torch::stable::narrow(tensor, 2, 0, size));
}

AttentionHeads heads(const Tensor& tensor) {
  // The stride of a dimension of one element may be anything.
  const auto stride = [&](int64_t dim) { return tensor.size(dim) > 1 ? tensor.stride(dim) : round_up(tensor.size(2)); };
  return {cuda::input(tensor), stride(0), stride(1)};
}

struct Inputs {
  Tensor q, k, v;
};

Inputs check(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& subtree_end, const Tensor& position,
             const Tensor& bounds, const Tensor& order, const std::optional<Tensor>& sinks,
             const std::optional<Tensor>& alibi_slopes, int64_t window) {
  check_heads(q, k, v, cuda::check_device);
  check_tree(subtree_end, position, bounds, order, q.size(0), cuda::check_device);
  check_per_head(sinks, q, "sinks", cuda::check_device);
  check_per_head(alibi_slopes, q, "alibi_slopes", cuda::check_device);
  STD_TORCH_CHECK(q.scalar_type() == ScalarType::BFloat16 || q.scalar_type() == ScalarType::Half,
                  "q: expected bfloat16 or float16 on a GPU");
  STD_TORCH_CHECK(window >= 0 && window <= INT32_MAX, "window: expected 0 to 2^31 - 1, got ", window);
  return {aligned(q), aligned(k), aligned(v)};
}

void describe(PrefixAttentionProblem& problem, const Inputs& inputs, const Tensor& subtree_end, const Tensor& position,
              const Tensor& bounds, const Tensor& order, const std::optional<Tensor>& sinks,
              const std::optional<Tensor>& alibi_slopes, double scale, int64_t window, double softcap) {
  problem.type = data_type(inputs.q, "q");
  problem.tokens = inputs.q.size(0);
  problem.query_heads = static_cast<int>(inputs.q.size(1));
  problem.key_heads = static_cast<int>(inputs.k.size(1));
  problem.key_size = static_cast<int>(inputs.q.size(2));
  problem.value_size = static_cast<int>(inputs.v.size(2));
  problem.scale = static_cast<float>(scale);
  problem.softcap = static_cast<float>(softcap);
  problem.alibi_slopes = cuda::input<float>(alibi_slopes);
  problem.sinks = cuda::input<float>(sinks);
  problem.window = static_cast<int>(window);
  problem.subtree_end = cuda::input<int32_t>(subtree_end);
  problem.position = cuda::input<int32_t>(position);
  problem.bounds = cuda::input<int32_t>(bounds);
  problem.query_order = cuda::input<int32_t>(order);
  problem.key_order = problem.query_order + order.size(1);
  problem.q = heads(inputs.q);
  problem.k = heads(inputs.k);
  problem.v = heads(inputs.v);
}

std::tuple<Tensor, Tensor, Tensor> forward(Tensor q, Tensor k, Tensor v, Tensor subtree_end, Tensor position,
                                           Tensor bounds, Tensor order, std::optional<Tensor> sinks,
                                           std::optional<Tensor> alibi_slopes, double scale, int64_t window,
                                           double softcap, bool return_max_logits, bool order_invariant) {
  const cuda::DeviceGuard guard(q);
  const Inputs inputs = check(q, k, v, subtree_end, position, bounds, order, sinks, alibi_slopes, window);
  const int64_t tokens = q.size(0), query_heads = q.size(1), value_size = v.size(2);
  Tensor out = cuda::empty(q, {tokens, query_heads, inputs.v.size(2)}, q.scalar_type());
  Tensor lse = cuda::empty(q, {tokens, query_heads}, ScalarType::Float);
  Tensor max_logits = cuda::empty(q, {return_max_logits ? query_heads : 0}, ScalarType::Float);
  torch::stable::fill_(max_logits, -std::numeric_limits<double>::infinity());
  if (lse.numel() == 0) return {without_padding(out, value_size), lse, max_logits};

  PrefixAttentionForward params{};
  describe(params, inputs, subtree_end, position, bounds, order, sinks, alibi_slopes, scale, window, softcap);
  params.out = cuda::output(out);
  params.lse = cuda::output<float>(lse);
  params.max_logits = return_max_logits ? cuda::output<float>(max_logits) : nullptr;
  std::optional<Tensor> paths;
  if (order_invariant) {
    paths = cuda::empty(q, {tokens, 2}, ScalarType::Int);
    params.paths = cuda::workspace<int32_t>(*paths);
  }
  cuda::check_launch(launch_prefix_attention_forward(params, cuda::current_stream(q)), "prefix_attention");
  return {without_padding(out, value_size), lse, max_logits};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(Tensor grad_out, std::optional<Tensor> grad_lse, Tensor q, Tensor k,
                                                    Tensor v, Tensor out, Tensor lse, Tensor subtree_end,
                                                    Tensor position, Tensor bounds, Tensor order,
                                                    std::optional<Tensor> sinks, std::optional<Tensor> alibi_slopes,
                                                    double scale, int64_t window, double softcap) {
  const cuda::DeviceGuard guard(q);
  const Inputs inputs = check(q, k, v, subtree_end, position, bounds, order, sinks, alibi_slopes, window);
  check_output(grad_out, q, v, "grad_out", cuda::check_device);
  check_output(out, q, v, "out", cuda::check_device);
  check_statistic(lse, q, "lse", cuda::check_device);
  if (grad_lse) check_statistic(*grad_lse, q, "grad_lse", cuda::check_device);
  const int64_t tokens = q.size(0), query_heads = q.size(1), key_heads = k.size(1);
  const int64_t key_size = q.size(2), value_size = v.size(2);
  const int64_t padded_key = inputs.q.size(2), padded_value = inputs.v.size(2);
  Tensor grad_q = cuda::empty(q, {tokens, query_heads, padded_key}, q.scalar_type());
  Tensor grad_k = cuda::empty(k, {tokens, key_heads, padded_key}, k.scalar_type());
  Tensor grad_v = cuda::empty(v, {tokens, key_heads, padded_value}, v.scalar_type());
  Tensor grad_sinks = cuda::empty(lse, {sinks ? query_heads : 0}, ScalarType::Float);
  if (lse.numel() == 0) {
    // Without query heads nothing flows to the keys.
    torch::stable::zero_(grad_k);
    torch::stable::zero_(grad_v);
    torch::stable::zero_(grad_sinks);
  } else {
    const Tensor grad_out_rows = aligned(grad_out), out_rows = aligned(out);
    const Tensor lse_rows = torch::stable::contiguous(lse);
    std::optional<Tensor> grad_lse_rows, sink_shares;
    if (grad_lse) grad_lse_rows = torch::stable::contiguous(*grad_lse);
    Tensor delta = cuda::empty(lse, {tokens, query_heads}, ScalarType::Float);
    PrefixAttentionBackward params{};
    describe(params, inputs, subtree_end, position, bounds, order, sinks, alibi_slopes, scale, window, softcap);
    params.grad_out = heads(grad_out_rows);
    params.out = heads(out_rows);
    params.lse = cuda::input<float>(lse_rows);
    params.grad_lse = cuda::input<float>(grad_lse_rows);
    params.delta = cuda::workspace<float>(delta);
    params.grad_q = cuda::output(grad_q);
    params.grad_k = cuda::output(grad_k);
    params.grad_v = cuda::output(grad_v);
    if (sinks) {
      sink_shares = cuda::empty(lse, {order.size(1), query_heads}, ScalarType::Float);
      params.sink_shares = cuda::workspace<float>(*sink_shares);
      params.grad_sinks = cuda::output<float>(grad_sinks);
    }
    Tensor key_shares = cuda::empty(lse, {prefix_attention_key_shares(params)}, ScalarType::Float);
    params.key_shares = cuda::workspace<float>(key_shares);
    cuda::check_launch(launch_prefix_attention_backward(params, cuda::current_stream(q)), "prefix_attention");
  }
  return {without_padding(grad_q, key_size), without_padding(grad_k, key_size), without_padding(grad_v, value_size),
          grad_sinks};
}

}  // namespace

PYKERN_CUDA_IMPL(m) {
  m.impl("prefix_attention_forward", TORCH_BOX(&forward));
  m.impl("prefix_attention_backward", TORCH_BOX(&backward));
}

}  // namespace pykern
