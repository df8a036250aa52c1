// Order statistics of masked values on a GPU: what the host hands over.
//
// A value becomes a key, an unsigned integer in the order asked for. The key of a rank is found digit by digit, from
// the highest: a launch counts the digits of the keys that begin as the wanted one does, and its last block finds
// the digit in which the rank lies. All counts are integers, so nothing depends on the order of blocks.
#pragma once

#include <cstdint>

#include "kernels/common/numeric.h"
#include "kernels/common/stream.h"

namespace pykern {

// In the order of ORDERS and INTERPOLATIONS in pykern/policy/order_statistics.py.
enum class SelectionOrder : int { largest, smallest, random };
enum class Interpolation : int { linear, nearest, lower, higher };

constexpr int kDigitBits = 11;
constexpr int kDigits = 1 << kDigitBits;
constexpr int kSelectionThreads = 256;

// Zero at first.
struct SelectionState {
  unsigned long long unmasked;    // tokens
  unsigned long long not_numbers; // among them
  unsigned long long candidates;  // tokens that may be selected
  unsigned long long wanted;      // how many are selected
  unsigned long long rank;        // of the wanted key among those that begin as it does
  unsigned long long prefix;      // the digits found so far, in place
  unsigned long long equal;       // keys that begin with it
  unsigned long long next;        // all bits but those of the smallest key beyond the wanted one
  unsigned long long finished;    // blocks of the launch
  double weight;                  // of the next key in the quantile
  unsigned long long digits[kDigits];
};
constexpr int64_t kSelectionStateWords = sizeof(SelectionState) / 8;

struct SelectionParams {
  const void* values;        // float32 or float64; not read in random order
  const uint8_t* mask;       // null: all tokens count
  const uint8_t* candidates; // null: all unmasked tokens may be selected
  int64_t tokens;
  SelectionState* state;

  // A share of the tokens.
  SelectionOrder order;
  double share;
  int64_t minimum;
  uint64_t seed;
  uint8_t* selected;         // [tokens]
  int64_t* counts;           // [2]: selected, unmasked
  unsigned long long* ties;  // [selection_blocks()]: tokens of each block's chunk with the key of the last selected

  // A quantile.
  double quantile;
  Interpolation interpolation;
  void* result;  // one value of the kind of `values`
};

int64_t selection_blocks(int64_t tokens);
const char* launch_select_share(DataType type, const SelectionParams& params, Stream stream);
const char* launch_quantile(DataType type, const SelectionParams& params, Stream stream);

// --- moments -----------------------------------------------------------------------------------------------

enum Moment : int { kCount, kMean, kMeanSquare, kSmallest, kLargest, kMoments };

struct MomentsParams {
  const void* values;
  const uint8_t* mask;
  const double* centre;  // null: zero
  int64_t tokens;
  double* partial;               // [moments_blocks(), kMoments]
  unsigned long long* finished;  // zero at first
  double* moments;               // [kMoments]
};

int64_t moments_blocks(int64_t tokens);  // one for no tokens: it says what the moments of none are
const char* launch_moments(DataType type, const MomentsParams& params, Stream stream);

}  // namespace pykern
