#include "kernels/common/launch.h"
#include "kernels/lowrank/panels.h"
#include "kernels/lowrank/project_sm80.cuh"
#include "kernels/lowrank/project_wide_sm80.cuh"

namespace pykern::lowrank {
namespace {

constexpr int kRankTiles[] = {64, 128, 256};
// A split is worth its parts from so many rows of G on.
constexpr int kLeastRows = 128;

// Up to this rank a projection is bound by memory with mma.sync too.
constexpr int kLeastRankSm90 = 65;

int rank_tile_of(const ProjectMatrix& m) {
  if (m.warpgroups) return rank_tile_sm90(m);
  return m.rank <= 64 ? 64 : m.rank <= 128 ? 128 : 256;
}
ProjectTile tile_of(const ProjectMatrix& m) {
  return m.warpgroups ? project_tile_sm90(rank_tile_of(m), m.narrow) : project_tile(rank_tile_of(m));
}
int64_t tiles_of(const ProjectMatrix& m) {
  const ProjectTile tile = tile_of(m);
  return rank_tiles(m, tile.rank) * length_tiles(m, tile.length);
}

// Whether the kernel for 9.0 takes a matrix: worth it from a rank on, where there are tensor maps.
bool takes_warpgroups(const ProjectMatrix& m) {
#if defined(PYKERN_HAS_SM90)
  const int64_t rows = m.along_length ? m.n : m.length, columns = m.along_length ? m.length : m.n;
  return m.rank >= kLeastRankSm90 && allows_panels(m.projector, m.rank, m.n, m.rank) &&
         allows_panels(m.matrix, m.stride, rows, columns) && compute_capability() == 90;
#else
  (void)m;
  return false;
#endif
}

template <class T, int rank_tile>
const char* launch_tiled(const ProjectCall& call, bool along_length, Stream stream) {
  const Grid grid{dim3(call.table.tiles), dim3(kProjectThreads), ProjectTiling<rank_tile>::kSharedBytes};
  return along_length ? launch(project_kernel<T, rank_tile, true>, grid, stream, call)
                      : launch(project_kernel<T, rank_tile, false>, grid, stream, call);
}

template <class T>
const char* launch_rank(const ProjectCall& call, int rank_tile, bool along_length, Stream stream) {
  switch (rank_tile) {
    case 64: return launch_tiled<T, 64>(call, along_length, stream);
    case 128: return launch_tiled<T, 128>(call, along_length, stream);
    default: return launch_tiled<T, 256>(call, along_length, stream);
  }
}

const char* launch_typed(const ProjectCall& call, DataType type, int rank_tile, bool along_length, Stream stream) {
  switch (type) {
    case DataType::bf16: return launch_rank<bf16>(call, rank_tile, along_length, stream);
    case DataType::f16: return launch_rank<f16>(call, rank_tile, along_length, stream);
    default: return "the matrices have to be of sixteen-bit elements";
  }
}

template <class T>
const char* launch_squares(ProjectCall& call, const ProjectParams& params, Stream stream) {
  for (const bool along_length : {true, false}) {
    const char* error = launch_grouped(
        call.table, params.count, [&](int64_t i) -> const ProjectMatrix& { return params.matrices[i]; },
        [&](int64_t i) -> int64_t {
          const ProjectMatrix& m = params.matrices[i];
          const int64_t columns = along_length ? kSquareColumns : kProjectWarps;
          return m.squares && m.along_length == along_length ? (m.length + columns - 1) / columns : 0;
        },
        [&](const ProjectTable& table) {
          return launch(along_length ? wide_squares_kernel<T, true> : wide_squares_kernel<T, false>,
                        Grid{dim3(table.tiles), dim3(kProjectThreads)}, stream, call);
        });
    if (error) return error;
  }
  if (!params.grad_scale && !params.maximize) return nullptr;
  return launch_grouped(
      call.table, params.count, [&](int64_t i) -> const ProjectMatrix& { return params.matrices[i]; },
      [&](int64_t i) {
        const ProjectMatrix& m = params.matrices[i];
        constexpr int64_t kElements = kProjectThreads * kPartElements;
        return (int64_t{m.rank} * m.length + kElements - 1) / kElements;
      },
      [&](const ProjectTable& table) {
        return launch(wide_factor_kernel<T>, Grid{dim3(table.tiles), dim3(kProjectThreads)}, stream, call);
      });
}

}  // namespace

const char* launch_project_wide(const ProjectParams& params, Stream stream) {
  ProjectCall call{{}, params.grad_scale, params.maximize};
  return params.type == DataType::f64 ? launch_squares<double>(call, params, stream)
                                      : launch_squares<float>(call, params, stream);
}

int64_t plan_project(ProjectParams& params) {
  const auto tiles_of_all = [&] {
    int64_t tiles = 0;
    for (int64_t i = 0; i < params.count; ++i) tiles += tiles_of(params.matrices[i]);
    return tiles;
  };
  for (int64_t i = 0; i < params.count; ++i) {
    params.matrices[i].warpgroups = takes_warpgroups(params.matrices[i]);
    params.matrices[i].narrow = false;
  }
  const int64_t blocks = multiprocessors();
  if (2 * tiles_of_all() <= blocks) {
    for (int64_t i = 0; i < params.count; ++i) {
      ProjectMatrix& m = params.matrices[i];
      m.narrow = m.warpgroups && rank_tile_of(m) == 128;
    }
  }
  const int64_t tiles = tiles_of_all(), wanted = tiles > 0 ? blocks / tiles : 1;
  int64_t floats = 0;
  for (int64_t i = 0; i < params.count; ++i) {
    ProjectMatrix& m = params.matrices[i];
    const int64_t most = m.n / kLeastRows;
    m.splits = static_cast<int32_t>(wanted < most ? wanted : most);
    if (m.splits < 1) m.splits = 1;
    if (m.splits > 1) floats += int64_t{m.splits} * (m.rank + 1) * m.length;
  }
  return floats;
}

const char* launch_project(const ProjectParams& params, Stream stream) {
  float* parts = params.workspace;
  for (int64_t i = 0; i < params.count; ++i) {
    ProjectMatrix& m = params.matrices[i];
    if (m.splits == 1) continue;
    m.parts = parts;
    parts += int64_t{m.splits} * (m.rank + 1) * m.length;
  }
  ProjectCall call{{}, params.grad_scale, params.maximize};
  const auto matrix = [&](int64_t i) -> const ProjectMatrix& { return params.matrices[i]; };
  for (const int rank_tile : kRankTiles) {
    for (const bool along_length : {true, false}) {
      const char* error = launch_grouped(
          call.table, params.count, matrix,
          [&](int64_t i) -> int64_t {
            const ProjectMatrix& m = params.matrices[i];
            const bool chosen = !m.warpgroups && m.along_length == along_length && rank_tile_of(m) == rank_tile;
            return chosen ? tiles_of(m) * m.splits : 0;
          },
          [&](const ProjectTable&) { return launch_typed(call, params.type, rank_tile, along_length, stream); });
      if (error) return error;
    }
  }
#if defined(PYKERN_HAS_SM90)
  if (const char* error = launch_project_sm90(params, stream)) return error;
#endif
  return launch_grouped(
      call.table, params.count, matrix,
      [&](int64_t i) -> int64_t {
        constexpr int64_t kElements = kProjectThreads * kPartElements;
        const ProjectMatrix& m = params.matrices[i];
        return m.splits > 1 ? (part_elements(m) + kElements - 1) / kElements : 0;
      },
      [&](const ProjectTable& table) {
        return launch(project_parts_kernel, Grid{dim3(table.tiles), dim3(kProjectThreads)}, stream, call);
      });
}

}  // namespace pykern::lowrank
