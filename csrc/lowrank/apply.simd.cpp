// The way up: the direction is projected up a tile at a time, and the weights take it from the cache, with the decay,
// what the update has of the gradient itself, and the rounding. Nothing of full size is stored.
#include "common/parallel.h"
#include "lowrank/blocking.h"
#include "lowrank/prefetch.h"
#include "lowrank/weight_piece.h"

namespace pykern::PYKERN_SIMD {
namespace {

// --- what both orientations share -------------------------------------------------------------------

template <class T>
struct Tiles : Weights<T> {
  using C = compute_t<T>;
  using Weights<T>::part;

  const int64_t n = part.param.n, length = part.param.length, rank = part.rank;
  const int64_t whole = round_up(rank, kDepth<C>);  // the depth of the products
  const float* direction = static_cast<const float*>(part.direction);
  const float* low = static_cast<const float*>(part.low);
  const T* projector = static_cast<const T*>(part.projector);

  explicit Tiles(const ApplyPart& given) : Weights<T>{given} {}
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
