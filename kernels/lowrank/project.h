// The projection of gradients into their subspaces, as plain parameters: low = P^T G, and the squared norms of G's
// columns, for a list of matrices.
#pragma once

#include <cstdint>

#include "kernels/common/numeric.h"
#include "kernels/common/stream.h"

namespace pykern::lowrank {

struct ProjectMatrix {
  const void* matrix;     // [n, length]
  const void* projector;  // [n, rank], without gaps; or the rows that are picked, int64 [rank]
  void* low;              // [rank, length], without gaps; float32, or float64 for float64 matrices
  void* squares;          // [length], of low's type, or null
  float* parts;           // set by launch_project
  int64_t stride;         // of the matrix along the axis without unit stride
  int32_t n, length, rank;
  int32_t splits;     // set by plan_project: parts of n that different blocks take
  bool along_length;  // where the unit stride is; else it is along n
  // Set by plan_project: whether the kernel for 9.0 takes it, and in narrow tiles.
  bool warpgroups, narrow;
};

struct ProjectParams {
  DataType type;
  int64_t count;
  ProjectMatrix* matrices;  // on the host
  const float* grad_scale;  // one element on the device, or null; results are those of G / grad_scale
  bool maximize;            // low changes its sign
  float* workspace;         // as many floats as plan_project says
};

// Where the tiles of all matrices are fewer than the multiprocessors, several blocks share the rows of G, and a second
// kernel adds their parts in a fixed order: results repeat bit for bit, but those of a matrix depend on how many others
// are in the list. Returns the floats of the workspace.
int64_t plan_project(ProjectParams& params);

// Matrices of bf16 or f16.
const char* launch_project(const ProjectParams& params, Stream stream);
// The products of those that plan_project gives to the kernel for 9.0, without the sum of parts.
const char* launch_project_sm90(const ProjectParams& params, Stream stream);

// Matrices of any type whose rows are picked, all of them; no squares.
const char* launch_project_rows(const ProjectParams& params, Stream stream);

// Matrices of f32 or f64, whose `low` is P^T G already, by the vendor's products: the squares, and the gradient's scale
// and sign.
const char* launch_project_wide(const ProjectParams& params, Stream stream);

}  // namespace pykern::lowrank
