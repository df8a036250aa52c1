// Quantisation in groups and its inverse.
#include "common/pack.h"
#include "common/parallel.h"
#include "common/vector_part.h"
#include "lowrank/affine.h"
#include "lowrank/quantized.h"

namespace pykern::PYKERN_SIMD {
namespace {

using lowrank::AffineMatrix;
using lowrank::Blend;

// Rows that are read or written together where rows are neighbours in memory: a line of it has so many bfloat16.
constexpr int64_t kRows = 32;

template <class T>
PYKERN_INLINE float read(T value) {
  if constexpr (sizeof(T) == 8) {
    return static_cast<float>(value);
  } else {
    return widen(value);
  }
}

template <class T>
PYKERN_INLINE void write(T* target, float value, const Blend& blend) {
  if constexpr (sizeof(T) == 8) {
    *target = static_cast<double>(value) + (blend.adds ? *target * blend.factor : 0.0);
  } else {
    narrow(blend.adds ? value + widen(*target) * static_cast<float>(blend.factor) : value, target);
  }
}

// kRows rows of one group's columns: a task's share of a matrix.
struct Tile {
  int64_t first_row, rows, group, first, columns;
};

template <class Body>
void each_tile(const AffineMatrix& matrix, const Body& body) {
  const int64_t groups = lowrank::affine_groups(matrix.columns);
  parallel_tasks(ceil_div(matrix.rows, kRows) * groups, [&](int64_t task, int) {
    const int64_t first_row = task / groups * kRows, group = task % groups, first = group * kAffineGroup;
    body(Tile{first_row, lesser(kRows, matrix.rows - first_row), group, first,
              lesser(kAffineGroup, matrix.columns - first)});
  });
}

// body(row, column, offset) along the unit stride of memory.
template <class Body>
PYKERN_INLINE void each_element(const AffineMatrix& matrix, const Tile& tile, const Body& body) {
  const int64_t base = tile.first_row * matrix.row_stride + tile.first * matrix.column_stride;
  if (matrix.column_stride == 1) {
    for (int64_t row = 0; row < tile.rows; ++row) {
      for (int64_t column = 0; column < tile.columns; ++column) {
        body(row, column, base + row * matrix.row_stride + column);
      }
    }
  } else {
    for (int64_t column = 0; column < tile.columns; ++column) {
      for (int64_t row = 0; row < tile.rows; ++row) {
        body(row, column, base + row * matrix.row_stride + column * matrix.column_stride);
      }
    }
  }
}

// Whether squares of kLanes rows and columns, turned in registers, are all of a tile whose rows are neighbours.
template <class T>
PYKERN_INLINE bool in_squares(const AffineMatrix& matrix, const Tile& tile) {
  return sizeof(T) < 8 && matrix.row_stride == 1 && matrix.column_stride != 1 && tile.rows % kLanes == 0 &&
         tile.columns % kLanes == 0;
}

// body(row, column, offset) of every square's corner.
template <class Body>
PYKERN_INLINE void each_square(const AffineMatrix& matrix, const Tile& tile, const Body& body) {
  for (int64_t column = 0; column < tile.columns; column += kLanes) {
    for (int64_t row = 0; row < tile.rows; row += kLanes) {
      body(row, column, tile.first_row + row + (tile.first + column) * matrix.column_stride);
    }
  }
}

using TileValues = float[kRows][kAffineGroup];

template <class T>
PYKERN_INLINE void read_tile(const AffineMatrix& matrix, const Tile& tile, TileValues& values) {
  const T* source = static_cast<const T*>(matrix.values);
  if constexpr (sizeof(T) < 8) {
    if (in_squares<T>(matrix, tile)) {
      each_square(matrix, tile, [&](int64_t row, int64_t column, int64_t offset) {
        vuint square[kLanes];
        for (int lane = 0; lane < kLanes; ++lane) {
          square[lane] = (vuint)load(source + offset + lane * matrix.column_stride);
        }
        detail::transpose<kLanes>(square);
        for (int lane = 0; lane < kLanes; ++lane) store(values[row + lane] + column, (vfloat)square[lane]);
      });
      return;
    }
  }
  each_element(matrix, tile, [&](int64_t row, int64_t column, int64_t offset) {
    values[row][column] = read(source[offset]);
  });
}

template <class T>
PYKERN_INLINE void write_tile(const AffineMatrix& matrix, const Tile& tile, const TileValues& values,
                              const Blend& blend) {
  T* target = static_cast<T*>(matrix.values);
  if constexpr (sizeof(T) < 8) {
    if (in_squares<T>(matrix, tile)) {
      const vfloat factor = broadcast(static_cast<float>(blend.factor));
      each_square(matrix, tile, [&](int64_t row, int64_t column, int64_t offset) {
        vuint square[kLanes];
        for (int lane = 0; lane < kLanes; ++lane) square[lane] = (vuint)load(values[row + lane] + column);
        detail::transpose<kLanes>(square);
        for (int lane = 0; lane < kLanes; ++lane) {
          T* place = target + offset + lane * matrix.column_stride;
          store(place, blend.adds ? (vfloat)square[lane] + load(place) * factor : (vfloat)square[lane]);
        }
      });
      return;
    }
  }
  each_element(matrix, tile, [&](int64_t row, int64_t column, int64_t offset) {
    write(target + offset, values[row][column], blend);
  });
}

template <class T>
void quantize_typed(int bits, const AffineMatrix& matrix) {
  const int64_t groups = lowrank::affine_groups(matrix.columns), row_bytes = lowrank::code_bytes(matrix.columns, bits);
  each_tile(matrix, [&](const Tile& tile) {
    alignas(64) TileValues values;
    alignas(64) int32_t codes[kAffineGroup];
    read_tile<T>(matrix, tile, values);
    for (int64_t row = 0; row < tile.rows; ++row) {
      const AffineScale group = scale_of_group(values[row], tile.columns, bits);
      const CodeScale code(group, bits);
      for (int64_t i = 0; i < tile.columns; i += kLanes) {
        // Adding 1.5 * 2^23 rounds to an integer, ties to even, and leaves it in the low bits.
        const vint rounded = (vint)(code(load(values[row] + i)) + 12582912.0f) & 255;
        std::memcpy(codes + i, &rounded, sizeof rounded);
      }
      const int64_t place = (tile.first_row + row) * groups + tile.group;
      store_codes(matrix.codes + (tile.first_row + row) * row_bytes + lowrank::code_bytes(tile.first, bits), codes,
                  tile.columns, bits);
      matrix.scale[place] = group.scale;
      matrix.zero[place] = group.zero;
    }
  });
}

template <class T>
void dequantize_typed(int bits, const AffineMatrix& matrix, const Blend& blend) {
  const int64_t groups = lowrank::affine_groups(matrix.columns), row_bytes = lowrank::code_bytes(matrix.columns, bits);
  each_tile(matrix, [&](const Tile& tile) {
    alignas(64) TileValues values;
    for (int64_t row = 0; row < tile.rows; ++row) {
      const int64_t place = (tile.first_row + row) * groups + tile.group;
      load_group(values[row],
                 matrix.codes + (tile.first_row + row) * row_bytes + lowrank::code_bytes(tile.first, bits),
                 tile.columns, bits, {matrix.scale[place], matrix.zero[place]});
    }
    write_tile<T>(matrix, tile, values, blend);
  });
}

}  // namespace

void quantize_matrix(DataType type, int bits, const AffineMatrix& matrix) {
  switch (type) {
    case DataType::f32: return quantize_typed<float>(bits, matrix);
    case DataType::f64: return quantize_typed<double>(bits, matrix);
    case DataType::bf16: return quantize_typed<bf16>(bits, matrix);
    case DataType::f16: return quantize_typed<f16>(bits, matrix);
  }
}

void dequantize_matrix(DataType type, int bits, const AffineMatrix& matrix, const Blend& blend) {
  switch (type) {
    case DataType::f32: return dequantize_typed<float>(bits, matrix, blend);
    case DataType::f64: return dequantize_typed<double>(bits, matrix, blend);
    case DataType::bf16: return dequantize_typed<bf16>(bits, matrix, blend);
    case DataType::f16: return dequantize_typed<f16>(bits, matrix, blend);
  }
}

}  // namespace pykern::PYKERN_SIMD
