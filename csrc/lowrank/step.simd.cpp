// The low-rank steps on float32, bfloat16 and float16 weights.
//
// The long axis of every weight is cut into tiles that need nothing of each other. A tile projects its gradient,
// updates its moments, projects up and updates its weights before the next one begins, so the low-rank gradient never
// leaves the cache and nothing of full size is stored; the projector is brought into the products' layouts tile by
// tile, which costs a few percent of the products and no memory that grows with it. Where the residual is scaled, one
// number of all tiles is needed in between, its norm: those steps run in two rounds, and only Fira's keeps the
// low-rank gradient from one to the other.
//
// A line is an index along the long axis, a place one along the compressed axis.
#include <new>

#include "common/parallel.h"
#include "lowrank/step.h"
#include "lowrank/step_layouts.h"
#include "lowrank/tasks.h"

namespace pykern::PYKERN_SIMD {
namespace {

using lowrank::LowRankStep;
using lowrank::Matrix;
using lowrank::Residual;
using lowrank::Sums;

constexpr int64_t kRows = 32;     // rows of a weight to scale at a time
constexpr int64_t kWidest = 192;  // lines of a tile, at most
constexpr int64_t kGranule = 64;  // lines of a tile come in so many, whose sums are taken together

// How the lines of a matrix are cut into tiles: `wider` of `least` + 1 granules, then the others of `least`.
struct Cut {
  int64_t tiles, least, wider;

  int64_t first_line(int64_t tile) const { return (tile * least + lesser(tile, wider)) * kGranule; }
};

// Tiles as wide as keep their low-rank gradient in the second-level cache, since every tile brings the whole projector
// into the products' layouts; of these the cut that keeps the threads most evenly busy with `matrices` such matrices.
// No result depends on it.
PYKERN_INLINE Cut cut_lines(const Matrix& matrix, int64_t matrices, int64_t threads) {
  const int64_t most = matrix.rank > 1600 ? 1 : lesser(kWidest, 102400 / matrix.rank) / kGranule;
  const int64_t granules = ceil_div(matrix.length, kGranule);
  Cut best{};
  int64_t least_cost = 0;
  const int64_t fewest = ceil_div(granules, most);
  for (int64_t tiles = fewest; tiles <= lesser(granules, fewest + threads); ++tiles) {
    const Cut cut{tiles, granules / tiles, granules % tiles};
    const int64_t rounds = ceil_div(tiles * matrices, threads), wide_rounds = ceil_div(cut.wider * matrices, threads);
    // A tile's own cost is that of a quarter of a granule.
    const int64_t cost = 4 * (rounds * cut.least + wide_rounds) + rounds;
    if (least_cost > 0 && cost >= least_cost) continue;
    best = cut;
    least_cost = cost;
  }
  return best;
}

template <class T>
PYKERN_INLINE int64_t padded_rank(const Matrix& matrix) {
  return round_up(matrix.rank, kDepth<compute_t<T>>);
}

// --- what is left of a line ---------------------------------------------------------------------

PYKERN_INLINE float norm_ratio(float direction_square, float low_square) {
  return __builtin_sqrtf(direction_square) / (__builtin_sqrtf(low_square) + static_cast<float>(lowrank::kNormEpsilon));
}

// |g - removed P r|^2 from |g|^2, |r|^2 and r^T (P^T P - I) r; the last is zero where P is orthonormal.
PYKERN_INLINE double residual_square(double g, double r, double defect, double removed) {
  const double rest = g + (removed * removed - 2 * removed) * r + removed * removed * defect;
  // What little is left of a line inside the subspace is rounding: it counts as nothing, lest the
  // limiter hold later residuals to it.
  return rest < 1e-5 * g ? 0 : rest;
}

// --- one matrix ---------------------------------------------------------------------------------

// The scratch memory of one thread.
template <class T>
struct Workspace {
  using C = compute_t<T>;
  float* low;   // panels of kPanel lines, each [rank, kPanel]; or the same packed, in place
  float* wide;  // a product [kTall, kGranule]
  C* packed;    // a packed slice of G, in the place of `wide`
  C* piece;     // [kTall, kDeep] or [kTall, rank] of the projector
};

template <class T>
struct MatrixStep {
  using C = compute_t<T>;

  const LowRankStep& step;
  const Matrix& matrix;
  Cut cut;
  // Lines that a tile takes up at most.
  int64_t width = lesser((cut.least + (cut.wider > 0)) * kGranule, round_up(matrix.length, kPanel));
  int64_t n = matrix.n, length = matrix.length, rank = matrix.rank, rank_even = padded_rank<T>(matrix);
  // Between the rounds: the ratios of the lines [length], the sums of every kGranule lines, and for Fira the low-rank
  // gradient of the tiles, packed, and P^T P - I, [rank, rank_even].
  float* ratios = nullptr;
  Sums* sums = nullptr;
  C* kept = nullptr;
  C* defect = nullptr;

  int64_t lines_of(int64_t tile) const { return lesser(cut.first_line(tile + 1), length) - cut.first_line(tile); }
  const T* gradient(int64_t place, int64_t line) const {
    return static_cast<const T*>(matrix.grad) + place * matrix.grad_place + line * matrix.grad_line;
  }
  T* weight(int64_t place, int64_t line) const {
    return static_cast<T*>(matrix.param) + place * matrix.param_place + line * matrix.param_line;
  }
  const T* projector(int64_t place) const { return static_cast<const T*>(matrix.projector) + place * rank; }
  float* first(int64_t k, int64_t line) const { return static_cast<float*>(matrix.exp_avg) + k * length + line; }
  float* second(int64_t k, int64_t line) const { return static_cast<float*>(matrix.exp_avg_sq) + k * length + line; }
  // Where row k of a vector at `line` of the tile lies, in panels of float32 and in packed ones.
  int64_t element(int64_t k, int64_t line) const { return (line / kPanel * rank_even + k) * kPanel + line % kPanel; }
  int64_t unit(int64_t k, int64_t line) const {
    return (line / kPanel * rank_even + k) * kPanel + line % kPanel * kDepth<C>;
  }

  // The squared norms of the gradient's columns, from a packed slice.
  void add_squares(const C* packed, int64_t depth, int64_t lines, float* squares) const {
    const int64_t padded = round_up(depth, kDepth<C>);
    for (int64_t line = 0; line < lines; line += kPanel) {
      const C* from = packed + line * padded;
      vfloat sums[kPanelVectors] = {};
      for (int64_t row = 0; row < padded; row += kDepth<C>) {
#pragma GCC unroll 4
        for (int v = 0; v < kPanelVectors; ++v) {
          sums[v] = add_square(from + row * kPanel + v * kLanes * kDepth<C>, sums[v]);
        }
      }
      for (int v = 0; v < kPanelVectors; ++v) {
        float* to = squares + line + v * kLanes;
        store(to, load(to) + sums[v]);
      }
    }
  }

  Prefetch prefetch(const T* data, int64_t place_stride, int64_t line_stride, int64_t places, int64_t lines,
                    int64_t steps) const {
    constexpr int64_t size = sizeof(T);
    if (places <= 0) return Prefetch();
    if (line_stride == 1) return Prefetch(data, places, place_stride * size, lines * size, steps);
    return Prefetch(data, lines, line_stride * size, places * size, steps);
  }
  Prefetch prefetch_gradient(int64_t place, int64_t places, int64_t line0, int64_t lines, int64_t steps) const {
    return prefetch(gradient(place, line0), matrix.grad_place, matrix.grad_line, lesser(places, n - place), lines,
                    steps);
  }
  Prefetch prefetch_weights(int64_t place, int64_t places, int64_t line0, int64_t lines, int64_t steps) const {
    return prefetch(weight(place, line0), matrix.param_place, matrix.param_line, lesser(places, n - place), lines,
                    steps);
  }

  // low = P^T G for the tile, and the squared norms of G's columns where they are asked for.
  void project(int64_t tile, const Workspace<T>& space, float* squares) const {
    const int64_t line0 = cut.first_line(tile), lines = lines_of(tile);
    for (int64_t place = 0; place < n; place += kDeep) {
      const int64_t depth = lesser(kDeep, n - place), steps = panel_steps<C>(rank, depth) * ceil_div(lines, kPanel);
      pack(space.packed, gradient(place, line0), depth, lines, matrix.grad_place, matrix.grad_line);
      if (squares) add_squares(space.packed, depth, lines, squares);
      Prefetch next = prefetch_gradient(place + kDeep, kDeep, line0, lines, steps);
      for (int64_t k = 0; k < rank; k += kTall) {
        const int64_t rows = lesser(kTall, rank - k);
        transpose_projector(space.piece, projector(place) + k, depth, rows, rank);
        for (int64_t line = 0; line < lines; line += kPanel) {
          multiply_panel(space.piece, kDeep, rows, depth, space.packed + line * round_up(depth, kDepth<C>),
                         space.low + element(k, line), kPanel, place > 0, [&] { next.step(); });
        }
      }
    }
  }

  // Replaces `low` by what `value(k, line, count)` gives, packed. A packed row lies in front of the rows that are
  // still to be read.
  template <class Value>
  void pack_low(int64_t lines, const Workspace<T>& space, const Value& value) const {
    C* packed = reinterpret_cast<C*>(space.low);
    const int64_t panel_bytes = rank_even * kPanel * sizeof(float);
    for (int64_t k = 0; k < rank; k += kDepth<C>) {
      for (int64_t line = 0; line < round_up(lines, kPanel); line += kLanes) {
        const int64_t count = lesser(kLanes, lines - line);
        vfloat rows[2] = {zero(), zero()};
        for (int i = 0; i < kDepth<C>; ++i) {
          if (count > 0 && k + i < rank) rows[i] = value(k + i, line, count);
        }
        C* panel = reinterpret_cast<C*>(reinterpret_cast<char*>(packed) + line / kPanel * panel_bytes);
        store_packed(panel + k * kPanel + line % kPanel * kDepth<C>, rows[0], rows[1]);
      }
    }
  }

  // W -= step_size * (P X [+ G * factors]) for the tile, with X the packed `low`.
  void apply(int64_t tile, const Workspace<T>& space, const float* factors) const {
    const int64_t line0 = cut.first_line(tile), lines = lines_of(tile);
    for (int64_t place = 0; place < n; place += kTall) {
      const int64_t places = lesser(kTall, n - place);
      const C* left = space.piece;
      if constexpr (std::is_same_v<T, C>) {
        if (rank == rank_even) left = projector(place);
      }
      if (left == space.piece) convert_rows(space.piece, rank_even, projector(place), rank, places, rank);
      for (int64_t line = 0; line < lines; line += kGranule) {
        const int64_t columns = lesser(kGranule, lines - line);
        const int64_t steps = panel_steps<C>(places, rank) * ceil_div(columns, kPanel);
        // Asked for no earlier than now: rows that are a power of two long lie in few sets of the cache, and push each
        // other out.
        Prefetch weights = prefetch_weights(place, kTall, line0 + line, columns, steps), slopes;
        if (factors) slopes = prefetch_gradient(place, kTall, line0 + line, columns, steps);
        for (int64_t panel = 0; panel < columns; panel += kPanel) {
          multiply_panel(left, rank_even, places, rank,
                         reinterpret_cast<const C*>(space.low + (line + panel) * rank_even), space.wide + panel,
                         kGranule, false, [&] {
                           weights.step();
                           slopes.step();
                         });
        }
        update_weights(line0 + line, columns, place, places, space.wide, factors ? factors + line : nullptr);
      }
    }
  }

  // `direction` is [places, kGranule].
  void update_weights(int64_t line0, int64_t lines, int64_t place, int64_t places, const float* direction,
                      const float* factors) const {
    const WeightUpdate update(matrix.rule);
    if (matrix.param_line == 1) {
      for (int64_t row = place; row < place + places; ++row) {
        update_row(update, weight(row, line0), direction + (row - place) * kGranule,
                   factors ? gradient(row, line0) : nullptr, matrix.grad_line, zero(), factors, lines);
      }
      return;
    }
    // Rows of the weight are lines: the direction is turned in blocks.
    for (int64_t line = 0; line < lines; line += kLanes) {
      for (int64_t row = 0; row < places; row += kLanes) {
        vuint block[kLanes];
#pragma GCC unroll 16
        for (int lane = 0; lane < kLanes; ++lane) block[lane] = (vuint)load(direction + (row + lane) * kGranule + line);
        detail::transpose<kLanes>(block);
        update_block(update, block, place + row, line0 + line, lesser(kLanes, places - row),
                     lesser(kLanes, lines - line), factors ? factors + line : nullptr);
      }
    }
  }

  // A block of the weight whose rows are lines: `block` [kLanes lines, kLanes places] is the direction.
  PYKERN_INLINE void update_block(const WeightUpdate& update, const vuint (&block)[kLanes], int64_t place, int64_t line,
                                  int64_t places, int64_t lines, const float* factors) const {
    if (places == kLanes && lines == kLanes && (!factors || matrix.grad_place == 1)) {
#pragma GCC unroll 16
      for (int lane = 0; lane < kLanes; ++lane) {
        vfloat change = (vfloat)block[lane];
        if (factors) change += load(gradient(place, line + lane)) * factors[lane];
        T* const row = weight(place, line + lane);
        store_rounded(row, update.apply(load(row), change));
      }
      return;
    }
    alignas(64) float turned[kLanes * kLanes];
    for (int lane = 0; lane < kLanes; ++lane) store(turned + lane * kLanes, (vfloat)block[lane]);
    for (int64_t lane = 0; lane < lines; ++lane) {
      update_row(update, weight(place, line + lane), turned + lane * kLanes,
                 factors ? gradient(place, line + lane) : nullptr, matrix.grad_place,
                 broadcast(factors ? factors[lane] : 0.0f), nullptr, places);
    }
  }

  void plain(int64_t tile, const Workspace<T>& space) const {
    const Adam adam(matrix.rule);
    const float scale = static_cast<float>(step.scale);
    const int64_t line0 = cut.first_line(tile);
    project(tile, space, nullptr);
    pack_low(lines_of(tile), space, [&](int64_t k, int64_t line, int64_t count) {
      return advance(adam, load(space.low + element(k, line)) * adam.sign, k, line0 + line, count) * scale;
    });
    apply(tile, space, nullptr);
  }

  PYKERN_INLINE vfloat advance(const Adam& adam, vfloat low, int64_t k, int64_t line, int64_t count) const {
    float* m = first(k, line);
    float* v = second(k, line);
    // The rows of the moments lie far apart: the processor does not foresee the next one.
    constexpr int64_t kAhead = 12;
    if (line % 16 == 0 && k + kAhead < rank) {
      __builtin_prefetch(m + kAhead * length, 1, 2);
      __builtin_prefetch(v + kAhead * length, 1, 2);
    }
    const Moments moments = adam.advance(low, {load_some(m, count), load_some(v, count)});
    store_some(m, moments.first, count);
    store_some(v, moments.second, count);
    return adam.direction(moments);
  }

  // The first round: the moments, and of every line the ratio; of the tile the sums.
  void measure(int64_t tile, const Workspace<T>& space) const {
    const Adam adam(matrix.rule);
    const int64_t line0 = cut.first_line(tile), lines = lines_of(tile);
    alignas(64) float squares[kWidest] = {}, directions[kWidest] = {}, lows[kWidest] = {}, defects[kWidest] = {};
    project(tile, space, squares);
    for (int64_t k = 0; k < rank; ++k) {
      for (int64_t line = 0; line < lines; line += kLanes) {
        float* low = space.low + element(k, line);
        const vfloat value = load(low) * adam.sign;
        const vfloat direction = advance(adam, value, k, line0 + line, lesser(kLanes, lines - line));
        store(low, value);
        store(lows + line, load(lows + line) + value * value);
        store(directions + line, load(directions + line) + direction * direction);
      }
    }
    if (kept) keep_low(tile, space);
    if (defect) measure_defect(tile, space, defects);
    const double square_scale = matrix.rule.sign * matrix.rule.sign;
    for (int64_t line = 0; line < lines; line += kGranule) sums[(line0 + line) / kGranule] = Sums{};
    for (int64_t line = 0; line < lines; ++line) {
      Sums& total = sums[(line0 + line) / kGranule];
      const float ratio = step.residual == Residual::apollo_tensor ? 1.0f : norm_ratio(directions[line], lows[line]);
      const double g = square_scale * squares[line];
      const double rest = kept ? residual_square(g, lows[line], defects[line], step.removed) : g;
      ratios[line0 + line] = ratio;
      total.direction += directions[line];
      total.low += lows[line];
      total.residual += static_cast<double>(ratio) * ratio * rest;
    }
  }

  C* kept_tile(int64_t tile) const { return kept + cut.first_line(tile) * rank_even; }

  void keep_low(int64_t tile, const Workspace<T>& space) const {
    C* to = kept_tile(tile);
    for (int64_t k = 0; k < rank; k += kDepth<C>) {
      for (int64_t line = 0; line < round_up(lines_of(tile), kPanel); line += kLanes) {
        const vfloat row = load(space.low + element(k, line));
        store_packed(to + unit(k, line), row, k + 1 < rank ? load(space.low + element(k + 1, line)) : zero());
      }
    }
  }

  // r^T (P^T P - I) r of every line r.
  void measure_defect(int64_t tile, const Workspace<T>& space, float* defects) const {
    for (int64_t line = 0; line < lines_of(tile); line += kPanel) {
      const C* packed = kept_tile(tile) + line * rank_even;
      for (int64_t k = 0; k < rank; k += kTall) {
        const int64_t rows = lesser(kTall, rank - k);
        matmul(rows, kPanel, rank, defect + k * rank_even, rank_even, int64_t{1}, packed, space.wide, kPanel, false);
        for (int64_t row = 0; row < rows; ++row) {
          for (int64_t lane = 0; lane < kPanel; lane += kLanes) {
            const vfloat low = load(space.low + element(k + row, line + lane));
            store(defects + line + lane, load(defects + line + lane) + low * load(space.wide + row * kPanel + lane));
          }
        }
      }
    }
  }

  // Rows k to k + kTall of P^T P - I: zero but for rounding where P is orthonormal. With it the norm of the residual
  // is exact whatever P is.
  void build_defect(int64_t k, const Workspace<T>& space, float* product, C* packed) const {
    const int64_t rows = lesser(kTall, rank - k), stride = round_up(rank, kPanel);
    for (int64_t place = 0; place < n; place += kDeep) {
      const int64_t depth = lesser(kDeep, n - place);
      transpose_projector(space.piece, projector(place) + k, depth, rows, rank);
      pack(packed, projector(place), depth, rank, rank, int64_t{1});
      matmul(rows, rank, depth, space.piece, kDeep, int64_t{1}, packed, product, stride, place > 0);
    }
    for (int64_t row = 0; row < rows; ++row) product[row * stride + k + row] -= 1.0f;
    convert_rows(defect + k * rank_even, rank_even, product, stride, rows, rank);
  }

  // APOLLO's second round: rows of the weight as they lie in memory, from `row` on. The ratios are the factors by now.
  int64_t memory_rows() const { return matrix.param_line == 1 ? n : length; }
  void scale_rows(int64_t row, int64_t rows) const {
    const WeightUpdate update(matrix.rule);
    const bool along_lines = matrix.param_line == 1;
    for (int64_t i = row; i < row + rows; ++i) {
      const int64_t place = along_lines ? i : 0, line = along_lines ? 0 : i;
      update_row<T>(update, weight(place, line), nullptr, gradient(place, line),
                    along_lines ? matrix.grad_line : matrix.grad_place,
                    broadcast(along_lines ? 0.0f : ratios[i]), along_lines ? ratios : nullptr,
                    along_lines ? length : n);
    }
  }

  // Fira's second round, when the factor that all lines share is known.
  void finish(int64_t tile, const Workspace<T>& space, float shared) const {
    const Adam adam(matrix.rule);
    const int64_t line0 = cut.first_line(tile), lines = lines_of(tile);
    alignas(64) float removed[kWidest] = {}, factors[kWidest] = {};
    for (int64_t line = 0; line < lines; ++line) {
      const float ratio = ratios[line0 + line] * shared;
      removed[line] = static_cast<float>(step.removed) * ratio;
      factors[line] = ratio * adam.sign;
    }
    const float scale = static_cast<float>(step.scale);
    const C* low = kept_tile(tile);
    pack_low(lines, space, [&](int64_t k, int64_t line, int64_t count) {
      const int row = k % kDepth<C>;
      const vfloat direction = direction_at(adam, first(k, line0 + line), second(k, line0 + line), count);
      return direction * scale - load_packed(low + unit(k - row, line), row) * load(removed + line);
    });
    apply(tile, space, factors);
  }
};

// --- all matrices of a step ---------------------------------------------------------------------

// Memory that is handed out in pieces; without memory it only counts.
struct Arena {
  char* base;
  int64_t used = 0;

  template <class E>
  E* take(int64_t elements) {
    char* const pointer = base ? base + used : nullptr;
    used += round_up(elements * static_cast<int64_t>(sizeof(E)), 64);
    return reinterpret_cast<E*>(pointer);
  }
};

template <class T>
class Runner {
  using C = compute_t<T>;

 public:
  explicit Runner(const LowRankStep& step)
      : step_(step),
        matrices_(step.count * sizeof(MatrixStep<T>)),
        tiles_(step.count, [&](int64_t i) { return cut_of(i).tiles; }),
        defects_(step.count, [&](int64_t i) { return measures_defect() ? ceil_div(step.matrices[i].rank, kTall) : 0; }),
        rows_(step.count, [&](int64_t i) {
          const Matrix& matrix = step.matrices[i];
          return ceil_div(matrix.param_line == 1 ? matrix.n : matrix.length, kRows);
        }) {}

  bool run() {
    if (!matrices_.get<char>() || !tiles_.allocated() || !defects_.allocated() || !rows_.allocated()) return false;
    for (int64_t i = 0; i < step_.count; ++i) new_matrix(i);
    Arena count{nullptr};
    lay_out(count);
    const Scratch between(count.used);
    Arena arena{between.get<char>()};
    if (!arena.base) return false;
    lay_out(arena);
    const int64_t thread_bytes = space_of(nullptr).used;
    const Scratch memory(thread_bytes * max_threads());
    if (!memory.get<char>()) return false;
    const auto space = [&](int thread) { return space_of(memory.get<char>() + thread * thread_bytes); };

    if (step_.residual == Residual::none) {
      each_tile([&](const MatrixStep<T>& matrix, int64_t tile, int thread) { matrix.plain(tile, space(thread)); });
      return true;
    }
    parallel_tasks(defects_.total(), [&](int64_t task, int thread) {
      const lowrank::TaskPlace place = defects_.find(task);
      const Space mine = space(thread);
      matrix(place.item).build_defect(place.task * kTall, mine, mine.product, mine.projector);
    });
    each_tile([&](const MatrixStep<T>& matrix, int64_t tile, int thread) { matrix.measure(tile, space(thread)); });
    for (int64_t i = 0; i < step_.count; ++i) resolve(i);
    if (step_.residual != Residual::fira) {
      parallel_tasks(rows_.total(), [&](int64_t task, int) {
        const lowrank::TaskPlace place = rows_.find(task);
        const MatrixStep<T>& one = matrix(place.item);
        one.scale_rows(place.task * kRows, lesser(kRows, one.memory_rows() - place.task * kRows));
      });
      return true;
    }
    each_tile([&](const MatrixStep<T>& matrix, int64_t tile, int thread) {
      matrix.finish(tile, space(thread), factors_[&matrix - &this->matrix(0)]);
    });
    return true;
  }

 private:
  struct Space : Workspace<T> {
    float* product;  // for build_defect
    C* projector;
    int64_t used;
  };

  bool measures_defect() const { return step_.residual == Residual::fira && !step_.orthonormal; }
  MatrixStep<T>& matrix(int64_t i) const { return matrices_.template get<MatrixStep<T>>()[i]; }
  Cut cut_of(int64_t i) const { return cut_lines(step_.matrices[i], step_.count, max_threads()); }
  void new_matrix(int64_t i) {
    const Matrix& matrix = step_.matrices[i];
    ::new (&this->matrix(i)) MatrixStep<T>{step_, matrix, cut_of(i)};
  }

  // What is kept between the rounds.
  void lay_out(Arena& arena) {
    factors_ = arena.take<float>(step_.count);
    for (int64_t i = 0; i < step_.count && step_.residual != Residual::none; ++i) {
      MatrixStep<T>& one = matrix(i);
      one.ratios = arena.take<float>(one.length + kLanes);
      one.sums = arena.take<Sums>(ceil_div(one.length, kGranule));
      if (step_.residual == Residual::fira) one.kept = arena.take<C>(round_up(one.length, kPanel) * one.rank_even);
      if (measures_defect()) one.defect = arena.take<C>(one.rank * one.rank_even);
    }
  }

  Space space_of(char* base) const {
    int64_t low = 0, packed = 0, piece = 0, product = 0, projector = 0;
    const auto raise = [](int64_t& most, int64_t size) { most = most < size ? size : most; };
    for (int64_t i = 0; i < step_.count; ++i) {
      const MatrixStep<T>& one = matrix(i);
      raise(low, one.rank_even * one.width);
      raise(packed, kDeep * one.width);
      raise(piece, kTall * (one.rank_even > kDeep ? one.rank_even : kDeep));
      if (measures_defect()) {
        raise(product, kTall * round_up(one.rank, kPanel));
        raise(projector, kDeep * round_up(one.rank, kPanel));
      }
    }
    Arena arena{base};
    Space space{};
    space.low = arena.take<float>(low);
    space.piece = arena.take<C>(piece);
    space.product = arena.take<float>(product);
    space.projector = arena.take<C>(projector);
    Arena other = arena;
    space.wide = arena.take<float>(kTall * kGranule);
    space.packed = other.take<C>(packed);
    space.used = arena.used > other.used ? arena.used : other.used;
    return space;
  }

  template <class Body>
  void each_tile(const Body& body) const {
    parallel_tasks(tiles_.total(), [&](int64_t task, int thread) {
      const lowrank::TaskPlace place = tiles_.find(task);
      body(matrix(place.item), place.task, thread);
    });
  }

  // The factor that all lines of a matrix share.
  void resolve(int64_t i) {
    const MatrixStep<T>& one = matrix(i);
    Sums total{};
    for (int64_t granule = 0; granule < ceil_div(one.length, kGranule); ++granule) {
      total.direction += one.sums[granule].direction;
      total.low += one.sums[granule].low;
      total.residual += one.sums[granule].residual;
    }
    float* stored = static_cast<float*>(one.matrix.residual_norm);
    double norm = stored ? *stored : 0;
    factors_[i] = static_cast<float>(lowrank::shared_factor(step_.limit, total, stored ? &norm : nullptr));
    if (stored) *stored = static_cast<float>(norm);
    if (step_.residual == Residual::fira) return;
    const float factor = factors_[i] * static_cast<float>(one.matrix.rule.sign);
    for (int64_t line = 0; line < one.length; ++line) one.ratios[line] *= factor;
  }

  const LowRankStep& step_;
  const Scratch matrices_;
  const lowrank::TaskList tiles_, defects_, rows_;
  float* factors_ = nullptr;
};

}  // namespace

bool low_rank_step(const LowRankStep& step) {
  switch (step.type) {
    case DataType::f32: return Runner<float>(step).run();
    case DataType::bf16: return Runner<bf16>(step).run();
    case DataType::f16: return Runner<f16>(step).run();
    default: return false;
  }
}

}  // namespace pykern::PYKERN_SIMD
