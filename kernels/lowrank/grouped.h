// One launch for many matrices of different shapes: a table of them travels with the launch, as a parameter of the
// kernel. Nothing is copied to the device before, and a captured graph keeps it.
//
// The work of a matrix is cut into tiles, one for each block of threads; a matrix knows the number of its first tile
// in the launch, and a block finds its matrix by halving the list.
#pragma once

#include <cstdint>

#include "kernels/common/host_device.h"

namespace pykern::lowrank {

// What CUDA 12.1 and newer allow for the parameters of a kernel, less than what stands beside the table.
constexpr int kTableBytes = 32764 - 256;
// A grid has fewer than 2^31 blocks.
constexpr int64_t kTableTiles = int64_t{1} << 30;

template <class Matrix, int bytes = kTableBytes>
struct GroupedTable {
  static constexpr int kCapacity = (bytes - 16) / static_cast<int>(sizeof(Matrix) + sizeof(uint32_t));

  int32_t count = 0;
  uint32_t tiles = 0;
  uint32_t first_tile[kCapacity];
  Matrix matrix[kCapacity];

  // Whether one more matrix still fits.
  bool takes(int64_t more_tiles) const { return count < kCapacity && tiles + more_tiles <= kTableTiles; }

  void add(const Matrix& added, int64_t its_tiles) {
    first_tile[count] = tiles;
    matrix[count++] = added;
    tiles += static_cast<uint32_t>(its_tiles);
  }

  void clear() {
    count = 0;
    tiles = 0;
  }

  // The matrix that a tile belongs to; a matrix without tiles has none.
  PYKERN_HOST_DEVICE int find(uint32_t tile) const {
    int low = 0, high = count;
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      if (first_tile[middle] <= tile) {
        low = middle;
      } else {
        high = middle;
      }
    }
    return low;
  }
};

// Calls launch(table) for as many matrices at a time as a table holds, and returns the first error. `count` matrices:
// matrix_of(i) and tiles_of(i); one without tiles is left out. A single matrix has at most kTableTiles tiles.
template <class Table, class MatrixOf, class TilesOf, class Launch>
const char* launch_grouped(Table& table, int64_t count, const MatrixOf& matrix_of, const TilesOf& tiles_of,
                           const Launch& launch) {
  table.clear();
  for (int64_t i = 0; i < count; ++i) {
    const int64_t tiles = tiles_of(i);
    if (tiles == 0) continue;
    if (tiles > kTableTiles) return "a matrix has more tiles than a launch";
    if (!table.takes(tiles)) {
      if (const char* error = launch(table)) return error;
      table.clear();
    }
    table.add(matrix_of(i), tiles);
  }
  return table.count == 0 ? nullptr : launch(table);
}

}  // namespace pykern::lowrank
