// The way up: the direction is projected up a tile at a time, and the weights take it from the cache, with the decay,
// what the update has of the gradient itself, and the rounding. Nothing of full size is stored.
#include "common/parallel.h"
#include "lowrank/blocking.h"
#include "lowrank/parts.h"
#include "lowrank/philox.h"
#include "lowrank/prefetch.h"

namespace pykern::PYKERN_SIMD {
namespace {

using lowrank::ApplyPart;
using lowrank::Rounding;

// --- the weights take their update ------------------------------------------------------------------

// Neighbours in memory: a piece of a row or of a column.
template <class T>
struct Piece {
  T* weights;
  T* compensation;
  const T* gradient;       // null where the update has nothing of it
  const float* update;     // up(direction), or null; it has room for whole vectors, as has `missed`
  const float* missed;     // up(low), or null
  bool scales_gradient;
  const float* factors;    // of the gradient, one for each neighbour, or null: `factor` for all
  float factor;
  int64_t count;
  int64_t index, index_step;  // of the elements in [n, length] order
};

// What `value` is once it is stored as T.
template <class T>
PYKERN_INLINE vfloat as_stored(vfloat value) {
  if constexpr (std::is_same_v<T, float>) return value;
  T stored[kLanes];
  store(stored, value);
  return load(stored);
}

PYKERN_INLINE vfloat sign_of(vfloat value) {
  return value > zero() ? broadcast(1.0f) : value < zero() ? broadcast(-1.0f) : value;
}

template <class T, Rounding Kind>
struct Update {
  const float scale, shrink, step_size, sign_scale, sign_factor;
  const uint64_t seed;
  const uint32_t step;

  explicit Update(const ApplyPart& part)
      : scale(static_cast<float>(part.scale)),
        shrink(static_cast<float>(part.shrink)),
        step_size(static_cast<float>(part.step_size)),
        sign_scale(static_cast<float>(part.sign_scale)),
        sign_factor(static_cast<float>(part.sign_factor)),
        seed(part.seed),
        step(part.step) {}

  void run(const Piece<T>& piece) const {
    for (int64_t i = 0; i < piece.count; i += kLanes) {
      const int64_t count = piece.count - i;
      vfloat direction = piece.update ? load(piece.update + i) * scale : zero();
      if (piece.gradient) {
        const vfloat gradient = load_some(piece.gradient + i, count);
        if (piece.scales_gradient) {
          direction += gradient * (piece.factors ? load_some(piece.factors + i, count) : broadcast(piece.factor));
        }
        if (piece.missed) direction += sign_of(gradient * sign_factor - load(piece.missed + i)) * sign_scale;
      }
      const vfloat weight = load_some(piece.weights + i, count);
      // A small change of the weight: 1 - decay keeps more digits than decay.
      const vfloat change = weight * -shrink - direction * step_size;
      if constexpr (Kind == Rounding::kahan) {
        const vfloat wanted = load_some(piece.compensation + i, count) + change;
        const vfloat reached = as_stored<T>(weight + wanted);
        store_some(piece.weights + i, reached, count);
        store_some(piece.compensation + i, wanted - (reached - weight), count);
      } else if constexpr (Kind == Rounding::stochastic) {
        const vuint words = philox_from(seed, piece.index + i * piece.index_step, piece.index_step, step);
        store_some(piece.weights + i, round_stochastic<T>(weight + change, words), count);
      } else {
        store_some(piece.weights + i, weight + change, count);
      }
    }
  }
};

// --- what both orientations share -------------------------------------------------------------------

template <class T>
struct Tiles {
  using C = compute_t<T>;

  const ApplyPart& part;
  const int64_t n = part.param.n, length = part.param.length, rank = part.rank;
  const int64_t whole = round_up(rank, kDepth<C>);  // the depth of the products
  const float* direction = static_cast<const float*>(part.direction);
  const float* low = static_cast<const float*>(part.low);
  const T* projector = static_cast<const T*>(part.projector);

  // Elements of G side by side: as they lie, or gathered into `buffer`.
  const T* gradient(int64_t line, int64_t element, int64_t count, T* buffer) const {
    if (!part.grad) return nullptr;
    const T* from = static_cast<const T*>(part.grad) + line * part.grad_line + element * part.grad_element;
    if (part.grad_element == 1) return from;
    for (int64_t i = 0; i < count; ++i) buffer[i] = from[i * part.grad_element];
    return buffer;
  }

  // `line` and `element` say where in memory order the piece begins.
  Piece<T> piece(int64_t line, int64_t element, int64_t count, const float* update, const float* missed,
                 T* buffer) const {
    const int64_t at = line * part.param.stride + element;
    const float* factors = static_cast<const float*>(part.factors);
    Piece<T> result{};
    result.weights = static_cast<T*>(part.data) + at;
    if (part.compensation) result.compensation = static_cast<T*>(part.compensation) + at;
    result.gradient = gradient(line, element, count, buffer);
    result.update = direction ? update : nullptr;
    result.missed = low ? missed : nullptr;
    result.scales_gradient = factors;
    result.count = count;
    if (part.param.rows) {
      result.factors = factors ? factors + element : nullptr;
      result.index = line * length + element;
      result.index_step = 1;
    } else {
      result.factor = factors ? factors[line] : 0.0f;
      result.index = element * length + line;
      result.index_step = length;
    }
    return result;
  }
};

// Lines of the weight, and of the gradient that lies alike, on their way into the cache.
template <class T>
struct Fetched {
  Prefetch weights, gradients;

  Fetched(const Tiles<T>& tiles, int64_t line0, int64_t lines, int64_t element0, int64_t elements, int64_t steps) {
    const ApplyPart& part = tiles.part;
    constexpr int64_t size = sizeof(T);
    weights = Prefetch(static_cast<const T*>(part.data) + line0 * part.param.stride + element0, lines,
                       part.param.stride * size, elements * size, steps);
    if (!part.grad || part.grad_element != 1) return;
    gradients = Prefetch(static_cast<const T*>(part.grad) + line0 * part.grad_line + element0, lines,
                         part.grad_line * size, elements * size, steps);
  }

  PYKERN_INLINE void step() {
    weights.step();
    gradients.step();
  }
};

// --- rows of the weight are contiguous: a tile is a block of columns ------------------------------

template <class T>
struct ColumnTiles : Tiles<T> {
  using Base = Tiles<T>;
  using typename Base::C;
  using Base::direction, Base::length, Base::low, Base::n, Base::part, Base::projector, Base::rank, Base::whole;

  const int64_t width = tile_of_columns(length), tiles = ceil_div(length, width);
  const int64_t chunk = 512, chunks = ceil_div(n, chunk);  // rows of P that one task converts

  explicit ColumnTiles(const ApplyPart& p) : Base{p} {}

  bool converts() const { return projector && !taken_as_is<T>(rank); }
  int64_t shared_bytes() const { return converts() ? round_up(n * whole * sizeof(C), 64) : 0; }
  int64_t packed_bytes() const { return round_up(whole * width * sizeof(C), 64); }
  int64_t update_bytes() const { return round_up(kUpdateHeight * width * sizeof(float), 64); }
  int64_t thread_bytes() const { return 2 * packed_bytes() + 2 * update_bytes() + round_up(width * sizeof(T), 64); }
  int64_t preparations() const { return converts() ? chunks : 0; }

  void prepare(char* shared, int64_t index) const {
    const int64_t row0 = index * chunk;
    convert_rows(reinterpret_cast<C*>(shared) + row0 * whole, whole, projector + row0 * rank, rank,
                 lesser(chunk, n - row0), rank);
  }

  template <Rounding Kind>
  void run(const Update<T, Kind>& rule, char* shared, char* own, int64_t tile) const {
    C* packed[2] = {reinterpret_cast<C*>(own), reinterpret_cast<C*>(own + packed_bytes())};
    own += 2 * packed_bytes();
    float* updates[2] = {reinterpret_cast<float*>(own), reinterpret_cast<float*>(own + update_bytes())};
    T* buffer = reinterpret_cast<T*>(own + 2 * update_bytes());
    const float* sources[2] = {direction, low};
    const C* left = reinterpret_cast<const C*>(shared);
    if constexpr (std::is_same_v<T, C>) {
      if (!converts()) left = projector;
    }
    const int64_t column0 = tile * width, columns = lesser(width, length - column0);
    for (int i = 0; i < 2; ++i) {
      if (sources[i]) pack(packed[i], sources[i] + column0, rank, columns, length, int64_t{1});
    }
    for (int64_t row0 = 0; row0 < n; row0 += kUpdateHeight) {
      const int64_t rows = lesser(kUpdateHeight, n - row0);
      Fetched<T> fetched(*this, row0, rows, column0, columns, panel_steps<C>(rows, rank) * ceil_div(columns, kPanel));
      for (int64_t panel = 0; panel < columns; panel += kPanel) {
        for (int i = 0; i < 2; ++i) {
          if (!sources[i]) continue;
          multiply_panel(left + row0 * whole, whole, rows, rank, packed[i] + panel * whole, updates[i] + panel, width,
                         false, [&] { fetched.step(); });
        }
      }
      for (int64_t row = 0; row < rows; ++row) {
        rule.run(this->piece(row0 + row, column0, columns, updates[0] + row * width, updates[1] + row * width, buffer));
      }
    }
  }
};

// --- columns of the weight are contiguous: a tile is a block of them ------------------------------

template <class T>
struct LineTiles : Tiles<T> {
  using Base = Tiles<T>;
  using typename Base::C;
  using Base::direction, Base::length, Base::low, Base::n, Base::part, Base::projector, Base::rank, Base::whole;

  const int64_t height = tile_of_lines(length), tiles = ceil_div(length, height);
  const int64_t chunks = ceil_div(n, kUpdateWidth);

  explicit LineTiles(const ApplyPart& p) : Base{p} {}

  // P^T packed [rank, n], a slice of kUpdateWidth columns after the other.
  int64_t shared_bytes() const { return projector ? round_up(whole * round_up(n, kPanel) * sizeof(C), 64) : 0; }
  int64_t narrowed_bytes() const { return round_up(height * whole * sizeof(C), 64); }
  int64_t update_bytes() const { return round_up(height * kUpdateWidth * sizeof(float), 64); }
  int64_t thread_bytes() const {
    return 2 * narrowed_bytes() + 2 * update_bytes() + round_up(kUpdateWidth * sizeof(T), 64);
  }
  int64_t preparations() const { return projector ? chunks : 0; }

  void prepare(char* shared, int64_t index) const {
    static_assert(kUpdateWidth % kPanel == 0);
    const int64_t place0 = index * kUpdateWidth;
    pack(reinterpret_cast<C*>(shared) + place0 * whole, projector + place0 * rank, rank,
         lesser(kUpdateWidth, n - place0), int64_t{1}, rank);
  }

  template <Rounding Kind>
  void run(const Update<T, Kind>& rule, char* shared, char* own, int64_t tile) const {
    C* lefts[2] = {reinterpret_cast<C*>(own), reinterpret_cast<C*>(own + narrowed_bytes())};
    own += 2 * narrowed_bytes();
    float* updates[2] = {reinterpret_cast<float*>(own), reinterpret_cast<float*>(own + update_bytes())};
    T* buffer = reinterpret_cast<T*>(own + 2 * update_bytes());
    const float* sources[2] = {direction, low};
    const int64_t line0 = tile * height, lines = lesser(height, length - line0);
    for (int i = 0; i < 2; ++i) {
      if (!sources[i]) continue;
      transpose_block(lefts[i], whole, sources[i] + line0, length, rank, lines, 1.0f);
      if (whole == rank) continue;
      for (int64_t line = 0; line < lines; ++line) narrow(0.0f, lefts[i] + line * whole + rank);
    }
    for (int64_t place0 = 0; place0 < n; place0 += kUpdateWidth) {
      const int64_t places = lesser(kUpdateWidth, n - place0);
      Fetched<T> fetched(*this, line0, lines, place0, places, panel_steps<C>(lines, rank) * ceil_div(places, kPanel));
      for (int64_t panel = 0; panel < places; panel += kPanel) {
        for (int i = 0; i < 2; ++i) {
          if (!sources[i]) continue;
          multiply_panel(lefts[i], whole, lines, rank,
                         reinterpret_cast<const C*>(shared) + (place0 + panel) * whole, updates[i] + panel,
                         kUpdateWidth, false, [&] { fetched.step(); });
        }
      }
      for (int64_t line = 0; line < lines; ++line) {
        rule.run(this->piece(line0 + line, place0, places, updates[0] + line * kUpdateWidth,
                             updates[1] + line * kUpdateWidth, buffer));
      }
    }
  }
};

template <class Work, class T, Rounding Kind>
bool run_tiles(const ApplyPart& part) {
  const Work work(part);
  const Update<T, Kind> rule(part);
  const int64_t shared = work.shared_bytes(), own = work.thread_bytes();
  const Scratch memory(static_cast<size_t>(shared + own * max_threads()));
  char* block = memory.get<char>();
  if (!block) return false;
  parallel_tasks(work.preparations(), [&](int64_t index, int) { work.prepare(block, index); });
  parallel_tasks(work.tiles,
                 [&](int64_t tile, int thread) { work.run(rule, block, block + shared + thread * own, tile); });
  return true;
}

template <class T, Rounding Kind>
bool apply_rounded(const ApplyPart& part) {
  return part.param.rows ? run_tiles<ColumnTiles<T>, T, Kind>(part) : run_tiles<LineTiles<T>, T, Kind>(part);
}

template <class T>
bool apply_typed(const ApplyPart& part) {
  switch (part.rounding) {
    case Rounding::nearest: return apply_rounded<T, Rounding::nearest>(part);
    case Rounding::stochastic: return apply_rounded<T, Rounding::stochastic>(part);
    case Rounding::kahan: return apply_rounded<T, Rounding::kahan>(part);
  }
  return false;
}

}  // namespace

bool apply_part(const ApplyPart& part) {
  switch (part.param.type) {
    case DataType::f32: return apply_typed<float>(part);
    case DataType::bf16: return apply_typed<bf16>(part);
    case DataType::f16: return apply_typed<f16>(part);
    default: return false;
  }
}

}  // namespace pykern::PYKERN_SIMD
