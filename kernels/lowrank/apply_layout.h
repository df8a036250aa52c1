// The kernel for compute capability 9.0: which weights it takes, and how it lays out shared memory. Plain C++.
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

// What a block holds: a strip of the direction, `width` columns along the length by the whole rank; stages of the
// basis; and buffers, each with a tile of the weight and one of whatever else changes it.
struct ApplyLayout {
  int width = 0;  // 0: the matrix is left to the kernel for all architectures
  int depth = 0;  // the rank in whole tiles
  int tensors = 0, buffers = 0;

  ApplyLayout() = default;
  ApplyLayout(int width, int rank, int tensors)
      : width(width), depth((rank + kTileDepth - 1) / kTileDepth * kTileDepth), tensors(tensors) {
    const int left = (kApplyMemory - buffers_begin()) / buffer_bytes();
    buffers = left < kMostBuffers ? left : kMostBuffers;
  }

  PYKERN_HOST_DEVICE int strip_bytes() const { return 2 * width * depth; }
  PYKERN_HOST_DEVICE int buffers_begin() const { return strip_bytes() + kBasisStages * kTileRows * kPanelRowBytes; }
  PYKERN_HOST_DEVICE int buffer_bytes() const { return 2 * width * kTileRows * tensors; }
  int shared_bytes() const { return buffers_begin() + buffers * buffer_bytes(); }
};

// Each tile of the basis comes out of L2 once for a strip: for a narrow one, of a rank of 256, it has as many bytes as
// the tile of a weight has that is read and written. With two buffers one is copied while the other one changes.
constexpr int kWideStrip = 256, kNarrowStrip = 128;
// The kernel for all architectures is bound by memory up to the least rank. Beyond the most a narrow strip leaves no
// room for two buffers.
constexpr int kLeastRankSm90 = 65, kMostRankSm90 = 640;

inline ApplyLayout apply_layout(const ApplyMatrix& m, DataType type) {
  const int64_t rows = m.along_length ? m.n : m.length, columns = m.along_length ? m.length : m.n;
  const bool sixteen_bits = type == DataType::bf16 || type == DataType::f16;
  const bool takes = sixteen_bits && m.direction && !m.low && (!m.grad || m.factors) && m.rank >= kLeastRankSm90 &&
                     m.rank <= kMostRankSm90 && allows_panels(m.projector, m.rank, m.n, m.rank) &&
                     allows_panels(m.param, m.param_stride, rows, columns) &&
                     (!m.grad || allows_panels(m.grad, m.grad_stride, rows, columns)) &&
                     (!m.compensation || allows_panels(m.compensation, m.param_stride, rows, columns));
  if (!takes) return {};
  const int tensors = 1 + (m.grad != nullptr) + (m.compensation != nullptr);
  const ApplyLayout wide(kWideStrip, m.rank, tensors), narrow(kNarrowStrip, m.rank, tensors);
  // Weights of f16 are too rare for kernels of their own width.
  if (wide.buffers >= 2 && type == DataType::bf16) return wide;
  return narrow.buffers >= 2 ? narrow : ApplyLayout();
}

// Of those matrices for which apply_layout has a width.
const char* launch_apply_sm90(const ApplyParams& params, Stream stream);

}  // namespace pykern::lowrank
