// Blocks of threads over the rows and columns of a matrix.
#pragma once

#include "kernels/lowrank/update_sm80.cuh"

namespace pykern::lowrank {

// `units` per row, one for each thread. Narrow rows share a block.
inline Tiling tiling_for(int64_t units) {
  int log_width = 5;
  while (log_width < 8 && (int64_t{1} << log_width) < units) ++log_width;
  return {log_width, static_cast<unsigned>((units + (int64_t{1} << log_width) - 1) >> log_width)};
}

inline dim3 tiling_blocks(const Tiling& tiling, int64_t rows) {
  const int64_t rows_per_block = kUpdateThreads >> tiling.log_width;
  return dim3(static_cast<unsigned>((rows + rows_per_block - 1) / rows_per_block * tiling.blocks_per_row));
}

}  // namespace pykern::lowrank
