// Everything about a chunk that isn't a sum of squares, and whether it is all zero. A part of kernels.inl.

namespace fastclip::cpu {
namespace FASTCLIP_ISA {

template <class Bits>
struct BitCounts {
  Bits largest, smallest;
  std::int64_t zeros, nans, infs;
};

// Works on the bits of |x|, whose order as signed integers is that of the magnitudes, with NaN above
// Inf. A true comparison is -1 in each lane, so counts are subtracted. kBlock can't overflow a lane.
template <class Real>
static inline auto count_bits(const Real* values, std::int64_t count) {
  using Layout = BitsOf<Real>;
  using Bits = typename Layout::type;
  constexpr int kCount = 8 * kWide / sizeof(Bits);
  typedef Bits Lanes __attribute__((vector_size(8 * kWide)));
  const Lanes inf = Lanes{} + Layout::kInf;
  Lanes largest = {}, smallest = inf, zeros = {}, nans = {}, infs = {};
  const auto add = [&](const Real* x) {
    Lanes bits;
    __builtin_memcpy(&bits, x, sizeof bits);
    bits &= Layout::kAbs;
    // masks, not ?: on vectors, which GCC 12 takes apart into scalars for AVX2
    const Lanes nan = bits > inf;
    const Lanes high = bits & ~nan, low = high | (inf & nan);
    const Lanes higher = high > largest, lower = low < smallest;
    largest = (high & higher) | (largest & ~higher);
    smallest = (low & lower) | (smallest & ~lower);
    zeros -= bits == 0;
    nans -= nan;
    infs -= bits == inf;
  };
  const std::int64_t whole = count / kCount * kCount;
  for (std::int64_t i = 0; i < whole; i += kCount) add(values + i);
  std::int64_t padding = 0;
  if (whole < count) {
    Real tail[kCount];
    for (int k = 0; k < kCount; ++k) tail[k] = values[whole + k < count ? whole + k : whole];
    add(tail);
    padding = kCount - (count - whole);  // the first of the tail was counted that often too much
  }
  BitCounts<Bits> sum{0, Layout::kInf, 0, 0, 0};
  for (int k = 0; k < kCount; ++k) {
    sum.largest = largest[k] > sum.largest ? largest[k] : sum.largest;
    sum.smallest = smallest[k] < sum.smallest ? smallest[k] : sum.smallest;
    sum.zeros += zeros[k];
    sum.nans += nans[k];
    sum.infs += infs[k];
  }
  if (padding > 0) {
    const Bits bits = bit_cast<Bits>(values[whole]) & Layout::kAbs;
    sum.zeros -= bits == 0 ? padding : 0;
    sum.nans -= bits > Layout::kInf ? padding : 0;
    sum.infs -= bits == Layout::kInf ? padding : 0;
  }
  return sum;
}

static Survey survey(DType dtype, const void* data, std::int64_t size) {
  return visit(dtype, [&](auto format) -> Survey {
    using Real = typename decltype(format)::Real;
    using Bits = typename BitsOf<Real>::type;
    Bits largest = 0, smallest = BitsOf<Real>::kInf;
    double sum_abs = 0.0;
    std::int64_t zeros = 0, nans = 0, infs = 0;
    for_blocks(format, data, size, [&](const Real* values, std::int64_t count) {
      const auto seen = count_bits(values, count);
      largest = largest > seen.largest ? largest : seen.largest;
      smallest = smallest < seen.smallest ? smallest : seen.smallest;
      zeros += seen.zeros;
      nans += seen.nans;
      infs += seen.infs;
      sum_abs += sum_terms(values, count, [](vd x) { return magnitude(x); });
    });
    return {static_cast<double>(bit_cast<Real>(largest)), static_cast<double>(bit_cast<Real>(smallest)),
            sum_abs, zeros, nans, infs};
  });
}

// Whether every element is 0, of either sign. The sign of a 4-, 2- or 1-byte element is masked in
// each of the 8 bytes looked at together.
static bool all_zero(DType dtype, const void* data, std::int64_t size) {
  return visit(dtype, [&](auto format) -> bool {
    using Format = decltype(format);
    constexpr int kBits = 8 * sizeof(typename Format::Storage);
    constexpr std::uint64_t kSigns = ~std::uint64_t{0} / (kBits == 64 ? ~std::uint64_t{0} : (std::uint64_t{1} << kBits % 64) - 1) << (kBits - 1);
    const auto* bytes = static_cast<const char*>(data);
    const std::int64_t count = size * kParts<Format> * static_cast<std::int64_t>(sizeof(typename Format::Storage));
    std::uint64_t seen = 0;
    std::int64_t i = 0;
    for (; i + 8 <= count; i += 8) {
      std::uint64_t word;
      __builtin_memcpy(&word, bytes + i, sizeof word);
      seen |= word;
    }
    if (i < count) {
      std::uint64_t word = 0;
      __builtin_memcpy(&word, bytes + i, count - i);
      seen |= word;
    }
    return (seen & ~kSigns) == 0;
  });
}

}  // namespace FASTCLIP_ISA
}  // namespace fastclip::cpu
