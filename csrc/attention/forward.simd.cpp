// The forward of prefix attention: per tile of queries one pass over the keys that it sees, with an
// online softmax.
#include "attention/prefix_attention.h"
#include "attention/tiles.h"
#include "common/parallel.h"

namespace pykern::PYKERN_SIMD {
namespace {

// Keys whose logits are held at once.
constexpr int64_t kRunUnits = 2;
constexpr int64_t kRunKeys = kRunUnits * kUnitKeys;

PYKERN_INLINE float largest_lane(vfloat value) {
#if defined(__GNUC__) && !defined(__clang__)
  // Stays in registers; the loop unrolls into constant shuffles.
#pragma GCC unroll 4
  for (int width = kLanes / 2; width > 0; width /= 2) {
    value = maximum(value, __builtin_shuffle(value, lane_numbers() ^ width));
  }
  return value[0];
#else
  return max_lanes(value);
#endif
}

// All keys and values of all heads, packed.
template <class C>
struct PackedKeys {
  C* across;             // keys as [key_size, keys], per head
  C* values;             // values as [keys, value_size], per head
  uint8_t* finite;       // per head and unit: the values are
  PYKERN_INLINE void carve(Pieces& pieces, const PrefixAttention& problem) {
    const Sizes<C> sizes(problem);
    across = pieces.take<C>(problem.key_heads * sizes.keys * sizes.key_depth);
    values = pieces.take<C>(problem.key_heads * sizes.keys * sizes.value_columns);
    finite = pieces.take<uint8_t>(problem.key_heads * problem.units);
  }
};

// One thread's tile.
template <class C>
struct Workspace {
  C* staged;           // a unit of keys, or the tile's queries
  float* logits;       // [tile_rows, kRunKeys]
  C* weights;          // the same in the type of the products; shares the logits' memory if that is float
  float* sums;         // [tile_rows, value_columns]
  float* largest;      // [tile_rows], the largest logit so far
  float* shift;        // [tile_rows], what the run subtracts from its logits
  float* factor;       // [tile_rows], by which earlier sums shrink
  float* denominator;  // [tile_rows, kLanes], one partial sum per lane
  PYKERN_INLINE void carve(Pieces& pieces, const PrefixAttention& problem) {
    const Sizes<C> sizes(problem);
    const int64_t depth = sizes.key_depth > sizes.value_depth ? sizes.key_depth : sizes.value_depth;
    staged = pieces.take<C>((sizes.tile_rows > kUnitKeys ? sizes.tile_rows : kUnitKeys) * depth);
    logits = pieces.take<float>(sizes.tile_rows * kRunKeys);
    if constexpr (sizeof(C) == sizeof(float)) {
      weights = logits;
    } else {
      weights = pieces.take<C>(sizes.tile_rows * kRunKeys);
    }
    sums = pieces.take<float>(sizes.tile_rows * sizes.value_columns);
    largest = pieces.take<float>(sizes.tile_rows);
    shift = pieces.take<float>(sizes.tile_rows);
    factor = pieces.take<float>(sizes.tile_rows);
    denominator = pieces.take<float>(sizes.tile_rows * kLanes);
  }
};

template <class T>
class ForwardTile {
 public:
  using C = compute_t<T>;

  PYKERN_INLINE ForwardTile(const PrefixAttentionForward& problem, const PackedKeys<C>& keys,
                            const Workspace<C>& workspace, const Tile& tile, int64_t head)
      : problem_(problem), keys_(keys), work_(workspace), sizes_(problem), tile_(tile), head_(head) {}

  void run() {
    load_queries();
    const int64_t stop = ceil_div(tile_.stop_token, kUnitKeys);
    for (int64_t unit = 0; unit < stop;) {
      count_ = 0;
      for (; unit + count_ < stop && count_ < kRunUnits; ++count_) {
        rows_[count_] = visible_rows(problem_, tile_, unit + count_);
        if (rows_[count_].empty()) break;
        full_[count_] = fully_visible(problem_, tile_, unit + count_);
      }
      if (count_ == 0) {
        ++unit;
        continue;
      }
      first_unit_ = unit;
      attend();
      unit += count_;
    }
    write();
  }

 private:
  PYKERN_INLINE int64_t token_of(int64_t row) const {
    return row < tile_.rows ? tile_.first_token + row / problem_.group() : -1;
  }

  void load_queries() {
    const int64_t group = problem_.group();
    for (int64_t row = 0; row < sizes_.tile_rows; ++row) {
      C* target = work_.staged + row * sizes_.key_depth;
      if (row < tile_.rows) {
        copy_row(target, sizes_.key_depth, row_of<T>(problem_.q, token_of(row), head_ * group + row % group),
                 problem_.key_size);
      } else {
        zero_row(target, sizes_.key_depth);
      }
      work_.largest[row] = -kInfinity;
    }
    std::memset(work_.sums, 0, sizes_.tile_rows * sizes_.value_columns * sizeof(float));
    std::memset(work_.denominator, 0, sizes_.tile_rows * kLanes * sizeof(float));
  }

  // One run of units: logits, softmax, weighted values.
  void attend() {
    const C* across = keys_.across + (head_ * sizes_.keys + first_unit_ * kUnitKeys) * sizes_.key_depth;
    bool all_full = true, same_rows = true;
    Range rows = rows_[0];
    for (int64_t i = 0; i < count_; ++i) {
      const Range& own = rows_[i];
      all_full &= full_[i];
      same_rows &= own == rows_[0];
      rows.begin = own.begin < rows.begin ? own.begin : rows.begin;
      rows.end = own.end > rows.end ? own.end : rows.end;
      matmul_panels(own.end - own.begin, kUnitKeys, problem_.key_size, work_.staged + own.begin * sizes_.key_depth,
                    sizes_.key_depth, 1, across + i * kUnitKeys * sizes_.key_depth, sizes_.key_depth * kPanel,
                    work_.logits + own.begin * kRunKeys + i * kUnitKeys, kRunKeys, kPanel, false);
    }
    if (all_full) {
      softmax<false>(rows);
    } else {
      softmax<true>(rows);
    }
    bool finite = true;
    for (int64_t i = 0; i < count_; ++i) finite &= full_[i] || value_is_finite(i);
    if (same_rows && finite) {
      add_values(rows, 0, count_ * kUnitKeys);
      return;
    }
    for (int64_t i = 0; i < count_; ++i) {
      if (full_[i] || value_is_finite(i)) {
        add_values(rows_[i], i * kUnitKeys, kUnitKeys);
      } else {
        add_visible_values(rows_[i], i);
      }
    }
  }

  PYKERN_INLINE bool value_is_finite(int64_t i) const { return keys_.finite[head_ * problem_.units + first_unit_ + i]; }

  // Logits become weights; what was summed before shrinks where a row's largest logit grew. One loop
  // per step, so that rows overlap in the processor.
  template <bool Masked>
  void softmax(Range rows) {
    const float scale = static_cast<float>(problem_.scale);
    find_largest<Masked>(rows);
    for (int64_t row = rows.begin; row < rows.end; row += kLanes) update_largest(row, rows.end);
    const int64_t width = count_ * kUnitKeys;
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      float* logits = work_.logits + row * kRunKeys;
      C* weights = work_.weights + row * kRunKeys;
      const float shift = work_.shift[row];
      vfloat denominator = load(work_.denominator + row * kLanes) * work_.factor[row];
      for (int64_t column = 0; column < width; column += kLanes) {
        const vfloat logit = load(logits + column);
        const vfloat weight = exp(Masked ? logit - shift : logit * scale - shift);
        denominator += weight;
        store_narrow(weights + column, weight);
      }
      store(work_.denominator + row * kLanes, denominator);
    }
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      const float factor = work_.factor[row];
      if (factor == 1.0f) continue;
      float* sums = work_.sums + row * sizes_.value_columns;
      for (int64_t column = 0; column < sizes_.value_columns; column += kLanes) {
        store(sums + column, load(sums + column) * factor);
      }
    }
  }

  // The largest logit of each row in this run, into work_.shift; masked logits become -inf.
  template <bool Masked>
  void find_largest(Range rows) {
    const int64_t width = count_ * kUnitKeys, first_key = first_unit_ * kUnitKeys;
    const float scale = static_cast<float>(problem_.scale);
    const vint lanes = lane_numbers();
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      float* logits = work_.logits + row * kRunKeys;
      const int32_t token = static_cast<int32_t>(token_of(row));
      vfloat best = broadcast(-kInfinity);
      for (int64_t column = 0; column < width; column += kLanes) {
        vfloat logit = load(logits + column) * scale;
        if (Masked) {
          const vint keys = lanes + static_cast<int32_t>(first_key + column);
          const vint sees = (keys <= token) & (token < load_ends(problem_.subtree_end + first_key + column));
          logit = select(sees, logit, broadcast(-kInfinity));
          store(logits + column, logit);
        }
        best = maximum(best, logit);
      }
      work_.shift[row] = largest_lane(best);
    }
  }

  // For up to kLanes rows: the new largest logit, what to subtract, and the factor of earlier sums.
  PYKERN_INLINE void update_largest(int64_t row, int64_t stop) {
    const int64_t rows = stop - row < kLanes ? stop - row : kLanes;
    const vfloat before = load_partial(work_.largest + row, rows);
    const vfloat largest = maximum(load_partial(work_.shift + row, rows), before);
    store_partial(work_.factor + row, select(largest == before, broadcast(1.0f), exp(before - largest)), rows);
    store_partial(work_.largest + row, largest, rows);
    store_partial(work_.shift + row, largest, rows);
    if (!any(largest == broadcast(-kInfinity))) return;
    // A row that has seen nothing yet must not subtract infinities; one that sees only logits of
    // -inf must, and becomes NaN as a softmax does.
    for (int64_t i = row; i < row + rows; ++i) {
      if (work_.shift[i] == -kInfinity && !sees_any(token_of(i))) work_.shift[i] = 0.0f;
    }
  }

  bool sees_any(int64_t token) const {
    if (token < 0) return false;
    for (int64_t key = first_unit_ * kUnitKeys; key < (first_unit_ + count_) * kUnitKeys; ++key) {
      if (visible(problem_, token, key)) return true;
    }
    return false;
  }

  PYKERN_INLINE void add_values(Range rows, int64_t key, int64_t keys) {
    const C* values = keys_.values + head_ * sizes_.keys * sizes_.value_columns +
                      (first_unit_ * kUnitKeys + key) * kPanel;
    matmul_panels(rows.end - rows.begin, problem_.value_size, keys, work_.weights + rows.begin * kRunKeys + key,
                  kRunKeys, 1, values, sizes_.keys * kPanel, work_.sums + rows.begin * sizes_.value_columns,
                  sizes_.value_columns, kPanel, true);
  }

  void add_visible_values(Range rows, int64_t i) {
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      const int64_t token = token_of(row);
      for (int64_t column = 0; column < kUnitKeys; ++column) {
        const int64_t key = (first_unit_ + i) * kUnitKeys + column;
        if (!visible(problem_, token, key)) continue;
        add_scaled(work_.sums + row * sizes_.value_columns, 1,
                   widen(work_.weights[row * kRunKeys + i * kUnitKeys + column]), row_of<T>(problem_.v, key, head_),
                   problem_.value_size);
      }
    }
  }

  void write() {
    const int64_t group = problem_.group(), size = problem_.value_size;
    for (int64_t row = 0; row < tile_.rows; ++row) {
      const int64_t at = token_of(row) * problem_.query_heads + head_ * group + row % group;
      const float* sums = work_.sums + row * sizes_.value_columns;
      const float denominator = sum_lanes(load(work_.denominator + row * kLanes));
      const float factor = denominator == 0.0f ? 0.0f : 1.0f / denominator;
      T* out = static_cast<T*>(problem_.out) + at * size;
      int64_t column = 0;
      for (; column + kLanes <= size; column += kLanes) store(out + column, load(sums + column) * factor);
      for (; column < size; ++column) narrow(sums[column] * factor, out + column);
      problem_.lse[at] = denominator == 0.0f ? -kInfinity : work_.largest[row] + __builtin_logf(denominator);
    }
  }

  const PrefixAttentionForward& problem_;
  const PackedKeys<C>& keys_;
  const Workspace<C>& work_;
  const Sizes<C> sizes_;
  const Tile tile_;
  const int64_t head_;
  int64_t first_unit_ = 0, count_ = 0;
  Range rows_[kRunUnits];
  bool full_[kRunUnits];
};

template <class T>
bool run_forward(const PrefixAttentionForward& problem) {
  using C = compute_t<T>;
  const Sizes<C> sizes(problem);
  PackedKeys<C> keys;
  Workspace<C> workspace;
  Pieces shared_count(nullptr), thread_count(nullptr);
  keys.carve(shared_count, problem);
  workspace.carve(thread_count, problem);
  const Scratch scratch(shared_count.used() + max_threads() * thread_count.used());
  char* memory = scratch.get<char>();
  if (!memory) return false;
  Pieces shared(memory);
  keys.carve(shared, problem);
  const auto thread_memory = [&](int thread) {
    Workspace<C> own;
    Pieces pieces(memory + shared_count.used() + thread * thread_count.used());
    own.carve(pieces, problem);
    return own;
  };

  parallel_tasks(problem.key_heads * problem.units, [&](int64_t task, int thread) {
    const int64_t head = task / problem.units, unit = task % problem.units;
    const Workspace<C> own = thread_memory(thread);
    stage_unit<C, T>(problem, problem.k, head, unit, problem.key_size, sizes.key_depth, own.staged);
    pack_across(keys.across + head * sizes.keys * sizes.key_depth, own.staged, unit, problem.key_size, sizes.key_depth);
    keys.finite[task] =
        stage_unit<C, T>(problem, problem.v, head, unit, problem.value_size, sizes.value_depth, own.staged);
    pack_along(keys.values + head * sizes.keys * sizes.value_columns, own.staged, unit, sizes.keys, problem.value_size,
               sizes.value_depth);
  });
  parallel_tasks(problem.key_heads * problem.tiles, [&](int64_t task, int thread) {
    const Tile tile(problem, problem.tile_order[task / problem.key_heads]);
    const Workspace<C> own = thread_memory(thread);
    ForwardTile<T>(problem, keys, own, tile, task % problem.key_heads).run();
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
