// A tile of keys walks the query tiles that may see it. Include from *.simd.cpp files only.
#pragma once

#include <sched.h>

#include "attention/tiles.h"

namespace pykern::PYKERN_SIMD {

constexpr int64_t kTileKeys = kMaxKeyTileUnits * kUnitKeys;
// Of these, so many are processed at once.
constexpr int64_t kSegmentUnits = 2;
constexpr int64_t kSegmentKeys = kSegmentUnits * kUnitKeys;
constexpr int64_t kUnitPanels = kUnitKeys / kPanel;

// The products with the transposed queries read them in place where elements may be strided.
template <class C>
constexpr bool kNeedsTransposed = sizeof(C) == 2;

// The operands of some heads, packed once for all tasks. Query rows are those of the tiles, tile
// after tile.
template <class C>
struct BackwardOperands {
  C* keys_across;    // keys as [key_size, keys]
  C* values_across;  // values as [value_size, keys]
  C* keys_along;     // keys as [keys, key_size]
  C* queries;        // [rows, key_depth]
  C* grad_out;       // [rows, value_depth]
  C* queries_transposed;   // per tile [key_size, tile_rows]; only where kNeedsTransposed
  C* grad_out_transposed;  // per tile [value_size, tile_rows]
  float* lse;              // [rows]
  float* delta;            // [rows], the sum of grad_out * out, less the gradient of lse
  float* grad_q;           // [rows, key_columns]
  uint8_t* keys_finite;    // [units], keys and values
  uint8_t* queries_finite;  // [tiles], queries and grad_out
  int32_t* turn;           // [tiles], the key tile whose share comes next

  PYKERN_INLINE void carve(Pieces& pieces, const PrefixAttention& problem) {
    const Sizes<C> sizes(problem);
    const int64_t rows = problem.tiles * sizes.tile_rows;
    keys_across = pieces.take<C>(sizes.keys * sizes.key_depth);
    values_across = pieces.take<C>(sizes.keys * sizes.value_depth);
    keys_along = pieces.take<C>(sizes.keys * sizes.key_columns);
    queries = pieces.take<C>(rows * sizes.key_depth);
    grad_out = pieces.take<C>(rows * sizes.value_depth);
    queries_transposed = pieces.take<C>(kNeedsTransposed<C> ? rows * problem.key_size : 0);
    grad_out_transposed = pieces.take<C>(kNeedsTransposed<C> ? rows * problem.value_size : 0);
    lse = pieces.take<float>(rows);
    delta = pieces.take<float>(rows);
    grad_q = pieces.take<float>(rows * sizes.key_columns);
    keys_finite = pieces.take<uint8_t>(problem.units);
    queries_finite = pieces.take<uint8_t>(problem.tiles);
    turn = pieces.take<int32_t>(problem.tiles);
  }
};

// One thread's key tile.
template <class C>
struct BackwardWorkspace {
  C* staged;      // a unit of keys
  // Of a segment, [panels, tile_rows, kPanel]; then the weights. Gradients of weights; then of logits.
  float* logits;
  float* grad;
  // The operands of the products. For float they are the two above in place.
  C* weights;      // as B [tile_rows, segment keys]
  C* grad_logits;  // the same
  C* grad_rows;    // as A [tile_rows, kTileKeys]; for float [panels of the tile, tile_rows, kPanel]
  float* grad_k;   // [panels, key_size, kPanel], transposed
  float* grad_v;   // [panels, value_size, kPanel]
  PYKERN_INLINE void carve(Pieces& pieces, const PrefixAttention& problem) {
    const Sizes<C> sizes(problem);
    const int64_t depth = sizes.key_depth > sizes.value_depth ? sizes.key_depth : sizes.value_depth;
    staged = pieces.take<C>(kUnitKeys * depth);
    logits = pieces.take<float>(sizes.tile_rows * kSegmentKeys);
    grad_rows = pieces.take<C>(sizes.tile_rows * kTileKeys);
    if constexpr (sizeof(C) == sizeof(float)) {
      weights = logits;
      grad = grad_logits = nullptr;
    } else {
      grad = pieces.take<float>(sizes.tile_rows * kSegmentKeys);
      weights = pieces.take<C>(sizes.tile_rows * kSegmentKeys);
      grad_logits = pieces.take<C>(sizes.tile_rows * kSegmentKeys);
    }
    grad_k = pieces.take<float>(problem.key_size * kTileKeys);
    grad_v = pieces.take<float>(problem.value_size * kTileKeys);
  }
};

struct KeyTile {
  int64_t first_key, first_tile, stop_tile;  // the query tiles that may see it

  PYKERN_INLINE KeyTile(const PrefixAttention& problem, int64_t index) {
    const int64_t begin = index * problem.key_tile_units;
    int64_t stop = 0;
    for (int64_t unit = begin; unit < begin + problem.key_tile_units && unit < problem.units; ++unit) {
      if (problem.last_end(unit) > stop) stop = problem.last_end(unit);
    }
    if (stop > problem.tokens) stop = problem.tokens;
    first_key = begin * kUnitKeys;
    first_tile = first_key / problem.tile_tokens;
    stop_tile = stop > first_key ? ceil_div(stop, problem.tile_tokens) : first_tile;
  }
};

// The first key tile from `index` on that passes the query tile.
PYKERN_INLINE int32_t next_turn(const PrefixAttention& problem, int64_t index, int64_t tile) {
  const int64_t key_tiles = ceil_div(problem.units, problem.key_tile_units);
  for (; index < key_tiles; ++index) {
    const KeyTile keys(problem, index);
    if (keys.first_tile <= tile && tile < keys.stop_tile) break;
  }
  return static_cast<int32_t>(index);
}

PYKERN_INLINE void wait_for_turn(const int32_t* turn, int64_t index) {
  for (int64_t spin = 0; __atomic_load_n(turn, __ATOMIC_ACQUIRE) != index; ++spin) {
    if (spin < 1000) {
#if defined(__x86_64__)
      __builtin_ia32_pause();
#endif
    } else {
      sched_yield();
    }
  }
}

#if defined(__AVX512BF16__)
// One vector of an even row and the same of the odd row below, as a B operand holds them.
PYKERN_INLINE void store_pair(bf16* target, vhalf even, vhalf odd) {
  const vuint pairs = __builtin_convertvector(even, vuint) | __builtin_convertvector(odd, vuint) << 16;
  std::memcpy(target, &pairs, sizeof pairs);
}
#endif

template <class T>
class BackwardKeyTile {
 public:
  using C = compute_t<T>;

  PYKERN_INLINE BackwardKeyTile(const PrefixAttentionBackward& problem, const BackwardOperands<C>& operands,
                                const BackwardWorkspace<C>& workspace, int64_t index, int64_t head)
      : problem_(problem),
        data_(operands),
        work_(workspace),
        sizes_(problem),
        score_(problem),
        index_(index),
        head_(head),
        keys_(problem, index),
        first_unit_(index * problem.key_tile_units),
        units_(problem.units - first_unit_ < problem.key_tile_units ? problem.units - first_unit_
                                                                    : problem.key_tile_units) {}

  void run() {
    std::memset(work_.grad_k, 0, problem_.key_size * kTileKeys * sizeof(float));
    std::memset(work_.grad_v, 0, problem_.value_size * kTileKeys * sizeof(float));
    for (int64_t tile = keys_.first_tile; tile < keys_.stop_tile; ++tile) visit(tile);
    write(work_.grad_k, static_cast<float>(problem_.scale), static_cast<T*>(problem_.grad_k), problem_.key_size);
    write(work_.grad_v, 1.0f, static_cast<T*>(problem_.grad_v), problem_.value_size);
  }

 private:
  struct QueryTile : Tile {
    int64_t index;
  };

  // Neighbouring units of the key tile that the same rows see, so that their products are taken together.
  struct Segment {
    int64_t unit, count;  // within the key tile
    Range rows;
    bool masked;
    bool selected;  // the mask hides NaN or infinity: products must leave out what it hides
  };

  void visit(int64_t index) {
    const QueryTile tile{Tile::of_index(problem_, index), index};
    Segment segments[kMaxKeyTileUnits];
    int64_t count = 0;
    for (int64_t i = 0; i < units_; ++i) {
      const int64_t unit = first_unit_ + i;
      Segment own{i, 1, visible_rows(problem_, tile, unit), !fully_visible(problem_, tile, unit), false};
      own.selected = own.masked && !(data_.keys_finite[unit] && data_.queries_finite[tile.index]);
      if (own.rows.empty()) continue;
      Segment* last = count > 0 ? &segments[count - 1] : nullptr;
      if (last && last->count < kSegmentUnits && joins(*last, own)) {
        last->masked |= own.masked;
        ++last->count;
      } else {
        segments[count++] = own;
      }
    }
    for (int64_t i = 0; i < count; ++i) add_keys_and_values(tile, segments[i]);
    // Shares in grad_q take larger pieces: each reads and writes all of the tile.
    int64_t joined = 0;
    for (int64_t i = 0; i < count; ++i) {
      if (joined > 0 && joins(segments[joined - 1], segments[i])) {
        segments[joined - 1].count += segments[i].count;
      } else {
        segments[joined++] = segments[i];
      }
    }
    wait_for_turn(data_.turn + tile.index, index_);
    for (int64_t i = 0; i < joined; ++i) add_queries(tile, segments[i]);
    __atomic_store_n(data_.turn + tile.index, next_turn(problem_, index_ + 1, tile.index), __ATOMIC_RELEASE);
  }

  PYKERN_INLINE static bool joins(const Segment& last, const Segment& next) {
    return last.unit + last.count == next.unit && last.rows == next.rows && last.selected == next.selected;
  }

  // The buffers of a segment's gradients, [panels, tile_rows, kPanel]. For float the operands of all
  // of the key tile's products are one.
  PYKERN_INLINE float* grad_of(const Segment& segment) const {
    if constexpr (sizeof(C) == sizeof(float)) return work_.grad_rows + segment.unit * kUnitKeys * sizes_.tile_rows;
    return work_.grad;
  }
  PYKERN_INLINE C* grad_logits_of(const Segment& segment) const {
    if constexpr (sizeof(C) == sizeof(float)) return grad_of(segment);
    return work_.grad_logits;
  }

  void add_keys_and_values(const QueryTile& tile, const Segment& segment) {
    const Range rows = segment.rows;
    const int64_t m = rows.end - rows.begin, keys = segment.count * kUnitKeys;
    const int64_t key = keys_.first_key + segment.unit * kUnitKeys;
    const int64_t row = tile.index * sizes_.tile_rows + rows.begin;
    const int64_t panel_size = sizes_.tile_rows * kPanel, at = rows.begin * kPanel;
    matmul_panels(m, keys, problem_.key_size, data_.queries + row * sizes_.key_depth, sizes_.key_depth, 1,
                  data_.keys_across + key * sizes_.key_depth, sizes_.key_depth * kPanel, work_.logits + at, kPanel,
                  panel_size, false);
    matmul_panels(m, keys, problem_.value_size, data_.grad_out + row * sizes_.value_depth, sizes_.value_depth, 1,
                  data_.values_across + key * sizes_.value_depth, sizes_.value_depth * kPanel, grad_of(segment) + at,
                  kPanel, panel_size, false);
    if (score_.plain) {
      segment.masked ? differentiate<true, false>(tile, segment) : differentiate<false, false>(tile, segment);
    } else {
      segment.masked ? differentiate<true, true>(tile, segment) : differentiate<false, true>(tile, segment);
    }
    if (segment.selected) {
      add_visible_keys_and_values(tile, segment);
      return;
    }
    const C* queries = data_.queries + row * sizes_.key_depth;
    const C* grad_out = data_.grad_out + row * sizes_.value_depth;
    int64_t query_row = 1, query_column = sizes_.key_depth, grad_row = 1, grad_column = sizes_.value_depth;
    if constexpr (kNeedsTransposed<C>) {
      queries = data_.queries_transposed + tile.index * sizes_.tile_rows * problem_.key_size + rows.begin;
      grad_out = data_.grad_out_transposed + tile.index * sizes_.tile_rows * problem_.value_size + rows.begin;
      query_row = grad_row = sizes_.tile_rows;
      query_column = grad_column = 1;
    }
    const int64_t first = segment.unit * kUnitKeys;
    matmul_panels(problem_.value_size, keys, m, grad_out, grad_row, grad_column, work_.weights + at, panel_size,
                  work_.grad_v + first * problem_.value_size, kPanel, problem_.value_size * kPanel, true);
    matmul_panels(problem_.key_size, keys, m, queries, query_row, query_column, grad_logits_of(segment) + at,
                  panel_size, work_.grad_k + first * problem_.key_size, kPanel, problem_.key_size * kPanel, true);
  }

  // Products and gradients of weights become weights and gradients of products (the scale left out).
  template <bool Masked, bool General>
  void differentiate(const QueryTile& tile, const Segment& segment) {
    const int64_t first_row = tile.index * sizes_.tile_rows, group = problem_.group();
    const int64_t first_key = keys_.first_key + segment.unit * kUnitKeys;
    const float* grads = grad_of(segment);
    for (int64_t panel = 0; panel < segment.count * kUnitPanels; ++panel) {
      const int64_t key = first_key + panel * kPanel;
      const KeyColumns keys{problem_.row + key, problem_.subtree_end + key, problem_.position + key};
      for (int64_t row = segment.rows.begin; row < segment.rows.end; row += 2) {
        const int64_t at = (panel * sizes_.tile_rows + row) * kPanel;
        float lse[2], delta[2], slopes[2];
        QueryToken token[2];
        for (int i = 0; i < 2; ++i) {
          lse[i] = data_.lse[first_row + row + i];
          delta[i] = data_.delta[first_row + row + i];
          if (Masked || General) {
            const int64_t index = (row + i) / group;
            token[i] = QueryToken(problem_, tile.first_token + index, row + i < tile.rows);
            slopes[i] = General && score_.slopes ? score_.slopes[head_ * group + row + i - index * group] : 0.0f;
          }
        }
#pragma GCC unroll 4
        for (int v = 0; v < kPanelVectors; ++v) {
          vfloat weight[2], grad[2];
#pragma GCC unroll 2
          for (int i = 0; i < 2; ++i) {
            const int64_t here = at + i * kPanel + v * kLanes;
            const vfloat product = load(work_.logits + here);
            vfloat logit = score_.scale * product, slope = broadcast(1.0f);
            if (General && score_.capped) {
              const vfloat bent = tanh(score_.inner * product);
              logit = score_.softcap * bent;
              slope -= bent * bent;
            }
            if (General && score_.slopes) logit -= slopes[i] * token[i].distance(keys, v * kLanes);
            weight[i] = exp2<C>((logit - lse[i]) * static_cast<float>(kLog2E));
            grad[i] = weight[i] * (load(grads + here) - delta[i]);
            if (General) grad[i] *= slope;
            if (Masked) {
              const vint sees = token[i].sees(keys, v * kLanes, score_.windowed);
              weight[i] = select(sees, weight[i], zero());
              grad[i] = select(sees, grad[i], zero());
            }
          }
          store_operands(segment, panel, row, v, weight, grad);
        }
      }
    }
  }

  PYKERN_INLINE void store_operands(const Segment& segment, int64_t panel, int64_t row, int v,
                                    const vfloat (&weight)[2], const vfloat (&grad)[2]) {
    const int64_t at = (panel * sizes_.tile_rows + row) * kPanel;
#if defined(__AVX512BF16__)
    if constexpr (sizeof(C) == 2) {
      const vhalf even = narrow_lanes(grad[0]), odd = narrow_lanes(grad[1]);
      store_pair(work_.weights + at + v * 2 * kLanes, narrow_lanes(weight[0]), narrow_lanes(weight[1]));
      store_pair(work_.grad_logits + at + v * 2 * kLanes, even, odd);
      bf16* rows = work_.grad_rows + row * kTileKeys + segment.unit * kUnitKeys + panel * kPanel + v * kLanes;
      std::memcpy(rows, &even, sizeof even);
      std::memcpy(rows + kTileKeys, &odd, sizeof odd);
      return;
    }
#endif
    float* grads = grad_of(segment);
    for (int i = 0; i < 2; ++i) {
      store(work_.logits + at + i * kPanel + v * kLanes, weight[i]);
      store(grads + at + i * kPanel + v * kLanes, grad[i]);
    }
  }

  // The share of this key tile in the gradient of a query tile.
  void add_queries(const QueryTile& tile, const Segment& segment) {
    if (segment.selected) return add_visible_queries(tile, segment);
    const Range rows = segment.rows;
    float* grad_q = data_.grad_q + (tile.index * sizes_.tile_rows + rows.begin) * sizes_.key_columns;
    const int64_t keys = segment.count * kUnitKeys, key = segment.unit * kUnitKeys;
    const C* along = data_.keys_along + (keys_.first_key + key) * kPanel;
    if constexpr (sizeof(C) == sizeof(float)) {
      for (int64_t panel = 0; panel < keys / kPanel; ++panel) {
        const int64_t at = ((key / kPanel + panel) * sizes_.tile_rows + rows.begin) * kPanel;
        matmul_panels(rows.end - rows.begin, problem_.key_size, kPanel, work_.grad_rows + at, kPanel, 1,
                      along + panel * kPanel * kPanel, sizes_.keys * kPanel, grad_q, sizes_.key_columns, kPanel, true);
      }
    } else {
      matmul_panels(rows.end - rows.begin, problem_.key_size, keys, work_.grad_rows + rows.begin * kTileKeys + key,
                    kTileKeys, 1, along, sizes_.keys * kPanel, grad_q, sizes_.key_columns, kPanel, true);
    }
  }

  // --- the same products over visible pairs alone ---------------------------------------------------

  template <class Body>
  PYKERN_INLINE void for_visible(const QueryTile& tile, const Segment& segment, const Body& body) {
    for (int64_t column = segment.unit * kUnitKeys; column < (segment.unit + segment.count) * kUnitKeys; ++column) {
      const int64_t key = keys_.first_key + column;
      for (int64_t row = segment.rows.begin; row < segment.rows.end && row < tile.rows; ++row) {
        if (problem_.visible(tile.first_token + row / problem_.group(), key)) body(row, column);
      }
    }
  }

  // A weight, from its B operand; `column` counts within the segment.
  PYKERN_INLINE float weight_at(int64_t row, int64_t column) const {
    constexpr int64_t depth = kDepth<C>;
    const int64_t in_panel = row / depth * depth * kPanel + column % kPanel * depth + row % depth;
    return widen(work_.weights[column / kPanel * sizes_.tile_rows * kPanel + in_panel]);
  }

  // The gradient of a logit, from the operand of the queries' product; `column` counts within the key tile.
  PYKERN_INLINE float grad_at(int64_t row, int64_t column) const {
    if constexpr (sizeof(C) == sizeof(float)) {
      return work_.grad_rows[(column / kPanel * sizes_.tile_rows + row) * kPanel + column % kPanel];
    } else {
      return widen(work_.grad_rows[row * kTileKeys + column]);
    }
  }

  void add_visible_keys_and_values(const QueryTile& tile, const Segment& segment) {
    for_visible(tile, segment, [&](int64_t row, int64_t column) {
      const int64_t token = tile.first_token + row / problem_.group();
      const int64_t head = head_ * problem_.group() + row % problem_.group();
      const int64_t panel = column / kPanel, lane = column % kPanel;
      add_scaled(work_.grad_v + panel * problem_.value_size * kPanel + lane, kPanel,
                 weight_at(row, column - segment.unit * kUnitKeys), row_of<T>(problem_.grad_out, token, head),
                 problem_.value_size);
      add_scaled(work_.grad_k + panel * problem_.key_size * kPanel + lane, kPanel, grad_at(row, column),
                 row_of<T>(problem_.q, token, head), problem_.key_size);
    });
  }

  void add_visible_queries(const QueryTile& tile, const Segment& segment) {
    for_visible(tile, segment, [&](int64_t row, int64_t column) {
      add_scaled(data_.grad_q + (tile.index * sizes_.tile_rows + row) * sizes_.key_columns, 1, grad_at(row, column),
                 row_of<T>(problem_.k, keys_.first_key + column, head_), problem_.key_size);
    });
  }

  // From [panels, size, kPanel] to rows of [tokens, key_heads, size].
  void write(const float* sums, float factor, T* target, int64_t size) {
    for (int64_t column = 0; column < units_ * kUnitKeys && keys_.first_key + column < problem_.tokens; ++column) {
      T* to = target + ((keys_.first_key + column) * problem_.key_heads + head_) * size;
      const float* from = sums + column / kPanel * size * kPanel + column % kPanel;
      for (int64_t i = 0; i < size; ++i) narrow(from[i * kPanel] * factor, to + i);
    }
  }

  const PrefixAttentionBackward& problem_;
  const BackwardOperands<C>& data_;
  const BackwardWorkspace<C>& work_;
  const Sizes<C> sizes_;
  const Score score_;
  const int64_t index_, head_;
  const KeyTile keys_;
  const int64_t first_unit_, units_;
};

}  // namespace pykern::PYKERN_SIMD
