#include "kernels/common/launch.h"
#include "kernels/lowrank/project_sm90.cuh"

namespace pykern::lowrank {
namespace {

template <class T, int rank, bool narrow>
const char* launch_tiled(ProjectCallSm90& call, const ProjectParams& params, Stream stream) {
  using Tiling = ProjectTilingSm90<rank, narrow>;
  const char* refused = nullptr;
  const auto with_maps = [&](int64_t i) {
    const ProjectMatrix& m = params.matrices[i];
    ProjectSm90 made{{}, {}, m};
    const char* error = Tiling::Basis::template map<T>(made.basis, m.projector, m.rank, m.n, m.rank);
    if (!error && m.along_length) {
      error = Tiling::template Gradient<true>::template map<T>(made.gradient, m.matrix, m.stride, m.n, m.length);
    } else if (!error) {
      error = Tiling::template Gradient<false>::template map<T>(made.gradient, m.matrix, m.stride, m.length, m.n);
    }
    if (error) refused = error;
    return made;
  };
  const auto tiles_of = [&](int64_t i) -> int64_t {
    const ProjectMatrix& m = params.matrices[i];
    const bool chosen = m.warpgroups && m.narrow == narrow && rank_tile_sm90(m) == rank;
    return chosen ? rank_tiles(m, rank) * length_tiles(m, Tiling::kLength) * m.splits : 0;
  };
  return launch_grouped(call.table, params.count, with_maps, tiles_of, [&](const auto& table) {
    if (refused) return refused;
    const auto most = static_cast<unsigned>(multiprocessors());
    const Grid grid{dim3(table.tiles < most ? table.tiles : most), dim3(kProjectThreadsSm90), Tiling::kSharedBytes};
    return launch(project_sm90_kernel<T, rank, narrow>, grid, stream, call);
  });
}

template <class T>
const char* launch_typed(ProjectCallSm90& call, const ProjectParams& params, Stream stream) {
  const char* error = launch_tiled<T, 128, false>(call, params, stream);
  if (!error) error = launch_tiled<T, 128, true>(call, params, stream);
  return error ? error : launch_tiled<T, 256, false>(call, params, stream);
}

}  // namespace

const char* launch_project_sm90(const ProjectParams& params, Stream stream) {
  ProjectCallSm90 call{{}, params.grad_scale, params.maximize};
  return params.type == DataType::bf16 ? launch_typed<bf16>(call, params, stream)
                                       : launch_typed<f16>(call, params, stream);
}

}  // namespace pykern::lowrank
