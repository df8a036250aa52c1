// Rows sorted by group: each group's rows lie together, in their own order, groups in the order of their first row.
#pragma once

#include <cstdint>
#include <vector>

namespace pykern {

constexpr int32_t kNoGroup = -1;

// At least `size` entries. Memory is kept from call to call: fresh pages cost more than what is done with them.
template <class T>
T* at_least(std::vector<T>& kept, int64_t size) {
  if (static_cast<int64_t>(kept.size()) < size) kept.resize(static_cast<size_t>(size));
  return kept.data();
}

// One for each thread that calls; `use` is handed it. Larger ones are given back.
template <class Kept, class Use>
void with_workspace(int64_t rows, Use use) {
  constexpr int64_t kKeptRows = int64_t{1} << 18;
  if (rows > kKeptRows) {
    Kept workspace;
    use(workspace);
  } else {
    static thread_local Kept workspace;
    use(workspace);
  }
}

// Numbers ids in the order in which they first come. A hash table with open addressing: it grows with the groups, not
// with the rows, to stay in the nearest cache.
class GroupFinder {
 public:
  void start() {
    groups_ = 0;
    resize(kFirstBits);
  }

  // Inline, for it is most of the work for one row.
  __attribute__((always_inline)) int32_t find(int64_t id) {
    for (size_t slot = first_slot(id);; slot = (slot + 1) & mask_) {
      const int32_t group = slots_[slot];
      if (group == kNoGroup) return add(id, slot);
      if (ids_[static_cast<size_t>(group)] == id) return group;
    }
  }
  int32_t groups() const { return groups_; }

 private:
  static constexpr int kFirstBits = 11;

  size_t first_slot(int64_t id) const {
    uint64_t mixed = static_cast<uint64_t>(id);
    mixed = (mixed ^ (mixed >> 32)) * 0x9e3779b97f4a7c15u;
    mixed = (mixed ^ (mixed >> 29)) * 0xbf58476d1ce4e5b9u;
    return mixed >> shift_;
  }

  void resize(int bits) {
    shift_ = 64 - bits;
    mask_ = (size_t{1} << bits) - 1;
    slots_.assign(mask_ + 1, kNoGroup);
  }

  __attribute__((noinline)) int32_t add(int64_t id, size_t slot) {
    at_least(ids_, groups_ + 1)[groups_] = id;
    slots_[slot] = groups_++;
    if (4 * static_cast<size_t>(groups_) > mask_) grow();
    return groups_ - 1;
  }

  void grow() {
    resize(64 - shift_ + 1);
    for (int32_t group = 0; group < groups_; ++group) {
      size_t slot = first_slot(ids_[static_cast<size_t>(group)]);
      while (slots_[slot] != kNoGroup) slot = (slot + 1) & mask_;
      slots_[slot] = group;
    }
  }

  std::vector<int32_t> slots_;
  std::vector<int64_t> ids_;
  int shift_ = 0;
  size_t mask_ = 0;
  int32_t groups_ = 0;
};

class SortedGroups {
 public:
  // `takes_part(row)` is asked once for each row; `place(row, place)` then tells where each that does has gone.
  template <class TakesPart, class Place>
  void sort(const int64_t* ids, int64_t rows, TakesPart takes_part, Place place) {
    int32_t* group_of = at_least(group_of_, rows);
    row_ = at_least(row_of_, rows);
    finder_.start();
    int32_t groups = 0;
    for (int64_t row = 0; row < rows; ++row) {
      const int32_t group = finder_.find(ids[row]);
      if (group == groups) at_least(ends_, ++groups)[group] = 0;
      const bool part = takes_part(row);
      group_of[row] = part ? group : kNoGroup;
      ends_[static_cast<size_t>(group)] += part;
    }
    int32_t taken = 0;
    for (int32_t group = 0; group < groups; ++group) {
      const int32_t size = ends_[static_cast<size_t>(group)];
      ends_[static_cast<size_t>(group)] = taken;  // the group's next place, and its end once its rows are in
      taken += size;
    }
    int32_t* const next = ends_.data();
    for (int64_t row = 0; row < rows; ++row) {
      const int32_t group = group_of[row];
      if (group == kNoGroup) continue;
      const int32_t to = next[group]++;
      row_[to] = static_cast<int32_t>(row);
      place(row, to);
    }
  }

  // Empty ones, of which no row takes part, included.
  int32_t groups() const { return finder_.groups(); }
  int32_t begin(int32_t group) const { return group == 0 ? 0 : ends_[static_cast<size_t>(group) - 1]; }
  int32_t end(int32_t group) const { return ends_[static_cast<size_t>(group)]; }
  const int32_t* rows() const { return row_; }  // by place

 private:
  GroupFinder finder_;
  std::vector<int32_t> group_of_, row_of_, ends_;
  int32_t* row_ = nullptr;
};

}  // namespace pykern
