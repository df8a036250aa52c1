// What the CPU and the CUDA side of packing share: checks, and the places of tensors in a block.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "common/checks.h"
#include "kernels/offload/staging.h"

namespace pykern {

// One tensor's place, from what the op got.
struct StagedTensor {
  Tensor tensor;
  StagingCodec codec;
  DataType type;   // of an encoded tensor
  int64_t count;   // elements; bytes where they are copied as they are
  int64_t offset;  // of its codes

  int64_t bytes() const { return tensor.numel() * tensor.element_size(); }
  int64_t scales_offset() const { return offset + staging_aligned(count); }
  int64_t scales_bytes() const { return codec == StagingCodec::none ? 0 : pykern::scales_bytes(count); }
  int64_t end() const { return scales_offset() + staging_aligned(scales_bytes()); }
};

// The tensors that have elements.
inline std::vector<StagedTensor> staged_tensors(const std::vector<Tensor>& tensors,
                                                const std::vector<int64_t>& offsets,
                                                const std::vector<int64_t>& codecs, const Tensor& staging) {
  check_type(staging, ScalarType::Byte, "staging");
  check_dim(staging, 1, "staging");
  check_contiguous(staging, "staging");
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(staging.const_data_ptr()) % 16 == 0,
                  "staging: expected to begin at a multiple of 16 bytes");
  STD_TORCH_CHECK(offsets.size() == tensors.size() && codecs.size() == tensors.size(),
                  "offsets, codecs: expected one for each of ", tensors.size(), " tensors, got ", offsets.size(),
                  " and ", codecs.size());
  std::vector<StagedTensor> staged;
  for (size_t i = 0; i < tensors.size(); ++i) {
    const Tensor& tensor = tensors[i];
    const std::string name = "tensors[" + std::to_string(i) + "]";
    check_contiguous(tensor, name.c_str());
    STD_TORCH_CHECK(tensor.is_cpu() == staging.is_cpu() && tensor.get_device_index() == staging.get_device_index(),
                    name, ": expected on staging's device");
    STD_TORCH_CHECK(codecs[i] >= 0 && codecs[i] <= static_cast<int64_t>(StagingCodec::int8), name, ": no codec ",
                    codecs[i]);
    if (tensor.numel() == 0) continue;
    StagedTensor place{tensor, static_cast<StagingCodec>(codecs[i]), DataType::f32, tensor.numel(), offsets[i]};
    if (place.codec == StagingCodec::none) {
      place.count = place.bytes();
    } else {
      place.type = data_type(tensor, name.c_str());
      STD_TORCH_CHECK(place.type != DataType::f64, name, ": float64 has no codec");
    }
    STD_TORCH_CHECK(place.offset >= 0 && place.offset % kStagingAlignment == 0, name,
                    ": expected an offset that is a multiple of ", kStagingAlignment, ", got ", place.offset);
    STD_TORCH_CHECK(place.end() <= staging.numel(), name, ": expected room up to byte ", place.end(),
                    " of staging, which has ", staging.numel());
    staged.push_back(place);
  }
  return staged;
}

}  // namespace pykern
