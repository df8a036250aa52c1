// Prefix attention in float64: plain loops over visible pairs.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "attention/prefix_attention.h"
#include "common/parallel.h"

namespace pykern {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

const double* row(const HeadsView& view, int64_t token, int64_t head) {
  return static_cast<const double*>(view.data) + token * view.token_stride + head * view.head_stride;
}

double dot(const double* a, const double* b, int64_t size) {
  double sum = 0.0;
  for (int64_t i = 0; i < size; ++i) sum += a[i] * b[i];
  return sum;
}

void add_scaled(double* target, double factor, const double* source, int64_t size) {
  for (int64_t i = 0; i < size; ++i) target[i] += factor * source[i];
}

// A value of a head, 0 where there are none.
double of_head(const void* values, int64_t head) { return values ? static_cast<const double*>(values)[head] : 0.0; }

struct Logit {
  double value;
  double slope;  // its derivative by the scaled product
};

Logit logit(const PrefixAttention& problem, int64_t head, int64_t query, int64_t key) {
  const double product = problem.scale * dot(row(problem.q, query, head), row(problem.k, key, head / problem.group()),
                                             problem.key_size);
  Logit result{product, 1.0};
  if (problem.softcap > 0.0) {
    const double bent = std::tanh(product / problem.softcap);
    result = {problem.softcap * bent, 1.0 - bent * bent};
  }
  if (problem.alibi_slopes) {
    const double distance = static_cast<double>(problem.position[query]) - problem.position[key];
    result.value -= of_head(problem.alibi_slopes, head) * distance;
  }
  return result;
}

}  // namespace

void prefix_attention_forward_float64(const PrefixAttentionFloat64& problem) {
  parallel_tasks(problem.query_heads, [&](int64_t head, int) {
    const int64_t key_head = head / problem.group();
    std::vector<double> logits(problem.tokens);
    for (int64_t query = 0; query < problem.tokens; ++query) {
      const int64_t at = query * problem.query_heads + head;
      double* o = problem.out + at * problem.value_size;
      for (int64_t i = 0; i < problem.value_size; ++i) o[i] = 0.0;
      double largest = -kInfinity;
      bool sees = false;
      for (int64_t key = 0; key <= query; ++key) {
        if (!problem.visible(query, key)) continue;
        sees = true;
        logits[key] = logit(problem, head, query, key).value;
        // A NaN stays.
        largest = largest >= logits[key] || largest != largest ? largest : logits[key];
      }
      if (problem.largest) problem.largest[at] = largest;
      if (!sees) {
        problem.lse[at] = -kInfinity;
        continue;
      }
      const double sink = problem.sinks ? of_head(problem.sinks, head) : -kInfinity;
      const double shift = largest >= sink || largest != largest ? largest : sink;
      double sum = problem.sinks ? std::exp(sink - shift) : 0.0;
      for (int64_t key = 0; key <= query; ++key) {
        if (!problem.visible(query, key)) continue;
        const double weight = std::exp(logits[key] - shift);
        sum += weight;
        add_scaled(o, weight, row(problem.v, key, key_head), problem.value_size);
      }
      for (int64_t i = 0; i < problem.value_size; ++i) o[i] /= sum;
      problem.lse[at] = shift + std::log(sum);
    }
  });
}

void prefix_attention_backward_float64(const PrefixAttentionBackwardFloat64& problem) {
  const int64_t key_size = problem.key_size, value_size = problem.value_size;
  // A task owns one key head, so it owns all that it adds to.
  parallel_tasks(problem.key_heads, [&](int64_t key_head, int) {
    for (int64_t key = 0; key < problem.tokens; ++key) {
      const int64_t at = key * problem.key_heads + key_head;
      std::fill_n(problem.grad_k + at * key_size, key_size, 0.0);
      std::fill_n(problem.grad_v + at * value_size, value_size, 0.0);
    }
    for (int64_t head = key_head * problem.group(); head < (key_head + 1) * problem.group(); ++head) {
      double grad_sink = 0.0;
      for (int64_t query = 0; query < problem.tokens; ++query) {
        const int64_t at = query * problem.query_heads + head;
        const double* q = row(problem.q, query, head);
        const double* g = row(problem.grad_out, query, head);
        double* gq = problem.grad_q + at * key_size;
        std::fill_n(gq, key_size, 0.0);
        if (problem.lse[at] == -kInfinity) continue;
        const double delta =
            dot(g, row(problem.out, query, head), value_size) - (problem.grad_lse ? problem.grad_lse[at] : 0.0);
        if (problem.sinks) grad_sink -= std::exp(of_head(problem.sinks, head) - problem.lse[at]) * delta;
        for (int64_t key = 0; key <= query; ++key) {
          if (!problem.visible(query, key)) continue;
          const int64_t key_at = key * problem.key_heads + key_head;
          const Logit own = logit(problem, head, query, key);
          const double weight = std::exp(own.value - problem.lse[at]);
          add_scaled(problem.grad_v + key_at * value_size, weight, g, value_size);
          const double grad_weight = dot(g, row(problem.v, key, key_head), value_size);
          const double grad_product = problem.scale * own.slope * weight * (grad_weight - delta);
          add_scaled(gq, grad_product, row(problem.k, key, key_head), key_size);
          add_scaled(problem.grad_k + key_at * key_size, grad_product, q, key_size);
        }
      }
      if (problem.grad_sinks) problem.grad_sinks[head] = grad_sink;
    }
  });
}

}  // namespace pykern
