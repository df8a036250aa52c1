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
  for (int64_t i = 0; i < count; i += kLanes) {
    const int64_t rest = count - i;
    const Moments moments = adam.advance(load_some(grad + i, rest) * adam.sign,
                                         {load_some(first + i, rest), load_some(second + i, rest)});
    store_some(first + i, moments.first, rest);
    store_some(second + i, moments.second, rest);
    store_some(param + i, update.apply(load_some(param + i, rest), adam.direction(moments)), rest);
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
