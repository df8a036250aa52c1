// Host side of linear_token_logprobs on CUDA: the vendor library's products on chunks of the vocabulary, and our
// kernels between them.
//
// A chunk holds some entries of the vocabulary for all rows: the gradient of an entry's weights is one product, with
// its sums in float32, and only the gradient of the hidden states, the smaller one of the two where it matters, is
// accumulated over chunks.
//
// linear_policy_loss keeps the logits of some rows from the forward to the backward instead: then a chunk holds the
// whole vocabulary for these rows, and it is the gradient of the weights that is accumulated.
#include <algorithm>
#include <tuple>

#include "common/cuda.h"
#include "common/products.h"
#include "kernels/policy/linear_logprobs.h"
#include "policy/logprobs_host.h"

namespace pykern {
namespace {

// Bytes of a chunk's logits and their gradient together. On the emulator a few, so that there are several chunks.
#ifdef PYKERN_EMULATED
constexpr int64_t kChunkBytes = int64_t{96} << 10;
constexpr int64_t kPartBytes = int64_t{12} << 10;
#else
constexpr int64_t kChunkBytes = int64_t{320} << 20;
// Bytes of the part of a weight's gradient that is then added to its sums.
constexpr int64_t kPartBytes = int64_t{32} << 20;
#endif
// As the schemas of the chunk ops say.
constexpr int64_t kKeptRows = 64, kKeptEntries = 192;

int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

DataType logits_type(DataType type) { return type == DataType::f64 ? DataType::f64 : DataType::f32; }

// The arguments of both passes, and how they divide the vocabulary: alike, so that the backward computes the logits of
// the forward bit for bit. A function of the sizes, never of the memory that is free.
struct Head {
  Tensor hidden, weight, targets;
  std::optional<Tensor> bias, row_temperature;
  DataType type;
  int64_t rows, hidden_size, vocabulary, vocabulary_start;
  double inverse_temperature, softcap;
  int64_t chunk_entries, stride;

  Head(const Tensor& hidden_argument, const Tensor& weight_argument, const Tensor& targets,
       const std::optional<Tensor>& bias, const std::optional<Tensor>& row_temperature, double temperature,
       double softcap, int64_t vocabulary_start)
      : hidden(cuda::detach(hidden_argument)),
        weight(cuda::detach(weight_argument)),
        targets(targets),
        bias(bias),
        row_temperature(row_temperature),
        vocabulary_start(vocabulary_start),
        inverse_temperature(1.0 / temperature),
        softcap(softcap) {
    cuda::check_device(hidden, "hidden");
    cuda::check_device(weight, "weight");
    cuda::check_device(targets, "targets");
    check_linear_head(hidden, weight, targets, bias, vocabulary_start);
    rows = hidden.size(0);
    hidden_size = hidden.size(1);
    vocabulary = weight.size(0);
    type = data_type(hidden, "hidden");
    if (bias) cuda::check_device(*bias, "bias");
    check_row_temperature(row_temperature, rows);
    if (row_temperature) cuda::check_device(*row_temperature, "row_temperature");
    STD_TORCH_CHECK(rows < (int64_t{1} << 31), "hidden: expected fewer than 2^31 rows, got ", rows);

    const int64_t bytes = std::max<int64_t>(rows, 1) * ((type == DataType::f64 ? 8 : 4) + hidden.element_size());
    const int64_t segment = linear_logprobs_segment(type), fitting = kChunkBytes / bytes;
    const int64_t multiple = fitting >= segment ? segment : kSmallestChunk;
    const int64_t most = std::max(fitting / multiple * multiple, kSmallestChunk);
    const int64_t chunks = std::max<int64_t>((vocabulary + most - 1) / most, 1);
    // Of equal size, as far as whole segments allow.
    chunk_entries = chunks == 1 ? vocabulary : round_up((vocabulary + chunks - 1) / chunks, multiple);
    stride = round_up(chunk_entries, kLinearLogprobsAlignment);
  }

  // One chunk, in a buffer from the caller.
  Tensor keep_whole(const Tensor& logits) {
    STD_TORCH_CHECK(type == DataType::f32 || type == DataType::bf16, "hidden: expected float32 or bfloat16");
    cuda::check_device(logits, "logits");
    check_type(logits, ScalarType::Float, "logits");
    check_contiguous(logits, "logits");
    stride = round_up(vocabulary, kKeptEntries);
    chunk_entries = vocabulary;
    const int64_t needed = round_up(rows, kKeptRows) * stride;
    STD_TORCH_CHECK(logits.numel() >= needed, "logits: expected at least ", needed, " elements, got ", logits.numel());
    return torch::stable::view(logits, {logits.numel()});
  }

  ScalarType real() const { return result_type(type); }
  bool empty() const { return rows == 0 || vocabulary == 0; }
  int64_t chunks() const { return empty() ? 0 : (vocabulary + chunk_entries - 1) / chunk_entries; }
  int64_t first(int64_t chunk) const { return chunk * chunk_entries; }
  int64_t entries(int64_t chunk) const { return std::min(chunk_entries, vocabulary - first(chunk)); }
  Tensor weight_of(int64_t chunk) const { return cuda::part_of(weight, first(chunk), entries(chunk)); }

  // [rows, entries of the chunk] of a buffer of rows * stride elements or more.
  Tensor matrix_of(const Tensor& buffer, int64_t chunk) const {
    Tensor whole = torch::stable::view(cuda::part_of(buffer, 0, rows * stride), {rows, stride});
    return torch::stable::narrow(whole, 1, 0, entries(chunk));
  }

  // What kernels read, announced after the device guard.
  LogitsChunk announced(const Tensor& logits) const {
    return {logits_type(type), rows, 0, 0, cuda::workspace(logits), stride, cuda::input<double>(bias), softcap,
            cuda::input<int64_t>(targets), cuda::input<double>(row_temperature), inverse_temperature};
  }

  LogitsChunk chunk_of(LogitsChunk all, int64_t chunk) const {
    all.entries = entries(chunk);
    all.first_entry = vocabulary_start + first(chunk);
    if (all.bias) all.bias += first(chunk);
    return all;
  }

 private:
  static constexpr int64_t kSmallestChunk = 256;
};

std::tuple<Tensor, Tensor, Tensor> run_forward(const Head& head, bool entropy, const Tensor& logits) {
  const Tensor& hidden = head.hidden;
  const ScalarType real = head.real();
  Tensor logprobs = cuda::empty(hidden, {head.rows}, real);
  Tensor entropies = cuda::empty(hidden, {entropy ? head.rows : 0}, real);
  Tensor statistics = cuda::empty(hidden, {head.rows, 2}, real);
  if (head.rows == 0) return {logprobs, entropies, statistics};

  const Stream stream = cuda::current_stream(hidden);
  const int64_t segment = linear_logprobs_segment(head.type);
  const auto segments_in = [segment](int64_t entries) { return (entries + segment - 1) / segment; };
  int64_t segments = 0;
  for (int64_t chunk = 0; chunk < head.chunks(); ++chunk) segments += segments_in(head.entries(chunk));
  Tensor sums = cuda::empty(hidden, {(entropy ? 3 : 2) * segments + 1, head.rows}, real);
  const LogitsChunk all = head.announced(logits);
  char* const planes = cuda::workspace<char>(sums);
  const int64_t plane = head.rows * sums.element_size();
  char *const target_logit = planes, *const largest = planes + plane;
  const auto of_segment = [&](int64_t kind, int64_t first) { return largest + (kind * segments + first) * plane; };

  for (int64_t chunk = 0, first = 0; chunk < head.chunks(); ++chunk) {
    cuda::multiply(head.hidden, cuda::transposed(head.weight_of(chunk)), head.matrix_of(logits, chunk));
    const LinearLogprobsSegments params{head.chunk_of(all, chunk), of_segment(0, first), of_segment(1, first),
                                        entropy ? of_segment(2, first) : nullptr, target_logit};
    cuda::check_launch(launch_linear_logprobs_segments(params, stream), "linear_token_logprobs");
    first += segments_in(head.entries(chunk));
  }
  const LinearLogprobsJoin params{all.type,
                                  head.rows,
                                  segments,
                                  head.vocabulary_start,
                                  head.vocabulary,
                                  of_segment(0, 0),
                                  of_segment(1, 0),
                                  entropy ? of_segment(2, 0) : nullptr,
                                  target_logit,
                                  all.targets,
                                  all.row_temperature,
                                  all.inverse_temperature,
                                  cuda::output(logprobs),
                                  entropy ? cuda::output(entropies) : nullptr,
                                  cuda::output(statistics)};
  cuda::check_launch(launch_linear_logprobs_join(params, stream), "linear_token_logprobs");
  return {logprobs, entropies, statistics};
}

std::tuple<Tensor, Tensor, Tensor> forward(Tensor hidden, Tensor weight, Tensor targets, std::optional<Tensor> bias,
                                           std::optional<Tensor> row_temperature, double temperature, double softcap,
                                           bool entropy, int64_t vocabulary_start) {
  const Head head(hidden, weight, targets, bias, row_temperature, temperature, softcap, vocabulary_start);
  const cuda::DeviceGuard guard(hidden);
  return run_forward(head, entropy, cuda::empty(hidden, {head.rows * head.stride}, head.real()));
}

std::tuple<Tensor, Tensor, Tensor> chunk_forward(Tensor hidden, Tensor weight, Tensor targets,
                                                 std::optional<Tensor> bias, std::optional<Tensor> row_temperature,
                                                 double temperature, double softcap, bool entropy, Tensor logits) {
  Head head(hidden, weight, targets, bias, row_temperature, temperature, softcap, 0);
  const Tensor kept = head.keep_whole(logits);
  const cuda::DeviceGuard guard(hidden);
  return run_forward(head, entropy, kept);
}

// What of the results' gradients the kernels read.
struct Gradients {
  Tensor statistics, entropies;
  std::optional<Tensor> logprobs, entropy;

  Gradients(const Head& head, const Tensor& statistics, const Tensor& entropies,
            const std::optional<Tensor>& grad_logprobs, const std::optional<Tensor>& grad_entropy)
      : statistics(statistics),
        entropies(entropies),
        logprobs(contiguous_gradient(grad_logprobs, head.type, head.rows, "grad_logprobs")),
        entropy(contiguous_gradient(grad_entropy, head.type, head.rows, "grad_entropy")) {
    STD_TORCH_CHECK(statistics.numel() == 2 * head.rows, "statistics: expected those of the forward");
    STD_TORCH_CHECK(!entropy || entropies.numel() == head.rows, "entropy: expected that of the forward");
  }

  LinearLogprobsRowGradients announced() const {
    return {cuda::input(statistics), cuda::input(entropies), cuda::input(logprobs), cuda::input(entropy)};
  }
};

// A copy of the hidden states that take part, with zeros for the others.
Tensor kept_hidden(const Head& head, const int64_t* targets, const LinearLogprobsRowGradients& given, Stream stream) {
  Tensor kept = cuda::empty(head.hidden, {head.rows, head.hidden_size}, head.hidden.scalar_type());
  const LinearLogprobsHidden params{head.type, head.rows, head.hidden_size, head.hidden.stride(0),
                                    cuda::input(head.hidden), targets, given, cuda::workspace(kept)};
  cuda::check_launch(launch_linear_logprobs_hidden(params, stream), "linear_token_logprobs_backward");
  return kept;
}

int64_t bias_shares_of(const Head& head) { return (head.rows + kLinearLogprobsRows - 1) / kLinearLogprobsRows; }

// grad_hidden = the sum over chunks of a chunk's gradient times its weights, with sums in float32.
class HiddenGradient {
 public:
  HiddenGradient(const Head& head, const Tensor& result, const Tensor& logits)
      : head_(head),
        result_(result),
        sum_(head.chunks() > 1 && result.scalar_type() != head.real()
                 ? cuda::empty(result, {head.rows, head.hidden_size}, head.real())
                 : result),
        parts_(logits),
        result_data_(cuda::output<char>(result)),
        sum_data_(sum_.const_data_ptr() == result.const_data_ptr() ? result_data_ : cuda::workspace<char>(sum_)) {}

  // Overwrites the logits.
  void add(int64_t chunk, const Tensor& gradient, Stream stream) {
    const Tensor weight = head_.weight_of(chunk);
    if (chunk == 0) {
      cuda::multiply(gradient, weight, sum_);
      return;
    }
    // As many rows at a time as the memory of the logits has room for.
    const int64_t rows_at_once = parts_.numel() / head_.hidden_size;
    for (int64_t row = 0; row < head_.rows; row += rows_at_once) {
      const int64_t rows = std::min(rows_at_once, head_.rows - row), columns = head_.hidden_size;
      const Tensor part = torch::stable::view(cuda::part_of(parts_, 0, rows * columns), {rows, columns});
      cuda::multiply(cuda::part_of(gradient, row, rows), weight, part);
      const bool last = chunk == head_.chunks() - 1;
      const int64_t first = row * columns;
      char* const sum = sum_data_ + first * sum_.element_size();
      const LinearLogprobsAccumulate params{logits_type(head_.type),
                                            last ? head_.type : logits_type(head_.type),
                                            rows,
                                            columns,
                                            columns,
                                            sum,
                                            part.const_data_ptr(),
                                            last ? result_data_ + first * result_.element_size() : sum};
      cuda::check_launch(launch_linear_logprobs_accumulate(params, stream), "linear_token_logprobs_backward");
    }
  }

 private:
  const Head& head_;
  Tensor result_, sum_, parts_;
  char *result_data_, *sum_data_;
};

std::tuple<Tensor, Tensor, Tensor> backward(Tensor hidden, Tensor weight, Tensor targets, std::optional<Tensor> bias,
                                            std::optional<Tensor> row_temperature, double temperature, double softcap,
                                            Tensor statistics, Tensor entropy, std::optional<Tensor> grad_logprobs,
                                            std::optional<Tensor> grad_entropy, int64_t vocabulary_start,
                                            bool hidden_needs_grad, bool weight_needs_grad, bool bias_needs_grad) {
  const Head head(hidden, weight, targets, bias, row_temperature, temperature, softcap, vocabulary_start);
  const cuda::DeviceGuard guard(hidden);
  const Gradients gradients(head, statistics, entropy, grad_logprobs, grad_entropy);
  const auto gradient_like = [&](bool needed, std::vector<int64_t> sizes, ScalarType type) {
    if (!needed) sizes = {0};
    return head.empty() ? cuda::new_zeros(hidden, sizes, type) : cuda::empty(hidden, sizes, type);
  };
  const ScalarType type = hidden.scalar_type(), real = head.real();
  Tensor grad_hidden = gradient_like(hidden_needs_grad, {head.rows, head.hidden_size}, type);
  Tensor grad_weight = gradient_like(weight_needs_grad, {head.vocabulary, head.hidden_size}, type);
  Tensor grad_bias = gradient_like(bias_needs_grad, {head.vocabulary}, ScalarType::Double);
  hidden_needs_grad = hidden_needs_grad && head.hidden_size > 0;
  weight_needs_grad = weight_needs_grad && head.hidden_size > 0;
  if (head.empty() || !(hidden_needs_grad || weight_needs_grad || bias_needs_grad)) {
    return {grad_hidden, grad_weight, grad_bias};
  }

  const char* const op = "linear_token_logprobs_backward";
  const Stream stream = cuda::current_stream(hidden);
  // They also hold a part of grad_hidden, which has a row at least.
  Tensor logits = cuda::empty(hidden, {std::max(head.rows * head.stride, head.hidden_size)}, real);
  Tensor gradient = cuda::empty(hidden, {head.rows * head.stride}, type);
  const int64_t shares = bias_shares_of(head);
  Tensor bias_shares = cuda::empty(hidden, {bias_needs_grad ? shares : 0, head.stride}, real);
  const LogitsChunk all = head.announced(logits);
  const LinearLogprobsRowGradients given = gradients.announced();
  void* const gradient_data = cuda::workspace(gradient);
  void* const share_data = bias_needs_grad ? cuda::workspace(bias_shares) : nullptr;
  double* const grad_bias_data = bias_needs_grad ? cuda::output<double>(grad_bias) : nullptr;

  std::optional<HiddenGradient> to_hidden;
  if (hidden_needs_grad) to_hidden.emplace(head, grad_hidden, logits);
  const Tensor kept = weight_needs_grad ? kept_hidden(head, all.targets, given, stream) : head.hidden;
  for (int64_t chunk = 0; chunk < head.chunks(); ++chunk) {
    const int64_t first = head.first(chunk), entries = head.entries(chunk);
    cuda::multiply(head.hidden, cuda::transposed(head.weight_of(chunk)), head.matrix_of(logits, chunk));
    const LinearLogprobsGradient params{head.chunk_of(all, chunk), given, head.type, gradient_data, share_data};
    cuda::check_launch(launch_linear_logprobs_gradient(params, stream), op);
    if (bias_needs_grad) {
      const LinearLogprobsBias sums{all.type, shares, entries, head.stride, share_data, grad_bias_data + first, false};
      cuda::check_launch(launch_linear_logprobs_bias(sums, stream), op);
    }
    const Tensor chunk_gradient = head.matrix_of(gradient, chunk);
    if (to_hidden) to_hidden->add(chunk, chunk_gradient, stream);
    if (weight_needs_grad) {
      cuda::multiply(cuda::transposed(chunk_gradient), kept, cuda::part_of(grad_weight, first, entries));
    }
  }
  return {grad_hidden, grad_weight, grad_bias};
}

// Adds gradient^T hidden to the sums, some entries of the vocabulary at a time.
void add_weight_gradient(const Head& head, const Tensor& gradient, const Tensor& hidden, const Tensor& sums,
                         Stream stream) {
  const int64_t columns = head.hidden_size, stride = sums.size(1);
  // Whole lines of memory, as the library that multiplies likes them.
  const int64_t entries_at_once = std::max<int64_t>(kPartBytes / (sums.element_size() * columns) / 64 * 64, 64);
  Tensor parts = cuda::empty(sums, {std::min(entries_at_once, head.vocabulary), columns}, sums.scalar_type());
  float *const sum = cuda::output<float>(sums), *const part = cuda::workspace<float>(parts);
  const Tensor transposed = cuda::transposed(gradient);
  for (int64_t first = 0; first < head.vocabulary; first += entries_at_once) {
    const int64_t entries = std::min(entries_at_once, head.vocabulary - first);
    cuda::multiply(cuda::part_of(transposed, first, entries), hidden, cuda::part_of(parts, 0, entries));
    float* const at = sum + first * stride;
    const LinearLogprobsAccumulate params{DataType::f32, DataType::f32, entries, columns, stride, at, part, at};
    cuda::check_launch(launch_linear_logprobs_accumulate(params, stream), "linear_chunk_gradients");
  }
}

Tensor chunk_backward(Tensor hidden, Tensor weight, Tensor targets, std::optional<Tensor> bias,
                      std::optional<Tensor> row_temperature, double temperature, double softcap, Tensor statistics,
                      Tensor entropy, std::optional<Tensor> grad_logprobs, std::optional<Tensor> grad_entropy,
                      Tensor logits, std::optional<Tensor> weight_sums, std::optional<Tensor> bias_sums,
                      bool hidden_needs_grad) {
  Head head(hidden, weight, targets, bias, row_temperature, temperature, softcap, 0);
  const Tensor kept_logits = head.keep_whole(logits);
  const bool is_sum = weight_sums && weight_sums->scalar_type() == ScalarType::Float;
  if (weight_sums) {
    cuda::check_device(*weight_sums, "weight_sums");
    check_contiguous(*weight_sums, "weight_sums");
    check_dim(*weight_sums, 2, "weight_sums");
    check_size(*weight_sums, 0, head.vocabulary, "weight_sums");
    if (is_sum) {
      STD_TORCH_CHECK(weight_sums->size(1) >= head.hidden_size, "weight_sums: expected rows for the hidden size");
    } else {
      check_type(*weight_sums, weight.scalar_type(), "weight_sums");
      check_size(*weight_sums, 1, head.hidden_size, "weight_sums");
    }
  }
  if (bias_sums) {
    cuda::check_device(*bias_sums, "bias_sums");
    check_type(*bias_sums, ScalarType::Double, "bias_sums");
    check_contiguous(*bias_sums, "bias_sums");
    check_dim(*bias_sums, 1, "bias_sums");
    check_size(*bias_sums, 0, head.vocabulary, "bias_sums");
  }
  const cuda::DeviceGuard guard(hidden);
  const Gradients gradients(head, statistics, entropy, grad_logprobs, grad_entropy);
  const ScalarType type = hidden.scalar_type();
  const std::vector<int64_t> sizes{hidden_needs_grad ? head.rows : 0, head.hidden_size};
  if (head.empty()) return cuda::new_zeros(hidden, sizes, type);
  if (head.hidden_size == 0) weight_sums.reset();
  Tensor grad_hidden = cuda::empty(hidden, sizes, type);

  const char* const op = "linear_chunk_gradients";
  const Stream stream = cuda::current_stream(hidden);
  // In place where both are float32: a thread writes what it has read.
  const bool in_place = type == ScalarType::Float;
  Tensor gradient = in_place ? kept_logits : cuda::empty(hidden, {head.rows * head.stride}, type);
  const int64_t shares = bias_shares_of(head);
  Tensor bias_shares = cuda::empty(hidden, {bias_sums ? shares : 0, head.stride}, ScalarType::Float);
  const LogitsChunk chunk = head.chunk_of(head.announced(kept_logits), 0);
  const LinearLogprobsRowGradients given = gradients.announced();
  const LinearLogprobsGradient params{chunk, given, head.type, in_place ? chunk.logits : cuda::workspace(gradient),
                                      bias_sums ? cuda::workspace(bias_shares) : nullptr};
  cuda::check_launch(launch_linear_logprobs_gradient(params, stream), op);
  if (bias_sums) {
    const LinearLogprobsBias sums{DataType::f32, shares, head.vocabulary, head.stride, params.bias_shares,
                                  cuda::output<double>(*bias_sums), true};
    cuda::check_launch(launch_linear_logprobs_bias(sums, stream), op);
  }
  const Tensor matrix = head.matrix_of(gradient, 0);
  if (hidden_needs_grad && head.hidden_size > 0) cuda::multiply(matrix, head.weight, grad_hidden);
  if (weight_sums) {
    const Tensor rows = kept_hidden(head, chunk.targets, given, stream);
    if (is_sum) {
      add_weight_gradient(head, matrix, rows, *weight_sums, stream);
    } else {
      cuda::multiply(cuda::transposed(matrix), rows, *weight_sums);
    }
  }
  return grad_hidden;
}

}  // namespace

PYKERN_CUDA_IMPL(m) {
  m.impl("linear_token_logprobs", TORCH_BOX(&forward));
  m.impl("linear_token_logprobs_backward", TORCH_BOX(&backward));
  m.impl("linear_chunk_logprobs", TORCH_BOX(&chunk_forward));
  m.impl("linear_chunk_gradients", TORCH_BOX(&chunk_backward));
}

}  // namespace pykern
