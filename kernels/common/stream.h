// cudaStream_t without CUDA's headers, for the plain functions of kernels/F/launch.h.
#pragma once

struct CUstream_st;

namespace pykern {

using Stream = CUstream_st*;

}  // namespace pykern
