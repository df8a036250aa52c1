// A block of 128 elements at a time, widened to float32. The compiler vectorises the loops over it: they have no
// branches.
#include "offload/codec.h"

#include "common/numeric.h"
#include "common/vector.h"
#include "kernels/offload/codec.h"

namespace pykern::PYKERN_SIMD {
namespace {

template <class T>
PYKERN_INLINE void widen_block(const T* source, int64_t count, float* block) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(block + i, load(source + i));
  if (i < count) {
    store(block + i, load_partial(source + i, count - i));
    i += kLanes;
  }
  for (; i < kScaleBlock; i += kLanes) store(block + i, zero());
}

template <class T>
PYKERN_INLINE void narrow_block(const float* block, int64_t count, T* target) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(target + i, load(block + i));
  if (i < count) store_partial(target + i, load(block + i), count - i);
}

// The largest of codec::finite_bits. The compiler does not find this maximum.
PYKERN_INLINE uint32_t largest_finite_bits(const float* block) {
  vint largest = {};
  for (int64_t i = 0; i < kScaleBlock; i += kLanes) {
    const vint bits = (vint)load(block + i) & 0x7fffffff;
    const vint finite = bits < static_cast<int32_t>(codec::kInfinityBits) ? bits : vint{};
    largest = finite > largest ? finite : largest;
  }
  int32_t result = 0;
  for (int lane = 0; lane < kLanes; ++lane) result = largest[lane] > result ? largest[lane] : result;
  return static_cast<uint32_t>(result);
}

template <class Codec, class T>
void encode(const T* source, int64_t count, uint8_t* codes, float* scales) {
  alignas(64) float block[kScaleBlock];
  alignas(64) uint8_t coded[kScaleBlock];
  for (int64_t first = 0; first < count; first += kScaleBlock) {
    const int64_t size = count - first < kScaleBlock ? count - first : kScaleBlock;
    widen_block(source + first, size, block);
    const float scale = codec::scale_of(largest_finite_bits(block), Codec::kRange);
    const float inverse = 1.0f / scale;
    for (int i = 0; i < kScaleBlock; ++i) coded[i] = codec::encode<Codec>(block[i], inverse);
    std::memcpy(codes + first, coded, size);
    scales[first / kScaleBlock] = scale;
  }
}

template <class Codec, class T>
void decode(const uint8_t* codes, const float* scales, int64_t count, T* target) {
  alignas(64) float block[kScaleBlock];
  alignas(64) uint8_t coded[kScaleBlock] = {};
  for (int64_t first = 0; first < count; first += kScaleBlock) {
    const int64_t size = count - first < kScaleBlock ? count - first : kScaleBlock;
    std::memcpy(coded, codes + first, size);
    const float scale = scales[first / kScaleBlock];
    for (int i = 0; i < kScaleBlock; ++i) block[i] = Codec::decode(coded[i], scale);
    narrow_block(block, size, target + first);
  }
}

template <class Codec>
void encode_type(DataType type, const void* source, int64_t count, uint8_t* codes, float* scales) {
  if (type == DataType::f32) return encode<Codec>(static_cast<const float*>(source), count, codes, scales);
  if (type == DataType::bf16) return encode<Codec>(static_cast<const bf16*>(source), count, codes, scales);
  encode<Codec>(static_cast<const f16*>(source), count, codes, scales);
}

template <class Codec>
void decode_type(DataType type, const uint8_t* codes, const float* scales, int64_t count, void* target) {
  if (type == DataType::f32) return decode<Codec>(codes, scales, count, static_cast<float*>(target));
  if (type == DataType::bf16) return decode<Codec>(codes, scales, count, static_cast<bf16*>(target));
  decode<Codec>(codes, scales, count, static_cast<f16*>(target));
}

}  // namespace

void staging_encode(StagingCodec codec, DataType type, const void* source, int64_t count, uint8_t* codes,
                    float* scales) {
  if (codec == StagingCodec::int8) return encode_type<codec::Int8>(type, source, count, codes, scales);
  encode_type<codec::Float8E4m3>(type, source, count, codes, scales);
}

void staging_decode(StagingCodec codec, DataType type, const uint8_t* codes, const float* scales, int64_t count,
                    void* target) {
  if (codec == StagingCodec::int8) return decode_type<codec::Int8>(type, codes, scales, count, target);
  decode_type<codec::Float8E4m3>(type, codes, scales, count, target);
}

}  // namespace pykern::PYKERN_SIMD
