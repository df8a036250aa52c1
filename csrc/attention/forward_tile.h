// A tile of queries takes its keys block by block, with an online softmax. Include from *.simd.cpp files only.
#pragma once

#include "attention/tiles.h"

namespace pykern::PYKERN_SIMD {

// Keys whose logits are held at once.
constexpr int64_t kRunUnits = 2;
constexpr int64_t kRunKeys = kRunUnits * kUnitKeys;
constexpr int64_t kRunVectors = kRunKeys / kLanes;

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

// Up to kRunUnits units of packed keys and their values.
template <class C>
struct KeyRun {
  const C* across;       // keys as [key_size, keys]
  const C* values;       // values as [keys, value_size], zeros for those that hold NaN or infinity
  int64_t values_panel;  // from one panel of values to the next
  KeyColumns columns;
  int64_t units;
  Range rows[kRunUnits];  // of the tile that may see the unit
  bool full[kRunUnits];   // all of those see all of it
  bool finite[kRunUnits];
};

// One thread's tile.
template <class C>
struct ForwardWorkspace {
  C* staged;           // a unit of keys
  C* queries;          // [tile_rows, key_depth]
  float* logits;       // [tile_rows, kRunKeys]
  C* weights;          // the same in the type of the products; shares the logits' memory if that is float
  float* sums;         // [tile_rows, value_columns]
  float* largest;      // [tile_rows], the largest logit so far, as the softmax finds it
  float* shift;        // [tile_rows], what the run subtracts from its logits
  float* factor;       // [tile_rows], by which earlier sums shrink
  float* denominator;  // [tile_rows, kLanes], one partial sum per lane
  PYKERN_INLINE void carve(Pieces& pieces, const PrefixAttention& problem) {
    const Sizes<C> sizes(problem);
    staged = pieces.take<C>(kUnitKeys * (sizes.key_depth > sizes.value_depth ? sizes.key_depth : sizes.value_depth));
    queries = pieces.take<C>(sizes.tile_rows * sizes.key_depth);
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

// What a row gets does not depend on the other rows of its tile, nor on runs that it does not see: a
// masked weight is 0 and changes no sum.
template <class T>
class ForwardTile {
 public:
  using C = compute_t<T>;

  PYKERN_INLINE ForwardTile(const PrefixAttentionForward& problem, const ForwardWorkspace<C>& workspace,
                            const Tile& tile, int64_t head)
      : problem_(problem),
        work_(workspace),
        sizes_(problem),
        score_(problem),
        scale_(score_.plain ? score_.scale : 1.0f),
        factor_(static_cast<float>(kLog2E * scale_)),
        tile_(tile),
        head_(head),
        group_(problem.group()) {
    load_queries();
  }

  // One run of units: logits, softmax, weighted values.
  void attend(const KeyRun<C>& run) {
    bool all_full = true, same_rows = true;
    Range rows = run.rows[0];
    for (int64_t i = 0; i < run.units; ++i) {
      const Range& own = run.rows[i];
      all_full &= run.full[i];
      same_rows &= own == run.rows[0];
      rows.begin = own.begin < rows.begin ? own.begin : rows.begin;
      rows.end = own.end > rows.end ? own.end : rows.end;
      matmul_panels(own.end - own.begin, kUnitKeys, problem_.key_size, work_.queries + own.begin * sizes_.key_depth,
                    sizes_.key_depth, 1, run.across + i * kUnitKeys * sizes_.key_depth, sizes_.key_depth * kPanel,
                    work_.logits + own.begin * kRunKeys + i * kUnitKeys, kRunKeys, kPanel, false);
    }
    if (score_.plain) {
      all_full ? find_largest<false, false>(run, rows) : find_largest<true, false>(run, rows);
    } else {
      all_full ? find_largest<false, true>(run, rows) : find_largest<true, true>(run, rows);
    }
    for (int64_t row = rows.begin; row < rows.end; row += kLanes) update_largest(run, row, rows.end);
    weigh(rows, run.units * kUnitKeys);
    shrink_sums(rows);
    if (same_rows) {
      add_values(run, rows, 0, run.units);
    } else {
      for (int64_t i = 0; i < run.units; ++i) add_values(run, run.rows[i], i, 1);
    }
    for (int64_t i = 0; i < run.units; ++i) {
      if (!run.finite[i]) add_dropped_values(run, run.rows[i], i);
    }
  }

  void write() {
    const int64_t size = problem_.value_size;
    for (int64_t row = 0; row < tile_.rows; ++row) {
      const int64_t token = tile_.first_token + row / group_, head = head_ * group_ + row % group_;
      const int64_t at = token * problem_.query_heads + head;
      const float* sums = work_.sums + row * sizes_.value_columns;
      const Statistic statistic = finish(row, token, head);
      T* out = static_cast<T*>(problem_.out) + at * size;
      int64_t column = 0;
      for (; column + kLanes <= size; column += kLanes) store(out + column, load(sums + column) * statistic.factor);
      for (; column < size; ++column) narrow(sums[column] * statistic.factor, out + column);
      problem_.lse[at] = statistic.lse;
      if (problem_.largest) problem_.largest[at] = statistic.largest;
    }
  }

 private:
  struct Statistic {
    float factor, lse, largest;  // of the sums; of the row
  };

  void load_queries() {
    for (int64_t row = 0; row < sizes_.tile_rows; ++row) {
      C* target = work_.queries + row * sizes_.key_depth;
      if (row < tile_.rows) {
        copy_row(target, sizes_.key_depth,
                 row_of<T>(problem_.q, tile_.first_token + row / group_, head_ * group_ + row % group_),
                 problem_.key_size);
      } else {
        zero_row(target, sizes_.key_depth);
      }
      work_.largest[row] = -kInfinity;
    }
    std::memset(work_.sums, 0, sizes_.tile_rows * sizes_.value_columns * sizeof(float));
    std::memset(work_.denominator, 0, sizes_.tile_rows * kLanes * sizeof(float));
  }

  PYKERN_INLINE QueryToken query_token(int64_t index) const {
    const int64_t token = tile_.first_token + index;
    return QueryToken(problem_, token, token < tile_.stop_token);
  }

  // The largest logit of each row in this run, into work_.shift. Where a mask or more than a factor
  // lies between products and logits, these take the products' place; masked ones become -inf.
  template <bool Masked, bool General>
  void find_largest(const KeyRun<C>& run, Range rows) {
    const int64_t width = run.units * kUnitKeys;
    if constexpr (!Masked && !General) {
      for (int64_t row = rows.begin; row < rows.end; ++row) {
        const float* products = work_.logits + row * kRunKeys;
        vfloat best = load(products);
        for (int64_t column = kLanes; column < width; column += kLanes) best = maximum(best, load(products + column));
        work_.shift[row] = largest_lane(best);
      }
      return;
    }
    vint sees[kRunVectors];
    vfloat distance[kRunVectors];
    for (int64_t index = rows.begin / group_; index * group_ < rows.end; ++index) {
      const QueryToken token = query_token(index);
      for (int64_t column = 0; column < width; column += kLanes) {
        if (Masked) sees[column / kLanes] = token.sees(run.columns, column, score_.windowed);
        if (General) distance[column / kLanes] = score_.slopes ? token.distance(run.columns, column) : zero();
      }
      for (int64_t member = 0; member < group_; ++member) {
        const int64_t row = index * group_ + member;
        if (row < rows.begin || row >= rows.end) continue;
        const float slope = score_.slopes ? score_.slopes[head_ * group_ + member] : 0.0f;
        float* logits = work_.logits + row * kRunKeys;
        vfloat best = broadcast(-kInfinity);
        for (int64_t column = 0; column < width; column += kLanes) {
          vfloat logit = load(logits + column);
          if (General) {
            logit = score_.capped ? score_.softcap * tanh(score_.inner * logit) : score_.scale * logit;
            if (score_.slopes) logit -= slope * distance[column / kLanes];
          }
          if (Masked) logit = select(sees[column / kLanes], logit, broadcast(-kInfinity));
          store(logits + column, logit);
          best = maximum(best, logit);
        }
        work_.shift[row] = largest_lane(best);
      }
    }
  }

  // For up to kLanes rows: the new largest logit, what to subtract, and the factor of earlier sums.
  PYKERN_INLINE void update_largest(const KeyRun<C>& run, int64_t row, int64_t stop) {
    const int64_t rows = stop - row < kLanes ? stop - row : kLanes;
    const vfloat before = load_up_to(work_.largest + row, rows);
    const vfloat largest = maximum(load_up_to(work_.shift + row, rows), before);
    const vfloat shift = largest * factor_;
    const vfloat factor = exp2<float>(before * factor_ - shift);
    store_up_to(work_.factor + row, select(largest == before, broadcast(1.0f), factor), rows);
    store_up_to(work_.largest + row, largest, rows);
    store_up_to(work_.shift + row, shift, rows);
    if (!any(largest == broadcast(-kInfinity))) return;
    // A row that has seen nothing yet must not subtract infinities; one that sees only logits of -inf
    // must, and becomes NaN as a softmax does, unless there is a sink to take all the weight.
    for (int64_t i = row; i < row + rows; ++i) {
      if (work_.shift[i] == -kInfinity && (problem_.sinks || !sees_any(run, i))) work_.shift[i] = 0.0f;
    }
  }

  PYKERN_INLINE static vfloat load_up_to(const float* source, int64_t count) {
    return count == kLanes ? load(source) : load_partial(source, count);
  }
  PYKERN_INLINE static void store_up_to(float* target, vfloat value, int64_t count) {
    count == kLanes ? store(target, value) : store_partial(target, value, count);
  }

  PYKERN_INLINE bool visible(const KeyRun<C>& run, int64_t row, int64_t column) const {
    const int64_t token = tile_.first_token + row / group_, key = run.columns.row[column];
    // Columns that hold no key end before they begin.
    return token < tile_.stop_token && token < run.columns.end[column] && problem_.visible(token, key);
  }

  bool sees_any(const KeyRun<C>& run, int64_t row) const {
    for (int64_t column = 0; column < run.units * kUnitKeys; ++column) {
      if (visible(run, row, column)) return true;
    }
    return false;
  }

  // Logits become weights.
  void weigh(Range rows, int64_t width) {
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      const float* logits = work_.logits + row * kRunKeys;
      C* weights = work_.weights + row * kRunKeys;
      const vfloat shift = broadcast(work_.shift[row]);
      vfloat denominator = load(work_.denominator + row * kLanes) * work_.factor[row];
      for (int64_t column = 0; column < width; column += kLanes) {
        const vfloat weight = exp2<C>(load(logits + column) * factor_ - shift);
        denominator += weight;
        store_narrow(weights + column, weight);
      }
      store(work_.denominator + row * kLanes, denominator);
    }
  }

  // What was summed before shrinks where a row's largest logit grew.
  void shrink_sums(Range rows) {
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      const float factor = work_.factor[row];
      if (factor == 1.0f) continue;
      float* sums = work_.sums + row * sizes_.value_columns;
      for (int64_t column = 0; column < sizes_.value_columns; column += kLanes) {
        store(sums + column, load(sums + column) * factor);
      }
    }
  }

  PYKERN_INLINE void add_values(const KeyRun<C>& run, Range rows, int64_t unit, int64_t units) {
    matmul_panels(rows.end - rows.begin, problem_.value_size, units * kUnitKeys,
                  work_.weights + rows.begin * kRunKeys + unit * kUnitKeys, kRunKeys, 1,
                  run.values + unit * kUnitKeys * kPanel, run.values_panel,
                  work_.sums + rows.begin * sizes_.value_columns, sizes_.value_columns, kPanel, true);
  }

  // The values that hold NaN or infinity: for the rows alone that see them.
  void add_dropped_values(const KeyRun<C>& run, Range rows, int64_t unit) {
    for (int64_t column = unit * kUnitKeys; column < (unit + 1) * kUnitKeys; ++column) {
      if (run.columns.end[column] <= run.columns.row[column]) continue;
      const T* value = row_of<T>(problem_.v, run.columns.row[column], head_);
      if (row_is_finite(value, problem_.value_size)) continue;
      for (int64_t row = rows.begin; row < rows.end; ++row) {
        if (!visible(run, row, column)) continue;
        add_scaled(work_.sums + row * sizes_.value_columns, 1, widen(work_.weights[row * kRunKeys + column]), value,
                   problem_.value_size);
      }
    }
  }

  Statistic finish(int64_t row, int64_t token, int64_t head) const {
    float largest = work_.largest[row], shift = largest * factor_;
    float sum = sum_lanes(load(work_.denominator + row * kLanes));
    // A NaN among logits shows in the sum; so do infinite ones.
    const float logit = sum != sum && largest != kInfinity ? sum : scale_ * largest;
    float factor = 1.0f;
    if (problem_.sinks) {
      if (largest == -kInfinity && !sees_any(token)) return {0.0f, -kInfinity, -kInfinity};
      const float sink = static_cast<float>(static_cast<const float*>(problem_.sinks)[head] * kLog2E);
      const float before = shift;
      shift = before < sink ? sink : before;
      factor = before == shift ? 1.0f : __builtin_exp2f(before - shift);
      sum = sum * factor + __builtin_exp2f(sink - shift);
    } else if (sum == 0.0f) {
      return {0.0f, -kInfinity, -kInfinity};
    }
    return {factor / sum, static_cast<float>(natural(shift, largest) + __builtin_logf(sum)), logit};
  }

  // A shift as a natural logit. The rounding of its factor is taken out again: where the largest logit
  // is far from zero, it would show.
  PYKERN_INLINE double natural(float shift, float largest) const {
    if (largest - largest != 0.0f) return shift / kLog2E;
    return static_cast<double>(largest) * scale_ + (shift - static_cast<double>(largest) * factor_) / kLog2E;
  }

  bool sees_any(int64_t token) const {
    for (int64_t unit = 0; unit * kUnitKeys <= token; ++unit) {
      if (problem_.last_end(unit) <= token) continue;
      for (int64_t key = unit * kUnitKeys; key < (unit + 1) * kUnitKeys && key <= token; ++key) {
        if (problem_.visible(token, key)) return true;
      }
    }
    return false;
  }

  const PrefixAttentionForward& problem_;
  const ForwardWorkspace<C>& work_;
  const Sizes<C> sizes_;
  const Score score_;
  // From what work_.logits holds, products or logits, to a logit, and to one in base two: a weight is
  // 2^(factor * logit - shift).
  const float scale_, factor_;
  const Tile tile_;
  const int64_t head_, group_;
};

}  // namespace pykern::PYKERN_SIMD
