// Tokens of a batch of sequences, padded or packed, as the host hands them over.
#pragma once

#include <cstdint>

namespace pykern {

struct TokenBatch {
  const uint8_t* mask;        // null: all tokens count
  const int64_t* cu_seqlens;  // [sequences + 1]; null: `columns` tokens each
  int64_t tokens, sequences, columns;
};

}  // namespace pykern
