#include "kernels/common/launch.h"
#include "kernels/offload/staging_sm80.cuh"

namespace pykern {
namespace {

template <bool packing>
const char* launch_staging(const StagingLaunch& params, Stream stream) {
  const Grid grid{dim3(params.chunks), dim3(kStagingThreads)};
  switch (params.codec) {
    case StagingCodec::none: return launch(staging_copy_kernel<packing>, grid, stream, params);
    case StagingCodec::float8_e4m3:
      return launch(staging_code_kernel<packing, codec::Float8E4m3>, grid, stream, params);
    case StagingCodec::int8: return launch(staging_code_kernel<packing, codec::Int8>, grid, stream, params);
  }
  return "unknown codec";
}

}  // namespace

const char* launch_staging_pack(const StagingLaunch& params, Stream stream) {
  return launch_staging<true>(params, stream);
}

const char* launch_staging_unpack(const StagingLaunch& params, Stream stream) {
  return launch_staging<false>(params, stream);
}

}  // namespace pykern
