// The backward of prefix attention. A task owns a tile of keys of one head and walks the contiguous
// range of query tiles that may see it: it recomputes the weights, sums the gradients of its keys and
// values, and adds its share to the gradient of each query tile it passes.
//
// Those shares are added in the order of the key tiles: a task waits until its predecessors have
// passed the query tile. Tasks start in that order too, so the earliest one under way never waits,
// and all sums have one order whatever the number of threads.
#include "attention/backward_tile.h"
#include "attention/prefix_attention.h"
#include "common/parallel.h"

namespace pykern::PYKERN_SIMD {
namespace {

template <class T>
void pack_unit(const PrefixAttention& problem, const BackwardOperands<compute_t<T>>& data, compute_t<T>* staged,
               int64_t head, int64_t unit) {
  using C = compute_t<T>;
  const Sizes<C> sizes(problem);
  const int64_t first = unit * kUnitKeys;
  const KeyColumns keys{problem.row + first, problem.subtree_end + first, problem.position + first};
  bool finite = stage_unit<C, T>(problem.v, keys, head, problem.value_size, sizes.value_depth, staged, NonFinite::keep);
  pack_across(data.values_across, staged, unit, problem.value_size, sizes.value_depth);
  finite &= stage_unit<C, T>(problem.k, keys, head, problem.key_size, sizes.key_depth, staged, NonFinite::keep);
  pack_across(data.keys_across, staged, unit, problem.key_size, sizes.key_depth);
  pack_along(data.keys_along, staged, unit, sizes.keys, problem.key_size, sizes.key_depth);
  data.keys_finite[unit] = finite;
}

// Both strides and the number of rows are even. Pairs of rows are interleaved, then turned as units.
PYKERN_INLINE void transpose_rows(bf16* target, int64_t target_row, const bf16* source, int64_t source_row,
                                  int64_t rows, int64_t columns) {
  for (int64_t row = 0; row < rows; row += 2 * kLanes) {
    const int64_t pairs = (rows - row < 2 * kLanes ? rows - row : 2 * kLanes) / 2;
    for (int64_t column = 0; column < columns; column += kLanes) {
      const int64_t width = columns - column < kLanes ? columns - column : kLanes;
      vuint units[kLanes];
      for (int64_t pair = 0; pair < kLanes; ++pair) {
        const bf16* even = source + (row + 2 * pair) * source_row + column;
        units[pair] = pair < pairs ? detail::bf16_bits<bf16>(detail::load_up_to(even, width)) |
                                         detail::bf16_bits<bf16>(detail::load_up_to(even + source_row, width)) << 16
                                   : vuint{};
      }
      detail::transpose<kLanes>(units);
      for (int64_t i = 0; i < width; ++i) {
        std::memcpy(target + (column + i) * target_row + row, &units[i], pairs * 4);
      }
    }
  }
}

template <class T>
void load_tile(const PrefixAttentionBackward& problem, const BackwardOperands<compute_t<T>>& data, int64_t head,
               int64_t index) {
  using C = compute_t<T>;
  const Sizes<C> sizes(problem);
  const Tile tile = Tile::of_index(problem, index);
  const int64_t group = problem.group(), first = index * sizes.tile_rows;
  vint bad = {};
  for (int64_t row = 0; row < sizes.tile_rows; ++row) {
    C* query = data.queries + (first + row) * sizes.key_depth;
    C* grad = data.grad_out + (first + row) * sizes.value_depth;
    const int64_t token = tile.first_token + row / group, query_head = head * group + row % group;
    const int64_t at = token * problem.query_heads + query_head;
    if (row >= tile.rows || problem.lse[at] == -kInfinity) {
      // Sees nothing: whatever stands there adds nothing.
      zero_row(query, sizes.key_depth);
      zero_row(grad, sizes.value_depth);
      data.lse[first + row] = kInfinity;
      data.delta[first + row] = 0.0f;
      continue;
    }
    const T* grad_row = row_of<T>(problem.grad_out, token, query_head);
    const T* out_row = row_of<T>(problem.out, token, query_head);
    bad |= copy_row(query, sizes.key_depth, row_of<T>(problem.q, token, query_head), problem.key_size);
    bad |= copy_row(grad, sizes.value_depth, grad_row, problem.value_size);
    vfloat sum = zero();
    int64_t column = 0;
    for (; column + kLanes <= problem.value_size; column += kLanes) {
      sum += load(grad_row + column) * load(out_row + column);
    }
    if (column < problem.value_size) {
      const int64_t rest = problem.value_size - column;
      sum += load_partial(grad_row + column, rest) * load_partial(out_row + column, rest);
    }
    data.lse[first + row] = problem.lse[at];
    data.delta[first + row] = sum_lanes(sum) - (problem.grad_lse ? problem.grad_lse[at] : 0.0f);
  }
  data.queries_finite[index] = !any(bad);
  if constexpr (kNeedsTransposed<C>) {
    transpose_rows(data.queries_transposed + first * problem.key_size, sizes.tile_rows,
                   data.queries + first * sizes.key_depth, sizes.key_depth, sizes.tile_rows, problem.key_size);
    transpose_rows(data.grad_out_transposed + first * problem.value_size, sizes.tile_rows,
                   data.grad_out + first * sizes.value_depth, sizes.value_depth, sizes.tile_rows, problem.value_size);
  }
  std::memset(data.grad_q + first * sizes.key_columns, 0, sizes.tile_rows * sizes.key_columns * sizeof(float));
  data.turn[index] = next_turn(problem, 0, index);
}

template <class T>
void write_tile(const PrefixAttentionBackward& problem, const BackwardOperands<compute_t<T>>& data, int64_t head,
                int64_t index) {
  const Sizes<compute_t<T>> sizes(problem);
  const Tile tile = Tile::of_index(problem, index);
  const int64_t group = problem.group(), size = problem.key_size;
  const float scale = static_cast<float>(problem.scale);
  for (int64_t row = 0; row < tile.rows; ++row) {
    const int64_t token = tile.first_token + row / group;
    const float* sums = data.grad_q + (index * sizes.tile_rows + row) * sizes.key_columns;
    T* target = static_cast<T*>(problem.grad_q) + (token * problem.query_heads + head * group + row % group) * size;
    int64_t column = 0;
    for (; column + kLanes <= size; column += kLanes) store(target + column, load(sums + column) * scale);
    for (; column < size; ++column) narrow(sums[column] * scale, target + column);
  }
}

// A sink takes the weight e^(sink - lse) of every row that sees a key; its value is zero.
template <class C>
float grad_of_sink(const PrefixAttentionBackward& problem, const BackwardOperands<C>& data, int64_t head) {
  const Sizes<C> sizes(problem);
  const int64_t group = problem.group();
  const float sink = static_cast<const float*>(problem.sinks)[head];
  double sum = 0.0;
  for (int64_t tile = 0; tile < problem.tiles; ++tile) {
    const int64_t rows = Tile::of_index(problem, tile).rows;
    for (int64_t row = head % group; row < rows; row += group) {
      const int64_t at = tile * sizes.tile_rows + row;
      // Rows that see nothing have an infinite lse here.
      if (data.lse[at] != kInfinity) sum -= static_cast<double>(__builtin_expf(sink - data.lse[at])) * data.delta[at];
    }
  }
  return static_cast<float>(sum);
}

template <class T>
bool run_backward(const PrefixAttentionBackward& problem) {
  using C = compute_t<T>;
  Pieces head_count(nullptr), thread_count(nullptr);
  BackwardOperands<C>().carve(head_count, problem);
  BackwardWorkspace<C>().carve(thread_count, problem);
  // As many heads at a time as fit a modest workspace; results don't depend on it.
  constexpr int64_t kWorkspaceBytes = int64_t{256} << 20;
  int64_t heads = kWorkspaceBytes / head_count.used();
  heads = heads < 1 ? 1 : heads > problem.key_heads ? problem.key_heads : heads;
  const Scratch scratch(heads * head_count.used() + max_threads() * thread_count.used());
  char* memory = scratch.get<char>();
  if (!memory) return false;
  const auto head_memory = [&](int64_t slot) {
    BackwardOperands<C> operands;
    Pieces pieces(memory + slot * head_count.used());
    operands.carve(pieces, problem);
    return operands;
  };
  const auto thread_memory = [&](int thread) {
    BackwardWorkspace<C> workspace;
    Pieces pieces(memory + heads * head_count.used() + thread * thread_count.used());
    workspace.carve(pieces, problem);
    return workspace;
  };

  const int64_t key_tiles = ceil_div(problem.units, problem.key_tile_units);
  for (int64_t first_head = 0; first_head < problem.key_heads; first_head += heads) {
    const int64_t count = problem.key_heads - first_head < heads ? problem.key_heads - first_head : heads;
    parallel_tasks(count * (problem.units + problem.tiles), [&](int64_t task, int thread) {
      const int64_t slot = task % count, part = task / count;
      const BackwardOperands<C> operands = head_memory(slot);
      if (part < problem.units) {
        pack_unit<T>(problem, operands, thread_memory(thread).staged, first_head + slot, part);
      } else {
        load_tile<T>(problem, operands, first_head + slot, part - problem.units);
      }
    });
    parallel_tasks(count * key_tiles, [&](int64_t task, int thread) {
      const BackwardOperands<C> operands = head_memory(task % count);
      const BackwardWorkspace<C> workspace = thread_memory(thread);
      BackwardKeyTile<T>(problem, operands, workspace, task / count, first_head + task % count).run();
    });
    parallel_tasks(count * problem.tiles, [&](int64_t task, int) {
      write_tile<T>(problem, head_memory(task % count), first_head + task % count, task / count);
    });
    if (problem.grad_sinks) {
      parallel_tasks(count * problem.group(), [&](int64_t task, int) {
        const int64_t slot = task % count, head = (first_head + slot) * problem.group() + task / count;
        problem.grad_sinks[head] = grad_of_sink(problem, head_memory(slot), head);
      });
    }
  }
  return true;
}

}  // namespace

bool prefix_attention_backward(DataType type, const PrefixAttentionBackward& problem) {
  switch (type) {
    case DataType::f32: return run_backward<float>(problem);
    case DataType::bf16: return run_backward<bf16>(problem);
    case DataType::f16: return run_backward<f16>(problem);
    default: return false;
  }
}

}  // namespace pykern::PYKERN_SIMD
