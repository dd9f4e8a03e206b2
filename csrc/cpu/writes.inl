// What is written in place: scale, clamp, zero_nonfinite. A part of kernels.inl.

namespace fastclip::cpu {
namespace FASTCLIP_ISA {

// Stores map(load(at)) at every vector's place, in a few streams. Those of a whole chunk lie a multiple of 4 KiB apart,
// where a load waits for an earlier store to the same offset: so all load before any stores. The last vector works on a
// padded copy.
constexpr int kWriteStreams = 4;

template <class Vector, class Storage, class Load, class Map, class Store>
FASTCLIP_INLINE static inline void map_vectors(Storage* x, std::int64_t size, Load load, Map map, Store store) {
  constexpr int kCount = sizeof(Storage) == 8 ? kWide : 2 * kWide;
  const Streams<kWriteStreams, kCount> streams(size, sizeof *x);
  for (std::int64_t row = 0; row < streams.rows; ++row) {
    Storage* const at = x + row * streams.step;
    Vector values[kWriteStreams];
    unrolled<kWriteStreams>([&](auto s) FASTCLIP_INLINE { values[s] = map(load(at + s * streams.apart)); });
    unrolled<kWriteStreams>([&](auto s) FASTCLIP_INLINE { store(at + s * streams.apart, values[s]); });
  }
  std::int64_t done = streams.size();
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

template <class Format, class Map>
FASTCLIP_INLINE static inline void map_halves(Format format, std::uint16_t* x, std::int64_t size, Map map) {
  map_vectors<vf>(
      x, size, [=](const std::uint16_t* at) FASTCLIP_INLINE { return load_half(format, at); }, map,
      [=](std::uint16_t* at, vf values) FASTCLIP_INLINE { store_half(format, at, values); });
}
template <class Format>
static void scale_halves(Format format, std::uint16_t* x, std::int64_t size, float factor) {
  map_halves(format, x, size, [factor](vf values) FASTCLIP_INLINE { return values * factor; });
}
template <class Format>
static void scale_halves_in_double(Format format, std::uint16_t* x, std::int64_t size, double factor) {
  map_halves(format, x, size, [factor](vf values) FASTCLIP_INLINE {
    for (int k = 0; k < kStep; ++k) values[k] = static_cast<float>(values[k] * factor);
    return values;
  });
}

constexpr double kSmallestNormalFloat = 1.1754943508222875e-38;

static void scale(DType dtype, void* data, std::int64_t size, double factor) {
  // A factor below float32's normal range, from a norm above 1e38, would lose its bits as a float: the product is taken in
  // float64.
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
      if (tiny)
        scale_halves_in_double(format, x, size, factor);
      else
        scale_halves(format, x, size, static_cast<float>(factor));
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

template <class Format> constexpr double kLargest = __DBL_MAX__;
template <> constexpr double kLargest<F32> = __FLT_MAX__;
template <> constexpr double kLargest<Bf16> = 0x1.fep127;
template <> constexpr double kLargest<F16> = 65504.0;

template <class Format>
static std::uint16_t half_bits(Format format, float value) {
  vf values = {};
  values += value;
  std::uint16_t stored[2 * kWide];
  store_half(format, stored, values);
  return stored[0];
}

static bool clamp(DType dtype, void* data, std::int64_t size, double bound) {
  return visit(dtype, [&](auto format) -> bool {
    using Format = decltype(format);
    using Storage = typename Format::Storage;
    if constexpr (kParts<Format> == 2 || sizeof(Storage) == 1) {
      return false;  // refused at the border
    } else if (bound > kLargest<Format>) {
      return false;  // no number of this format exceeds it
    } else if constexpr (sizeof(Storage) == 2) {
      return clamp_bits(static_cast<Storage*>(data), size, half_bits(format, static_cast<float>(bound)),
                        static_cast<Storage>(kInfBits<Format>));
    } else {
      using Bits = typename BitsOf<Storage>::Unsigned;
      return clamp_bits(static_cast<Bits*>(data), size, bit_cast<Bits>(static_cast<Storage>(bound)), static_cast<Bits>(kInfBits<Format>));
    }
  });
}

// A number of kCount parts is zeroed when any of its parts isn't finite.
template <int kCount, class Bits>
static bool zero_nonfinite_bits(Bits* x, std::int64_t size, Bits inf) {
  constexpr Bits kMagnitude = static_cast<Bits>(static_cast<Bits>(~Bits{0}) >> 1);
  bool written = false;
  for (std::int64_t begin = 0; begin < size * kCount; begin += kBlock) {
    const std::int64_t end = begin + kBlock < size * kCount ? begin + kBlock : size * kCount;
    Bits largest = 0;
    for (std::int64_t i = begin; i < end; ++i) {
      const Bits magnitude = x[i] & kMagnitude;
      largest = magnitude > largest ? magnitude : largest;
    }
    if (largest < inf) continue;  // nothing to do: nothing is written
    written = true;
    for (std::int64_t i = begin; i < end; i += kCount) {
      bool finite = true;
      for (int k = 0; k < kCount; ++k) finite &= (x[i + k] & kMagnitude) < inf;
      for (int k = 0; k < kCount; ++k) x[i + k] = finite ? x[i + k] : Bits{0};
    }
  }
  return written;
}

static bool zero_nonfinite(DType dtype, void* data, std::int64_t size) {
  return visit(dtype, [&](auto format) -> bool {
    using Format = decltype(format);
    using Storage = typename Format::Storage;
    if constexpr (sizeof(Storage) >= 2) {
      using Bits = typename BitsOf<Storage>::Unsigned;
      return zero_nonfinite_bits<kParts<Format>>(static_cast<Bits*>(data), size, static_cast<Bits>(kInfBits<Format>));
    } else {
      return false;  // refused at the border
    }
  });
}

}  // namespace FASTCLIP_ISA
}  // namespace fastclip::cpu
