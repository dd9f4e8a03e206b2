// Storage -> float or double, a block at a time. A part of kernels.inl.

namespace fastclip::cpu {
namespace FASTCLIP_ISA {

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
  const double length = __builtin_hypot(re, im);
  // past the largest number a finite one stays there: Inf always means that a part is Inf
  return __builtin_isinf(length) && !__builtin_isinf(re) && !__builtin_isinf(im) ? __DBL_MAX__ : length;
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

}  // namespace FASTCLIP_ISA
}  // namespace fastclip::cpu
