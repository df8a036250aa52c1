// The grid of kernels that find groups: their blocks share out the rows by group.
#pragma once

#include "kernels/common/launch.h"
#include "kernels/policy/advantages.h"

namespace pykern {

// Small batches take few blocks and threads: all of them wait for each other several times.
inline Grid group_grid(int64_t rows, int64_t most_threads, int64_t row_bytes) {
  constexpr int64_t kBlockRows = 128, kThreadRows = 8;
  const int64_t wanted_blocks = (rows + kBlockRows - 1) / kBlockRows, most = multiprocessors();
  const int64_t wanted_threads = (rows / kThreadRows + kWarpSize - 1) / kWarpSize * kWarpSize;
  const int64_t threads = wanted_threads < 64             ? 64
                          : wanted_threads < most_threads ? wanted_threads
                                                          : most_threads;
  return {dim3(static_cast<unsigned>(wanted_blocks < most ? wanted_blocks : most)),
          dim3(static_cast<unsigned>(threads)), static_cast<size_t>(kSharedGroupRows * row_bytes)};
}

}  // namespace pykern
