// Host side of prefix attention on the CPU: check, allocate, plan the tiles, run.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <numeric>
#include <optional>
#include <tuple>
#include <vector>

#include "attention/arguments.h"
#include "attention/prefix_attention.h"
#include "common/scratch.h"

namespace pykern {
namespace {

Tensor with_contiguous_rows(const Tensor& tensor) {
  return tensor.size(2) <= 1 || tensor.stride(2) == 1 ? tensor : torch::stable::contiguous(tensor);
}

HeadsView view(const Tensor& tensor) { return {tensor.const_data_ptr(), tensor.stride(0), tensor.stride(1)}; }

// Fills a PrefixAttention and owns the arrays that it points to.
class Problem {
 public:
  template <class T>
  void describe(T& problem, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& subtree_end,
                double scale) {
    check_heads(q, k, v, check_cpu);
    q_ = with_contiguous_rows(q);
    k_ = with_contiguous_rows(k);
    v_ = with_contiguous_rows(v);
    problem.tokens = q.size(0);
    problem.query_heads = q.size(1);
    problem.key_heads = k.size(1);
    problem.key_size = q.size(2);
    problem.value_size = v.size(2);
    problem.scale = scale;
    problem.q = view(q_);
    problem.k = view(k_);
    problem.v = view(v_);

    problem.units = ceil_div(problem.tokens, kUnitKeys);
    ends_.assign(problem.units * kUnitKeys, 0);
    for (int64_t key = 0; key < problem.tokens; ++key) {
      const int32_t end = input<int32_t>(subtree_end)[key];
      // One value for all keys that no query sees, so that the tile rules know them.
      ends_[key] = end > key ? end : 0;
    }
    min_end_.resize(problem.units);
    max_end_.resize(problem.units);
    for (int64_t unit = 0; unit < problem.units; ++unit) {
      const auto begin = ends_.begin() + unit * kUnitKeys;
      const auto [least, most] = std::minmax_element(begin, begin + kUnitKeys);
      min_end_[unit] = *least;
      max_end_[unit] = *most;
    }
    problem.subtree_end = ends_.data();
    problem.unit_min_end = min_end_.data();
    problem.unit_max_end = max_end_.data();
    // About as many rows as keep the vector units busy and the tile in the second-level cache.
    problem.tile_tokens = std::max<int64_t>(1, kTileRows / std::max<int64_t>(1, problem.group()));
    problem.tiles = ceil_div(problem.tokens, problem.tile_tokens);
  }

 private:
  static constexpr int64_t kTileRows = 192;
  Tensor q_, k_, v_;
  std::vector<int32_t> ends_, min_end_, max_end_;
};

// Tiles by falling number of units that they read, so that the last to start are short.
std::vector<int64_t> tiles_by_work(const PrefixAttention& problem) {
  std::vector<int64_t> work(problem.tiles), order(problem.tiles);
  for (int64_t tile = 0; tile < problem.tiles; ++tile) {
    const int64_t first = tile * problem.tile_tokens;
    const int64_t stop = std::min(first + problem.tile_tokens, problem.tokens);
    for (int64_t unit = 0; unit * kUnitKeys < stop; ++unit) work[tile] += problem.unit_max_end[unit] > first;
  }
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return work[a] > work[b]; });
  return order;
}

std::tuple<Tensor, Tensor, Tensor> forward(Tensor q, Tensor k, Tensor v, Tensor subtree_end, Tensor position,
                                           Tensor bounds, Tensor order, std::optional<Tensor> sinks,
                                           std::optional<Tensor> alibi_slopes, double scale, int64_t window,
                                           double softcap, bool return_max_logits, bool order_invariant) {
  check_tree(subtree_end, position, bounds, order, q.size(0), check_cpu);
  check_per_head(sinks, q, "sinks", check_cpu);
  check_per_head(alibi_slopes, q, "alibi_slopes", check_cpu);
  STD_TORCH_CHECK(!sinks && !alibi_slopes && window == 0 && softcap == 0.0 && !return_max_logits && !order_invariant,
                  "prefix_attention: options are not there yet");
  PrefixAttentionForward problem{};
  Problem owner;
  owner.describe(problem, q, k, v, subtree_end, scale);
  const bool float64 = q.scalar_type() == ScalarType::Double;
  Tensor out = torch::stable::new_empty(q, {q.size(0), q.size(1), v.size(2)});
  Tensor lse = torch::stable::new_empty(q, {q.size(0), q.size(1)}, float64 ? ScalarType::Double : ScalarType::Float);
  Tensor max_logits = torch::stable::new_empty(lse, {0});
  if (lse.numel() == 0) return {out, lse, max_logits};
  if (float64) {
    prefix_attention_forward_float64(problem, output<double>(out), output<double>(lse));
    return {out, lse, max_logits};
  }
  const std::vector<int64_t> tile_order = tiles_by_work(problem);
  problem.tile_order = tile_order.data();
  problem.out = out.mutable_data_ptr();
  problem.lse = output<float>(lse);
  STD_TORCH_CHECK(prefix_attention_forward()(data_type(q, "q"), problem), "prefix_attention: out of memory");
  return {out, lse, max_logits};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(Tensor grad_out, std::optional<Tensor> grad_lse, Tensor q, Tensor k,
                                                    Tensor v, Tensor out, Tensor lse, Tensor subtree_end,
                                                    Tensor position, Tensor bounds, Tensor order,
                                                    std::optional<Tensor> sinks, std::optional<Tensor> alibi_slopes,
                                                    double scale, int64_t window, double softcap) {
  check_tree(subtree_end, position, bounds, order, q.size(0), check_cpu);
  check_per_head(sinks, q, "sinks", check_cpu);
  check_per_head(alibi_slopes, q, "alibi_slopes", check_cpu);
  STD_TORCH_CHECK(!sinks && !alibi_slopes && window == 0 && softcap == 0.0,
                  "prefix_attention: options are not there yet");
  PrefixAttentionBackward problem{};
  Problem owner;
  owner.describe(problem, q, k, v, subtree_end, scale);
  Tensor grad_q = torch::stable::new_empty(q, q.sizes());
  Tensor grad_k = torch::stable::new_empty(k, k.sizes());
  Tensor grad_v = torch::stable::new_empty(v, v.sizes());
  Tensor grad_sinks = torch::stable::new_empty(lse, {0});
  if (lse.numel() == 0) {
    // Without query heads nothing flows to the keys.
    torch::stable::zero_(grad_k);
    torch::stable::zero_(grad_v);
    return {grad_q, grad_k, grad_v, grad_sinks};
  }
  check_output(grad_out, q, v, "grad_out", check_cpu);
  check_output(out, q, v, "out", check_cpu);
  check_statistic(lse, q, "lse", check_cpu);
  if (grad_lse) check_statistic(*grad_lse, q, "grad_lse", check_cpu);
  const bool float64 = q.scalar_type() == ScalarType::Double;
  const Tensor lse_rows = torch::stable::contiguous(lse);
  std::optional<Tensor> grad_lse_rows;
  if (grad_lse) grad_lse_rows = torch::stable::contiguous(*grad_lse);
  const Tensor grad_out_rows = with_contiguous_rows(grad_out);
  const Tensor out_rows = with_contiguous_rows(out);
  if (float64) {
    prefix_attention_backward_float64(problem, view(grad_out_rows), view(out_rows), input<double>(lse_rows),
                                      grad_lse_rows ? input<double>(*grad_lse_rows) : nullptr, output<double>(grad_q),
                                      output<double>(grad_k), output<double>(grad_v));
    return {grad_q, grad_k, grad_v, grad_sinks};
  }
  // Large key tiles read the queries less often; small ones give many threads something to do. By
  // the shape alone, so that results don't depend on the threads.
  problem.key_tile_units = std::clamp<int64_t>(problem.units * problem.key_heads / 16, 1, kMaxKeyTileUnits);
  problem.grad_out = view(grad_out_rows);
  problem.out = view(out_rows);
  problem.lse = input<float>(lse_rows);
  problem.grad_lse = grad_lse_rows ? input<float>(*grad_lse_rows) : nullptr;
  problem.grad_q = grad_q.mutable_data_ptr();
  problem.grad_k = grad_k.mutable_data_ptr();
  problem.grad_v = grad_v.mutable_data_ptr();
  STD_TORCH_CHECK(prefix_attention_backward()(data_type(q, "q"), problem), "prefix_attention: out of memory");
  return {grad_q, grad_k, grad_v, grad_sinks};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pykern, CPU, m) {
  m.impl("prefix_attention_forward", TORCH_BOX(&forward));
  m.impl("prefix_attention_backward", TORCH_BOX(&backward));
}

}  // namespace pykern
