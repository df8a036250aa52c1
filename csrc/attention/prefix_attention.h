// What the host wrapper hands to the kernels: plain data, no torch type.
#pragma once

#include <cstdint>

#include "common/cpu_level.h"
#include "common/numeric.h"

namespace pykern {

// Keys are classified in units of this many: for a tile of queries a unit is skipped, visible to
// all of them, or needs the mask.
constexpr int64_t kUnitKeys = 64;

// The backward's key tiles hold at most so many units.
constexpr int64_t kMaxKeyTileUnits = 4;

// [tokens, heads, size] whose last dimension is contiguous.
struct HeadsView {
  const void* data;
  int64_t token_stride;
  int64_t head_stride;
};

struct PrefixAttention {
  int64_t tokens;
  int64_t query_heads;
  int64_t key_heads;
  int64_t key_size;
  int64_t value_size;
  double scale;
  HeadsView q, k, v;

  // Of every key, padded with zeros (seen by none) to a whole number of units.
  const int32_t* subtree_end;
  // The smallest and largest subtree_end of every unit.
  const int32_t* unit_min_end;
  const int32_t* unit_max_end;
  int64_t units;

  // Queries are processed in tiles of this many tokens, all query heads of one key head together.
  int64_t tile_tokens;
  int64_t tiles;

  // The backward's key tiles, units each.
  int64_t key_tile_units;

  int64_t group() const { return query_heads / key_heads; }
};

struct PrefixAttentionForward : PrefixAttention {
  void* out;   // [tokens, query_heads, value_size], contiguous
  float* lse;  // [tokens, query_heads]
  const int64_t* tile_order;  // tiles by falling work
};

struct PrefixAttentionBackward : PrefixAttention {
  HeadsView grad_out;
  HeadsView out;
  const float* lse;       // [tokens, query_heads]
  const float* grad_lse;  // the same, or null
  void* grad_q;           // contiguous, as the next two
  void* grad_k;
  void* grad_v;
};

// Both return false where the machine lacks the memory for the workspace.
PYKERN_SIMD_FUNCTION(bool, prefix_attention_forward, (DataType type, const PrefixAttentionForward& problem))
PYKERN_SIMD_FUNCTION(bool, prefix_attention_backward, (DataType type, const PrefixAttentionBackward& problem))

// float64 runs through plain loops; it serves gradcheck and comparisons. lse is float64 there.
void prefix_attention_forward_float64(const PrefixAttention& problem, double* out, double* lse);
void prefix_attention_backward_float64(const PrefixAttention& problem, const HeadsView& grad_out, const HeadsView& out,
                                       const double* lse, const double* grad_lse, double* grad_q, double* grad_k,
                                       double* grad_v);

}  // namespace pykern
