// Everything about a chunk that isn't a sum of squares, and whether it is all zero. A part of kernels.inl.

namespace fastclip::cpu {
namespace FASTCLIP_ISA {

// Magnitudes, by their bits.
template <class Bits>
struct Magnitudes {
  Bits largest, smallest;
  std::int64_t zeros, nans, infs;
};

// A loop as the compilers' vectorisers like it: no count of a block overflows 16 bits.
static_assert(kBlock <= 0x7fff);
template <bool kFinite, class Bits, class Value>
static inline Magnitudes<Bits> seen_in(const Value* values, std::int64_t count, Bits inf) {
  Bits largest = 0, smallest = inf, zeros = 0, nans = 0, infs = 0;
  for (std::int64_t i = 0; i < count; ++i) {
    const Bits bits = bit_cast<Bits>(values[i]) & BitsOf<Value>::kAbs;
    const bool nan = !kFinite && bits > inf;
    const Bits high = nan ? Bits{0} : bits, low = nan ? inf : bits;
    largest = high > largest ? high : largest;
    smallest = low < smallest ? low : smallest;
    zeros += bits == 0;
    nans += nan;
    infs += !kFinite && bits == inf;
  }
  return {largest, smallest, zeros, nans, infs};
}

// Adds a block to what was seen before. NaN and Inf are rare: a block without them is looked at by half the operations.
template <class Bits, class Value>
static inline void add_block(Magnitudes<Bits>& all, const Value* values, std::int64_t count, Bits inf) {
  Magnitudes<Bits> seen = seen_in<true>(values, count, inf);
  if (seen.largest >= inf) seen = seen_in<false>(values, count, inf);
  all.largest = all.largest > seen.largest ? all.largest : seen.largest;
  all.smallest = all.smallest < seen.smallest ? all.smallest : seen.smallest;
  all.zeros += seen.zeros;
  all.nans += seen.nans;
  all.infs += seen.infs;
}

template <class Real>
static inline double sum_magnitudes(const Real* values, std::int64_t count) {
  return sum_wide(values, count, [](vd sum, vd x) FASTCLIP_INLINE { return sum + magnitude(x); });
}
static inline double sum_of_stored(F64, const double* x, std::int64_t size) { return sum_magnitudes(x, size); }
static inline double sum_of_stored(F32, const float* x, std::int64_t size) { return sum_magnitudes(x, size); }
template <class Format>
static inline double sum_of_stored(Format format, const std::uint16_t* x, std::int64_t size) {
  double sum = sum_halves(format, x, size, [](vf sum, vf values) FASTCLIP_INLINE { return sum + magnitude(values); });
  if (__builtin_isfinite(sum)) return sum;
  sum = 0.0;  // a few bfloat16 numbers may be more than a float32 lane holds
  for_blocks(format, x, size, [&](const float* values, std::int64_t count) { sum += sum_magnitudes(values, count); });
  return sum;
}

static inline double value_of(F64, std::int64_t bits) { return bit_cast<double>(bits); }
static inline double value_of(F32, std::int32_t bits) { return bit_cast<float>(bits); }
template <class Format>
static inline double value_of(Format format, std::int16_t bits) {
  const std::uint16_t stored[kStep] = {static_cast<std::uint16_t>(bits)};
  return load_half(format, stored)[0];
}

static Survey survey(DType dtype, const void* data, std::int64_t size, bool with_sum) {
  return visit(dtype, [&](auto format) -> Survey {
    using Format = decltype(format);
    using Storage = typename Format::Storage;
    using Real = typename Format::Real;
    if constexpr (kParts<Format> == 1 && sizeof(Storage) > 1) {
      constexpr auto inf = kInfBits<Format>;
      const auto* x = static_cast<const Storage*>(data);
      const double sum = with_sum ? sum_of_stored(format, x, size) : 0.0;
      Magnitudes<std::remove_const_t<decltype(inf)>> all{0, inf, 0, 0, 0};
      for (std::int64_t begin = 0; begin < size; begin += kBlock)
        add_block(all, x + begin, begin + kBlock < size ? kBlock : size - begin, inf);
      return {value_of(format, all.largest), value_of(format, all.smallest), sum, all.zeros, all.nans, all.infs};
    } else {
      constexpr auto inf = BitsOf<Real>::kInf;
      double sum = 0.0;
      Magnitudes<std::remove_const_t<decltype(inf)>> all{0, inf, 0, 0, 0};
      for_blocks(format, data, size, [&](const Real* values, std::int64_t count) {
        if (with_sum) sum += sum_magnitudes(values, count);
        add_block(all, values, count, inf);
      });
      return {static_cast<double>(bit_cast<Real>(all.largest)), static_cast<double>(bit_cast<Real>(all.smallest)), sum,
              all.zeros, all.nans, all.infs};
    }
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
