// Bounds of a tree's tiles and the order of its blocks, on the CPU.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <numeric>
#include <tuple>
#include <vector>

#include "attention/arguments.h"
#include "common/parallel.h"
#include "common/scratch.h"

namespace pykern {
namespace {

void sort_by_falling_work(const std::vector<int64_t>& work, int32_t* order) {
  std::iota(order, order + work.size(), 0);
  std::stable_sort(order, order + work.size(), [&](int32_t a, int32_t b) { return work[a] > work[b]; });
}

std::tuple<Tensor, Tensor> tiles(Tensor subtree_end, Tensor position) {
  check_tokens(subtree_end, "subtree_end", check_cpu);
  check_tokens(position, "position", check_cpu);
  const int64_t tokens = subtree_end.size(0);
  check_size(position, 0, tokens, "position");
  const int64_t count = ceil_div(tokens, kTileTokens), blocks = ceil_div(tokens, kBlockTokens);
  Tensor bounds = torch::stable::new_empty(subtree_end, {count, 4});
  Tensor order = torch::stable::new_empty(subtree_end, {2, blocks});
  const int32_t* ends = input<int32_t>(subtree_end);
  const int32_t* positions = input<int32_t>(position);
  int32_t* target = output<int32_t>(bounds);
  for (int64_t tile = 0; tile < count; ++tile) {
    const int64_t first = tile * kTileTokens, stop = std::min(first + kTileTokens, tokens);
    int32_t least_end = INT32_MAX, last_end = 0;
    for (int64_t key = first; key < stop; ++key) {
      const int32_t end = ends[key] > key ? ends[key] : 0;
      least_end = std::min(least_end, end);
      last_end = std::max(last_end, end);
    }
    const auto [least, last] = std::minmax_element(positions + first, positions + stop);
    target[4 * tile] = least_end;
    target[4 * tile + 1] = last_end;
    target[4 * tile + 2] = *least;
    target[4 * tile + 3] = *last;
  }

  std::vector<int64_t> work(blocks);
  parallel_tasks(blocks, [&](int64_t block, int) {
    const int64_t first = block * kBlockTokens, stop = std::min(first + kBlockTokens, tokens);
    int64_t seen = 0;
    for (int64_t tile = 0; tile * kTileTokens < stop; ++tile) seen += target[4 * tile + 1] > first;
    work[block] = seen;
  });
  sort_by_falling_work(work, output<int32_t>(order));
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t tile = block * (kBlockTokens / kTileTokens);
    int32_t last_end = target[4 * tile + 1];
    if (tile + 1 < count) last_end = std::max(last_end, target[4 * tile + 5]);
    work[block] = std::max<int64_t>(last_end - block * kBlockTokens, 0);
  }
  sort_by_falling_work(work, output<int32_t>(order) + blocks);
  return {bounds, order};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pykern, CPU, m) { m.impl("prefix_attention_tiles", TORCH_BOX(&tiles)); }

}  // namespace pykern
