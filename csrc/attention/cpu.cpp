// Host side of prefix attention on the CPU: check, allocate, plan the tiles, run.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <numeric>
#include <optional>
#include <tuple>
#include <vector>

#include "attention/prefix_attention.h"
#include "common/checks.h"
#include "common/scratch.h"

namespace pykern {
namespace {

constexpr int64_t kMaxHeadSize = 256;

Tensor with_contiguous_rows(const Tensor& tensor) {
  return tensor.size(2) <= 1 || tensor.stride(2) == 1 ? tensor : torch::stable::contiguous(tensor);
}

// lse or its gradient, [tokens, query_heads].
Tensor statistics(const Tensor& tensor, const Tensor& q, const char* name) {
  check_cpu(tensor, name);
  check_type(tensor, q.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float, name);
  check_dim(tensor, 2, name);
  check_size(tensor, 0, q.size(0), name);
  check_size(tensor, 1, q.size(1), name);
  return torch::stable::contiguous(tensor);
}

HeadsView view(const Tensor& tensor) { return {tensor.const_data_ptr(), tensor.stride(0), tensor.stride(1)}; }

// Fills a PrefixAttention and owns the arrays that it points to.
class Problem {
 public:
  template <class T>
  void describe(T& problem, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& subtree_end,
                double scale) {
    for (const auto& [tensor, name] : {std::pair{&q, "q"}, {&k, "k"}, {&v, "v"}}) {
      check_cpu(*tensor, name);
      check_dim(*tensor, 3, name);
      check_type(*tensor, q.scalar_type(), name);
      check_size(*tensor, 0, q.size(0), name);
    }
    check_cpu(subtree_end, "subtree_end");
    check_type(subtree_end, ScalarType::Int, "subtree_end");
    check_dim(subtree_end, 1, "subtree_end");
    check_size(subtree_end, 0, q.size(0), "subtree_end");
    check_size(k, 2, q.size(2), "k");
    check_size(v, 1, k.size(1), "v");
    STD_TORCH_CHECK(k.size(1) > 0 && q.size(1) % k.size(1) == 0, "q: expected a multiple of ", k.size(1),
                    " heads, got ", q.size(1));
    STD_TORCH_CHECK(q.size(2) <= kMaxHeadSize && v.size(2) <= kMaxHeadSize, "head size: at most ", kMaxHeadSize);
    STD_TORCH_CHECK(q.size(0) <= INT32_MAX - kUnitKeys, "q: too many tokens");

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
    const Tensor ends = torch::stable::contiguous(subtree_end);
    ends_.assign(problem.units * kUnitKeys, 0);
    for (int64_t key = 0; key < problem.tokens; ++key) {
      const int32_t end = input<int32_t>(ends)[key];
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

std::tuple<Tensor, Tensor> forward(Tensor q, Tensor k, Tensor v, Tensor subtree_end, double scale) {
  PrefixAttentionForward problem{};
  Problem owner;
  owner.describe(problem, q, k, v, subtree_end, scale);
  const bool float64 = q.scalar_type() == ScalarType::Double;
  Tensor out = torch::stable::new_empty(q, {q.size(0), q.size(1), v.size(2)});
  Tensor lse = torch::stable::new_empty(q, {q.size(0), q.size(1)}, float64 ? ScalarType::Double : ScalarType::Float);
  if (lse.numel() == 0) return {out, lse};
  if (float64) {
    prefix_attention_forward_float64(problem, output<double>(out), output<double>(lse));
    return {out, lse};
  }
  const std::vector<int64_t> order = tiles_by_work(problem);
  problem.tile_order = order.data();
  problem.out = out.mutable_data_ptr();
  problem.lse = output<float>(lse);
  STD_TORCH_CHECK(prefix_attention_forward()(data_type(q, "q"), problem), "prefix_attention: out of memory");
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> backward(Tensor grad_out, std::optional<Tensor> grad_lse, Tensor q, Tensor k,
                                            Tensor v, Tensor out, Tensor lse, Tensor subtree_end, double scale) {
  PrefixAttentionBackward problem{};
  Problem owner;
  owner.describe(problem, q, k, v, subtree_end, scale);
  Tensor grad_q = torch::stable::new_empty(q, q.sizes());
  Tensor grad_k = torch::stable::new_empty(k, k.sizes());
  Tensor grad_v = torch::stable::new_empty(v, v.sizes());
  if (lse.numel() == 0) {
    // Without query heads nothing flows to the keys.
    torch::stable::zero_(grad_k);
    torch::stable::zero_(grad_v);
    return {grad_q, grad_k, grad_v};
  }
  for (const auto& [tensor, name] : {std::pair{&grad_out, "grad_out"}, {&out, "out"}}) {
    check_cpu(*tensor, name);
    check_type(*tensor, q.scalar_type(), name);
    check_dim(*tensor, 3, name);
    check_size(*tensor, 0, q.size(0), name);
    check_size(*tensor, 1, q.size(1), name);
    check_size(*tensor, 2, v.size(2), name);
  }
  const bool float64 = q.scalar_type() == ScalarType::Double;
  const Tensor lse_rows = statistics(lse, q, "lse");
  std::optional<Tensor> grad_lse_rows;
  if (grad_lse) grad_lse_rows = statistics(*grad_lse, q, "grad_lse");
  const Tensor grad_out_rows = with_contiguous_rows(grad_out);
  const Tensor out_rows = with_contiguous_rows(out);
  if (float64) {
    prefix_attention_backward_float64(problem, view(grad_out_rows), view(out_rows), input<double>(lse_rows),
                                      grad_lse_rows ? input<double>(*grad_lse_rows) : nullptr, output<double>(grad_q),
                                      output<double>(grad_k), output<double>(grad_v));
    return {grad_q, grad_k, grad_v};
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
  return {grad_q, grad_k, grad_v};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pykern, CPU, m) {
  m.impl("prefix_attention_forward", TORCH_BOX(&forward));
  m.impl("prefix_attention_backward", TORCH_BOX(&backward));
}

}  // namespace pykern
