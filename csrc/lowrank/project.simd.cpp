// The projection of gradients: low = P^T G, with the columns' squared norms from the same reading of G.
#include "common/parallel.h"
#include "lowrank/blocking.h"
#include "lowrank/parts.h"

namespace pykern::PYKERN_SIMD {
namespace {

using lowrank::ProjectPart;

// --- rows of G are contiguous: a tile is a block of columns --------------------------------------

template <class T>
struct ColumnTiles {
  using C = compute_t<T>;

  const ProjectPart& part;
  const int64_t n = part.matrix.n, length = part.matrix.length, rank = part.rank, stride = part.matrix.stride;
  const int64_t slices = n > 0 ? ceil_div(n, kSliceDepth) : 1;
  const int64_t width = tile_of_columns(length), tiles = ceil_div(length, width);
  const float factor = static_cast<float>(part.factor);

  // Slices of P^T [rank, kSliceDepth], zero behind the last place.
  C* transposed(char* shared, int64_t slice) const {
    return reinterpret_cast<C*>(shared) + slice * kSliceDepth * rank;
  }
  int64_t shared_bytes() const { return round_up(slices * kSliceDepth * rank * sizeof(C), 64); }
  int64_t low_bytes() const { return round_up(rank * width * sizeof(float), 64); }
  int64_t packed_bytes() const { return round_up(kSliceDepth * width * sizeof(C), 64); }
  int64_t thread_bytes() const { return low_bytes() + packed_bytes() + round_up(width * sizeof(float), 64); }

  void prepare(char* shared, int64_t slice) const {
    const int64_t place0 = slice * kSliceDepth, depth = lesser(kSliceDepth, n - place0);
    C* to = transposed(shared, slice);
    transpose_block(to, kSliceDepth, static_cast<const T*>(part.projector) + place0 * rank, rank, depth, rank, 1.0f);
    for (int64_t k = 0; k < rank; ++k) {
      for (int64_t place = depth; place < kSliceDepth; ++place) narrow(0.0f, to + k * kSliceDepth + place);
    }
  }

  void run(char* shared, char* own, int64_t tile) const {
    float* low = reinterpret_cast<float*>(own);
    C* packed = reinterpret_cast<C*>(own + low_bytes());
    float* squares = reinterpret_cast<float*>(own + low_bytes() + packed_bytes());
    const int64_t column0 = tile * width, columns = lesser(width, length - column0);
    for (int64_t slice = 0; slice < slices; ++slice) {
      const int64_t place0 = slice * kSliceDepth, depth = lesser(kSliceDepth, n - place0);
      const T* from = static_cast<const T*>(part.data) + place0 * stride + column0;
      pack(packed, from, depth, columns, stride, int64_t{1});
      if (part.squares) add_squares(from, depth, columns, squares, slice > 0);
      matmul(rank, columns, depth, transposed(shared, slice), kSliceDepth, int64_t{1}, packed, low, width, slice > 0);
    }
    float* target = static_cast<float*>(part.low) + column0;
    for (int64_t k = 0; k < rank; ++k) {
      for (int64_t column = 0; column < columns; column += kLanes) {
        store_some(target + k * length + column, load(low + k * width + column) * factor, columns - column);
      }
    }
    if (!part.squares) return;
    float* norms = static_cast<float*>(part.squares) + column0;
    for (int64_t column = 0; column < columns; column += kLanes) {
      store_some(norms + column, load(squares + column) * factor * factor, columns - column);
    }
  }

  // Four sums at a time, a slice after the other: a sum of short sums rounds less than one long sum.
  void add_squares(const T* from, int64_t depth, int64_t columns, float* squares, bool accumulate) const {
    for (int64_t column = 0; column < columns; column += kLanes) {
      const int64_t count = columns - column;
      vfloat sums[4] = {};
      int64_t row = 0;
      for (; row + 4 <= depth; row += 4) {
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
          const vfloat value = load_some(from + (row + i) * stride + column, count);
          sums[i] += value * value;
        }
      }
      for (; row < depth; ++row) {
        const vfloat value = load_some(from + row * stride + column, count);
        sums[0] += value * value;
      }
      const vfloat sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
      store(squares + column, accumulate ? load(squares + column) + sum : sum);
    }
  }
};

// --- columns of G are contiguous: a tile is a block of them ---------------------------------------

template <class T>
struct LineTiles {
  using C = compute_t<T>;

  const ProjectPart& part;
  const int64_t n = part.matrix.n, length = part.matrix.length, rank = part.rank, stride = part.matrix.stride;
  const int64_t padded = round_up(rank, kPanel);
  const int64_t slices = n > 0 ? ceil_div(n, kSliceDepth) : 1;
  const int64_t height = tile_of_lines(length), tiles = ceil_div(length, height);
  const float factor = static_cast<float>(part.factor);

  // Slices of P packed [kSliceDepth, rank].
  C* packed(char* shared, int64_t slice) const { return reinterpret_cast<C*>(shared) + slice * kSliceDepth * padded; }
  int64_t shared_bytes() const { return round_up(slices * kSliceDepth * padded * sizeof(C), 64); }
  int64_t low_bytes() const { return round_up(height * padded * sizeof(float), 64); }
  int64_t gradient_bytes() const { return round_up(height * kSliceDepth * sizeof(C), 64); }
  int64_t thread_bytes() const { return low_bytes() + gradient_bytes(); }

  void prepare(char* shared, int64_t slice) const {
    const int64_t place0 = slice * kSliceDepth, depth = lesser(kSliceDepth, n - place0);
    pack(packed(shared, slice), static_cast<const T*>(part.projector) + place0 * rank, depth, rank, rank, int64_t{1});
  }

  void run(char* shared, char* own, int64_t tile) const {
    float* low = reinterpret_cast<float*>(own);
    C* converted = reinterpret_cast<C*>(own + low_bytes());
    const int64_t line0 = tile * height, lines = lesser(height, length - line0);
    float squares[96] = {};
    for (int64_t slice = 0; slice < slices; ++slice) {
      const int64_t place0 = slice * kSliceDepth, depth = lesser(kSliceDepth, n - place0);
      const T* from = static_cast<const T*>(part.data) + line0 * stride + place0;
      const C* left = converted;
      int64_t left_stride = kSliceDepth;
      bool as_is = false;
      if constexpr (std::is_same_v<T, C>) {
        if (taken_as_is<T>(depth)) {
          left = from;
          left_stride = stride;
          as_is = true;
        }
      }
      if (!as_is) convert_rows(converted, kSliceDepth, from, stride, lines, depth);
      if (part.squares) {
        for (int64_t line = 0; line < lines; ++line) squares[line] += sum_of_squares(from + line * stride, depth);
      }
      matmul(lines, rank, depth, left, left_stride, int64_t{1}, packed(shared, slice), low, padded, slice > 0);
    }
    transpose_block(static_cast<float*>(part.low) + line0, length, low, padded, lines, rank, factor);
    if (!part.squares) return;
    for (int64_t line = 0; line < lines; ++line) {
      static_cast<float*>(part.squares)[line0 + line] = squares[line] * factor * factor;
    }
  }

  static float sum_of_squares(const T* line, int64_t depth) {
    vfloat sum = zero();
    for (int64_t place = 0; place < depth; place += kLanes) {
      const vfloat value = load_some(line + place, depth - place);
      sum += value * value;
    }
    return sum_lanes(sum);
  }
};

template <class Tiles>
bool run_tiles(const ProjectPart& part) {
  const Tiles work{part};
  const int64_t shared = work.shared_bytes(), own = work.thread_bytes();
  const Scratch memory(static_cast<size_t>(shared + own * max_threads()));
  char* block = memory.get<char>();
  if (!block) return false;
  parallel_tasks(work.slices, [&](int64_t slice, int) { work.prepare(block, slice); });
  parallel_tasks(work.tiles,
                 [&](int64_t tile, int thread) { work.run(block, block + shared + thread * own, tile); });
  return true;
}

template <class T>
bool project_typed(const ProjectPart& part) {
  return part.matrix.rows ? run_tiles<ColumnTiles<T>>(part) : run_tiles<LineTiles<T>>(part);
}

}  // namespace

bool project_part(const ProjectPart& part) {
  switch (part.matrix.type) {
    case DataType::f32: return project_typed<float>(part);
    case DataType::bf16: return project_typed<bf16>(part);
    case DataType::f16: return project_typed<f16>(part);
    default: return false;
  }
}

}  // namespace pykern::PYKERN_SIMD
