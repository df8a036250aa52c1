// What an attention kernel needs to know of a tree to skip what no query sees, and the order of its blocks.
#pragma once

#include <cstdint>

#include "kernels/common/stream.h"

namespace pykern {

struct PrefixAttentionTiles {
  static constexpr int kTileTokens = 64, kBlockTokens = 128;

  const int32_t* subtree_end;  // [tokens]
  const int32_t* position;     // [tokens]
  // [ceil(tokens / 64), 4]: smallest and largest subtree_end, 0 for a key that no query sees; smallest and largest
  // position.
  int32_t* bounds;
  int32_t* work;   // [2, ceil(tokens / 128)], of each block as queries and as keys
  int32_t* order;  // the same size: blocks by falling work
  int64_t tokens;
};

const char* launch_prefix_attention_tiles(const PrefixAttentionTiles& params, Stream stream);

}  // namespace pykern
