// What the forward and the backward kernels share: tiles of stacked queries, packed keys, masks.
// Include from *.simd.cpp files only.
//
// A tile holds the queries of `tile_tokens` neighbouring tokens for all query heads that share one
// key head: row t * group + g is head g of the tile's token t. So a group of heads fills the
// matrix unit even where sequences are short.
#pragma once

#include <type_traits>

#include "attention/prefix_attention.h"
#include "attention/score.h"
#include "common/matmul.h"
#include "common/scratch.h"
#include "common/vector.h"

namespace pykern::PYKERN_SIMD {

// Hands out pieces of one allocation; with a null base it only counts.
class Pieces {
 public:
  PYKERN_INLINE explicit Pieces(void* base) : base_(static_cast<char*>(base)) {}

  template <class T>
  PYKERN_INLINE T* take(int64_t count) {
    T* piece = reinterpret_cast<T*>(base_ + used_);
    used_ += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
    return piece;
  }
  PYKERN_INLINE int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

// Rows of queries come in such numbers: in pairs, and never so few that a product takes another way.
constexpr int64_t kRowMultiple = 8;

// Sizes in elements that follow from a problem and the type C of its products.
template <class C>
struct Sizes {
  PYKERN_INLINE explicit Sizes(const PrefixAttention& problem)
      : keys(problem.units * kUnitKeys),
        key_depth(round_up(problem.key_size, kDepth<C>)),
        value_depth(round_up(problem.value_size, kDepth<C>)),
        key_columns(round_up(problem.key_size, kPanel)),
        value_columns(round_up(problem.value_size, kPanel)),
        tile_rows(round_up(problem.tile_tokens * problem.group(), kRowMultiple)) {}

  int64_t keys;
  int64_t key_depth, value_depth;      // a head's size as the depth of a product
  int64_t key_columns, value_columns;  // a head's size as the columns of a product
  int64_t tile_rows;                   // so many that rows can be paired
};

// --- who sees whom ------------------------------------------------------------------------------

struct Range {
  int64_t begin, end;
  PYKERN_INLINE bool empty() const { return begin >= end; }
  PYKERN_INLINE bool operator==(const Range& other) const { return begin == other.begin && end == other.end; }
};

PYKERN_INLINE Positions positions_of(const int32_t* position, int64_t count) {
  Positions range{position[0], position[0]};
  for (int64_t i = 1; i < count; ++i) {
    range.least = position[i] < range.least ? position[i] : range.least;
    range.last = position[i] > range.last ? position[i] : range.last;
  }
  return range;
}

struct Tile {
  int64_t first_token, stop_token;
  int64_t rows;  // of real queries; the tile's buffers have some more, which see nothing
  Positions positions{};  // only with a window

  PYKERN_INLINE Tile(const PrefixAttention& problem, int64_t first, int64_t stop)
      : first_token(first), stop_token(stop), rows((stop - first) * problem.group()) {
    if (problem.window > 0) positions = positions_of(problem.position + first, stop - first);
  }

  PYKERN_INLINE static Tile of_index(const PrefixAttention& problem, int64_t index) {
    const int64_t first = index * problem.tile_tokens, stop = first + problem.tile_tokens;
    return Tile(problem, first, stop < problem.tokens ? stop : problem.tokens);
  }
};

// Rows of the tile that may see keys of the unit, widened to whole pairs.
PYKERN_INLINE Range visible_rows(const PrefixAttention& problem, const Tile& tile, int64_t unit) {
  const int64_t key = unit * kUnitKeys, stop = problem.last_end(unit);
  int64_t begin = key > tile.first_token ? key : tile.first_token;
  int64_t end = stop < tile.stop_token ? stop : tile.stop_token;
  if (problem.window > 0 && begin < end) {
    const int64_t first_unseen = problem.last_position(unit) + problem.window;
    if (tile.positions.least >= first_unseen) return {0, 0};
    while (begin < end && problem.position[begin] >= first_unseen) ++begin;
    while (begin < end && problem.position[end - 1] >= first_unseen) --end;
  }
  if (begin >= end) return {0, 0};
  const int64_t group = problem.group();
  return {(begin - tile.first_token) * group / 2 * 2, round_up((end - tile.first_token) * group, 2)};
}

PYKERN_INLINE bool fully_visible(const PrefixAttention& problem, const Tile& tile, int64_t unit) {
  return (unit + 1) * kUnitKeys - 1 <= tile.first_token && problem.least_end(unit) >= tile.stop_token &&
         (problem.window == 0 || tile.positions.last - int64_t{problem.least_position(unit)} < problem.window);
}

PYKERN_INLINE vint lane_numbers() {
  vint lanes;
  for (int lane = 0; lane < kLanes; ++lane) lanes[lane] = lane;
  return lanes;
}

// --- copies ---------------------------------------------------------------------------------------

PYKERN_INLINE bool any(vint condition) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)condition, (__m512i)condition) != 0;
#elif defined(__AVX2__)
  return !_mm256_testz_si256((__m256i)condition, (__m256i)condition);
#else
  int32_t lanes = 0;
  for (int lane = 0; lane < kLanes; ++lane) lanes |= condition[lane];
  return lanes != 0;
#endif
}

#if defined(__AVX512BF16__)
PYKERN_INLINE vhalf narrow_lanes(vfloat value) { return (vhalf)_mm512_cvtneps_pbh((__m512)value); }

// Rounds by one instruction, which takes subnormals for zero: for products, not for results.
PYKERN_INLINE void store_narrow(bf16* target, vfloat value) {
  const vhalf half = narrow_lanes(value);
  std::memcpy(target, &half, sizeof half);
}
#endif
PYKERN_INLINE void store_narrow(float* target, vfloat value) { store(target, value); }

// Converts one row, zeros behind it up to `stride`; says in which lanes NaN or infinity went by.
template <class C, class T>
PYKERN_INLINE vint copy_row(C* target, int64_t stride, const T* source, int64_t columns) {
  vint bad = {};
  int64_t column = 0;
  if constexpr (std::is_same_v<C, T> && sizeof(C) == 2) {
    for (; column + 2 * kLanes <= columns; column += 2 * kLanes) {
      vint pairs;
      std::memcpy(&pairs, source + column, sizeof pairs);
      bad |= ((pairs & 0x7f80) == 0x7f80) | ((pairs & 0x7f800000) == 0x7f800000);
      std::memcpy(target + column, &pairs, sizeof pairs);
    }
  }
  for (; column + kLanes <= columns; column += kLanes) {
    const vfloat value = load(source + column);
    bad |= (value - value) != zero();
    store(target + column, value);
  }
  if (column < columns) {
    const vfloat value = load_partial(source + column, columns - column);
    bad |= (value - value) != zero();
    store_partial(target + column, value, columns - column);
  }
  for (column = columns; column < stride; ++column) narrow(0.0f, target + column);
  return bad;
}

template <class T>
PYKERN_INLINE bool row_is_finite(const T* row, int64_t size) {
  for (int64_t i = 0; i < size; ++i) {
    const float value = widen(row[i]);
    if (value - value != 0.0f) return false;
  }
  return true;
}

template <class C>
PYKERN_INLINE void zero_row(C* target, int64_t stride) {
  std::memset(target, 0, stride * sizeof(C));
}

template <class T>
PYKERN_INLINE const T* row_of(const HeadsView& view, int64_t token, int64_t head) {
  return static_cast<const T*>(view.data) + token * view.token_stride + head * view.head_stride;
}

// What becomes of a row that holds NaN or infinity.
enum class NonFinite { keep, drop };

// Copies a unit of keys or values of one head to [kUnitKeys, depth]. Rows that no query sees become
// zero, whatever they hold, and so do those that are dropped. Returns whether all the others are finite.
template <class C, class T>
bool stage_unit(const HeadsView& view, const KeyColumns& keys, int64_t head, int64_t size, int64_t depth, C* staged,
                NonFinite rule) {
  bool finite = true;
  for (int64_t i = 0; i < kUnitKeys; ++i) {
    C* target = staged + i * depth;
    if (keys.end[i] <= keys.row[i]) {
      zero_row(target, depth);
    } else if (any(copy_row(target, depth, row_of<T>(view, keys.row[i], head), size))) {
      finite = false;
      if (rule == NonFinite::drop) zero_row(target, depth);
    }
  }
  return finite;
}

// Packs a staged unit as the B operand [size, keys] of one head: the unit's panels follow each other.
template <class C>
PYKERN_INLINE void pack_across(C* packed, const C* staged, int64_t unit, int64_t size, int64_t depth) {
  pack(packed + unit * kUnitKeys * depth, staged, size, kUnitKeys, 1, depth);
}

// Packs a staged unit into the B operand [all keys, size] of one head, whose panels are `keys` deep.
template <class C>
PYKERN_INLINE void pack_along(C* packed, const C* staged, int64_t unit, int64_t keys, int64_t size, int64_t depth) {
  for (int64_t column = 0; column < size; column += kPanel) {
    pack(packed + column * keys + unit * kUnitKeys * kPanel, staged + column, kUnitKeys,
         size - column < kPanel ? size - column : kPanel, depth, 1);
  }
}

// --- products -------------------------------------------------------------------------------------

// matmul over the panels of a B packed for other, larger products: its panels lie b_panel elements
// apart, those of C c_panel.
template <class C>
PYKERN_INLINE void matmul_panels(int64_t m, int64_t n, int64_t k, const C* a, int64_t a_row, int64_t a_column,
                                 const C* b, int64_t b_panel, float* c, int64_t c_row, int64_t c_panel,
                                 bool accumulate) {
  for (int64_t panel = 0; panel * kPanel < n; ++panel) {
    matmul(m, kPanel, k, a, a_row, a_column, b + panel * b_panel, c + panel * c_panel, c_row, accumulate);
  }
}

// target += factor * source, a row at a time: for the pairs of a tile whose masked partners hold NaN
// or infinity, which a product would spread.
template <class T>
PYKERN_INLINE void add_scaled(float* target, int64_t target_stride, float factor, const T* source, int64_t size) {
  for (int64_t i = 0; i < size; ++i) target[i * target_stride] += factor * widen(source[i]);
}

}  // namespace pykern::PYKERN_SIMD
