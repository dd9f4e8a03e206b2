// A norm of norms: how chunks join to tensors, and tensors to the total.
//
// The p-norm of a list equals the p-norm of the norms of its pieces, so one rule serves every level,
// and a norm, unlike a sum of powers, neither overflows nor underflows where its elements don't.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <limits>

#if defined(__CUDACC__)
#define FASTCLIP_BOTH __host__ __device__
#else
#define FASTCLIP_BOTH
#endif

namespace fastclip {

inline constexpr double kInf = std::numeric_limits<double>::infinity();
inline constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

// The norm of no elements at all: what leaves any join unchanged.
FASTCLIP_BOTH inline double empty_norm(double p) { return p < 0 ? kInf : 0.0; }

// Exponents up to which a power of two and its inverse are both normal numbers.
inline constexpr int kDoubleExponents = 1000, kFloatExponents = 100;

// A power of two that brings `largest` near 1, as far as `exponents` allow, without losing a bit.
FASTCLIP_BOTH inline double unit_scale(double largest, int exponents = kDoubleExponents) {
  int exponent = std::ilogb(largest);
  if (exponent > exponents) exponent = exponents;
  if (exponent < -exponents) exponent = -exponents;
  return std::ldexp(1.0, -exponent);
}

// Finite elements never give an infinite norm: past the largest double it stays there.
FASTCLIP_BOTH inline double saturate(double norm) { return norm > DBL_MAX ? DBL_MAX : norm; }

// p-norm of norms[0], norms[stride], ..., in index order. NaN wins over Inf, Inf over the rest.
inline double norm_of_norms(const double* norms, std::int64_t count, double p) {
  double largest = 0.0, smallest = kInf, sum = 0.0;
  for (std::int64_t i = 0; i < count; ++i) {
    const double norm = norms[i];
    if (std::isnan(norm)) return kNaN;
    largest = norm > largest ? norm : largest;
    smallest = norm < smallest ? norm : smallest;
    sum += norm;
  }
  if (p == 0.0) return sum;
  if (p == kInf) return largest;
  if (p == -kInf) return smallest;
  if (p > 0 && (largest == 0.0 || largest == kInf)) return largest;
  if (p < 0 && (smallest == 0.0 || smallest == kInf)) return smallest;
  if (p == 1.0) return saturate(sum);
  if (p == 2.0) {
    const double scale = unit_scale(largest);
    double squares = 0.0;
    for (std::int64_t i = 0; i < count; ++i) {
      const double norm = norms[i] * scale;
      squares += norm * norm;
    }
    return saturate(std::sqrt(squares) / scale);
  }
  // The dominant piece counts as exactly 1, so the sum stays within [1, count] for every p.
  const double dominant = p > 0 ? largest : smallest;
  double powers = 0.0;
  for (std::int64_t i = 0; i < count; ++i) powers += std::pow(norms[i] / dominant, p);
  return saturate(dominant * std::pow(powers, 1.0 / p));
}

// The multiplier of torch's clip_grad_norm_, but exactly 1 at or below the bound, and for
// max_norm=inf, where torch divides Inf by Inf.
FASTCLIP_BOTH inline double clip_coef(double total_norm, double max_norm, double eps) {
  if (total_norm <= max_norm || max_norm == kInf) return 1.0;
  return max_norm / (total_norm + eps);
}

}  // namespace fastclip
