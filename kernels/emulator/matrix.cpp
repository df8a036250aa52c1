// ldmatrix, stmatrix, mma: meetings of a warp.
#include "kernels/emulator/matrix.h"

#include <cstring>

#include "kernels/emulator/async_state.h"
#include "kernels/emulator/numeric.h"

namespace pykern::emulator {
namespace {

constexpr unsigned kWholeWarp = 0xffffffffu;

struct MatrixLane {
  uint32_t* registers;
  char* row;
};

struct MatrixContext {
  int count;
  bool transposed, store;
};

// Element (r, c) of matrix i lies in lane 4 r + c / 2, or, transposed, in lane 4 c + r / 2.
void move_matrices(void* const* lanes, unsigned, void* context) {
  const auto& how = *static_cast<const MatrixContext*>(context);
  for (int i = 0; i < how.count; ++i) {
    for (int row = 0; row < 8; ++row) {
      char* memory = static_cast<const MatrixLane*>(lanes[8 * i + row])->row;
      for (int column = 0; column < 8; ++column) {
        const int outer = how.transposed ? column : row, inner = how.transposed ? row : column;
        uint32_t& value = static_cast<const MatrixLane*>(lanes[4 * outer + inner / 2])->registers[i];
        const int shift = inner % 2 * 16;
        if (how.store) {
          const auto element = static_cast<uint16_t>(value >> shift);
          std::memcpy(memory + 2 * column, &element, 2);
        } else {
          uint16_t element;
          std::memcpy(&element, memory + 2 * column, 2);
          value = (value & ~(0xffffu << shift)) | uint32_t{element} << shift;
        }
      }
    }
  }
}

void require_whole_warp(const char* what, Site site) {
  const Block& block = *current->block;
  const size_t first = static_cast<size_t>(current->warp()) * 32;
  bool whole = first + 32 <= block.threads.size();
  for (size_t i = first; whole && i < first + 32; ++i) whole = block.threads[i]->state != Thread::done;
  if (!whole) fail(text("%s (%s:%d): all 32 lanes of a warp must take part", what, site.file, site.line));
}

void meet_matrices(uint32_t* registers, MatrixContext how, const void* row, const char* what, Site site, const void* from) {
  require_whole_warp(what, site);
  if (current->lane() < 8 * how.count) {
    require_shared(row, 16, 16, what, from);
    check_access(row, 16, how.store ? AccessKind::write : AccessKind::read, from);
  }
  MatrixLane mine{registers, static_cast<char*>(const_cast<void*>(row))};
  meet(kWholeWarp, &mine, move_matrices, &how, what, site);
}

// Values of all 65536 halves.
const float* half_table() {
  static const std::vector<float> table = [] {
    std::vector<float> values(1 << 16);
    for (uint32_t bits = 0; bits < 1 << 16; ++bits) values[bits] = half_to_float(static_cast<uint16_t>(bits));
    return values;
  }();
  return table.data();
}

float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

struct MultiplyLane {
  float* d;
  const uint32_t *a, *b;
};

// d[16][8] += a[16][depth] b[depth][8]
template <int depth>
void multiply_tile(float (*d)[8], const float (*a)[16], const float (*b)[8]) {
  for (int row = 0; row < 16; ++row) {
    float sum[8];
    for (int column = 0; column < 8; ++column) sum[column] = d[row][column];
    for (int k = 0; k < depth; ++k) {
      for (int column = 0; column < 8; ++column) sum[column] += a[row][k] * b[k][column];
    }
    for (int column = 0; column < 8; ++column) d[row][column] = sum[column];
  }
}

void multiply_lanes(void* const* lanes, unsigned, void* context) {
  const MatrixType type = *static_cast<const MatrixType*>(context);
  const bool wide = type == MatrixType::tf32;
  float a[16][16], b[16][8], d[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const auto& mine = *static_cast<const MultiplyLane*>(lanes[lane]);
    const int g = lane / 4, t = lane % 4;
    if (wide) {
      constexpr uint32_t read = ~0x1fffu;
      for (int i = 0; i < 4; ++i) a[g + i % 2 * 8][t + i / 2 * 4] = float_of(mine.a[i] & read);
      for (int i = 0; i < 2; ++i) b[t + 4 * i][g] = float_of(mine.b[i] & read);
    } else {
      for (int i = 0; i < 4; ++i) {
        unpack(type, mine.a[i], a[g + i % 2 * 8][2 * t + i / 2 * 8], a[g + i % 2 * 8][2 * t + i / 2 * 8 + 1]);
      }
      for (int i = 0; i < 2; ++i) unpack(type, mine.b[i], b[2 * t + 8 * i][g], b[2 * t + 8 * i + 1][g]);
    }
    for (int i = 0; i < 4; ++i) d[g + i / 2 * 8][2 * t + i % 2] = mine.d[i];
  }
  if (wide) {
    multiply_tile<8>(d, a, b);
  } else {
    multiply_tile<16>(d, a, b);
  }
  for (int lane = 0; lane < 32; ++lane) {
    const auto& mine = *static_cast<const MultiplyLane*>(lanes[lane]);
    for (int i = 0; i < 4; ++i) mine.d[i] = d[lane / 4 + i / 2 * 8][2 * (lane % 4) + i % 2];
  }
}

}  // namespace

float widen_element(MatrixType type, uint16_t bits) {
  return type == MatrixType::bf16 ? float_of(uint32_t{bits} << 16) : half_table()[bits];
}

void unpack(MatrixType type, uint32_t pair, float& low, float& high) {
  low = widen_element(type, static_cast<uint16_t>(pair));
  high = widen_element(type, static_cast<uint16_t>(pair >> 16));
}

void load_matrices(uint32_t* registers, int count, bool transposed, const void* row, Site site) {
  meet_matrices(registers, {count, transposed, false}, row, "ldmatrix", site, __builtin_return_address(0));
}

void store_matrices(void* row, int count, bool transposed, const uint32_t* registers, Site site) {
  meet_matrices(const_cast<uint32_t*>(registers), {count, transposed, true}, row, "stmatrix", site, __builtin_return_address(0));
}

void multiply(MatrixType type, float* d, const uint32_t* a, const uint32_t* b, Site site) {
  require_whole_warp("mma", site);
  MultiplyLane mine{d, a, b};
  meet(kWholeWarp, &mine, multiply_lanes, &type, "mma", site);
}

}  // namespace pykern::emulator
