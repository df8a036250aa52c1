// The tasks of all items of a list in one row, so that one parallel region serves many small items.
// No torch header here, and nothing of std that could be compiled for an instruction set and linked for all.
#pragma once

#include "common/scratch.h"

namespace pykern::lowrank {

struct TaskPlace {
  int64_t item, task;  // `task` counts from 0 in its item
};

class TaskList {
 public:
  // tasks_of(item) says how many tasks an item has.
  template <class Count>
  PYKERN_INLINE TaskList(int64_t items, const Count& tasks_of) : items_(items), memory_((items + 1) * sizeof(int64_t)) {
    int64_t* first = memory_.get<int64_t>();
    if (!first) return;
    first[0] = 0;
    for (int64_t item = 0; item < items; ++item) first[item + 1] = first[item] + tasks_of(item);
  }

  PYKERN_INLINE bool allocated() const { return memory_.get<int64_t>() != nullptr; }
  PYKERN_INLINE int64_t total() const { return memory_.get<int64_t>()[items_]; }

  PYKERN_INLINE TaskPlace find(int64_t task) const {
    const int64_t* first = memory_.get<int64_t>();
    int64_t low = 0, high = items_;
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      (first[middle] <= task ? low : high) = middle;
    }
    return {low, task - first[low]};
  }

 private:
  int64_t items_;
  Scratch memory_;
};

}  // namespace pykern::lowrank
