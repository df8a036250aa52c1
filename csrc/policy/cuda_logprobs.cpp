// Host side of token_logprobs on CUDA.
#include <tuple>

#include "common/cuda.h"
#include "kernels/policy/logprobs.h"
#include "policy/logprobs_host.h"

namespace pykern {
namespace {

// Finds the rows of [..., vocabulary] by few dimensions; false if there are more than a kernel takes.
bool find_rows(const Tensor& logits, TokenLogprobsRows& rows) {
  rows.dimensions = 0;
  for (int64_t dim = 0; dim < logits.dim() - 1; ++dim) {
    const int64_t size = logits.size(dim), stride = logits.stride(dim);
    if (size == 1) continue;
    const int last = rows.dimensions - 1;
    if (last >= 0 && rows.stride[last] == size * stride) {
      rows.size[last] *= static_cast<uint32_t>(size);
      rows.stride[last] = stride;
      continue;
    }
    if (rows.dimensions == TokenLogprobsRows::kDimensions) return false;
    rows.size[rows.dimensions] = static_cast<uint32_t>(size);
    rows.stride[rows.dimensions++] = stride;
  }
  if (rows.dimensions == 0) {
    rows.size[0] = 1;
    rows.stride[0] = 0;
    rows.dimensions = 1;
  }
  return true;
}

// Copies `logits` where their rows need more dimensions than a kernel takes.
TokenLogprobsRows prepare(Tensor& logits, const Tensor& targets, const std::optional<Tensor>& row_temperature,
                          double temperature) {
  cuda::check_device(logits, "logits");
  cuda::check_device(targets, "targets");
  check_logits(logits, targets);
  check_type(targets, ScalarType::Long, "targets");
  check_contiguous(targets, "targets");
  check_row_temperature(row_temperature, targets.numel());
  if (row_temperature) cuda::check_device(*row_temperature, "row_temperature");
  STD_TORCH_CHECK(targets.numel() < (int64_t{1} << 31), "targets: expected fewer than 2^31, got ", targets.numel());
  TokenLogprobsRows rows{};
  rows.type = data_type(logits, "logits");
  rows.rows = targets.numel();
  rows.vocabulary = logits.size(logits.dim() - 1);
  rows.inverse_temperature = 1.0 / temperature;
  if (!find_rows(logits, rows)) {
    logits = contiguous(logits);
    find_rows(logits, rows);
  }
  return rows;
}

// After the device guard, where the emulator begins to listen.
void announce(TokenLogprobsRows& rows, const Tensor& targets, const std::optional<Tensor>& row_temperature) {
  rows.targets = cuda::input<int64_t>(targets);
  rows.row_temperature = cuda::input<double>(row_temperature);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(Tensor logits, Tensor targets, std::optional<Tensor> row_temperature,
                                                   double temperature, bool entropy, bool sum_p2) {
  TokenLogprobsRows rows = prepare(logits, targets, row_temperature, temperature);
  const cuda::DeviceGuard guard(logits);
  const ScalarType type = result_type(rows.type);
  Tensor logprobs = cuda::empty(logits, targets.sizes(), type);
  Tensor entropies = entropy ? cuda::empty(logits, targets.sizes(), type) : cuda::empty(logits, {0}, type);
  Tensor squares = sum_p2 ? cuda::empty(logits, targets.sizes(), type) : cuda::empty(logits, {0}, type);
  Tensor statistics = cuda::empty(logits, {rows.rows, 2}, type);
  if (rows.rows > 0) {
    announce(rows, targets, row_temperature);
    rows.logits = cuda::input(logits);
    const TokenLogprobsParams params{rows, cuda::output(logprobs), entropy ? cuda::output(entropies) : nullptr,
                                     sum_p2 ? cuda::output(squares) : nullptr, cuda::output(statistics)};
    cuda::check_launch(launch_token_logprobs(params, cuda::current_stream(logits)), "token_logprobs");
  }
  return {logprobs, entropies, squares, statistics};
}

void run_backward(TokenLogprobsRows rows, const Tensor& logits, const Tensor& targets,
                  const std::optional<Tensor>& row_temperature, const TokenLogprobsGradients& given,
                  const Tensor& grad_logits, bool in_place) {
  announce(rows, targets, row_temperature);
  void* gradient = cuda::output(grad_logits);
  rows.logits = in_place ? gradient : cuda::input(logits);
  const TokenLogprobsBackwardParams params{rows,
                                           cuda::input(given.statistics),
                                           cuda::input(given.entropy),
                                           cuda::input(given.sum_p2),
                                           cuda::input(given.grad_logprobs),
                                           cuda::input(given.grad_entropy),
                                           cuda::input(given.grad_sum_p2),
                                           gradient,
                                           in_place};
  cuda::check_launch(launch_token_logprobs_backward(params, cuda::current_stream(logits)), "token_logprobs_backward");
}

Tensor backward(Tensor logits, Tensor targets, std::optional<Tensor> row_temperature, double temperature,
                Tensor statistics, Tensor entropy, Tensor sum_p2, std::optional<Tensor> grad_logprobs,
                std::optional<Tensor> grad_entropy, std::optional<Tensor> grad_sum_p2) {
  const TokenLogprobsRows rows = prepare(logits, targets, row_temperature, temperature);
  const cuda::DeviceGuard guard(logits);
  const TokenLogprobsGradients given(rows.type, rows.rows, statistics, entropy, sum_p2, grad_logprobs, grad_entropy,
                                     grad_sum_p2);
  Tensor grad_logits = cuda::empty(logits, logits.sizes(), logits.scalar_type());
  if (logits.numel() > 0) run_backward(rows, logits, targets, row_temperature, given, grad_logits, false);
  return grad_logits;
}

void backward_in_place(Tensor logits, Tensor targets, std::optional<Tensor> row_temperature, double temperature,
                       Tensor statistics, Tensor entropy, Tensor sum_p2, std::optional<Tensor> grad_logprobs,
                       std::optional<Tensor> grad_entropy, std::optional<Tensor> grad_sum_p2) {
  check_no_overlap(logits);
  const void* given_memory = logits.const_data_ptr();
  const TokenLogprobsRows rows = prepare(logits, targets, row_temperature, temperature);
  STD_TORCH_CHECK(logits.const_data_ptr() == given_memory, "logits: expected leading dimensions that merge into ",
                  int{TokenLogprobsRows::kDimensions}, " or fewer, as the logits are overwritten");
  const cuda::DeviceGuard guard(logits);
  const TokenLogprobsGradients given(rows.type, rows.rows, statistics, entropy, sum_p2, grad_logprobs, grad_entropy,
                                     grad_sum_p2);
  if (logits.numel() > 0) run_backward(rows, logits, targets, row_temperature, given, logits, true);
}

}  // namespace

PYKERN_CUDA_IMPL(m) {
  m.impl("token_logprobs", TORCH_BOX(&forward));
  m.impl("token_logprobs_backward", TORCH_BOX(&backward));
  m.impl("token_logprobs_backward_in_place", TORCH_BOX(&backward_in_place));
}

}  // namespace pykern
