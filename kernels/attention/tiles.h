// Bounds of subtree_end over each tile of keys: what tells an attention kernel which tiles to skip.
#pragma once

#include <cstdint>

#include "kernels/common/stream.h"

namespace pykern {

// A key that no query sees (subtree_end[key] <= key) counts as 0.
struct PrefixAttentionTiles {
  const int32_t* subtree_end;  // [tokens]
  int32_t* bounds;             // [ceil(tokens / tile), 2]: smallest and largest
  int64_t tokens, tile;
};

const char* launch_prefix_attention_tiles(const PrefixAttentionTiles& params, Stream stream);

}  // namespace pykern
