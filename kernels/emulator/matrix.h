// Twins of the matrix instructions in kernels/ptx.
#pragma once

#include <cstdint>

#include "kernels/emulator/machine.h"

namespace pykern::emulator {

enum class MatrixType : int { bf16, f16, tf32 };

// 8x8 matrices of 16-bit elements between shared memory and registers; lane 8 i + r gives the address of row r of
// matrix i.
void load_matrices(uint32_t* registers, int count, bool transposed, const void* row, Site site);
void store_matrices(void* row, int count, bool transposed, const uint32_t* registers, Site site);

// d += a b of a warp: m16n8k16, or m16n8k8 for tf32. Products are exact in float; they are added in the order of k
// to d, each sum rounded to nearest (the hardware adds several at once and truncates below the largest).
void multiply(MatrixType type, float* d, const uint32_t* a, const uint32_t* b, Site site);

struct ProductShape {
  MatrixType type;
  int columns;
  bool a_in_registers;
  bool a_transposed, b_transposed;  // stored with m, or n, innermost
  bool accumulate;
};

// wgmma: m64nNk16 of a warpgroup. The result comes at product_wait; until then d is poison.
void product_fence(Site site);
void product_issue(const ProductShape& shape, float* d, const uint32_t* a_registers, uint64_t a, uint64_t b, Site site);
void product_commit(Site site);
void product_wait(int groups_left, Site site);

}  // namespace pykern::emulator
