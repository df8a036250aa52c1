// A block of threads takes one chunk of one tensor. Which one is found in the table of the launch's parameters.
#pragma once

#include "kernels/common/reduce.cuh"
#include "kernels/common/vector.cuh"
#include "kernels/offload/codec.h"
#include "kernels/offload/staging.h"

namespace pykern {

constexpr int kStagingThreads = 256;
// Packs of a chunk that each thread takes, all of them loaded before the first is used.
constexpr int kStagingPacks = kStagingChunk / 16 / kStagingThreads;

// The last segment that begins at or before the chunk. Empty tensors have no segment.
__device__ __forceinline__ int staging_segment(const StagingLaunch& params, int32_t chunk) {
  int low = 0, high = params.segments - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (params.segment[middle].first_chunk <= chunk) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

__device__ __forceinline__ void zero_to_alignment(unsigned char* bytes, int64_t count) {
  const int64_t at = count + threadIdx.x;
  if (at < staging_aligned(count)) bytes[at] = 0;
}

// --- bytes as they are -------------------------------------------------------------------------------------

template <class Unit>
__device__ __forceinline__ int copy_units(unsigned char* target, const unsigned char* source, int bytes) {
  const int units = bytes / static_cast<int>(sizeof(Unit));
#pragma unroll 1
  for (int unit = threadIdx.x; unit < units; unit += kStagingThreads) {
    reinterpret_cast<Unit*>(target)[unit] = reinterpret_cast<const Unit*>(source)[unit];
  }
  return units * static_cast<int>(sizeof(Unit));
}

__device__ __forceinline__ int copy_packs(unsigned char* target, const unsigned char* source, int bytes) {
  const int packs = bytes / 16;
  const uint32_t* from = reinterpret_cast<const uint32_t*>(source);
  uint32_t* to = reinterpret_cast<uint32_t*>(target);
  Pack<uint32_t> values[kStagingPacks];
#pragma unroll
  for (int i = 0; i < kStagingPacks; ++i) {
    const int pack = threadIdx.x + i * kStagingThreads;
    if (pack < packs) values[i] = load_pack<Reuse::stream>(from + pack * 4);
  }
#pragma unroll
  for (int i = 0; i < kStagingPacks; ++i) {
    const int pack = threadIdx.x + i * kStagingThreads;
    if (pack < packs) store_pack<Reuse::stream>(to + pack * 4, values[i]);
  }
  return packs * 16;
}

// At most a chunk. The block's side is aligned; the tensor's decides how wide a unit may be.
__device__ __forceinline__ void copy_chunk(unsigned char* target, const unsigned char* source, int bytes) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(target) | reinterpret_cast<uintptr_t>(source);
  int done;
  if (address % 16 == 0) {
    done = copy_packs(target, source, bytes);
  } else if (address % 8 == 0) {
    done = copy_units<uint64_t>(target, source, bytes);
  } else if (address % 4 == 0) {
    done = copy_units<uint32_t>(target, source, bytes);
  } else if (address % 2 == 0) {
    done = copy_units<uint16_t>(target, source, bytes);
  } else {
    done = 0;
  }
  copy_units<unsigned char>(target + done, source + done, bytes - done);
}

// --- encoded -------------------------------------------------------------------------------------------------

template <int bytes>
struct CodeWord;
template <>
struct CodeWord<4> {
  using type = uint32_t;
};
template <>
struct CodeWord<8> {
  using type = uint64_t;
};

// An encoded tensor and its place in the block.
template <class T>
struct Coded {
  T* tensor;
  unsigned char* codes;
  float* scales;
  int64_t count;
};

// `packs` packs of each thread, from element `first` on. A whole stretch lies inside the tensor, whose address allows
// packs; another is read and written element by element. A thread holds one pack of elements at a time, so 128
// elements are those of 16 or 32 neighbouring threads of one warp.
template <class Codec, int packs, bool whole, class T>
__device__ __forceinline__ void encode_packs(const Coded<T>& part, int64_t first) {
  constexpr int kSize = Pack<T>::kSize;
  constexpr int kSharers = kScaleBlock / kSize;
  using Word = typename CodeWord<kSize>::type;
  Pack<T> values[packs];
#pragma unroll
  for (int i = 0; i < packs; ++i) {
    const int64_t element = first + (threadIdx.x + i * kStagingThreads) * kSize;
    if (whole) {
      values[i] = load_pack<Reuse::stream>(part.tensor + element);
    } else {
#pragma unroll
      for (int j = 0; j < kSize; ++j) {
        values[i][j] = T{};
        if (element + j < part.count) values[i][j] = part.tensor[element + j];
      }
    }
  }
#pragma unroll
  for (int i = 0; i < packs; ++i) {
    const int64_t element = first + (threadIdx.x + i * kStagingThreads) * kSize;
    uint32_t largest = 0;
#pragma unroll
    for (int j = 0; j < kSize; ++j) largest = Largest()(largest, codec::absolute_bits(widen(values[i][j])));
    // Rarely anything is not finite; only then is each value asked.
    const bool finite = !__any_sync(kFullWarp, largest >= codec::kInfinityBits);
    if (!finite) {
      largest = 0;
#pragma unroll
      for (int j = 0; j < kSize; ++j) largest = Largest()(largest, codec::finite_bits(widen(values[i][j])));
    }
#pragma unroll
    for (int distance = kSharers / 2; distance > 0; distance /= 2) {
      largest = Largest()(largest, __shfl_xor_sync(kFullWarp, largest, distance));
    }
    const float scale = codec::scale_of(largest, Codec::kRange);
    const float inverse = 1.0f / scale;
    Word word = 0;
    if (finite) {
#pragma unroll
      for (int j = 0; j < kSize; ++j) word |= Word{Codec::encode_finite(widen(values[i][j]), inverse)} << (8 * j);
    } else {
#pragma unroll
      for (int j = 0; j < kSize; ++j) word |= Word{codec::encode<Codec>(widen(values[i][j]), inverse)} << (8 * j);
    }
    if (whole) {
      *reinterpret_cast<Word*>(part.codes + element) = word;
    } else {
      for (int j = 0; j < kSize && element + j < part.count; ++j) {
        part.codes[element + j] = static_cast<unsigned char>(word >> (8 * j));
      }
    }
    if (threadIdx.x % kSharers == 0 && (whole || element < part.count)) part.scales[element / kScaleBlock] = scale;
  }
}

template <class Codec, int packs, bool whole, class T>
__device__ __forceinline__ void decode_packs(const Coded<T>& part, int64_t first) {
  constexpr int kSize = Pack<T>::kSize;
  using Word = typename CodeWord<kSize>::type;
  Word words[packs];
  float scales[packs];
#pragma unroll
  for (int i = 0; i < packs; ++i) {
    const int64_t element = first + (threadIdx.x + i * kStagingThreads) * kSize;
    if (!whole && element >= part.count) return;
    // The zeros behind the last code make every word whole.
    words[i] = *reinterpret_cast<const Word*>(part.codes + element);
    scales[i] = part.scales[element / kScaleBlock];
  }
#pragma unroll
  for (int i = 0; i < packs; ++i) {
    const int64_t element = first + (threadIdx.x + i * kStagingThreads) * kSize;
    Pack<T> values;
#pragma unroll
    for (int j = 0; j < kSize; ++j) {
      narrow(Codec::decode(static_cast<uint8_t>(words[i] >> (8 * j)), scales[i]), values[j]);
    }
    if (whole) {
      store_pack(part.tensor + element, values);
    } else {
#pragma unroll
      for (int j = 0; j < kSize; ++j) {
        if (element + j < part.count) part.tensor[element + j] = values[j];
      }
    }
  }
}

template <bool packing, class Codec, int packs, bool whole, class T>
__device__ __forceinline__ void code_packs(const Coded<T>& part, int64_t first) {
  if (packing) {
    encode_packs<Codec, packs, whole>(part, first);
  } else {
    decode_packs<Codec, packs, whole>(part, first);
  }
}

template <bool packing, class T, class Codec>
__device__ __forceinline__ void code_chunk(const StagingSegment& segment, unsigned char* staging, int64_t chunk) {
  constexpr int64_t kElements = kStagingChunk / static_cast<int64_t>(sizeof(T));
  unsigned char* codes = staging + segment.offset;
  const Coded<T> part{static_cast<T*>(segment.tensor), codes,
                      reinterpret_cast<float*>(codes + staging_aligned(segment.count)), segment.count};
  const int64_t first = chunk * kElements;
  if (first + kElements <= part.count && allows_packs(part.tensor)) {
    code_packs<packing, Codec, kStagingPacks, true>(part, first);
  } else {
#pragma unroll 1
    for (int i = 0; i < kStagingPacks; ++i) {
      code_packs<packing, Codec, 1, false>(part, first + i * (kElements / kStagingPacks));
    }
  }
  if (packing && first + kElements >= part.count) {
    zero_to_alignment(part.codes, part.count);
    zero_to_alignment(reinterpret_cast<unsigned char*>(part.scales), scales_bytes(part.count));
  }
}

template <bool packing, class Codec>
__global__ void __launch_bounds__(kStagingThreads) staging_code_kernel(StagingLaunch params) {
  const int32_t index = static_cast<int32_t>(blockIdx.x);
  const StagingSegment& segment = params.segment[staging_segment(params, index)];
  const int64_t chunk = index - segment.first_chunk;
  if (segment.type == DataType::f32) {
    code_chunk<packing, float, Codec>(segment, params.staging, chunk);
  } else if (segment.type == DataType::bf16) {
    code_chunk<packing, bf16, Codec>(segment, params.staging, chunk);
  } else {
    code_chunk<packing, f16, Codec>(segment, params.staging, chunk);
  }
}

template <bool packing>
__global__ void __launch_bounds__(kStagingThreads) staging_copy_kernel(StagingLaunch params) {
  const int32_t index = static_cast<int32_t>(blockIdx.x);
  const StagingSegment& segment = params.segment[staging_segment(params, index)];
  const int64_t first = (index - segment.first_chunk) * kStagingChunk, left = segment.count - first;
  const int bytes = static_cast<int>(left < kStagingChunk ? left : kStagingChunk);
  unsigned char* tensor = static_cast<unsigned char*>(segment.tensor) + first;
  unsigned char* block = params.staging + segment.offset;
  copy_chunk(packing ? block + first : tensor, packing ? tensor : block + first, bytes);
  if (packing && left <= kStagingChunk) zero_to_alignment(block, segment.count);
}

}  // namespace pykern
