// Numbers that the parts of an advantage are made of, in double.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

namespace pykern {

// Within the range of the values, which rounding might leave: the mean of equal values is then exactly theirs.
inline double mean_within(double sum, double weight, double low, double high) {
  const double quotient = sum / weight;
  return quotient < low ? low : quotient > high ? high : quotient;
}

// Of the values that `read(visit)` hands to visit(value, weight); it is called twice. Values of weight zero are none.
struct Moments {
  double weight = 0, low = std::numeric_limits<double>::infinity(), high = -low, mean = 0, squares = 0;

  template <class Read>
  explicit Moments(Read read) {
    double sum = 0;
    read([&](double value, double value_weight) {
      if (value_weight <= 0) return;
      weight += value_weight;
      sum += value_weight * value;
      low = value < low ? value : low;
      high = value > high ? value : high;
    });
    if (weight <= 0) return;
    mean = mean_within(sum, weight, low, high);
    read([&](double value, double value_weight) {
      if (value_weight > 0) squares += value_weight * (value - mean) * (value - mean);
    });
  }

  bool empty() const { return weight <= 0; }
  bool equal() const { return low == high; }
  double variance(int ddof) const { return squares / (weight - ddof); }
  // The deviation of a single value is one.
  double deviation(int ddof) const { return weight > 1 ? std::sqrt(variance(ddof)) : 1; }
};

// C(a, k) / C(b, k) for a <= b; zero where there is no choice of k.
inline double choose_ratio(int64_t a, int64_t b, int64_t k) {
  if (k < 0 || k > a || k > b) return 0;
  double ratio = 1;
  for (int64_t i = 0; i < k; ++i) ratio *= static_cast<double>(a - i) / static_cast<double>(b - i);
  return ratio;
}

inline double log_gamma(double value) {
#if defined(__GLIBC__)
  int sign;
  return lgamma_r(value, &sign);  // std::lgamma writes the sign to a variable that all threads share
#else
  return std::lgamma(value);
#endif
}

// The Beta distribution that the means of the groups suggest; BNPO divides by its density.
class BetaPrior {
 public:
  BetaPrior(double mean, double variance) : flat_(variance == 0) {
    if (flat_) return;
    const double q = mean * (1 - mean) / variance - 1;
    alpha_ = std::fmax(1 + q * mean / 3, 1);
    beta_ = std::fmax(1 + q * (1 - mean) / 3, 1);
    log_scale_ = log_gamma(alpha_ + beta_) - log_gamma(alpha_) - log_gamma(beta_);
  }

  double inverse_density(double share) const {
    if (flat_) return 1;
    const double log_density = power(alpha_ - 1, share) + power(beta_ - 1, 1 - share) + log_scale_;
    return std::fmin(std::exp(-log_density), 1e6);
  }

 private:
  static double power(double exponent, double base) { return exponent == 0 ? 0 : exponent * std::log(base); }

  bool flat_;
  double alpha_ = 1, beta_ = 1, log_scale_ = 0;
};

}  // namespace pykern
