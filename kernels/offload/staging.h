// Many tensors in one block of bytes, and back. The codes of a tensor begin at a multiple of kStagingAlignment; the
// scales of a tensor that is encoded follow them at the next such multiple. The bytes between are zero.
#pragma once

#include <cstdint>

#include "kernels/common/host_device.h"
#include "kernels/common/numeric.h"
#include "kernels/common/stream.h"

namespace pykern {

// In the order of CODECS in pykern/offload/staging.py.
enum class StagingCodec : int { none, float8_e4m3, int8 };

constexpr int64_t kStagingAlignment = 256;
// Elements that share a scale.
constexpr int64_t kScaleBlock = 128;

PYKERN_HOST_DEVICE int64_t staging_aligned(int64_t bytes) {
  return (bytes + kStagingAlignment - 1) / kStagingAlignment * kStagingAlignment;
}
// Bytes of the scales of `count` elements.
PYKERN_HOST_DEVICE int64_t scales_bytes(int64_t count) {
  return (count + kScaleBlock - 1) / kScaleBlock * static_cast<int64_t>(sizeof(float));
}

// Bytes of a tensor that one block of threads takes at a time.
constexpr int64_t kStagingChunk = 16384;

struct StagingSegment {
  void* tensor;   // read by pack, written by unpack
  int64_t count;  // elements; bytes where they are copied as they are
  int64_t offset;
  int32_t first_chunk;  // of the launch
  DataType type;        // of encoded tensors
};

// The table travels with the launch: nothing is copied to the device before, and a captured graph keeps it. As many
// segments as fit into the 4096 bytes that parameters may have.
constexpr int kStagingSegments = 120;

struct StagingLaunch {
  unsigned char* staging;
  StagingCodec codec;  // one for all segments of a launch
  int32_t segments, chunks;
  StagingSegment segment[kStagingSegments];
};
static_assert(sizeof(StagingLaunch) <= 4096, "more than the parameters of a launch hold");

const char* launch_staging_pack(const StagingLaunch& params, Stream stream);
const char* launch_staging_unpack(const StagingLaunch& params, Stream stream);

}  // namespace pykern
