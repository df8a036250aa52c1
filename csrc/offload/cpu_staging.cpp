// Packing tensors into a block of bytes on the CPU.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstring>

#include "common/parallel.h"
#include "offload/codec.h"
#include "offload/staging.h"

namespace pykern {
namespace {

// Of elements, or of bytes that are copied as they are. A multiple of kScaleBlock, so that scales have one writer.
constexpr int64_t kPiece = 65536;

struct Piece {
  const StagedTensor* place;
  int64_t first, count;
};

std::vector<Piece> pieces_of(const std::vector<StagedTensor>& staged) {
  std::vector<Piece> pieces;
  for (const StagedTensor& place : staged) {
    for (int64_t first = 0; first < place.count; first += kPiece) {
      pieces.push_back({&place, first, std::min(kPiece, place.count - first)});
    }
  }
  return pieces;
}

void pack(std::vector<Tensor> tensors, std::vector<int64_t> offsets, std::vector<int64_t> codecs, Tensor staging) {
  check_cpu(staging, "staging");
  const std::vector<StagedTensor> staged = staged_tensors(tensors, offsets, codecs, staging);
  const std::vector<Piece> pieces = pieces_of(staged);
  uint8_t* block = output<uint8_t>(staging);
  parallel_tasks(static_cast<int64_t>(pieces.size()), [&](int64_t task, int) {
    const auto [place, first, count] = pieces[task];
    uint8_t* codes = block + place->offset + first;
    uint8_t* scales = block + place->scales_offset();
    const char* source = input<char>(place->tensor);
    if (place->codec == StagingCodec::none) {
      std::memcpy(codes, source + first, count);
    } else {
      staging_encode()(place->codec, place->type, source + first * place->tensor.element_size(), count, codes,
                       reinterpret_cast<float*>(scales) + first / kScaleBlock);
    }
    if (first + count == place->count) {
      std::fill(codes + count, scales, uint8_t{0});
      std::fill(scales + place->scales_bytes(), block + place->end(), uint8_t{0});
    }
  });
}

void unpack(Tensor staging, std::vector<int64_t> offsets, std::vector<int64_t> codecs, std::vector<Tensor> tensors) {
  check_cpu(staging, "staging");
  const std::vector<StagedTensor> staged = staged_tensors(tensors, offsets, codecs, staging);
  const std::vector<Piece> pieces = pieces_of(staged);
  const uint8_t* block = input<uint8_t>(staging);
  parallel_tasks(static_cast<int64_t>(pieces.size()), [&](int64_t task, int) {
    const auto [place, first, count] = pieces[task];
    const uint8_t* codes = block + place->offset + first;
    char* target = output<char>(place->tensor);
    if (place->codec == StagingCodec::none) {
      std::memcpy(target + first, codes, count);
    } else {
      const float* scales = reinterpret_cast<const float*>(block + place->scales_offset()) + first / kScaleBlock;
      staging_decode()(place->codec, place->type, codes, scales, count,
                       target + first * place->tensor.element_size());
    }
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pykern, CPU, m) {
  m.impl("offload_pack", TORCH_BOX(&pack));
  m.impl("offload_unpack", TORCH_BOX(&unpack));
}

}  // namespace pykern
