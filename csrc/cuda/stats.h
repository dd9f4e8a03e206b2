// What one stretch of memory, a unit or a piece of one, says: the fields of a row. A part of read.cu.
#pragma once

#include "../norms.h"
#include "walk.h"

namespace fastclip::cuda {

// In a row's order; the same stands in fastclip/types.py and ../cpu/engine.h.
struct Stats {
  double norm, nans, infs, max_abs, sum_abs, zeros;
};

template <class Real>
struct Survey {
  Real max_abs, min_abs;  // NaN left out
  double sum_abs;
  std::uint32_t zeros, nans, infs;
};

// Calls see(|x|) for every element of this thread's share.
template <class Real, int kInFlight, class See>
__device__ void for_magnitudes(const Group& group, DType dtype, const char* data, std::uint32_t bytes, See see) {
  for_vectors<kInFlight>(group, data, bytes, [&](const Vector& raw, std::uint32_t valid) {
    see_magnitudes(Real{}, dtype, raw, valid, see);
  });
}

template <bool kAll, class Real, int kInFlight>
__device__ Survey<Real> survey(Group& group, DType dtype, const char* data, std::uint32_t bytes) {
  constexpr Real kInfinite = static_cast<Real>(INFINITY);
  Survey<Real> seen{0, kInfinite, 0.0, 0, 0, 0};
  for_magnitudes<Real, kInFlight>(group, dtype, data, bytes, [&](Real x) {
    seen.nans += x != x;
    seen.infs += x == kInfinite;
    seen.max_abs = Largest{}(x, seen.max_abs);  // a NaN is neither larger nor smaller
    if constexpr (kAll) {
      seen.min_abs = Smallest{}(x, seen.min_abs);
      seen.sum_abs += static_cast<double>(x);
      seen.zeros += x == 0;
    }
  });
  seen.nans = group.reduce(seen.nans, Add{});
  seen.infs = group.reduce(seen.infs, Add{});
  seen.max_abs = group.reduce(seen.max_abs, Largest{});
  if constexpr (kAll) {
    seen.min_abs = group.reduce(seen.min_abs, Smallest{});
    seen.sum_abs = group.reduce(seen.sum_abs, Add{});
    seen.zeros = group.reduce(seen.zeros, Add{});
  }
  return seen;
}

template <class Real>
__device__ double norm_of(Group& group, DType dtype, const char* data, std::uint32_t bytes, double p, const Survey<Real>& seen) {
  if (p == 0.0) return bytes / bytes_of(dtype) - seen.zeros;
  if (seen.nans > 0) return kNaN;
  if (p == kInf) return seen.max_abs;
  if (p == -kInf) return seen.min_abs;
  if (p > 0 && seen.infs > 0) return kInf;
  if (p == 1.0 && seen.sum_abs <= DBL_MAX) return seen.sum_abs;
  const double dominant = p > 0 ? seen.max_abs : seen.min_abs;
  if (dominant == 0.0 || dominant == kInf) return dominant;
  const double scale = p == 2.0 ? unit_scale(dominant) : 1.0 / dominant;
  const bool divide = scale > DBL_MAX || scale < DBL_MIN;  // 1 / dominant is not a normal number
  double powers = 0.0;
  for_magnitudes<Real, 1>(group, dtype, data, bytes, [&](Real x) {
    const double part = divide ? x / dominant : x * scale;
    powers += p == 2.0 ? part * part : pow(part, p);
  });
  powers = group.reduce(powers, Add{});
  return saturate(p == 2.0 ? sqrt(powers) / scale : dominant * pow(powers, 1.0 / p));
}

// Everything, from as many looks as it takes; all but the first find the data in cache.
template <bool kAll, class Real, int kInFlight>
__device__ Stats full_stats(Group& group, DType dtype, const char* data, std::uint32_t bytes, double p) {
  const Survey<Real> seen = survey<kAll, Real, kInFlight>(group, dtype, data, bytes);
  const bool nan = seen.nans > 0;
  return {norm_of(group, dtype, data, bytes, p, seen),
          static_cast<double>(seen.nans),
          static_cast<double>(seen.infs),
          nan ? kNaN : static_cast<double>(seen.max_abs),
          nan ? kNaN : seen.sum_abs,
          static_cast<double>(seen.zeros)};
}

// kAll: every field, for any p. Else p is 2 and only norm, nans and infs are wanted. kInFlight: loads on their way at a
// time in a look at everything; one will do where it finds the data in cache.
template <bool kAll, int kInFlight = kAll ? 4 : 1>
__device__ Stats stats_of(Group& group, DType dtype, const char* data, std::uint32_t bytes, double p) {
  if constexpr (!kAll) {
    double sum = 0.0, least = 0.0;
    std::uint32_t any = 0;  // a bit that isn't a sign
    visit(dtype, [&](const auto& format) {
      using Format = std::decay_t<decltype(format)>;
      for_vectors<Format::kInFlight>(group, data, bytes, [&](const Vector& raw, std::uint32_t) {
        sum += squares(format, raw);
        any |= ((raw.x | raw.z) & ~Format::kEvenSigns) | ((raw.y | raw.w) & ~Format::kOddSigns);
      });
      least = Format::kLeastTrusted;
    });
    sum = group.reduce(sum, Add{});
    if (sum >= least && sum > 0.0 && sum <= DBL_MAX) return {sqrt(sum), 0.0, 0.0, 0.0, 0.0, 0.0};
    // Most chunks of an embedding's gradient are zeros: they must not be read again.
    if (sum == 0.0 && group.reduce(any, Or{}) == 0) return {0.0, 0.0, 0.0, 0.0, 0.0, 0.0};
    p = 2.0;
  }
  // The second look, while the chunk is in cache: tells NaN, Inf, overflow and underflow apart.
  return is_narrow(dtype) ? full_stats<kAll, float, kInFlight>(group, dtype, data, bytes, p)
                          : full_stats<kAll, double, kInFlight>(group, dtype, data, bytes, p);
}

// ---- joins ------------------------------------------------------------------------------------------

// Calls see(fields) for this thread's share of pieces [0, count), whose fields lie `stride` apart. One block joins what
// all have read, and nothing hides its loads but each other: kInFlight of each field are on their way before the first
// is used. The order in which they are seen is that of one after the other.
template <int kFields, int kInFlight, class See>
__device__ void for_pieces(const Group& group, const double* pieces, std::int64_t stride, std::int64_t count, See see) {
#pragma unroll 1
  for (std::int64_t first = group.rank; first < count; first += kInFlight * group.size) {
    double fields[kInFlight][kFields];
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) {
      const std::int64_t at = first + k * group.size;
#pragma unroll
      for (int f = 0; f < kFields; ++f) fields[k][f] = load_shared_between_blocks(pieces + f * stride + (at < count ? at : first));
    }
#pragma unroll
    for (int k = 0; k < kInFlight; ++k)
      if (first + k * group.size < count) see(fields[k]);
  }
}

// The p-norm of norms[0], ..., norms[count - 1], none of them NaN, of which each thread knows the largest, the smallest
// and the sum of its share.
inline __device__ double join_norms(Group& group, const double* norms, std::int64_t count, double p, double largest,
                                    double smallest, double sum) {
  largest = group.reduce(largest, Largest{});
  if (p == kInf) return largest;
  if (p < 0) smallest = group.reduce(smallest, Smallest{});
  if (p == -kInf) return smallest;
  if (p == 0.0 || p == 1.0) {
    sum = group.reduce(sum, Add{});
    return p == 0.0 || largest == kInf ? sum : saturate(sum);
  }
  if (p > 0 && (largest == 0.0 || largest == kInf)) return largest;
  if (p < 0 && (smallest == 0.0 || smallest == kInf)) return smallest;
  // The dominant one counts as 1, or nearly so: the sum neither overflows nor underflows.
  const double scale = unit_scale(largest), dominant = p > 0 ? largest : smallest;
  double powers = 0.0;
  for_pieces<1, 4>(group, norms, 0, count, [&](const double (&piece)[1]) {
    powers += p == 2.0 ? piece[0] * scale * (piece[0] * scale) : pow(piece[0] / dominant, p);
  });
  powers = group.reduce(powers, Add{});
  return saturate(p == 2.0 ? sqrt(powers) / scale : dominant * pow(powers, 1.0 / p));
}

// Pieces [0, count) as one; see norm_of_norms, of which this is the parallel form. Their order is fixed by `count` alone.
inline __device__ Stats join(Group& group, const double* pieces, std::int64_t stride, std::int64_t count, double p, bool all) {
  if (p == 2.0 && !all) {  // nearly always one look at the norms is enough: a NaN or Inf among them shows in the sum
    double sum = 0.0;
    for_pieces<1, 8>(group, pieces, 0, count, [&](const double (&piece)[1]) { sum += piece[0] * piece[0]; });
    sum = group.reduce(sum, Add{});
    if (sum >= F64::kLeastTrusted && sum <= DBL_MAX) return {sqrt(sum), 0.0, 0.0, 0.0, 0.0, 0.0};
  }
  Stats joined{0.0, 0.0, 0.0, 0.0, 0.0, 0.0};
  double largest = 0.0, smallest = kInf, sum = 0.0;
  std::uint32_t nan = 0, bad = 0;
  for_pieces<3, 4>(group, pieces, stride, count, [&](const double (&piece)[3]) {
    const double norm = piece[0];
    nan |= norm != norm;
    bad |= piece[1] + piece[2] > 0;
    largest = Largest{}(norm, largest);
    smallest = Smallest{}(norm, smallest);
    sum += norm;
    joined.nans += piece[1];
    joined.infs += piece[2];
  });
  const std::uint32_t found = group.reduce(nan | bad << 1, Or{});
  if (found & 2) {  // else both are 0
    joined.nans = group.reduce(joined.nans, Add{});
    joined.infs = group.reduce(joined.infs, Add{});
  }
  joined.norm = found & 1 ? kNaN : join_norms(group, pieces, count, p, largest, smallest, sum);
  if (!all) return joined;
  for_pieces<3, 4>(group, pieces + 3 * stride, stride, count, [&](const double (&piece)[3]) {
    joined.max_abs = Largest{}(piece[0], joined.max_abs);  // a NaN is counted above, and set below
    joined.sum_abs += piece[1];
    joined.zeros += piece[2];
  });
  joined.max_abs = group.reduce(joined.max_abs, Largest{});
  joined.sum_abs = group.reduce(joined.sum_abs, Add{});
  joined.zeros = group.reduce(joined.zeros, Add{});
  if (joined.nans > 0) joined.max_abs = joined.sum_abs = kNaN;
  return joined;
}

__device__ inline void store_row(double* rows, std::int64_t stride, const Stats& stats, bool all, double divisor, double p) {
  rows[0] = p == 0.0 ? stats.norm : stats.norm / divisor;
  rows[stride] = stats.nans;
  rows[2 * stride] = stats.infs;
  if (!all) return;
  rows[3 * stride] = stats.max_abs / divisor;
  rows[4 * stride] = stats.sum_abs / divisor;
  rows[5 * stride] = stats.zeros;
}

}  // namespace fastclip::cuda
