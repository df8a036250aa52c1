// Which weights change by the kernel for compute capability 9.0, and how it lays out shared memory. Plain C++.
#pragma once

#include "kernels/common/host_device.h"
#include "kernels/lowrank/apply.h"
#include "kernels/lowrank/panels.h"

namespace pykern::lowrank {

// Sizes along n of the tiles of a weight, and along the rank of a tile of the basis.
constexpr int kTileRows = 64, kTileDepth = kPanelElements;
// Stages of tiles of the basis: together a rank of 256.
constexpr int kBasisStages = 4;
constexpr int kMostBuffers = 8;
// A little of the 227 KiB is left for barriers.
constexpr int kApplyMemory = 224 * 1024;

// What a block holds: a strip of the direction, `width` columns by the whole rank, stages of the basis, and buffers,
// each with the tiles of a weight and of what else changes it.
struct ApplyLayout {
  int width = 0;                // along the length; 0: the kernel for compute capability 8.0
  int depth = 0, tensors = 0;   // the rank in whole tiles; tiles in a buffer
  int buffers = 0;

  ApplyLayout() = default;
  ApplyLayout(int width, int rank, int tensors)
      : width(width), depth((rank + kTileDepth - 1) / kTileDepth * kTileDepth), tensors(tensors) {
    const int left = (kApplyMemory - strip_bytes() - kBasisStages * kTileRows * kPanelRowBytes) / buffer_bytes();
    buffers = left < kMostBuffers ? left : kMostBuffers;
  }

  PYKERN_HOST_DEVICE int strip_bytes() const { return 2 * width * depth; }
  PYKERN_HOST_DEVICE int buffer_bytes() const { return 2 * width * kTileRows * tensors; }
  PYKERN_HOST_DEVICE int shared_bytes() const {
    return strip_bytes() + kBasisStages * kTileRows * kPanelRowBytes + buffers * buffer_bytes();
  }
};

// The width of a strip is how often a tile of the basis is used: the wider one counts where the basis, out of L2,
// would else be more than the weight. Two buffers let a tile be copied or stored while another one changes.
constexpr int kWideStrip = 256, kNarrowStrip = 128;
// Below, the kernel for all architectures is bound by the weights as well.
constexpr int kLeastRank = 64;

inline ApplyLayout apply_layout(const ApplyMatrix& m, const ApplyRule& rule, DataType type) {
  const int64_t rows = m.along_length ? m.n : m.length, columns = m.along_length ? m.length : m.n;
  const bool product = (type == DataType::bf16 || type == DataType::f16) && m.direction && !m.low;
  if (!product || m.rank < kLeastRank || (m.grad && !m.factors)) return {};
  const bool copies = allows_panels(m.projector, m.rank, m.n, m.rank) &&
                      allows_panels(m.param, m.param_stride, rows, columns) &&
                      (!m.grad || allows_panels(m.grad, m.grad_stride, rows, columns)) &&
                      (!m.compensation || allows_panels(m.compensation, m.param_stride, rows, columns));
  if (!copies) return {};
  const int tensors = 1 + (m.grad != nullptr) + (rule.rounding == WeightRounding::kahan);
  const ApplyLayout wide(kWideStrip, m.rank, tensors), narrow(kNarrowStrip, m.rank, tensors);
  if (wide.buffers >= 2 && type == DataType::bf16) return wide;
  return narrow.buffers >= 2 ? narrow : ApplyLayout();
}

// Of those matrices for which apply_layout has a width.
const char* launch_apply_sm90(const ApplyParams& params, Stream stream);

}  // namespace pykern::lowrank
