// Sums of squares and of powers. A part of kernels.inl.

namespace fastclip::cpu {
namespace FASTCLIP_ISA {

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

template <class Real, class Add>
FASTCLIP_INLINE static inline void add_wide(const Real* x, vd (&lanes)[kVectors], Add add) {
  unrolled<kVectors>([&](auto v) FASTCLIP_INLINE { lanes[v] = add(lanes[v], load_wide(x + v * kWide)); });
}

FASTCLIP_INLINE static inline void clear(vd (&streams)[kStreams][kVectors]) {
  unrolled<kStreams>([&](auto s) FASTCLIP_INLINE { unrolled<kVectors>([&](auto v) FASTCLIP_INLINE { streams[s][v] = vd{}; }); });
}

// Adds the 8 lanes of one stream in a fixed tree.
static_assert(kLanes == 8);
FASTCLIP_INLINE static inline double sum_of_lanes(const vd (&lanes)[kVectors]) {
  double row[kLanes];
  __builtin_memcpy(row, lanes, sizeof row);
  return ((row[0] + row[4]) + (row[2] + row[6])) + ((row[1] + row[5]) + (row[3] + row[7]));
}

// Adds the lanes in a fixed tree: the streams, then the 8 lanes that are left.
static_assert(kStreams == 8);
FASTCLIP_INLINE static inline double sum_of_streams(const vd (&streams)[kStreams][kVectors]) {
  vd lanes[kVectors];
  unrolled<kVectors>([&](auto v) FASTCLIP_INLINE {
    lanes[v] = ((streams[0][v] + streams[4][v]) + (streams[2][v] + streams[6][v])) +
               ((streams[1][v] + streams[5][v]) + (streams[3][v] + streams[7][v]));
  });
  return sum_of_lanes(lanes);
}

// The sum that begins at 0 and goes on as add(sum, x), over all x. An x of 0 must add 0: the last row of lanes is padded
// with zeros.
template <class Real, class Add>
static inline double sum_wide(const Real* x, std::int64_t size, Add add) {
  const Streams<kStreams, kLanes> streams(size, sizeof *x);
  vd lanes[kStreams][kVectors];
  clear(lanes);
  for (std::int64_t row = 0; row < streams.rows; ++row)
    unrolled<kStreams>([&](auto s) FASTCLIP_INLINE {
      const Real* at = x + row * streams.step + s * streams.apart;
      __builtin_prefetch(reinterpret_cast<const char*>(at) + kPrefetchBytes);
      add_wide(at, lanes[s], add);
    });
  if (const std::int64_t done = streams.size(); done < size) {
    Real tail[kStreams * kLanes] = {};
    __builtin_memcpy(tail, x + done, (size - done) * sizeof *x);
    unrolled<kStreams>([&](auto s) FASTCLIP_INLINE { add_wide(tail + s * kLanes, lanes[s], add); });
  }
  return sum_of_streams(lanes);
}

// A float's square is exact as a double.
template <bool kScaled, class Real>
static double sum_squares_wide(const Real* x, std::int64_t size, double scale) {
  return sum_wide(x, size, [scale](vd sum, vd values) FASTCLIP_INLINE {
    if (kScaled) values *= scale;
    if constexpr (sizeof(Real) == 4) return add_square(sum, values);
    else return sum + values * values;
  });
}

static inline vd magnitude(vd x) {
  typedef std::int64_t Lanes __attribute__((vector_size(8 * kWide)));
  return reinterpret_cast<vd>(reinterpret_cast<Lanes>(x) & BitsOf<double>::kAbs);
}
static inline vf magnitude(vf x) {
  typedef std::int32_t Lanes __attribute__((vector_size(8 * kWide)));
  return reinterpret_cast<vf>(reinterpret_cast<Lanes>(x) & BitsOf<float>::kAbs);
}

static inline vf load_half(Bf16, const std::uint16_t* x) { return load_bf16(x); }
static inline vf load_half(F16, const std::uint16_t* x) { return load_f16(x); }

// `steps` <= kMaxFloatAdditions steps of kHalfLanes numbers: float32 sums, widened once.
template <class Format, class Add>
FASTCLIP_INLINE static inline void add_halves(Format format, const std::uint16_t* x, int steps, vd (&lanes)[kVectors], Add add) {
  vf sums[kHalfVectors];
  unrolled<kHalfVectors>([&](auto v) FASTCLIP_INLINE { sums[v] = vf{}; });
  for (int step = 0; step < steps; ++step)
    unrolled<kHalfVectors>([&](auto v) FASTCLIP_INLINE {
      sums[v] = add(sums[v], load_half(format, x + step * kHalfLanes + v * 2 * kWide));
    });
  unrolled<kHalfVectors>([&](auto v) FASTCLIP_INLINE {
    lanes[(2 * v) % kVectors] += widen_low(sums[v]);
    lanes[(2 * v + 1) % kVectors] += widen_high(sums[v]);
  });
}

// As sum_wide, add(sum, x) being of float32 vectors.
template <class Format, class Add>
static inline double sum_halves(Format format, const std::uint16_t* x, std::int64_t size, Add add) {
  constexpr int kRun = kMaxFloatAdditions * kHalfLanes;
  const Streams<kStreams, kRun> streams(size, sizeof *x);
  const std::int64_t ahead = half_prefetch_bytes;
  vd lanes[kStreams][kVectors];
  clear(lanes);
  for (std::int64_t row = 0; row < streams.rows; ++row)
    unrolled<kStreams>([&](auto s) FASTCLIP_INLINE {
      const std::uint16_t* at = x + row * streams.step + s * streams.apart;
      for (int line = 0; line < 4; ++line)
        __builtin_prefetch(reinterpret_cast<const char*>(at) + ahead + 64 * line);
      add_halves(format, at, kMaxFloatAdditions, lanes[s], add);
    });
  std::int64_t done = streams.size();
  if (const int steps = static_cast<int>((size - done) / (kStreams * kHalfLanes)); steps > 0) {
    unrolled<kStreams>([&](auto s) FASTCLIP_INLINE { add_halves(format, x + done + s * steps * kHalfLanes, steps, lanes[s], add); });
    done += steps * kStreams * kHalfLanes;
  }
  if (done < size) {
    std::uint16_t tail[kStreams * kHalfLanes] = {};
    __builtin_memcpy(tail, x + done, (size - done) * sizeof *x);
    unrolled<kStreams>([&](auto s) FASTCLIP_INLINE { add_halves(format, tail + s * kHalfLanes, 1, lanes[s], add); });
  }
  return sum_of_streams(lanes);
}

static inline vf add_half_square(F16, vf sum, vf x) { return add_square(sum, x); }
static inline vf add_half_square(Bf16, vf sum, vf x) { return sum + x * x; }  // which may underflow, and is rounded then

template <bool kScaled, class Format>
static double sum_squares_half(Format format, const std::uint16_t* x, std::int64_t size, float scale) {
  return sum_halves(format, x, size, [=](vf sum, vf values) FASTCLIP_INLINE {
    if (kScaled) values *= scale;
    return add_half_square(format, sum, values);
  });
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
        sum += sum_wide(values, count, [=](vd powers, vd x) FASTCLIP_INLINE {
          const vd ratio = magnitude(x) / unit;
          vd result = ratio;
          for (int k = 1; k < whole; ++k) result *= ratio;
          return powers + result;
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

}  // namespace FASTCLIP_ISA
}  // namespace fastclip::cpu
