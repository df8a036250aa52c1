// What the host wrapper hands to the kernels: plain data, no torch type.
#pragma once

#include <cstdint>

#include "common/cpu_level.h"
#include "common/numeric.h"

namespace pykern {

// Keys are classified in units of this many, the tiles of the tree's bounds: for a tile of queries a
// unit is skipped, visible to all of them, or needs the mask.
constexpr int64_t kUnitKeys = 64;

// The backward's key tiles hold at most so many units.
constexpr int64_t kMaxKeyTileUnits = 4;

// [tokens, heads, size] whose last dimension is contiguous.
struct HeadsView {
  const void* data;
  int64_t token_stride;
  int64_t head_stride;
};

// The smallest and the largest of some tokens.
struct Positions {
  int32_t least, last;
};

// Neighbouring tokens that are processed as queries together.
struct QueryTokens {
  int64_t first, stop;
};

struct PrefixAttention {
  int64_t tokens;
  int64_t query_heads;
  int64_t key_heads;
  int64_t key_size;
  int64_t value_size;
  double scale;
  double softcap;  // 0: none
  int64_t window;  // 0: none
  HeadsView q, k, v;
  const void* sinks;         // [query_heads] in lse's type, or null
  const void* alibi_slopes;  // the same

  // The next three are padded to a whole number of units by keys that none sees: end 0. That is also
  // the end of a token whose own is not behind it.
  const int32_t* row;  // 0, 1, 2, ...
  const int32_t* subtree_end;
  const int32_t* position;
  const int32_t* bounds;  // [units, 4], of the tree
  int64_t units;

  // Queries are processed in tiles of this many tokens, all query heads of one key head together.
  int64_t tile_tokens;
  int64_t tiles;

  // The backward's key tiles, units each.
  int64_t key_tile_units;

  int64_t group() const { return query_heads / key_heads; }
  int32_t least_end(int64_t unit) const { return bounds[4 * unit]; }
  int32_t last_end(int64_t unit) const { return bounds[4 * unit + 1]; }
  int32_t least_position(int64_t unit) const { return bounds[4 * unit + 2]; }
  int32_t last_position(int64_t unit) const { return bounds[4 * unit + 3]; }

  // Query `token` sees no key whose position is at most this.
  int32_t horizon(int32_t token_position) const {
    const int64_t last_unseen = token_position - window;
    return last_unseen < INT32_MIN ? INT32_MIN : static_cast<int32_t>(last_unseen);
  }
  bool visible(int64_t token, int64_t key) const {
    return key <= token && token < subtree_end[key] &&
           (window == 0 || static_cast<int64_t>(position[token]) - position[key] < window);
  }
};

struct PrefixAttentionForward : PrefixAttention {
  void* out;       // [tokens, query_heads, value_size], contiguous
  float* lse;      // [tokens, query_heads]
  float* largest;  // the largest logit of every row, [tokens, query_heads]; or null
  // Tiles by falling work; what they hold is cut by rows or, where the order of sums must not depend
  // on the packing, within runs of tokens that continue each other's path.
  const QueryTokens* query_tiles;
  int64_t query_tile_count;
  bool along_paths;
};

struct PrefixAttentionBackward : PrefixAttention {
  HeadsView grad_out;
  HeadsView out;
  const float* lse;       // [tokens, query_heads]
  const float* grad_lse;  // the same, or null
  void* grad_q;           // contiguous, as the next two
  void* grad_k;
  void* grad_v;
  float* grad_sinks;  // [query_heads], or null
};

// Both return false where the machine lacks the memory for the workspace.
PYKERN_SIMD_FUNCTION(bool, prefix_attention_forward, (DataType type, const PrefixAttentionForward& problem))
PYKERN_SIMD_FUNCTION(bool, prefix_attention_backward, (DataType type, const PrefixAttentionBackward& problem))

// float64 runs through plain loops; it serves gradcheck and comparisons. Sums run along a row's path,
// so they are the same however it is packed.
struct PrefixAttentionFloat64 : PrefixAttention {
  double* out;
  double* lse;
  double* largest;  // or null
};
struct PrefixAttentionBackwardFloat64 : PrefixAttention {
  HeadsView grad_out;
  HeadsView out;
  const double* lse;
  const double* grad_lse;  // or null
  double* grad_q;
  double* grad_k;
  double* grad_v;
  double* grad_sinks;  // or null
};
void prefix_attention_forward_float64(const PrefixAttentionFloat64& problem);
void prefix_attention_backward_float64(const PrefixAttentionBackwardFloat64& problem);

}  // namespace pykern
