// Bounds of subtree_end over tiles of keys, on the CPU.
#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "common/checks.h"
#include "common/parallel.h"
#include "common/scratch.h"

namespace pykern {
namespace {

Tensor tiles(Tensor subtree_end, int64_t tile) {
  check_cpu(subtree_end, "subtree_end");
  check_type(subtree_end, ScalarType::Int, "subtree_end");
  check_dim(subtree_end, 1, "subtree_end");
  check_contiguous(subtree_end, "subtree_end");
  STD_TORCH_CHECK(tile > 0, "tile: expected at least 1, got ", tile);
  const int64_t tokens = subtree_end.size(0), count = tokens / tile + (tokens % tile != 0);
  Tensor bounds = torch::stable::new_empty(subtree_end, {count, 2});
  const int32_t* ends = input<int32_t>(subtree_end);
  int32_t* target = output<int32_t>(bounds);
  const int64_t tiles_per_task = std::max<int64_t>(1, 65536 / tile);
  parallel_tasks(ceil_div(count, tiles_per_task), [&](int64_t task, int) {
    const int64_t last = std::min((task + 1) * tiles_per_task, count);
    for (int64_t index = task * tiles_per_task; index < last; ++index) {
      const int64_t first = index * tile, stop = first + std::min(tile, tokens - first);
      int32_t smallest = INT32_MAX, largest = 0;
      for (int64_t key = first; key < stop; ++key) {
        const int32_t end = ends[key] > key ? ends[key] : 0;
        smallest = std::min(smallest, end);
        largest = std::max(largest, end);
      }
      target[2 * index] = smallest;
      target[2 * index + 1] = largest;
    }
  });
  return bounds;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pykern, CPU, m) { m.impl("prefix_attention_tiles", TORCH_BOX(&tiles)); }

}  // namespace pykern
