// ldmatrix, stmatrix, mma: meetings of a warp.
#include "kernels/emulator/matrix.h"

#include <cstring>

#include "kernels/emulator/async_state.h"
#include "kernels/emulator/numeric.h"
#include "kernels/emulator/rows.h"

namespace pykern::emulator {
namespace {

constexpr unsigned kWholeWarp = 0xffffffffu;

// Meets all lanes of the warp; `Lane` begins with a flag that tells whether they all came.
template <class Lane>
void meet_warp(Lane& mine, Combine combine, void* context, const char* what, Site site) {
  meet(kWholeWarp, &mine, combine, context, what, site);
  if (!mine.whole) fail(text("%s (%s:%d): all 32 lanes of a warp must take part", what, site.file, site.line));
}

// At the meeting: whether all lanes came.
template <class Lane>
bool all_came(void* const* lanes, unsigned mask) {
  for (int lane = 0; lane < 32; ++lane) {
    if (lanes[lane]) static_cast<Lane*>(lanes[lane])->whole = mask == kWholeWarp;
  }
  return mask == kWholeWarp;
}

struct MatrixLane {
  bool whole;
  uint32_t* registers;
  char* row;
};

struct MatrixContext {
  int count;
  bool transposed, store;
};

// Element (r, c) of matrix i lies in lane 4 r + c / 2, or, transposed, in lane 4 c + r / 2.
void move_matrices(void* const* lanes, unsigned mask, void* context) {
  if (!all_came<MatrixLane>(lanes, mask)) return;
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

void meet_matrices(uint32_t* registers, MatrixContext how, const void* row, const char* what, Site site,
                   const void* from) {
  if (current->lane() < 8 * how.count) {
    require_shared(row, 16, 16, what, from);
    check_access(row, 16, how.store ? AccessKind::write : AccessKind::read, from);
  }
  MatrixLane mine{false, registers, static_cast<char*>(const_cast<void*>(row))};
  meet_warp(mine, move_matrices, &how, what, site);
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
  bool whole;
  float* d;
  const uint32_t *a, *b;
};

template <MatrixType type>
void multiply_typed(void* const* lanes, const float* halves) {
  constexpr int depth = type == MatrixType::tf32 ? 8 : 16;
  const auto widen = [&](uint32_t bits) {
    return type == MatrixType::bf16 ? float_of(bits << 16) : halves[bits & 0xffff];
  };
  float a[16][depth];
  alignas(32) float b[depth][8], d[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const auto& mine = *static_cast<const MultiplyLane*>(lanes[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) d[g + i / 2 * 8][2 * t + i % 2] = mine.d[i];
    if constexpr (type == MatrixType::tf32) {
      constexpr uint32_t read = ~0x1fffu;
      for (int i = 0; i < 4; ++i) a[g + i % 2 * 8][t + i / 2 * 4] = float_of(mine.a[i] & read);
      for (int i = 0; i < 2; ++i) b[t + 4 * i][g] = float_of(mine.b[i] & read);
    } else {
      for (int i = 0; i < 4; ++i) {
        float* pair = &a[g + i % 2 * 8][2 * t + i / 2 * 8];
        pair[0] = widen(mine.a[i]);
        pair[1] = widen(mine.a[i] >> 16);
      }
      for (int i = 0; i < 2; ++i) {
        b[2 * t + 8 * i][g] = widen(mine.b[i]);
        b[2 * t + 8 * i + 1][g] = widen(mine.b[i] >> 16);
      }
    }
  }
  for (int row = 0; row < 8; ++row) multiply_two_rows<depth>(d[row], d[row + 8], a[row], a[row + 8], b[0], 8);
  for (int lane = 0; lane < 32; ++lane) {
    const auto& mine = *static_cast<const MultiplyLane*>(lanes[lane]);
    for (int i = 0; i < 4; ++i) mine.d[i] = d[lane / 4 + i / 2 * 8][2 * (lane % 4) + i % 2];
  }
}

void multiply_lanes(void* const* lanes, unsigned mask, void* context) {
  if (!all_came<MultiplyLane>(lanes, mask)) return;
  switch (*static_cast<const MatrixType*>(context)) {
    case MatrixType::bf16:
      return multiply_typed<MatrixType::bf16>(lanes, nullptr);
    case MatrixType::f16:
      return multiply_typed<MatrixType::f16>(lanes, half_table());
    case MatrixType::tf32:
      return multiply_typed<MatrixType::tf32>(lanes, nullptr);
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
  meet_matrices(const_cast<uint32_t*>(registers), {count, transposed, true}, row, "stmatrix", site,
                __builtin_return_address(0));
}

void multiply(MatrixType type, float* d, const uint32_t* a, const uint32_t* b, Site site) {
  MultiplyLane mine{false, d, a, b};
  meet_warp(mine, multiply_lanes, &type, "mma", site);
}

}  // namespace pykern::emulator
