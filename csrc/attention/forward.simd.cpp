// The forward of prefix attention: per tile of queries one pass over the keys that it sees.
#include "attention/forward_tile.h"
#include "attention/prefix_attention.h"
#include "common/parallel.h"

namespace pykern::PYKERN_SIMD {
namespace {

template <class C>
struct PackedUnits {
  C* across;        // keys as [key_size, keys]
  C* values;        // values as [keys, value_size], all panels of a number of keys
  uint8_t* finite;  // per unit: the values are
};

// Packs one unit, number `unit` of `units`.
template <class T>
void pack_unit(const PrefixAttention& problem, const KeyColumns& columns, int64_t head, int64_t unit, int64_t units,
               compute_t<T>* staged, const PackedUnits<compute_t<T>>& packed) {
  const Sizes<compute_t<T>> sizes(problem);
  stage_unit<compute_t<T>, T>(problem.k, columns, head, problem.key_size, sizes.key_depth, staged, NonFinite::keep);
  pack_across(packed.across, staged, unit, problem.key_size, sizes.key_depth);
  packed.finite[unit] = stage_unit<compute_t<T>, T>(problem.v, columns, head, problem.value_size, sizes.value_depth,
                                                    staged, NonFinite::drop);
  pack_along(packed.values, staged, unit, units * kUnitKeys, problem.value_size, sizes.value_depth);
}

// --- keys by rows ---------------------------------------------------------------------------------

// Of all heads, packed once for all tiles.
template <class C>
struct AllKeys {
  C* across;
  C* values;
  uint8_t* finite;
  PYKERN_INLINE void carve(Pieces& pieces, const PrefixAttention& problem) {
    const Sizes<C> sizes(problem);
    across = pieces.take<C>(problem.key_heads * sizes.keys * sizes.key_depth);
    values = pieces.take<C>(problem.key_heads * sizes.keys * sizes.value_columns);
    finite = pieces.take<uint8_t>(problem.key_heads * problem.units);
  }
  PYKERN_INLINE PackedUnits<C> of_head(const PrefixAttention& problem, int64_t head) const {
    const Sizes<C> sizes(problem);
    return {across + head * sizes.keys * sizes.key_depth, values + head * sizes.keys * sizes.value_columns,
            finite + head * problem.units};
  }
};

template <class T>
void attend_rows(const PrefixAttentionForward& problem, const PackedUnits<compute_t<T>>& keys,
                 const ForwardWorkspace<compute_t<T>>& workspace, const Tile& tile, int64_t head) {
  using C = compute_t<T>;
  const Sizes<C> sizes(problem);
  ForwardTile<T> queries(problem, workspace, tile, head);
  const int64_t stop = ceil_div(tile.stop_token, kUnitKeys);
  for (int64_t unit = 0; unit < stop;) {
    KeyRun<C> run;
    for (run.units = 0; unit + run.units < stop && run.units < kRunUnits; ++run.units) {
      const int64_t i = run.units;
      run.rows[i] = visible_rows(problem, tile, unit + i);
      if (run.rows[i].empty()) break;
      run.full[i] = fully_visible(problem, tile, unit + i);
      run.finite[i] = keys.finite[unit + i];
    }
    if (run.units == 0) {
      ++unit;
      continue;
    }
    const int64_t first = unit * kUnitKeys;
    run.across = keys.across + first * sizes.key_depth;
    run.values = keys.values + first * kPanel;
    run.values_panel = sizes.keys * kPanel;
    run.columns = {problem.row + first, problem.subtree_end + first, problem.position + first};
    queries.attend(run);
    unit += run.units;
  }
  queries.write();
}

// --- keys by paths --------------------------------------------------------------------------------

// The keys that one tile sees, gathered in the order of its path and cut in runs by their place in it.
// So the sums of a row have the same terms in the same order wherever its path lies.
template <class C>
struct PathKeys {
  C* across;                     // of one run
  C* values;
  uint8_t* finite;
  int32_t *row, *end, *position;  // of the whole path, padded to whole runs
  PYKERN_INLINE void carve(Pieces& pieces, const PrefixAttention& problem) {
    const Sizes<C> sizes(problem);
    const int64_t longest = round_up(problem.tokens, kRunKeys);
    across = pieces.take<C>(kRunKeys * sizes.key_depth);
    values = pieces.take<C>(kRunKeys * sizes.value_columns);
    finite = pieces.take<uint8_t>(kRunUnits);
    row = pieces.take<int32_t>(longest);
    end = pieces.take<int32_t>(longest);
    position = pieces.take<int32_t>(longest);
  }

  // Returns the length of the path.
  int64_t gather(const PrefixAttention& problem, const Tile& tile) const {
    int64_t length = 0;
    for (int64_t unit = 0; unit * kUnitKeys < tile.stop_token; ++unit) {
      if (problem.last_end(unit) <= tile.first_token) continue;
      for (int64_t key = unit * kUnitKeys; key < (unit + 1) * kUnitKeys && key < tile.stop_token; ++key) {
        if (problem.subtree_end[key] <= tile.first_token || problem.subtree_end[key] <= key) continue;
        row[length] = static_cast<int32_t>(key);
        end[length] = problem.subtree_end[key];
        position[length++] = problem.position[key];
      }
    }
    for (int64_t i = length; i < round_up(length, kRunKeys); ++i) row[i] = end[i] = position[i] = 0;
    return length;
  }
};

template <class T>
void attend_path(const PrefixAttentionForward& problem, const PathKeys<compute_t<T>>& keys,
                 const ForwardWorkspace<compute_t<T>>& workspace, const Tile& tile, int64_t head) {
  using C = compute_t<T>;
  ForwardTile<T> queries(problem, workspace, tile, head);
  const int64_t length = keys.gather(problem, tile);
  // As many rows whatever the tile, where a product of few would take another way.
  const Range rows{0, round_up(tile.rows, kRowMultiple)};
  for (int64_t first = 0; first < length; first += kRunKeys) {
    const int64_t count = length - first < kRunKeys ? length - first : kRunKeys;
    bool full = count == kRunKeys && keys.row[first + count - 1] <= tile.first_token;
    if (problem.window > 0) {
      const Positions range = positions_of(keys.position + first, count);
      if (tile.positions.least - int64_t{range.last} >= problem.window) continue;
      full &= tile.positions.last - int64_t{range.least} < problem.window;
    }
    for (int64_t i = first; i < first + count; ++i) full &= keys.end[i] >= tile.stop_token;
    KeyRun<C> run{keys.across, keys.values, kRunKeys * kPanel, {}, kRunUnits, {}, {}, {}};
    run.columns = {keys.row + first, keys.end + first, keys.position + first};
    for (int64_t i = 0; i < kRunUnits; ++i) {
      const KeyColumns columns{run.columns.row + i * kUnitKeys, run.columns.end + i * kUnitKeys,
                               run.columns.position + i * kUnitKeys};
      pack_unit<T>(problem, columns, head, i, kRunUnits, workspace.staged, {keys.across, keys.values, keys.finite});
      run.rows[i] = rows;
      run.full[i] = full;
      run.finite[i] = keys.finite[i];
    }
    queries.attend(run);
  }
  queries.write();
}

// --- tasks ----------------------------------------------------------------------------------------

template <class T>
bool run_forward(const PrefixAttentionForward& problem) {
  using C = compute_t<T>;
  AllKeys<C> keys;
  Pieces shared_count(nullptr), tile_count(nullptr);
  if (!problem.along_paths) keys.carve(shared_count, problem);
  ForwardWorkspace<C>().carve(tile_count, problem);
  if (problem.along_paths) PathKeys<C>().carve(tile_count, problem);
  const Scratch scratch(shared_count.used() + max_threads() * tile_count.used());
  char* memory = scratch.get<char>();
  if (!memory) return false;
  Pieces shared(memory);
  if (!problem.along_paths) keys.carve(shared, problem);

  if (!problem.along_paths) {
    parallel_tasks(problem.key_heads * problem.units, [&](int64_t task, int thread) {
      const int64_t head = task / problem.units, unit = task % problem.units, first = unit * kUnitKeys;
      ForwardWorkspace<C> workspace;
      Pieces pieces(memory + shared_count.used() + thread * tile_count.used());
      workspace.carve(pieces, problem);
      const KeyColumns columns{problem.row + first, problem.subtree_end + first, problem.position + first};
      pack_unit<T>(problem, columns, head, unit, problem.units, workspace.staged, keys.of_head(problem, head));
    });
  }
  parallel_tasks(problem.key_heads * problem.query_tile_count, [&](int64_t task, int thread) {
    const int64_t head = task % problem.key_heads;
    const QueryTokens tokens = problem.query_tiles[task / problem.key_heads];
    const Tile tile(problem, tokens.first, tokens.stop);
    ForwardWorkspace<C> workspace;
    Pieces pieces(memory + shared_count.used() + thread * tile_count.used());
    workspace.carve(pieces, problem);
    if (problem.along_paths) {
      PathKeys<C> path;
      path.carve(pieces, problem);
      attend_path<T>(problem, path, workspace, tile, head);
    } else {
      attend_rows<T>(problem, keys.of_head(problem, head), workspace, tile, head);
    }
  });
  return true;
}

}  // namespace

bool prefix_attention_forward(DataType type, const PrefixAttentionForward& problem) {
  switch (type) {
    case DataType::f32: return run_forward<float>(problem);
    case DataType::bf16: return run_forward<bf16>(problem);
    case DataType::f16: return run_forward<f16>(problem);
    default: return false;
  }
}

}  // namespace pykern::PYKERN_SIMD
