// Plain Adam of lists of float32, bfloat16 and float16 tensors.
#include "common/parallel.h"
#include "lowrank/adam.h"
#include "lowrank/tasks.h"

namespace pykern::PYKERN_SIMD {
namespace {

using lowrank::AdamStep;
using lowrank::AdamTensor;

constexpr int64_t kChunk = 16384;

template <class T>
void advance_chunk(const AdamTensor& tensor, int64_t begin) {
  const Adam adam(tensor.rule);
  const WeightUpdate update(tensor.rule);
  const int64_t count = lesser(kChunk, tensor.size - begin);
  T* param = static_cast<T*>(tensor.param) + begin;
  const T* grad = static_cast<const T*>(tensor.grad) + begin;
  float* first = static_cast<float*>(tensor.exp_avg) + begin;
  float* second = static_cast<float*>(tensor.exp_avg_sq) + begin;
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    const Moments moments = adam.advance(load(grad + i) * adam.sign, {load(first + i), load(second + i)});
    store(first + i, moments.first);
    store(second + i, moments.second);
    store(param + i, update.apply(load(param + i), adam.direction(moments)));
  }
  if (i < count) {
    const int64_t rest = count - i;
    const Moments moments = adam.advance(load_partial(grad + i, rest) * adam.sign,
                                         {load_partial(first + i, rest), load_partial(second + i, rest)});
    store_partial(first + i, moments.first, rest);
    store_partial(second + i, moments.second, rest);
    store_partial(param + i, update.apply(load_partial(param + i, rest), adam.direction(moments)), rest);
  }
}

template <class T>
bool adam_typed(const AdamStep& step) {
  const lowrank::TaskList tasks(step.count, [&](int64_t i) { return ceil_div(step.tensors[i].size, kChunk); });
  if (!tasks.allocated()) return false;
  parallel_tasks(tasks.total(), [&](int64_t task, int) {
    const lowrank::TaskPlace place = tasks.find(task);
    advance_chunk<T>(step.tensors[place.item], place.task * kChunk);
  });
  return true;
}

}  // namespace

bool adam_step(const AdamStep& step) {
  switch (step.type) {
    case DataType::f32: return adam_typed<float>(step);
    case DataType::bf16: return adam_typed<bf16>(step);
    case DataType::f16: return adam_typed<f16>(step);
    default: return false;
  }
}

}  // namespace pykern::PYKERN_SIMD
