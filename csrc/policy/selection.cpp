// Order statistics of masked values: one pass counts the leading bits of all keys, a second gathers the keys that share
// those of the wanted one, and nth_element finds it among them.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "common/parallel.h"
#include "policy/selection_arguments.h"

namespace pykern {
namespace {

// In the order of ORDERS and INTERPOLATIONS in pykern/policy/order_statistics.py.
enum class Order : int64_t { largest, smallest, random };
enum class Interpolation : int64_t { linear, nearest, lower, higher };

constexpr int64_t kTaskTokens = 16384;
constexpr int kLeadingBits = 11;

int64_t task_count(int64_t tokens) { return (tokens + kTaskTokens - 1) / kTaskTokens; }

template <class Body>
void for_task_tokens(int64_t task, int64_t tokens, const Body& body) {
  const int64_t end = std::min(tokens, (task + 1) * kTaskTokens);
  for (int64_t token = task * kTaskTokens; token < end; ++token) body(token);
}

// --- keys ----------------------------------------------------------------------------------------------------

template <class T, class Bits>
Bits ordered_bits(T value) {
  if (value == 0) value = 0;  // both zeros are one value
  Bits bits;
  std::memcpy(&bits, &value, sizeof bits);
  constexpr Bits kTop = Bits{1} << (8 * sizeof(Bits) - 1);
  return bits & kTop ? ~bits : bits | kTop;
}

// Integers in the order asked for, smallest first.
template <class T>
class ValueKeys {
 public:
  using Key = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
  ValueKeys(const T* values, Order order) : values_(values), flip_(order == Order::largest ? ~Key{0} : 0) {}
  bool is_number(int64_t token) const { return values_[token] == values_[token]; }
  Key operator()(int64_t token) const { return ordered_bits<T, Key>(values_[token]) ^ flip_; }
  static double value(Key key) {
    constexpr Key kTop = Key{1} << (8 * sizeof(Key) - 1);
    const Key bits = key & kTop ? key & ~kTop : ~key;
    T value;
    std::memcpy(&value, &bits, sizeof value);
    return static_cast<double>(value);
  }

 private:
  const T* values_;
  Key flip_;
};

// A bijection of the token for each seed, so no two tokens share a key.
class RandomKeys {
 public:
  using Key = uint64_t;
  explicit RandomKeys(uint64_t seed) : seed_(seed) {}
  bool is_number(int64_t) const { return true; }
  Key operator()(int64_t token) const {
    uint64_t mixed = (static_cast<uint64_t>(token) + 1) * 0x9e3779b97f4a7c15u + seed_ * 0xd1342543de82ef95u;
    mixed = (mixed ^ (mixed >> 30)) * 0xbf58476d1ce4e5b9u;
    mixed = (mixed ^ (mixed >> 27)) * 0x94d049bb133111ebu;
    return mixed ^ (mixed >> 31);
  }

 private:
  uint64_t seed_;
};

// --- selection -------------------------------------------------------------------------------------------------

template <class Keys>
class Selection {
 public:
  using Key = typename Keys::Key;

  Selection(Keys keys, const uint8_t* mask, const uint8_t* candidates, int64_t tokens)
      : keys_(keys), mask_(mask), candidates_(candidates), tokens_(tokens) {
    std::vector<Counts> of_thread(max_threads());
    parallel_tasks(task_count(tokens), [&](int64_t task, int thread) {
      Counts& counts = of_thread[thread];
      for_task_tokens(task, tokens_, [&](int64_t token) {
        if (mask_ && !mask_[token]) return;
        ++counts.unmasked;
        if (!keys_.is_number(token)) {
          ++counts.not_numbers;
        } else if (!candidates_ || candidates_[token]) {
          ++counts.leading[keys_(token) >> kShift];
        }
      });
    });
    for (const Counts& counts : of_thread) {
      counts_.unmasked += counts.unmasked;
      counts_.not_numbers += counts.not_numbers;
      for (size_t bits = 0; bits < counts_.leading.size(); ++bits) counts_.leading[bits] += counts.leading[bits];
    }
    for (const int64_t count : counts_.leading) candidates_count_ += count;
  }

  int64_t unmasked() const { return counts_.unmasked; }
  int64_t not_numbers() const { return counts_.not_numbers; }
  int64_t candidates() const { return candidates_count_; }

  bool takes_part(int64_t token) const {
    return (!mask_ || mask_[token]) && (!candidates_ || candidates_[token]) && keys_.is_number(token);
  }
  Key key(int64_t token) const { return keys_(token); }

  struct Place {
    int64_t smaller, equal;  // keys that are smaller than the wanted one, or as large
  };

  // The key of this rank, and with `next` the one that follows.
  Key at(int64_t rank, Place* of_key, Key* next) const {
    Key leading = 0;
    int64_t before = 0;
    while (rank >= before + counts_.leading[leading]) before += counts_.leading[leading++];
    std::vector<std::vector<Key>> of_task(task_count(tokens_));
    parallel_tasks(task_count(tokens_), [&](int64_t task, int) {
      for_task_tokens(task, tokens_, [&](int64_t token) {
        if (takes_part(token) && keys_(token) >> kShift == leading) of_task[task].push_back(keys_(token));
      });
    });
    std::vector<Key> found;
    found.reserve(counts_.leading[leading]);
    for (const auto& keys : of_task) found.insert(found.end(), keys.begin(), keys.end());
    const auto place = found.begin() + (rank - before);
    std::nth_element(found.begin(), place, found.end());
    const Key result = *place;
    if (of_key) {
      of_key->smaller = before + std::count_if(found.begin(), found.end(), [&](Key key) { return key < result; });
      of_key->equal = std::count(found.begin(), found.end(), result);
    }
    if (next) {
      *next = place + 1 < found.end() ? *std::min_element(place + 1, found.end())
              : rank + 1 < candidates_count_ ? at(rank + 1, nullptr, nullptr)
                                             : result;
    }
    return result;
  }

 private:
  static constexpr int kShift = 8 * sizeof(Key) - kLeadingBits;
  struct Counts {
    int64_t unmasked = 0, not_numbers = 0;
    std::vector<int64_t> leading = std::vector<int64_t>(1 << kLeadingBits);
  };

  Keys keys_;
  const uint8_t *mask_, *candidates_;
  int64_t tokens_, candidates_count_ = 0;
  Counts counts_;
};

const uint8_t* flags(const std::optional<Tensor>& tensor) { return tensor ? input<uint8_t>(*tensor) : nullptr; }

// Of the tokens with the last key, those that come first are selected.
template <class Keys>
void select_share(const Selection<Keys>& selection, int64_t tokens, double share, int64_t minimum, bool* selected,
                  int64_t* counts) {
  const auto of_share = static_cast<int64_t>(std::floor(share * static_cast<double>(selection.unmasked())));
  const int64_t wanted = std::min(std::max(of_share, minimum), selection.candidates());
  counts[0] = wanted;
  counts[1] = selection.unmasked();
  if (wanted == 0) {
    std::fill(selected, selected + tokens, false);
    return;
  }
  typename Selection<Keys>::Place place;
  const auto last = selection.at(wanted - 1, &place, nullptr);
  const int64_t wanted_ties = wanted - place.smaller;
  std::vector<int64_t> ties(task_count(tokens) + 1);
  parallel_tasks(wanted_ties < place.equal ? task_count(tokens) : 0, [&](int64_t task, int) {
    for_task_tokens(task, tokens, [&](int64_t token) {
      ties[task + 1] += selection.takes_part(token) && selection.key(token) == last;
    });
  });
  for (size_t task = 1; task < ties.size(); ++task) ties[task] += ties[task - 1];
  parallel_tasks(task_count(tokens), [&](int64_t task, int) {
    int64_t tie = ties[task];
    for_task_tokens(task, tokens, [&](int64_t token) {
      selected[token] = false;
      if (!selection.takes_part(token)) return;
      const auto key = selection.key(token);
      selected[token] = key < last || (key == last && tie++ < wanted_ties);
    });
  });
}

std::tuple<Tensor, Tensor> masked_select_share(Tensor values, std::optional<Tensor> mask,
                                               std::optional<Tensor> candidates, int64_t order, double share,
                                               int64_t minimum, int64_t seed) {
  check_share(values, mask, candidates, order, share, minimum, check_cpu);
  Tensor selected = torch::stable::new_empty(values, values.sizes(), ScalarType::Bool);
  Tensor counts = torch::stable::new_empty(values, {2}, ScalarType::Long);
  const int64_t tokens = values.numel();
  const auto select = [&](auto keys) {
    const Selection<decltype(keys)> selection(keys, flags(mask), flags(candidates), tokens);
    select_share(selection, tokens, share, minimum, output<bool>(selected), output<int64_t>(counts));
  };
  if (static_cast<Order>(order) == Order::random) {
    select(RandomKeys(static_cast<uint64_t>(seed)));
  } else if (values.scalar_type() == ScalarType::Double) {
    select(ValueKeys<double>(input<double>(values), static_cast<Order>(order)));
  } else {
    select(ValueKeys<float>(input<float>(values), static_cast<Order>(order)));
  }
  return {selected, counts};
}

template <class T>
double quantile(const Selection<ValueKeys<T>>& selection, double share, Interpolation interpolation) {
  if (selection.candidates() == 0 || selection.not_numbers() > 0) return std::numeric_limits<double>::quiet_NaN();
  const double position = share * static_cast<double>(selection.candidates() - 1);
  double rank = std::floor(position);
  if (interpolation == Interpolation::nearest) rank = std::nearbyint(position);
  if (interpolation == Interpolation::higher) rank = std::ceil(position);
  const double weight = interpolation == Interpolation::linear ? position - rank : 0;
  using Keys = ValueKeys<T>;
  typename Keys::Key next = 0;
  const double value = Keys::value(selection.at(static_cast<int64_t>(rank), nullptr, weight > 0 ? &next : nullptr));
  if (!(weight > 0)) return value;
  const double upper = Keys::value(next);
  return upper == value ? value : (1 - weight) * value + weight * upper;
}

template <class T>
void quantiles_of(const Tensor& values, const std::optional<Tensor>& mask, const std::vector<double>& quantiles,
                  Interpolation interpolation, Tensor& result) {
  const Selection<ValueKeys<T>> selection(ValueKeys<T>(input<T>(values), Order::smallest), flags(mask), nullptr,
                                          values.numel());
  for (size_t index = 0; index < quantiles.size(); ++index) {
    output<T>(result)[index] = static_cast<T>(quantile<T>(selection, quantiles[index], interpolation));
  }
}

Tensor masked_quantile(Tensor values, std::optional<Tensor> mask, std::vector<double> quantiles,
                       int64_t interpolation) {
  check_quantiles(values, mask, quantiles, interpolation, check_cpu);
  Tensor result = torch::stable::new_empty(values, {static_cast<int64_t>(quantiles.size())});
  if (values.scalar_type() == ScalarType::Double) {
    quantiles_of<double>(values, mask, quantiles, static_cast<Interpolation>(interpolation), result);
  } else {
    quantiles_of<float>(values, mask, quantiles, static_cast<Interpolation>(interpolation), result);
  }
  return result;
}

// --- moments ---------------------------------------------------------------------------------------------------

struct Moments {
  double count = 0, sum = 0, squares = 0;
  double smallest = std::numeric_limits<double>::infinity(), largest = -std::numeric_limits<double>::infinity();
};

template <class T>
Moments moments_of(const T* values, const uint8_t* mask, double centre, int64_t tokens) {
  std::vector<Moments> of_task(task_count(tokens));
  parallel_tasks(task_count(tokens), [&](int64_t task, int) {
    Moments moments;
    for_task_tokens(task, tokens, [&](int64_t token) {
      if (mask && !mask[token]) return;
      const auto value = static_cast<double>(values[token]);
      moments.count += 1;
      moments.sum += value;
      moments.squares += (value - centre) * (value - centre);
      moments.smallest = value < moments.smallest ? value : moments.smallest;
      moments.largest = value > moments.largest ? value : moments.largest;
    });
    of_task[task] = moments;
  });
  Moments all;
  for (const Moments& moments : of_task) {
    all.count += moments.count;
    all.sum += moments.sum;
    all.squares += moments.squares;
    all.smallest = std::min(all.smallest, moments.smallest);
    all.largest = std::max(all.largest, moments.largest);
  }
  return all;
}

Tensor masked_moments(Tensor values, std::optional<Tensor> mask, std::optional<Tensor> centre) {
  check_moments(values, mask, centre, check_cpu);
  const double about = centre ? *input<double>(*centre) : 0;
  const Moments moments = values.scalar_type() == ScalarType::Double
                              ? moments_of(input<double>(values), flags(mask), about, values.numel())
                              : moments_of(input<float>(values), flags(mask), about, values.numel());
  const double divisor = moments.count > 0 ? moments.count : 1;
  const double results[] = {moments.count, moments.sum / divisor, moments.squares / divisor, moments.smallest,
                            moments.largest};
  Tensor result = torch::stable::new_empty(values, {5}, ScalarType::Double);
  std::copy(std::begin(results), std::end(results), output<double>(result));
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pykern, CPU, m) {
  m.impl("masked_quantile", TORCH_BOX(&masked_quantile));
  m.impl("masked_select_share", TORCH_BOX(&masked_select_share));
  m.impl("masked_moments", TORCH_BOX(&masked_moments));
}

}  // namespace pykern
