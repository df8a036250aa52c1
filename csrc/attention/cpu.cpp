// Host side of prefix attention on the CPU: check, allocate, plan the tiles, run.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <optional>
#include <tuple>
#include <vector>

#include "attention/arguments.h"
#include "attention/prefix_attention.h"
#include "common/parallel.h"
#include "common/scratch.h"

namespace pykern {
namespace {

static_assert(kUnitKeys == kTileTokens, "units are the tiles of the tree's bounds");

Tensor with_contiguous_rows(const Tensor& tensor) {
  return tensor.size(2) <= 1 || tensor.stride(2) == 1 ? tensor : torch::stable::contiguous(tensor);
}

HeadsView view(const Tensor& tensor) { return {tensor.const_data_ptr(), tensor.stride(0), tensor.stride(1)}; }

// What both passes are given.
struct Arguments {
  const Tensor &q, &k, &v, &subtree_end, &position, &bounds, &order;
  const std::optional<Tensor>&sinks, &alibi_slopes;
  double scale;
  int64_t window;
  double softcap;

  void check() const {
    check_heads(q, k, v, check_cpu);
    check_tree(subtree_end, position, bounds, order, q.size(0), check_cpu);
    check_per_head(sinks, q, "sinks", check_cpu);
    check_per_head(alibi_slopes, q, "alibi_slopes", check_cpu);
    STD_TORCH_CHECK(window >= 0, "window: expected at least 1 token, or 0 for none, got ", window);
    STD_TORCH_CHECK(softcap >= 0.0 && std::isfinite(softcap),
                    "softcap: expected a finite number above 0, or 0 for none, got ", softcap);
    // A block that is left out would leave its rows unwritten, one out of range would be written elsewhere.
    std::vector<bool> found(order.size(1));
    for (int64_t i = 0; i < order.size(1); ++i) {
      const int32_t block = input<int32_t>(order)[i];
      STD_TORCH_CHECK(block >= 0 && block < order.size(1) && !found[block], "order: expected each block once");
      found[block] = true;
    }
  }
};

// Fills a PrefixAttention and owns the arrays that it points to.
class Problem {
 public:
  Problem(PrefixAttention& problem, const Arguments& given)
      : q_(with_contiguous_rows(given.q)), k_(with_contiguous_rows(given.k)), v_(with_contiguous_rows(given.v)) {
    problem.tokens = given.q.size(0);
    problem.query_heads = given.q.size(1);
    problem.key_heads = given.k.size(1);
    problem.key_size = given.q.size(2);
    problem.value_size = given.v.size(2);
    problem.scale = given.scale;
    problem.softcap = given.softcap;
    problem.window = given.window;
    problem.q = view(q_);
    problem.k = view(k_);
    problem.v = view(v_);
    problem.sinks = given.sinks ? given.sinks->const_data_ptr() : nullptr;
    problem.alibi_slopes = given.alibi_slopes ? given.alibi_slopes->const_data_ptr() : nullptr;

    problem.bounds = input<int32_t>(given.bounds);
    problem.units = ceil_div(problem.tokens, kUnitKeys);
    rows_.resize(problem.units * kUnitKeys);
    std::iota(rows_.begin(), rows_.end(), 0);
    ends_.assign(problem.units * kUnitKeys, 0);
    positions_.assign(problem.units * kUnitKeys, 0);
    std::copy_n(input<int32_t>(given.position), problem.tokens, positions_.begin());
    for (int64_t key = 0; key < problem.tokens; ++key) {
      const int32_t end = input<int32_t>(given.subtree_end)[key];
      // One value for all keys that no query sees, so that the tile rules know them.
      ends_[key] = end > key ? end : 0;
    }
    problem.row = rows_.data();
    problem.subtree_end = ends_.data();
    problem.position = positions_.data();

    const int64_t group = std::max<int64_t>(1, problem.group());
    problem.tile_tokens = kBlockTokens;
    while (problem.tile_tokens > 1 && problem.tile_tokens * group > kTileRows) problem.tile_tokens /= 2;
    problem.tiles = ceil_div(problem.tokens, problem.tile_tokens);
  }

 private:
  // About as many rows as keep the vector units busy and the tile in the second-level cache.
  static constexpr int64_t kTileRows = 256;
  const Tensor q_, k_, v_;
  std::vector<int32_t> rows_, ends_, positions_;
};

// The tiles of rows, longest first: tiles divide the blocks that `order` ranks.
std::vector<QueryTokens> tiles_of_rows(const PrefixAttention& problem, const Tensor& order) {
  std::vector<QueryTokens> tiles;
  for (int64_t i = 0; i < order.size(1); ++i) {
    const int64_t block = input<int32_t>(order)[i];
    const int64_t stop = std::min((block + 1) * kBlockTokens, problem.tokens);
    for (int64_t first = block * kBlockTokens; first < stop; first += problem.tile_tokens) {
      tiles.push_back({first, std::min(first + problem.tile_tokens, stop)});
    }
  }
  return tiles;
}

// Tiles within runs of tokens each of which sees the one before it, so that a tile has one path.
std::vector<QueryTokens> tiles_of_runs(const PrefixAttention& problem) {
  std::vector<QueryTokens> tiles;
  for (int64_t token = 0; token < problem.tokens; ++token) {
    const bool continues = token > 0 && problem.subtree_end[token - 1] > token;
    if (continues && token - tiles.back().first < problem.tile_tokens) {
      ++tiles.back().stop;
    } else {
      tiles.push_back({token, token + 1});
    }
  }
  std::stable_sort(tiles.begin(), tiles.end(), [&](const QueryTokens& a, const QueryTokens& b) {
    return problem.position[a.stop - 1] > problem.position[b.stop - 1];
  });
  return tiles;
}

// The largest logit of each head from those of its rows; a NaN among them stays.
template <class T>
void largest_of_heads(const T* rows, int64_t tokens, int64_t heads, T* target) {
  parallel_tasks(heads, [&](int64_t head, int) {
    T largest = -std::numeric_limits<T>::infinity();
    for (int64_t token = 0; token < tokens && largest == largest; ++token) {
      const T value = rows[token * heads + head];
      if (!(value <= largest)) largest = value;
    }
    target[head] = largest;
  });
}

std::tuple<Tensor, Tensor, Tensor> forward(Tensor q, Tensor k, Tensor v, Tensor subtree_end, Tensor position,
                                           Tensor bounds, Tensor order, std::optional<Tensor> sinks,
                                           std::optional<Tensor> alibi_slopes, double scale, int64_t window,
                                           double softcap, bool return_max_logits, bool order_invariant) {
  const Arguments given{q, k, v, subtree_end, position, bounds, order, sinks, alibi_slopes, scale, window, softcap};
  given.check();
  const int64_t tokens = q.size(0), heads = q.size(1);
  Tensor out = torch::stable::new_empty(q, {tokens, heads, v.size(2)});
  Tensor lse = torch::stable::new_empty(q, {tokens, heads}, statistic_type(q));
  Tensor max_logits = torch::stable::new_empty(lse, {return_max_logits ? heads : 0});
  if (lse.numel() == 0) {
    torch::stable::fill_(max_logits, -std::numeric_limits<double>::infinity());
    return {out, lse, max_logits};
  }
  Tensor largest = torch::stable::new_empty(lse, {return_max_logits ? lse.numel() : 0});
  if (q.scalar_type() == ScalarType::Double) {
    PrefixAttentionFloat64 problem{};
    const Problem owner(problem, given);
    problem.out = output<double>(out);
    problem.lse = output<double>(lse);
    problem.largest = return_max_logits ? output<double>(largest) : nullptr;
    prefix_attention_forward_float64(problem);
    if (return_max_logits) largest_of_heads(input<double>(largest), tokens, heads, output<double>(max_logits));
    return {out, lse, max_logits};
  }
  PrefixAttentionForward problem{};
  const Problem owner(problem, given);
  const std::vector<QueryTokens> tiles = order_invariant ? tiles_of_runs(problem) : tiles_of_rows(problem, order);
  problem.query_tiles = tiles.data();
  problem.query_tile_count = static_cast<int64_t>(tiles.size());
  problem.along_paths = order_invariant;
  problem.out = out.mutable_data_ptr();
  problem.lse = output<float>(lse);
  problem.largest = return_max_logits ? output<float>(largest) : nullptr;
  STD_TORCH_CHECK(prefix_attention_forward()(data_type(q, "q"), problem), "prefix_attention: out of memory");
  if (return_max_logits) largest_of_heads(input<float>(largest), tokens, heads, output<float>(max_logits));
  return {out, lse, max_logits};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(Tensor grad_out, std::optional<Tensor> grad_lse, Tensor q, Tensor k,
                                                    Tensor v, Tensor out, Tensor lse, Tensor subtree_end,
                                                    Tensor position, Tensor bounds, Tensor order,
                                                    std::optional<Tensor> sinks, std::optional<Tensor> alibi_slopes,
                                                    double scale, int64_t window, double softcap) {
  const Arguments given{q, k, v, subtree_end, position, bounds, order, sinks, alibi_slopes, scale, window, softcap};
  given.check();
  check_output(grad_out, q, v, "grad_out", check_cpu);
  check_output(out, q, v, "out", check_cpu);
  check_statistic(lse, q, "lse", check_cpu);
  if (grad_lse) check_statistic(*grad_lse, q, "grad_lse", check_cpu);
  Tensor grad_q = torch::stable::new_empty(q, q.sizes());
  Tensor grad_k = torch::stable::new_empty(k, k.sizes());
  Tensor grad_v = torch::stable::new_empty(v, v.sizes());
  Tensor grad_sinks = torch::stable::new_empty(lse, {sinks ? q.size(1) : 0});
  if (lse.numel() == 0) {
    // Without query heads nothing flows to the keys.
    for (Tensor* grad : {&grad_k, &grad_v, &grad_sinks}) torch::stable::zero_(*grad);
    return {grad_q, grad_k, grad_v, grad_sinks};
  }
  const Tensor lse_rows = torch::stable::contiguous(lse);
  std::optional<Tensor> grad_lse_rows;
  if (grad_lse) grad_lse_rows = torch::stable::contiguous(*grad_lse);
  const Tensor grad_out_rows = with_contiguous_rows(grad_out);
  const Tensor out_rows = with_contiguous_rows(out);
  if (q.scalar_type() == ScalarType::Double) {
    PrefixAttentionBackwardFloat64 problem{};
    const Problem owner(problem, given);
    problem.grad_out = view(grad_out_rows);
    problem.out = view(out_rows);
    problem.lse = input<double>(lse_rows);
    problem.grad_lse = grad_lse_rows ? input<double>(*grad_lse_rows) : nullptr;
    problem.grad_q = output<double>(grad_q);
    problem.grad_k = output<double>(grad_k);
    problem.grad_v = output<double>(grad_v);
    problem.grad_sinks = sinks ? output<double>(grad_sinks) : nullptr;
    prefix_attention_backward_float64(problem);
    return {grad_q, grad_k, grad_v, grad_sinks};
  }
  PrefixAttentionBackward problem{};
  const Problem owner(problem, given);
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
  problem.grad_sinks = sinks ? output<float>(grad_sinks) : nullptr;
  STD_TORCH_CHECK(prefix_attention_backward()(data_type(q, "q"), problem), "prefix_attention: out of memory");
  return {grad_q, grad_k, grad_v, grad_sinks};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pykern, CPU, m) {
  m.impl("prefix_attention_forward", TORCH_BOX(&forward));
  m.impl("prefix_attention_backward", TORCH_BOX(&backward));
}

}  // namespace pykern
