// Packing tensors into a block of bytes on CUDA.
#include <torch/csrc/stable/library.h>

#include "common/cuda.h"
#include "common/scratch.h"
#include "offload/staging.h"

namespace pykern {
namespace {

// One launch for the tensors of each codec, more where a launch's table doesn't hold them.
template <bool packing>
void launch_all(const std::vector<StagedTensor>& staged, const Tensor& staging, const char* op) {
  const cuda::DeviceGuard guard(staging);
  const Stream stream = cuda::current_stream(staging);
  unsigned char* block = packing ? cuda::output<unsigned char>(staging)
                                 : const_cast<unsigned char*>(cuda::input<unsigned char>(staging));
  for (const StagingCodec codec : {StagingCodec::none, StagingCodec::float8_e4m3, StagingCodec::int8}) {
    StagingLaunch params{block, codec, 0, 0, {}};
    const auto launch = [&] {
      if (params.segments == 0) return;
      cuda::check_launch(packing ? launch_staging_pack(params, stream) : launch_staging_unpack(params, stream), op);
      params.segments = params.chunks = 0;
    };
    for (const StagedTensor& place : staged) {
      if (place.codec != codec) continue;
      void* data = packing ? const_cast<void*>(cuda::input(place.tensor)) : cuda::output(place.tensor);
      params.segment[params.segments++] = {data, place.count, place.offset, params.chunks, place.type};
      params.chunks += static_cast<int32_t>(ceil_div(place.bytes(), kStagingChunk));
      if (params.segments == kStagingSegments) launch();
    }
    launch();
  }
}

void pack(std::vector<Tensor> tensors, std::vector<int64_t> offsets, std::vector<int64_t> codecs, Tensor staging) {
  cuda::check_device(staging, "staging");
  launch_all<true>(staged_tensors(tensors, offsets, codecs, staging), staging, "offload_pack");
}

void unpack(Tensor staging, std::vector<int64_t> offsets, std::vector<int64_t> codecs, std::vector<Tensor> tensors) {
  cuda::check_device(staging, "staging");
  launch_all<false>(staged_tensors(tensors, offsets, codecs, staging), staging, "offload_unpack");
}

}  // namespace

PYKERN_CUDA_IMPL(m) {
  m.impl("offload_pack", TORCH_BOX(&pack));
  m.impl("offload_unpack", TORCH_BOX(&unpack));
}

}  // namespace pykern
