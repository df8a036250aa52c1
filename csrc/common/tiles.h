// The eight tile registers of AMX behind thin functions. A tile holds 16 rows of 64 bytes.
//
// Inline assembly rather than the compiler's macros: in GCC 12 those don't tell the compiler that a
// tile load and the configuration read memory, so it may move or drop the stores in front of them.
//
// PYKERN_TILE_TWIN puts a scalar twin in their place. Only the tests define it: the code over the
// tiles (amx.h) is then proved on machines that have none. The instructions themselves were never
// run where this was written, which is why tile_check.h tries them before the level is chosen.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/numeric.h"

namespace pykern::PYKERN_SIMD {

#if defined(PYKERN_TILE_TWIN)

inline thread_local unsigned char twin_tiles[8][16][64];
inline thread_local bool twin_configured = false;

PYKERN_INLINE void tile_configure() { twin_configured = true; }

PYKERN_INLINE void tile_release() {
  twin_configured = false;
  std::memset(twin_tiles, 0xff, sizeof twin_tiles);  // NaN
}

template <int Tile>
PYKERN_INLINE void tile_zero() {
  if (!twin_configured) __builtin_trap();
  std::memset(twin_tiles[Tile], 0, sizeof twin_tiles[Tile]);
}

template <int Tile>
PYKERN_INLINE void tile_load(const void* source, int64_t row_bytes) {
  if (!twin_configured) __builtin_trap();
  for (int row = 0; row < 16; ++row) {
    std::memcpy(twin_tiles[Tile][row], static_cast<const char*>(source) + row * row_bytes, 64);
  }
}

template <int Tile>
PYKERN_INLINE void tile_store(void* target, int64_t row_bytes) {
  if (!twin_configured) __builtin_trap();
  for (int row = 0; row < 16; ++row) {
    std::memcpy(static_cast<char*>(target) + row * row_bytes, twin_tiles[Tile][row], 64);
  }
}

template <int Sum, int A, int B>
PYKERN_INLINE void tile_multiply_bf16() {
  if (!twin_configured) __builtin_trap();
  const auto element = [](int tile, int row, int column) {
    uint32_t bits = 0;
    std::memcpy(reinterpret_cast<char*>(&bits) + 2, twin_tiles[tile][row] + 2 * column, 2);
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
  };
  for (int row = 0; row < 16; ++row) {
    for (int column = 0; column < 16; ++column) {
      float sum;
      std::memcpy(&sum, twin_tiles[Sum][row] + 4 * column, sizeof sum);
      for (int pair = 0; pair < 16; ++pair) {
        sum += element(A, row, 2 * pair) * element(B, pair, 2 * column);
        sum += element(A, row, 2 * pair + 1) * element(B, pair, 2 * column + 1);
      }
      std::memcpy(twin_tiles[Sum][row] + 4 * column, &sum, sizeof sum);
    }
  }
}

#else

// All eight tiles full size.
PYKERN_INLINE void tile_configure() {
  struct alignas(64) Configuration {
    uint8_t palette = 1;
    uint8_t start_row = 0;
    uint8_t reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  };
  const Configuration configuration;
  __asm__ volatile("ldtilecfg %0" : : "m"(configuration));
}

PYKERN_INLINE void tile_release() { __asm__ volatile("tilerelease" : : : "memory"); }

template <int Tile>
PYKERN_INLINE void tile_zero() {
  __asm__ volatile("tilezero %%tmm%c0" : : "i"(Tile));
}

template <int Tile>
PYKERN_INLINE void tile_load(const void* source, int64_t row_bytes) {
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(source), "r"(row_bytes), "i"(Tile) : "memory");
}

template <int Tile>
PYKERN_INLINE void tile_store(void* target, int64_t row_bytes) {
  __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(target), "r"(row_bytes), "i"(Tile) : "memory");
}

// Sum[16, 16] += A[16, 32] B[32, 16]; row p of tile B holds rows 2p and 2p + 1 of B, interleaved.
template <int Sum, int A, int B>
PYKERN_INLINE void tile_multiply_bf16() {
  __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(Sum), "i"(A), "i"(B));
}

#endif

// Configures the tiles for a scope and releases them after it: a thread that keeps live tile state
// makes every context switch dearer.
class TileScope {
 public:
  PYKERN_INLINE TileScope() { tile_configure(); }
  PYKERN_INLINE ~TileScope() { tile_release(); }
  TileScope(const TileScope&) = delete;
  TileScope& operator=(const TileScope&) = delete;
};

}  // namespace pykern::PYKERN_SIMD
