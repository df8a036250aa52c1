// The optimizer steps on float32, bfloat16 and float16 weights.
//
// Low rank: the long axis of the weight is cut into tiles that need nothing of each other. A tile
// projects its gradient, updates its moments, projects up and updates its weights before the next
// one begins, so the low-rank gradient never leaves the cache and nothing of full size is stored.
// Fira needs one number of the whole residual, its norm, in between: its tiles run in two rounds.
#include <type_traits>

#include "common/matmul.h"
#include "common/parallel.h"
#include "common/scratch.h"
#include "lowrank/adam.h"
#include "lowrank/step.h"

namespace pykern::PYKERN_SIMD {
namespace {

using lowrank::AdamStep;
using lowrank::LowRankStep;

// --- Adam on whole parameters -------------------------------------------------------------------

template <class T>
void adam_typed(const AdamStep& step) {
  const Adam adam(step.rule);
  const WeightUpdate update(step.rule);
  constexpr int64_t kChunk = 16384;
  parallel_tasks(ceil_div(step.size, kChunk), [&](int64_t task, int) {
    const int64_t begin = task * kChunk, count = lesser(kChunk, step.size - begin);
    T* param = static_cast<T*>(step.param) + begin;
    const T* grad = static_cast<const T*>(step.grad) + begin;
    float* first = static_cast<float*>(step.exp_avg) + begin;
    float* second = static_cast<float*>(step.exp_avg_sq) + begin;
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
      const Moments moments = adam.advance(load(grad + i) * adam.sign, {load(first + i), load(second + i)});
      store(first + i, moments.first);
      store(second + i, moments.second);
      store(param + i, update.apply(load(param + i), adam.direction(moments)));
    }
    if (i < count) {
      const int64_t rest = count - i;
      const Moments moments = adam.advance(load_partial(grad + i, rest) * adam.sign,
                                           {load_partial(first + i, rest), load_partial(second + i, rest)});
      store_partial(first + i, moments.first, rest);
      store_partial(second + i, moments.second, rest);
      store_partial(param + i, update.apply(load_partial(param + i, rest), adam.direction(moments)), rest);
    }
  });
}

// --- Adam in the subspace -----------------------------------------------------------------------

constexpr int64_t kDeep = 256;    // compressed axis, elements per slice of a projection
constexpr int64_t kWide = 512;    // columns per slice of a right-side up-projection
constexpr int64_t kTall = 96;     // rows per slice of a left-side up-projection
constexpr int64_t kWidest = 256;  // columns of a left-side tile, at most

// What the tiles of one step share: the projector in the layouts that the products want.
template <class T>
struct Shared {
  using C = compute_t<T>;

  const LowRankStep& step;
  const Adam adam;
  const WeightUpdate weights;
  const bool fira;
  const int64_t lines, places, rank;  // kept axis, compressed axis
  const int64_t rank_padded = round_up(rank, kPanel), rank_even = round_up(rank, 2);
  const int64_t slices = ceil_div(places, kDeep);
  const int threads = max_threads();

  // Slices of kDeep places: P packed [places, rank], and P transposed [rank, kDeep].
  const Scratch packed_memory, transposed_memory;
  // The whole of P for the way up: packed P^T [rank, places] (right), or rows [places, rank_even] (left).
  const Scratch up_memory;
  // P^T P - I, packed (right) or as rows [rank, rank_even] (left); the low-rank gradient; factor and
  // squared residual per line.
  const Scratch defect_memory, low_memory, factor_memory, square_memory;

  const T* projector() const { return static_cast<const T*>(step.projector); }
  C* packed(int64_t slice) const { return packed_memory.get<C>() + slice * kDeep * rank_padded; }
  C* transposed(int64_t slice) const { return transposed_memory.get<C>() + slice * kDeep * rank; }
  bool needs_packed() const { return step.right || fira; }
  bool needs_transposed() const { return !step.right || fira; }
  int64_t depth(int64_t slice) const { return lesser(kDeep, places - slice * kDeep); }

  explicit Shared(const LowRankStep& s)
      : step(s),
        adam(s.rule),
        weights(s.rule),
        fira(s.residual_norm != nullptr),
        lines(s.right ? s.rows : s.columns),
        places(s.right ? s.columns : s.rows),
        rank(s.rank),
        packed_memory(needs_packed() ? slices * kDeep * rank_padded * sizeof(C) : 0),
        transposed_memory(needs_transposed() ? slices * kDeep * rank * sizeof(C) : 0),
        up_memory((s.right ? rank_even * round_up(places, kPanel) : rank_even * places) * sizeof(C)),
        defect_memory(fira ? rank_even * rank_padded * sizeof(C) : 0),
        low_memory(fira ? (lines * rank + kLanes) * sizeof(float) : 0),
        factor_memory(fira ? (lines + kPanel) * sizeof(float) : 0),
        square_memory(fira ? (lines + kPanel) * sizeof(float) : 0) {}

  bool allocated() const {
    return packed_memory.get<C>() && transposed_memory.get<C>() && up_memory.get<C>() && defect_memory.get<C>() &&
           low_memory.get<float>() && factor_memory.get<float>() && square_memory.get<float>();
  }

  void prepare() const {
    parallel_tasks(slices, [&](int64_t slice, int) {
      const int64_t place0 = slice * kDeep, count = depth(slice);
      const T* from = projector() + place0 * rank;
      if (needs_packed()) pack(packed(slice), from, count, rank, rank, int64_t{1});
      if (needs_transposed()) {
        C* to = transposed(slice);
        for (int64_t place = 0; place < kDeep; ++place) {
          for (int64_t k = 0; k < rank; ++k) {
            narrow(place < count ? widen(from[place * rank + k]) : 0.0f, to + k * kDeep + place);
          }
        }
      }
      if (step.right) {
        static_assert(kDeep % kPanel == 0);
        pack(up_memory.get<C>() + place0 * rank_whole(), from, rank, count, int64_t{1}, rank);
      } else {
        convert_rows(up_memory.get<C>() + place0 * rank_even, rank_even, from, rank, count, rank);
      }
    });
  }

  // The depth of packed P^T.
  int64_t rank_whole() const { return round_up(rank, kDepth<C>); }

  // P^T P - I: zero but for rounding where P is orthonormal. With it the norm of the residual is
  // exact whatever P is: |g - b P r|^2 = |g|^2 + (b^2 - 2b) |r|^2 + b^2 r^T (P^T P - I) r.
  void measure_defect(float* rows) const {
    parallel_tasks(ceil_div(rank, kTall), [&](int64_t task, int) {
      const int64_t row0 = task * kTall, count = lesser(kTall, rank - row0);
      for (int64_t slice = 0; slice < slices; ++slice) {
        matmul(count, rank, depth(slice), transposed(slice) + row0 * kDeep, kDeep, int64_t{1}, packed(slice),
               rows + row0 * rank_padded, rank_padded, slice > 0);
      }
      for (int64_t row = row0; row < row0 + count; ++row) rows[row * rank_padded + row] -= 1.0f;
    });
    if (step.right) {
      pack(defect_memory.get<C>(), rows, rank, rank, rank_padded, int64_t{1});
    } else {
      convert_rows(defect_memory.get<C>(), rank_even, rows, rank_padded, rank, rank);
    }
  }

  // The factor of the residual on every line, once all norms are known.
  double resolve_limit() const {
    double total = 0;
    for (int64_t line = 0; line < lines; ++line) total += square_memory.get<float>()[line];
    float* stored = static_cast<float*>(step.residual_norm);
    double norm = *stored;
    const double factor = lowrank::limit_residual(__builtin_sqrt(total), &norm, step.zero_norm_limits);
    *stored = static_cast<float>(norm);
    return factor;
  }
};

PYKERN_INLINE float residual_square(double factor, double g, double r, double defect, double removed) {
  const double rest = g + (removed * removed - 2 * removed) * r + removed * removed * defect;
  // What little is left of a line inside the subspace is rounding: it counts as nothing, lest the
  // limiter hold later residuals to it.
  return static_cast<float>(factor * factor * (rest < 1e-5 * g ? 0 : rest));
}

PYKERN_INLINE float norm_ratio(float direction_square, float low_square) {
  return __builtin_sqrtf(direction_square) / (__builtin_sqrtf(low_square) + static_cast<float>(lowrank::kNormEpsilon));
}

// Rows of W per tile: a property of the matrix alone, so that results don't depend on the threads.
PYKERN_INLINE int64_t tile_rows(int64_t rows) { return rows >= 1536 ? 96 : rows >= 384 ? 48 : 24; }
PYKERN_INLINE int64_t tile_columns(int64_t columns) {
  const int64_t wanted = columns >= 4096 ? 256 : columns >= 1024 ? 128 : 64;
  return round_up(wanted, kPanel);
}

// --- right side: R[rows, rank] = G P, a tile is a block of rows -----------------------------------

template <class T>
struct RightTiles {
  using C = compute_t<T>;

  const Shared<T>& shared;
  const LowRankStep& step = shared.step;
  const int64_t height = tile_rows(step.rows), tiles = ceil_div(step.rows, height);
  const int64_t rank = shared.rank, stride = shared.rank_padded;
  // Per thread: low-rank tile, second low-rank tile, the same narrowed, converted gradients, update.
  const int64_t low_size = height * stride, gradient_size = height * kDeep, update_size = height * kWide;
  const int64_t thread_bytes = round_up(
      (2 * low_size + update_size) * sizeof(float) + (height * shared.rank_even + gradient_size) * sizeof(C), 64);
  const Scratch memory{static_cast<size_t>(thread_bytes) * shared.threads};

  float* low(int thread) const { return reinterpret_cast<float*>(memory.get<char>() + thread * thread_bytes); }
  float* second_low(int thread) const { return low(thread) + low_size; }
  float* update(int thread) const { return second_low(thread) + low_size; }
  C* narrowed(int thread) const { return reinterpret_cast<C*>(update(thread) + update_size); }
  C* gradients(int thread) const { return narrowed(thread) + height * shared.rank_even; }

  explicit RightTiles(const Shared<T>& s) : shared(s) {}

  int64_t rows_of(int64_t tile) const { return lesser(height, step.rows - tile * height); }
  const T* gradient(int64_t row) const { return static_cast<const T*>(step.grad) + row * step.grad_stride; }
  float* exp_avg(int64_t row) const { return static_cast<float*>(step.exp_avg) + row * rank; }
  float* exp_avg_sq(int64_t row) const { return static_cast<float*>(step.exp_avg_sq) + row * rank; }

  // low = G P, and with Fira the squared norms of G's rows.
  void project(int64_t tile, int thread, float* squares) const {
    const int64_t row0 = tile * height, rows = rows_of(tile);
    for (int64_t slice = 0; slice < shared.slices; ++slice) {
      const int64_t depth = shared.depth(slice);
      const T* from = gradient(row0) + slice * kDeep;
      const C* left = nullptr;
      int64_t left_stride = 0;
      if constexpr (std::is_same_v<T, C>) {
        if (depth % kDepth<C> == 0) {
          left = from;
          left_stride = step.grad_stride;
        }
      }
      if (!left) {
        convert_rows(gradients(thread), kDeep, from, step.grad_stride, rows, depth);
        left = gradients(thread);
        left_stride = kDeep;
      }
      if (squares) {
        for (int64_t row = 0; row < rows; ++row) {
          const T* line = from + row * step.grad_stride;
          vfloat sum = zero();
          int64_t column = 0;
          for (; column + kLanes <= depth; column += kLanes) sum += load(line + column) * load(line + column);
          if (column < depth) {
            const vfloat rest = load_partial(line + column, depth - column);
            sum += rest * rest;
          }
          squares[row] = (slice > 0 ? squares[row] : 0.0f) + sum_lanes(sum);
        }
      }
      matmul(rows, rank, depth, left, left_stride, int64_t{1}, shared.packed(slice), low(thread), stride, slice > 0);
    }
  }

  // W -= step_size * (narrowed up-projected [+ factor * G]) for the tile's rows.
  void apply(int64_t tile, int thread, const float* factors) const {
    const int64_t row0 = tile * height, rows = rows_of(tile);
    T* weights = static_cast<T*>(step.param) + row0 * step.param_stride;
    for (int64_t column = 0; column < step.columns; column += kWide) {
      const int64_t columns = lesser(kWide, step.columns - column);
      matmul(rows, columns, rank, narrowed(thread), shared.rank_even, int64_t{1},
             shared.up_memory.template get<C>() + column * shared.rank_whole(), update(thread), kWide, false);
      for (int64_t row = 0; row < rows; ++row) {
        T* to = weights + row * step.param_stride + column;
        const float* from = update(thread) + row * kWide;
        if (factors) {
          shared.weights.row_with_gradient(to, from, gradient(row0 + row) + column, broadcast(factors[row]), nullptr,
                                           columns);
        } else {
          shared.weights.row(to, from, columns);
        }
      }
    }
  }

  void plain(int64_t tile, int thread) const {
    const int64_t row0 = tile * height, rows = rows_of(tile);
    project(tile, thread, nullptr);
    advance_tile(shared.adam, static_cast<float>(step.scale), rows, rank, low(thread), stride, exp_avg(row0),
                 exp_avg_sq(row0), rank, low(thread));
    convert_rows(narrowed(thread), shared.rank_even, low(thread), stride, rows, rank);
    apply(tile, thread, nullptr);
  }

  // Fira, first round: moments, and of every row the low-rank gradient, factor and residual norm.
  void measure(int64_t tile, int thread) const {
    const int64_t row0 = tile * height, rows = rows_of(tile);
    float* squares = shared.square_memory.template get<float>() + row0;
    float* factors = shared.factor_memory.template get<float>() + row0;
    project(tile, thread, squares);
    advance_tile(shared.adam, 1.0f, rows, rank, low(thread), stride, exp_avg(row0), exp_avg_sq(row0), rank,
                 second_low(thread));
    for (int64_t row = 0; row < rows; ++row) {
      factors[row] = dot(second_low(thread) + row * stride, second_low(thread) + row * stride);
    }
    convert_rows(narrowed(thread), shared.rank_even, low(thread), stride, rows, rank);
    matmul(rows, rank, rank, narrowed(thread), shared.rank_even, int64_t{1},
           shared.defect_memory.template get<C>(), second_low(thread), stride, false);
    for (int64_t row = 0; row < rows; ++row) {
      const float* from = low(thread) + row * stride;
      const float low_square = dot(from, from);
      const float defect = dot(from, second_low(thread) + row * stride);
      factors[row] = norm_ratio(factors[row], low_square);
      squares[row] = residual_square(factors[row], squares[row], low_square, defect, step.removed);
      std::memcpy(shared.low_memory.template get<float>() + (row0 + row) * rank, from, rank * sizeof(float));
    }
  }

  // Fira, second round: direction = up(scale * N - removed * factor * R) + factor * G.
  void finish(int64_t tile, int thread, float limit) const {
    const int64_t row0 = tile * height, rows = rows_of(tile);
    float* factors = shared.factor_memory.template get<float>() + row0;
    const float scale = static_cast<float>(step.scale), removed = static_cast<float>(step.removed);
    for (int64_t row = 0; row < rows; ++row) {
      const float factor = factors[row] * limit;
      const float* r = shared.low_memory.template get<float>() + (row0 + row) * rank;
      for (int64_t k = 0; k < rank; k += kLanes) {
        const int64_t count = lesser(kLanes, rank - k);
        const vfloat direction = direction_at(shared.adam, exp_avg(row0 + row) + k, exp_avg_sq(row0 + row) + k, count);
        const vfloat gradient = count == kLanes ? load(r + k) : load_partial(r + k, count);
        store(low(thread) + row * stride + k, direction * scale - gradient * (removed * factor));
      }
      factors[row] = factor * shared.adam.sign;
    }
    convert_rows(narrowed(thread), shared.rank_even, low(thread), stride, rows, rank);
    apply(tile, thread, factors);
  }

  float dot(const float* a, const float* b) const {
    vfloat sum = zero();
    int64_t k = 0;
    for (; k + kLanes <= rank; k += kLanes) sum += load(a + k) * load(b + k);
    if (k < rank) sum += load_partial(a + k, rank - k) * load_partial(b + k, rank - k);
    return sum_lanes(sum);
  }
};

// --- left side: R[rank, columns] = P^T G, a tile is a block of columns ----------------------------

template <class T>
struct LeftTiles {
  using C = compute_t<T>;

  const Shared<T>& shared;
  const LowRankStep& step = shared.step;
  const int64_t width = tile_columns(step.columns), tiles = ceil_div(step.columns, width);
  const int64_t rank = shared.rank;
  // Per thread: low-rank tile, second low-rank tile, update, packed slice of G or packed low-rank tile.
  const int64_t low_size = rank * width, update_size = kTall * width;
  const int64_t packed_count = (kDeep > shared.rank_even ? kDeep : shared.rank_even) * width;
  const int64_t thread_bytes =
      round_up((2 * low_size + update_size) * sizeof(float) + packed_count * sizeof(C), 64);
  const Scratch memory{static_cast<size_t>(thread_bytes) * shared.threads};

  float* low(int thread) const { return reinterpret_cast<float*>(memory.get<char>() + thread * thread_bytes); }
  float* second_low(int thread) const { return low(thread) + low_size; }
  float* update(int thread) const { return second_low(thread) + low_size; }
  C* packed(int thread) const { return reinterpret_cast<C*>(update(thread) + update_size); }

  explicit LeftTiles(const Shared<T>& s) : shared(s) {}

  int64_t columns_of(int64_t tile) const { return lesser(width, step.columns - tile * width); }
  const T* gradient(int64_t row, int64_t column) const {
    return static_cast<const T*>(step.grad) + row * step.grad_stride + column;
  }
  float* exp_avg(int64_t column) const { return static_cast<float*>(step.exp_avg) + column; }
  float* exp_avg_sq(int64_t column) const { return static_cast<float*>(step.exp_avg_sq) + column; }

  void project(int64_t tile, int thread, float* squares) const {
    const int64_t column0 = tile * width, columns = columns_of(tile);
    for (int64_t slice = 0; slice < shared.slices; ++slice) {
      const int64_t row0 = slice * kDeep, depth = shared.depth(slice);
      pack(packed(thread), gradient(row0, column0), depth, columns, step.grad_stride, int64_t{1});
      if (squares) {
        for (int64_t column = 0; column < columns; column += kLanes) {
          const int64_t count = lesser(kLanes, columns - column);
          vfloat sum = slice > 0 ? load(squares + column) : zero();
          for (int64_t row = row0; row < row0 + depth; ++row) {
            const T* from = gradient(row, column0 + column);
            const vfloat value = count == kLanes ? load(from) : load_partial(from, count);
            sum += value * value;
          }
          store(squares + column, sum);
        }
      }
      matmul(rank, columns, depth, shared.transposed(slice), kDeep, int64_t{1}, packed(thread), low(thread), width,
             slice > 0);
    }
  }

  // W -= step_size * (P times the tile in `from` [+ G * factors]) for the tile's columns.
  void apply(int64_t tile, int thread, const float* from, const float* factors) const {
    const int64_t column0 = tile * width, columns = columns_of(tile);
    pack(packed(thread), from, rank, columns, width, int64_t{1});
    for (int64_t row0 = 0; row0 < step.rows; row0 += kTall) {
      const int64_t rows = lesser(kTall, step.rows - row0);
      matmul(rows, columns, rank, shared.up_memory.template get<C>() + row0 * shared.rank_even, shared.rank_even,
             int64_t{1}, packed(thread), update(thread), width, false);
      for (int64_t row = 0; row < rows; ++row) {
        T* to = static_cast<T*>(step.param) + (row0 + row) * step.param_stride + column0;
        if (factors) {
          shared.weights.row_with_gradient(to, update(thread) + row * width, gradient(row0 + row, column0), zero(),
                                           factors, columns);
        } else {
          shared.weights.row(to, update(thread) + row * width, columns);
        }
      }
    }
  }

  void plain(int64_t tile, int thread) const {
    const int64_t column0 = tile * width, columns = columns_of(tile);
    project(tile, thread, nullptr);
    advance_tile(shared.adam, static_cast<float>(step.scale), rank, columns, low(thread), width, exp_avg(column0),
                 exp_avg_sq(column0), step.columns, low(thread));
    apply(tile, thread, low(thread), nullptr);
  }

  // Sums over the rank of a * b, for every column.
  void dots(const float* a, const float* b, int64_t columns, float* sums) const {
    for (int64_t column = 0; column < columns; column += kLanes) {
      vfloat sum = zero();
      for (int64_t k = 0; k < rank; ++k) sum += load(a + k * width + column) * load(b + k * width + column);
      store(sums + column, sum);
    }
  }

  void measure(int64_t tile, int thread) const {
    const int64_t column0 = tile * width, columns = columns_of(tile);
    alignas(64) float squares[kWidest], low_squares[kWidest], defects[kWidest], direction_squares[kWidest];
    float* factors = shared.factor_memory.template get<float>() + column0;
    project(tile, thread, squares);
    advance_tile(shared.adam, 1.0f, rank, columns, low(thread), width, exp_avg(column0), exp_avg_sq(column0),
                 step.columns, second_low(thread));
    dots(second_low(thread), second_low(thread), columns, direction_squares);
    dots(low(thread), low(thread), columns, low_squares);
    pack(packed(thread), low(thread), rank, columns, width, int64_t{1});
    matmul(rank, columns, rank, shared.defect_memory.template get<C>(), shared.rank_even, int64_t{1}, packed(thread),
           second_low(thread), width, false);
    dots(low(thread), second_low(thread), columns, defects);
    for (int64_t column = 0; column < columns; ++column) {
      factors[column] = norm_ratio(direction_squares[column], low_squares[column]);
      shared.square_memory.template get<float>()[column0 + column] =
          residual_square(factors[column], squares[column], low_squares[column], defects[column], step.removed);
    }
    for (int64_t k = 0; k < rank; ++k) {
      std::memcpy(shared.low_memory.template get<float>() + k * step.columns + column0, low(thread) + k * width,
                  columns * sizeof(float));
    }
  }

  void finish(int64_t tile, int thread, float limit) const {
    const int64_t column0 = tile * width, columns = columns_of(tile);
    alignas(64) float signed_factors[kWidest] = {}, removed_factors[kWidest] = {};
    const float* factors = shared.factor_memory.template get<float>() + column0;
    const float scale = static_cast<float>(step.scale), removed = static_cast<float>(step.removed);
    for (int64_t column = 0; column < columns; ++column) {
      removed_factors[column] = removed * (factors[column] * limit);
      signed_factors[column] = factors[column] * limit * shared.adam.sign;
    }
    for (int64_t k = 0; k < rank; ++k) {
      const float* r = shared.low_memory.template get<float>() + k * step.columns + column0;
      for (int64_t column = 0; column < columns; column += kLanes) {
        const int64_t count = lesser(kLanes, columns - column);
        const int64_t state = k * step.columns + column;
        const vfloat direction =
            direction_at(shared.adam, exp_avg(column0) + state, exp_avg_sq(column0) + state, count);
        const vfloat gradient = count == kLanes ? load(r + column) : load_partial(r + column, count);
        store(low(thread) + k * width + column, direction * scale - gradient * load(removed_factors + column));
      }
    }
    apply(tile, thread, low(thread), signed_factors);
  }
};

template <class T, template <class> class Tiles>
bool run_tiles(const Shared<T>& shared) {
  const Tiles<T> work(shared);
  if (!work.memory.template get<char>()) return false;
  if (!shared.fira) {
    parallel_tasks(work.tiles, [&](int64_t tile, int thread) { work.plain(tile, thread); });
    return true;
  }
  parallel_tasks(work.tiles, [&](int64_t tile, int thread) { work.measure(tile, thread); });
  const float limit = static_cast<float>(shared.resolve_limit());
  parallel_tasks(work.tiles, [&](int64_t tile, int thread) { work.finish(tile, thread, limit); });
  return true;
}

template <class T>
bool low_rank_typed(const LowRankStep& step) {
  const Shared<T> shared(step);
  if (!shared.allocated()) return false;
  shared.prepare();
  if (shared.fira) {
    const Scratch rows(shared.rank * shared.rank_padded * sizeof(float));
    if (!rows.get<float>()) return false;
    shared.measure_defect(rows.get<float>());
  }
  return step.right ? run_tiles<T, RightTiles>(shared) : run_tiles<T, LeftTiles>(shared);
}

}  // namespace

bool low_rank_step(const LowRankStep& step) {
  switch (step.type) {
    case DataType::f32: return low_rank_typed<float>(step);
    case DataType::bf16: return low_rank_typed<bf16>(step);
    case DataType::f16: return low_rank_typed<f16>(step);
    default: return false;
  }
}

void adam_step(const AdamStep& step) {
  switch (step.type) {
    case DataType::f32: return adam_typed<float>(step);
    case DataType::bf16: return adam_typed<bf16>(step);
    case DataType::f16: return adam_typed<f16>(step);
    default: return;
  }
}

}  // namespace pykern::PYKERN_SIMD
