// The CPU kernels, written once and compiled once per instruction set.
//
// The including file defines FASTCLIP_ISA and, in that namespace, its vectors:
//   vd, kWide           double lanes and their number (2, 4 or 8)
//   vf                  2 * kWide float lanes
//   load_wide(p)        kWide floats or doubles -> vd
//   load_bf16(p), load_f16(p)   2 * kWide 16-bit numbers -> vf
//   widen_low(f), widen_high(f) the halves of vf -> vd
//   store_bf16(p, f), store_f16(p, f) vf -> 2 * kWide 16-bit numbers, rounded to nearest even; a NaN
//                       stays one (in bfloat16 it becomes 0x7fc0, as in torch: rounding could carry it to 0)
//
// Every sum runs over the same 64 double lanes whatever the width of a vector, products of narrow
// types are exact in the wider one, and contraction to FMA is off: all instruction sets give the
// same bits. Nothing here calls an inline function of a header: see kernels.h.

namespace fastclip::cpu {
namespace FASTCLIP_ISA {

// A chunk is read as 8 streams side by side. One stream alone stalls wherever the prefetcher has to
// start anew, at each 4 KiB page; the measured gain is in bench/NOTES.md.
constexpr int kStreams = 8;
constexpr int kLanes = 8;                          // doubles per stream
constexpr int kVectors = kLanes / kWide;           // vectors per stream
constexpr int kPrefetchBytes = 512;
constexpr int kHalfPrefetchBytes = 1024;           // a 16-bit stream takes 256 bytes at a time
constexpr int kHalfLanes = 2 * kLanes;             // floats per stream, for 16-bit numbers
constexpr int kHalfVectors = kHalfLanes / (2 * kWide);
constexpr int kMaxFloatAdditions = 8;              // then float32 lanes are widened to float64
constexpr int kStep = 2 * kWide;                   // floats per vector
constexpr std::int64_t kBlock = 512;               // elements decoded at a time, in registers and L1
static_assert(kLanes % kWide == 0 && kBlock % kLanes == 0);

struct F64 { using Storage = double; using Real = double; };
struct F32 { using Storage = float; using Real = float; };
struct Bf16 { using Storage = std::uint16_t; using Real = float; };
struct F16 { using Storage = std::uint16_t; using Real = float; };
struct C128 { using Storage = double; using Real = double; };
struct C64 { using Storage = float; using Real = double; };
template <int kExponentBits, bool kFnuz> struct F8 { using Storage = std::uint8_t; using Real = float; };

template <class Real> struct BitsOf;
template <> struct BitsOf<float> {
  using type = std::int32_t;
  using Unsigned = std::uint32_t;
  static constexpr type kAbs = 0x7fffffff, kInf = 0x7f800000;
};
template <> struct BitsOf<double> {
  using type = std::int64_t;
  using Unsigned = std::uint64_t;
  static constexpr type kAbs = 0x7fffffffffffffff, kInf = 0x7ff0000000000000;
};

template <int kValue>
struct Index {
  constexpr operator int() const { return kValue; }
};
template <int... kIndex> struct Indices {};
template <int kCount, int... kIndex> struct IndicesBelow : IndicesBelow<kCount - 1, kCount - 1, kIndex...> {};
template <int... kIndex> struct IndicesBelow<0, kIndex...> { using type = Indices<kIndex...>; };

template <class To, class From>
static inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}

template <class Fn>
static auto visit(DType dtype, Fn fn) {
  switch (dtype) {
    case DType::f64: return fn(F64{});
    case DType::f32: return fn(F32{});
    case DType::bf16: return fn(Bf16{});
    case DType::f16: return fn(F16{});
    case DType::c128: return fn(C128{});
    case DType::c64: return fn(C64{});
    case DType::f8_e4m3fn: return fn(F8<4, false>{});
    case DType::f8_e4m3fnuz: return fn(F8<4, true>{});
    case DType::f8_e5m2: return fn(F8<5, false>{});
    default: return fn(F8<5, true>{});
  }
}

// ---- decoding: storage -> |x| or x in float or double, a block at a time -------------------------

// |value| of each of the 256 codes. FN: no Inf, all ones is NaN. FNUZ: 0x80 is the only NaN.
template <int kExponentBits, bool kFnuz>
struct F8Table {
  float magnitude[256];
  constexpr F8Table() : magnitude() {
    constexpr int mantissa_bits = 7 - kExponentBits;
    constexpr int bias = (1 << (kExponentBits - 1)) - (kFnuz ? 0 : 1);
    constexpr int top = (1 << kExponentBits) - 1;
    for (int code = 0; code < 256; ++code) {
      const int exponent = (code & 0x7f) >> mantissa_bits;
      const int mantissa = code & ((1 << mantissa_bits) - 1);
      const int significand = exponent ? mantissa + (1 << mantissa_bits) : mantissa;
      double value = significand;
      for (int e = (exponent ? exponent : 1) - bias - mantissa_bits; e != 0; e += e < 0 ? 1 : -1)
        value = e < 0 ? value / 2 : value * 2;
      magnitude[code] = static_cast<float>(value);
      if (kFnuz) {
        if (code == 0x80) magnitude[code] = __builtin_nanf("");
      } else if (kExponentBits == 4) {
        if ((code & 0x7f) == 0x7f) magnitude[code] = __builtin_nanf("");
      } else if (exponent == top) {
        magnitude[code] = mantissa ? __builtin_nanf("") : __builtin_inff();
      }
    }
  }
};
template <int kExponentBits, bool kFnuz>
static constexpr F8Table<kExponentBits, kFnuz> kF8Table{};

static inline double modulus(float re, float im) {
  const double a = re, b = im;
  return __builtin_sqrt(a * a + b * b);  // exact squares: no overflow, NaN wins over Inf
}
static inline double modulus(double re, double im) {
  if (__builtin_isnan(re) || __builtin_isnan(im)) return __builtin_nan("");  // hypot(Inf, NaN) is Inf
  return __builtin_hypot(re, im);
}

static inline const double* decode(F64, const double* x, std::int64_t, double*) { return x; }
static inline const float* decode(F32, const float* x, std::int64_t, float*) { return x; }
static inline const float* decode(Bf16, const std::uint16_t* x, std::int64_t size, float* out) {
  for (std::int64_t i = 0; i < size; ++i) out[i] = bit_cast<float>(std::uint32_t{x[i]} << 16);
  return out;
}
static inline const float* decode(F16, const std::uint16_t* x, std::int64_t size, float* out) {
  std::int64_t i = 0;
  for (; i + kStep <= size; i += kStep) {
    const vf values = load_f16(x + i);
    __builtin_memcpy(out + i, &values, sizeof values);
  }
  if (i < size) {
    std::uint16_t tail[kStep] = {};
    __builtin_memcpy(tail, x + i, (size - i) * sizeof *x);
    const vf values = load_f16(tail);
    __builtin_memcpy(out + i, &values, (size - i) * sizeof *out);
  }
  return out;
}
template <int kExponentBits, bool kFnuz>
static inline const float* decode(F8<kExponentBits, kFnuz>, const std::uint8_t* x, std::int64_t size, float* out) {
  for (std::int64_t i = 0; i < size; ++i) out[i] = kF8Table<kExponentBits, kFnuz>.magnitude[x[i]];
  return out;
}
template <class Part>
static inline const double* decode_complex(const Part* x, std::int64_t size, double* out) {
  for (std::int64_t i = 0; i < size; ++i) out[i] = modulus(x[2 * i], x[2 * i + 1]);
  return out;
}
static inline const double* decode(C128, const double* x, std::int64_t size, double* out) { return decode_complex(x, size, out); }
static inline const double* decode(C64, const float* x, std::int64_t size, double* out) { return decode_complex(x, size, out); }

template <class Format> constexpr std::int64_t kParts = 1;
template <> constexpr std::int64_t kParts<C128> = 2;
template <> constexpr std::int64_t kParts<C64> = 2;

// Calls fn(values, count) for block after block; values are float or double.
template <class Format, class Fn>
static inline void for_blocks(Format format, const void* data, std::int64_t size, Fn fn) {
  const auto* x = static_cast<const typename Format::Storage*>(data);
  typename Format::Real buffer[kBlock];
  for (std::int64_t begin = 0; begin < size; begin += kBlock) {
    const std::int64_t count = size - begin < kBlock ? size - begin : kBlock;
    fn(decode(format, x + begin * kParts<Format>, count, buffer), count);
  }
}

// ---- sums -----------------------------------------------------------------------------------------

#define FASTCLIP_INLINE __attribute__((always_inline))

template <int... kIndex, class Fn>
FASTCLIP_INLINE static inline void call_each(Indices<kIndex...>, Fn fn) {
  (fn(Index<kIndex>{}), ...);
}
// fn(Index<0>), fn(Index<1>), ...: unrolled before the optimiser sees it, so that an array of vectors
// indexed by it lives in registers. A pragma comes too late for that.
template <int kCount, class Fn>
FASTCLIP_INLINE static inline void unrolled(Fn fn) {
  call_each(typename IndicesBelow<kCount>::type{}, fn);
}

template <class Real, class Term>
FASTCLIP_INLINE static inline void add_terms(const Real* x, vd (&lanes)[kVectors], Term term) {
  unrolled<kVectors>([&](auto v) FASTCLIP_INLINE { lanes[v] += term(load_wide(x + v * kWide)); });
}

FASTCLIP_INLINE static inline void clear(vd (&streams)[kStreams][kVectors]) {
  unrolled<kStreams>([&](auto s) FASTCLIP_INLINE { unrolled<kVectors>([&](auto v) FASTCLIP_INLINE { streams[s][v] = vd{}; }); });
}

// Adds the lanes in a fixed tree: the streams, then the 8 lanes that are left.
static_assert(kStreams == 8 && kLanes == 8);
FASTCLIP_INLINE static inline double sum_of_streams(const vd (&streams)[kStreams][kVectors]) {
  vd lanes[kVectors];
  unrolled<kVectors>([&](auto v) FASTCLIP_INLINE {
    lanes[v] = ((streams[0][v] + streams[4][v]) + (streams[2][v] + streams[6][v])) +
               ((streams[1][v] + streams[5][v]) + (streams[3][v] + streams[7][v]));
  });
  double row[kLanes];
  __builtin_memcpy(row, lanes, sizeof row);
  return ((row[0] + row[4]) + (row[2] + row[6])) + ((row[1] + row[5]) + (row[3] + row[7]));
}

// Sum of term(x) over all x. term(0) must be 0: the last row of lanes is padded with zeros.
template <class Real, class Term>
static inline double sum_terms(const Real* x, std::int64_t size, Term term) {
  const std::int64_t stream = size / (kStreams * kLanes) * kLanes;
  vd lanes[kStreams][kVectors];
  clear(lanes);
  for (std::int64_t i = 0; i < stream; i += kLanes)
    unrolled<kStreams>([&](auto s) FASTCLIP_INLINE {
      const Real* at = x + s * stream + i;
      __builtin_prefetch(reinterpret_cast<const char*>(at) + kPrefetchBytes);
      add_terms(at, lanes[s], term);
    });
  if (const std::int64_t done = stream * kStreams; done < size) {
    Real tail[kStreams * kLanes] = {};
    __builtin_memcpy(tail, x + done, (size - done) * sizeof *x);
    unrolled<kStreams>([&](auto s) FASTCLIP_INLINE { add_terms(tail + s * kLanes, lanes[s], term); });
  }
  return sum_of_streams(lanes);
}

template <bool kScaled, class Real>
static double sum_squares_wide(const Real* x, std::int64_t size, double scale) {
  return sum_terms(x, size, [scale](vd values) {
    if (kScaled) values *= scale;
    return values * values;
  });
}

static inline vd magnitude(vd x) {
  typedef std::int64_t Lanes __attribute__((vector_size(8 * kWide)));
  return reinterpret_cast<vd>(reinterpret_cast<Lanes>(x) & BitsOf<double>::kAbs);
}

static inline vf load_half(Bf16, const std::uint16_t* x) { return load_bf16(x); }
static inline vf load_half(F16, const std::uint16_t* x) { return load_f16(x); }

// `steps` <= kMaxFloatAdditions steps of kHalfLanes numbers: float32 sums, widened once.
template <bool kScaled, class Format>
FASTCLIP_INLINE static inline void add_half_squares(Format format, const std::uint16_t* x, int steps, vd (&lanes)[kVectors], float scale) {
  vf sums[kHalfVectors];
  unrolled<kHalfVectors>([&](auto v) FASTCLIP_INLINE { sums[v] = vf{}; });
  for (int step = 0; step < steps; ++step)
    unrolled<kHalfVectors>([&](auto v) FASTCLIP_INLINE {
      vf values = load_half(format, x + step * kHalfLanes + v * 2 * kWide);
      if (kScaled) values *= scale;
      sums[v] += values * values;
    });
  unrolled<kHalfVectors>([&](auto v) FASTCLIP_INLINE {
    lanes[(2 * v) % kVectors] += widen_low(sums[v]);
    lanes[(2 * v + 1) % kVectors] += widen_high(sums[v]);
  });
}

template <bool kScaled, class Format>
static double sum_squares_half(Format format, const std::uint16_t* x, std::int64_t size, float scale) {
  constexpr std::int64_t kRun = kMaxFloatAdditions * kHalfLanes;
  const std::int64_t stream = size / (kStreams * kHalfLanes) * kHalfLanes;
  vd lanes[kStreams][kVectors];
  clear(lanes);
  std::int64_t i = 0;
  for (; i + kRun <= stream; i += kRun)
    unrolled<kStreams>([&](auto s) FASTCLIP_INLINE {
      const std::uint16_t* at = x + s * stream + i;
      for (int line = 0; line < 4; ++line)
        __builtin_prefetch(reinterpret_cast<const char*>(at) + kHalfPrefetchBytes + 64 * line);
      add_half_squares<kScaled>(format, at, kMaxFloatAdditions, lanes[s], scale);
    });
  if (const int steps = static_cast<int>((stream - i) / kHalfLanes); steps > 0)
    unrolled<kStreams>([&](auto s) FASTCLIP_INLINE {
      add_half_squares<kScaled>(format, x + s * stream + i, steps, lanes[s], scale);
    });
  if (const std::int64_t done = stream * kStreams; done < size) {
    std::uint16_t tail[kStreams * kHalfLanes] = {};
    __builtin_memcpy(tail, x + done, (size - done) * sizeof *x);
    unrolled<kStreams>([&](auto s) FASTCLIP_INLINE {
      add_half_squares<kScaled>(format, tail + s * kHalfLanes, 1, lanes[s], scale);
    });
  }
  return sum_of_streams(lanes);
}

template <bool kScaled>
static double sum_squares_of(DType dtype, const void* data, std::int64_t size, double scale) {
  return visit(dtype, [&](auto format) -> double {
    using Format = decltype(format);
    const auto* x = static_cast<const typename Format::Storage*>(data);
    if constexpr (sizeof(typename Format::Storage) >= 4) {  // re and im are summed as two numbers
      return sum_squares_wide<kScaled>(x, size * kParts<Format>, scale);
    } else if constexpr (sizeof(typename Format::Storage) == 2) {
      return sum_squares_half<kScaled>(format, x, size, static_cast<float>(scale));
    } else {
      double sum = 0.0;
      for_blocks(format, data, size, [&](const float* values, std::int64_t count) {
        sum += sum_squares_wide<kScaled>(values, count, scale);
      });
      return sum;
    }
  });
}

static double sum_squares(DType dtype, const void* data, std::int64_t size, double scale) {
  return scale == 1.0 ? sum_squares_of<false>(dtype, data, size, scale) : sum_squares_of<true>(dtype, data, size, scale);
}

constexpr int kLargestMultipliedPower = 16;

static double sum_powers(DType dtype, const void* data, std::int64_t size, double unit, double power) {
  const int whole = power >= 1 && power <= kLargestMultipliedPower ? static_cast<int>(power) : 0;
  return visit(dtype, [&](auto format) -> double {
    using Format = decltype(format);
    if (whole == power) {
      double sum = 0.0;
      for_blocks(format, data, size, [&](const typename Format::Real* values, std::int64_t count) {
        sum += sum_terms(values, count, [=](vd x) {
          const vd ratio = magnitude(x) / unit;
          vd result = ratio;
          for (int k = 1; k < whole; ++k) result *= ratio;
          return result;
        });
      });
      return sum;
    }
    double sum = 0.0;
    for_blocks(format, data, size, [&](const typename Format::Real* values, std::int64_t count) {
      for (std::int64_t i = 0; i < count; ++i)
        sum += __builtin_pow(__builtin_fabs(static_cast<double>(values[i])) / unit, power);
    });
    return sum;
  });
}

// ---- survey ---------------------------------------------------------------------------------------

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

// ---- writes ---------------------------------------------------------------------------------------

// Stores map(load(at)) at every vector's place: side by side in a few streams, for the same reason as
// in the sums. The streams lie a multiple of 4 KiB apart, where a load waits for an earlier store to the
// same offset: so all load before any stores. The last vector works on a padded copy.
constexpr int kWriteStreams = 4;

template <class Vector, class Storage, class Load, class Map, class Store>
FASTCLIP_INLINE static inline void map_vectors(Storage* x, std::int64_t size, Load load, Map map, Store store) {
  constexpr int kCount = sizeof(Storage) == 8 ? kWide : 2 * kWide;
  const std::int64_t stream = size / (kWriteStreams * kCount) * kCount;
  for (std::int64_t i = 0; i < stream; i += kCount) {
    Vector values[kWriteStreams];
    unrolled<kWriteStreams>([&](auto s) FASTCLIP_INLINE { values[s] = map(load(x + s * stream + i)); });
    unrolled<kWriteStreams>([&](auto s) FASTCLIP_INLINE { store(x + s * stream + i, values[s]); });
  }
  std::int64_t done = kWriteStreams * stream;
  for (; done + kCount <= size; done += kCount) store(x + done, map(load(x + done)));
  if (done < size) {
    Storage tail[kCount] = {};
    __builtin_memcpy(tail, x + done, (size - done) * sizeof *x);
    store(tail, map(load(tail)));
    __builtin_memcpy(x + done, tail, (size - done) * sizeof *x);
  }
}

template <class Vector, class Real>
static inline void scale_vectors(Real* x, std::int64_t size, Real factor) {
  map_vectors<Vector>(
      x, size,
      [](const Real* at) FASTCLIP_INLINE {
        Vector values;
        __builtin_memcpy(&values, at, sizeof values);
        return values;
      },
      [factor](Vector values) FASTCLIP_INLINE { return values * factor; },
      [](Real* at, Vector values) FASTCLIP_INLINE { __builtin_memcpy(at, &values, sizeof values); });
}
static void scale_reals(float* x, std::int64_t size, float factor) { scale_vectors<vf>(x, size, factor); }
static void scale_reals(double* x, std::int64_t size, double factor) { scale_vectors<vd>(x, size, factor); }

static void scale_in_double(float* x, std::int64_t size, double factor) {
  for (std::int64_t i = 0; i < size; ++i) x[i] = static_cast<float>(x[i] * factor);
}

static inline void store_half(Bf16, std::uint16_t* x, vf values) { store_bf16(x, values); }
static inline void store_half(F16, std::uint16_t* x, vf values) { store_f16(x, values); }

// Multiplies by first * second, of which `first` is a power of two.
template <class Format>
static void scale_half(Format format, std::uint16_t* x, std::int64_t size, float first, float second) {
  map_vectors<vf>(
      x, size, [=](const std::uint16_t* at) FASTCLIP_INLINE { return load_half(format, at); },
      [=](vf values) FASTCLIP_INLINE { return values * first * second; },
      [=](std::uint16_t* at, vf values) FASTCLIP_INLINE { store_half(format, at, values); });
}

constexpr double kSmallestNormalFloat = 1.1754943508222875e-38;

static void scale(DType dtype, void* data, std::int64_t size, double factor) {
  // A factor below float32's normal range, from a norm above 1e38, would lose its bits as a float.
  const bool tiny = factor != 0.0 && __builtin_fabs(factor) < kSmallestNormalFloat;
  visit(dtype, [&](auto format) {
    using Format = decltype(format);
    auto* x = static_cast<typename Format::Storage*>(data);
    if constexpr (sizeof(typename Format::Storage) == 8) {
      scale_reals(x, size * kParts<Format>, factor);
    } else if constexpr (sizeof(typename Format::Storage) == 4) {
      if (tiny)
        scale_in_double(x, size * kParts<Format>, factor);
      else
        scale_reals(x, size * kParts<Format>, static_cast<float>(factor));
    } else if constexpr (sizeof(typename Format::Storage) == 2) {
      scale_half(format, x, size, tiny ? 0x1p-64f : 1.0f, static_cast<float>(tiny ? factor * 0x1p64 : factor));
    }
  });
}

// `bound` and `inf` are bit patterns of the storage type: order of magnitudes is order of integers.
template <class Bits>
static bool clamp_bits(Bits* x, std::int64_t size, Bits bound, Bits inf) {
  constexpr Bits kSign = Bits{1} << (8 * sizeof(Bits) - 1);
  bool written = false;
  for (std::int64_t begin = 0; begin < size; begin += kBlock) {
    const std::int64_t end = begin + kBlock < size ? begin + kBlock : size;
    Bits above = 0;
    for (std::int64_t i = begin; i < end; ++i) {
      const Bits magnitude = x[i] & static_cast<Bits>(~kSign);
      above |= magnitude > bound && magnitude <= inf;
    }
    if (!above) continue;  // nothing to do: nothing is written
    written = true;
    for (std::int64_t i = begin; i < end; ++i) {
      const Bits magnitude = x[i] & static_cast<Bits>(~kSign);
      const Bits clamped = static_cast<Bits>((x[i] & kSign) | bound);
      x[i] = magnitude > bound && magnitude <= inf ? clamped : x[i];
    }
  }
  return written;
}

template <class Format>
static std::uint16_t half_bits(Format format, float value) {
  vf values = {};
  values += value;
  std::uint16_t stored[2 * kWide];
  store_half(format, stored, values);
  return stored[0];
}
constexpr std::uint16_t half_inf(Bf16) { return 0x7f80; }
constexpr std::uint16_t half_inf(F16) { return 0x7c00; }

static bool clamp(DType dtype, void* data, std::int64_t size, double bound) {
  return visit(dtype, [&](auto format) -> bool {
    using Format = decltype(format);
    using Storage = typename Format::Storage;
    if constexpr (kParts<Format> == 2 || sizeof(Storage) == 1) {
      return false;  // refused at the border
    } else if constexpr (sizeof(Storage) == 2) {
      return clamp_bits(static_cast<Storage*>(data), size, half_bits(format, static_cast<float>(bound)), half_inf(format));
    } else {
      using Layout = BitsOf<Storage>;
      using Bits = typename Layout::Unsigned;
      return clamp_bits(static_cast<Bits*>(data), size, bit_cast<Bits>(static_cast<Storage>(bound)), static_cast<Bits>(Layout::kInf));
    }
  });
}

// A number of kCount parts is zeroed when any of its parts isn't finite.
template <int kCount, class Bits>
static bool zero_nonfinite_bits(Bits* x, std::int64_t size, Bits inf) {
  constexpr Bits kMagnitude = static_cast<Bits>(static_cast<Bits>(~Bits{0}) >> 1);
  bool written = false;
  for (std::int64_t i = 0; i < size * kCount; i += kCount) {
    bool finite = true;
    for (int k = 0; k < kCount; ++k) finite &= (x[i + k] & kMagnitude) < inf;
    if (finite) continue;
    written = true;
    for (int k = 0; k < kCount; ++k) x[i + k] = Bits{0};
  }
  return written;
}

static bool zero_nonfinite(DType dtype, void* data, std::int64_t size) {
  return visit(dtype, [&](auto format) -> bool {
    using Format = decltype(format);
    using Storage = typename Format::Storage;
    if constexpr (sizeof(Storage) == 2) {
      return zero_nonfinite_bits<1>(static_cast<Storage*>(data), size, half_inf(format));
    } else if constexpr (sizeof(Storage) >= 4) {
      using Layout = BitsOf<Storage>;
      using Bits = typename Layout::Unsigned;
      return zero_nonfinite_bits<kParts<Format>>(static_cast<Bits*>(data), size, static_cast<Bits>(Layout::kInf));
    } else {
      return false;  // refused at the border
    }
  });
}

static constexpr Kernels table(const char* name) {
  return {name, sum_squares, sum_powers, all_zero, survey, scale, clamp, zero_nonfinite};
}

}  // namespace FASTCLIP_ISA
}  // namespace fastclip::cpu

#undef FASTCLIP_INLINE
