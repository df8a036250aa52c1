// Prefix attention in float64: plain loops over visible pairs.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "attention/prefix_attention.h"
#include "common/parallel.h"

namespace pykern {
namespace {

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

}  // namespace

void prefix_attention_forward_float64(const PrefixAttention& problem, double* out, double* lse) {
  parallel_tasks(problem.query_heads, [&](int64_t head, int) {
    const int64_t key_head = head / problem.group();
    std::vector<double> logits(problem.tokens);
    for (int64_t query = 0; query < problem.tokens; ++query) {
      const double* q = row(problem.q, query, head);
      double* o = out + (query * problem.query_heads + head) * problem.value_size;
      for (int64_t i = 0; i < problem.value_size; ++i) o[i] = 0.0;
      double largest = -std::numeric_limits<double>::infinity();
      double sum = 0.0;
      bool sees = false;
      for (int64_t key = 0; key <= query; ++key) {
        if (query >= problem.subtree_end[key]) continue;
        sees = true;
        logits[key] = problem.scale * dot(q, row(problem.k, key, key_head), problem.key_size);
        largest = std::max(largest, logits[key]);
      }
      for (int64_t key = 0; key <= query; ++key) {
        if (query >= problem.subtree_end[key]) continue;
        const double weight = std::exp(logits[key] - largest);
        sum += weight;
        add_scaled(o, weight, row(problem.v, key, key_head), problem.value_size);
      }
      for (int64_t i = 0; sees && i < problem.value_size; ++i) o[i] /= sum;
      lse[query * problem.query_heads + head] = sees ? largest + std::log(sum) : largest;
    }
  });
}

void prefix_attention_backward_float64(const PrefixAttention& problem, const HeadsView& grad_out, const HeadsView& out,
                                       const double* lse, const double* grad_lse, double* grad_q, double* grad_k,
                                       double* grad_v) {
  const int64_t key_size = problem.key_size, value_size = problem.value_size;
  // A task owns one key head, so it owns all that it adds to.
  parallel_tasks(problem.key_heads, [&](int64_t key_head, int) {
    for (int64_t key = 0; key < problem.tokens; ++key) {
      const int64_t at = key * problem.key_heads + key_head;
      for (int64_t i = 0; i < key_size; ++i) grad_k[at * key_size + i] = 0.0;
      for (int64_t i = 0; i < value_size; ++i) grad_v[at * value_size + i] = 0.0;
    }
    for (int64_t head = key_head * problem.group(); head < (key_head + 1) * problem.group(); ++head) {
      for (int64_t query = 0; query < problem.tokens; ++query) {
        const int64_t at = query * problem.query_heads + head;
        const double* q = row(problem.q, query, head);
        const double* g = row(grad_out, query, head);
        double* gq = grad_q + at * key_size;
        for (int64_t i = 0; i < key_size; ++i) gq[i] = 0.0;
        const double delta = dot(g, row(out, query, head), value_size) - (grad_lse ? grad_lse[at] : 0.0);
        for (int64_t key = 0; key <= query; ++key) {
          if (query >= problem.subtree_end[key]) continue;
          const int64_t key_at = key * problem.key_heads + key_head;
          const double* k = row(problem.k, key, key_head);
          const double weight = std::exp(problem.scale * dot(q, k, key_size) - lse[at]);
          add_scaled(grad_v + key_at * value_size, weight, g, value_size);
          const double grad_weight = dot(g, row(problem.v, key, key_head), value_size);
          const double grad_logit = problem.scale * weight * (grad_weight - delta);
          add_scaled(gq, grad_logit, k, key_size);
          add_scaled(grad_k + key_at * key_size, grad_logit, q, key_size);
        }
      }
    }
  });
}

}  // namespace pykern
