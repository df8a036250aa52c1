#include <algorithm>

#include "kernels/common/launch.h"
#include "kernels/lowrank/apply_sm90.cuh"

namespace pykern::lowrank {
namespace {

int ceil_div(int a, int b) { return a / b + (a % b != 0); }

int64_t units_of(const ApplyMatrix& m, int width, int unit_tiles) {
  return int64_t{ceil_div(m.length, width)} * ceil_div(ceil_div(m.n, kTileRows), unit_tiles);
}

// A unit begins with its strip of the direction, whose floats take as long as some tiles of weights; long units fill
// the last wave of blocks less well. The number with the least to do, in tiles and one wave after the other.
int choose_unit_tiles(const ApplyCallSm90& call) {
  constexpr int kMost = 64;
  int strips[kApplyMatrices], tiles[kApplyMatrices];
  for (int i = 0; i < call.table.count; ++i) {
    const ApplyMatrix& m = call.table.matrix[i];
    strips[i] = ceil_div(m.length, call.layout.width);
    tiles[i] = ceil_div(m.n, kTileRows);
  }
  const int64_t blocks = multiprocessors(), strip = call.layout.depth / kTileRows;
  int64_t least = INT64_MAX;
  int chosen = 1;
  for (int unit_tiles = 1; unit_tiles <= kMost; ++unit_tiles) {
    int64_t units = 0;
    for (int i = 0; i < call.table.count; ++i) units += int64_t{strips[i]} * ceil_div(tiles[i], unit_tiles);
    const int64_t work = (units + blocks - 1) / blocks * (unit_tiles + strip);
    if (work <= least) {
      least = work;
      chosen = unit_tiles;
    }
  }
  return chosen;
}

template <class T, int width>
const char* make_map(TensorMap& map, const ApplyMatrix& m, const void* data, int64_t stride) {
  return m.along_length ? WeightTile<width, true>::template map<T>(map, data, stride, m.n, m.length)
                        : WeightTile<width, false>::template map<T>(map, data, stride, m.length, m.n);
}

template <class T, int width>
const char* make_maps(ApplyTableSm90& table) {
  for (int i = 0; i < table.count; ++i) {
    const ApplyMatrix& m = table.matrix[i];
    TensorMap* map = table.map + i * table.maps_each;
    const char* error = BasisTile::map<T>(*map++, m.projector, m.rank, m.n, m.rank);
    if (!error) error = make_map<T, width>(*map++, m, m.param, m.param_stride);
    if (!error && m.grad) error = make_map<T, width>(*map++, m, m.grad, m.grad_stride);
    if (!error && m.compensation) error = make_map<T, width>(*map++, m, m.compensation, m.param_stride);
    if (error) return error;
  }
  return nullptr;
}

template <class T, int width>
const char* launch_tiled(ApplyCallSm90& call, Stream stream) {
  if (const char* error = make_maps<T, width>(call.table)) return error;
  // One strip holds the largest rank.
  int rank = 0;
  for (int i = 0; i < call.table.count; ++i) rank = std::max(rank, call.table.matrix[i].rank);
  call.layout = ApplyLayout(width, rank, call.layout.tensors);
  call.unit_tiles = choose_unit_tiles(call);
  uint32_t units = 0;
  for (int i = 0; i < call.table.count; ++i) {
    call.table.first_tile[i] = units;
    units += static_cast<uint32_t>(units_of(call.table.matrix[i], width, call.unit_tiles));
  }
  call.table.tiles = units;
  const auto most = static_cast<unsigned>(multiprocessors());
  const Grid grid{dim3(units < most ? units : most), dim3(kApplyThreadsSm90),
                  static_cast<size_t>(call.layout.shared_bytes())};
  return launch(apply_sm90_kernel<T, width>, grid, stream, call);
}

template <class T, int width>
const char* launch_width(const ApplyParams& params, Stream stream) {
  ApplyCallSm90 call{{}, params.rule, {}, 1};
  return launch_grouped(
      call.table, params.count, [&](int64_t i) -> const ApplyMatrix& { return params.matrices[i]; },
      [&](int64_t i) -> int64_t {
        const ApplyMatrix& m = params.matrices[i];
        const ApplyLayout layout = apply_layout(m, params.type);
        if (layout.width != width) return 0;
        call.layout.tensors = layout.tensors;
        call.table.maps_each = 1 + layout.tensors;
        return units_of(m, width, 1);
      },
      [&](const ApplyTableSm90&) { return launch_tiled<T, width>(call, stream); });
}

}  // namespace

const char* launch_apply_sm90(const ApplyParams& params, Stream stream) {
  switch (params.type) {
    case DataType::bf16: {
      const char* error = launch_width<bf16, kWideStrip>(params, stream);
      return error ? error : launch_width<bf16, kNarrowStrip>(params, stream);
    }
    case DataType::f16: return launch_width<f16, kNarrowStrip>(params, stream);
    default: return nullptr;
  }
}

}  // namespace pykern::lowrank
