// Storage formats: 16 bytes -> numbers, and back.
//
// A format is how one real is stored; a complex number is two of them. It says how many bytes a real has (kBytes),
// how many a vector holds (kReals), how many products are added in float32 (kJoined), how many loads of a sum are on
// their way at a time (kInFlight), which bits are signs, from which sum of squares on a plain sum can be trusted
// (kLeastTrusted), and where it can be written its largest number (kLargest).
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include <device.h>

#include "../norms.h"
#include "../tensor_table.h"

namespace fastclip::cuda {

template <class To, class From>
__device__ inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

__device__ inline std::uint32_t word(const Vector& raw, int index) {
  return index == 0 ? raw.x : index == 1 ? raw.y : index == 2 ? raw.z : raw.w;
}

// Sums of squares at or above kLeastTrusted hold what the squares that underflowed, of at most 2^16 reals in a
// chunk, could have added, below their own rounding: 2^16 times half the smallest float32 is 2^-134, 2^-34 of 2^-100.
struct F32 {
  using Part = float;
  static constexpr int kBytes = 4, kReals = 4, kInFlight = 8;
  static constexpr int kJoined = 2;  // products that are added in float32: 2 roundings, so 1 of the norm at most
  static constexpr std::uint32_t kEvenSigns = 0x80000000u, kOddSigns = 0x80000000u;
  static constexpr double kLeastTrusted = 0x1p-100, kLargest = FLT_MAX;
  __device__ void decode(const Vector& raw, float (&x)[4]) const {
#pragma unroll
    for (int k = 0; k < 4; ++k) x[k] = bit_cast<float>(word(raw, k));
  }
  __device__ Vector encode(const float (&x)[4]) const {
    return {bit_cast<std::uint32_t>(x[0]), bit_cast<std::uint32_t>(x[1]), bit_cast<std::uint32_t>(x[2]), bit_cast<std::uint32_t>(x[3])};
  }
};

struct F64 {
  using Part = double;
  static constexpr int kBytes = 8, kReals = 2, kInFlight = 8;
  static constexpr int kJoined = 1;
  static constexpr std::uint32_t kEvenSigns = 0, kOddSigns = 0x80000000u;
  static constexpr double kLeastTrusted = 0x1p-950, kLargest = DBL_MAX;  // 2^13 reals lose 2^-1023 each: 2^-60 of it
  __device__ void decode(const Vector& raw, double (&x)[2]) const {
    x[0] = bit_cast<double>(std::uint64_t{raw.y} << 32 | raw.x);
    x[1] = bit_cast<double>(std::uint64_t{raw.w} << 32 | raw.z);
  }
  __device__ Vector encode(const double (&x)[2]) const {
    const auto low = bit_cast<std::uint64_t>(x[0]), high = bit_cast<std::uint64_t>(x[1]);
    return {static_cast<std::uint32_t>(low), static_cast<std::uint32_t>(low >> 32), static_cast<std::uint32_t>(high),
            static_cast<std::uint32_t>(high >> 32)};
  }
};

// 16-bit numbers: their products are exact in float32 (float16's to the bit, bfloat16's with room to spare).
template <class Own>
struct Halves {
  using Part = float;
  static constexpr int kBytes = 2, kReals = 8, kInFlight = 8;
  static constexpr int kJoined = 4;  // two levels of additions: 2 roundings
  static constexpr std::uint32_t kEvenSigns = 0x80008000u, kOddSigns = 0x80008000u;
  __device__ void decode(const Vector& raw, float (&x)[8]) const {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      x[2 * k] = Own::widened(word(raw, k) & 0xffffu);
      x[2 * k + 1] = Own::widened(word(raw, k) >> 16);
    }
  }
  __device__ Vector encode(const float (&x)[8]) const {
    const auto pair = [&](int k) { return Own::rounded(x[k]) | Own::rounded(x[k + 1]) << 16; };
    return {pair(0), pair(2), pair(4), pair(6)};
  }
};

struct Bf16 : Halves<Bf16> {
  static constexpr double kLeastTrusted = F32::kLeastTrusted, kLargest = 0x1.fep127;
  static __device__ float widened(std::uint32_t bits) { return bit_cast<float>(bits << 16); }
  // to nearest even; a NaN becomes 0x7fc0, as in torch: rounding could carry it to 0
  static __device__ std::uint32_t rounded(float x) {
    const auto bits = bit_cast<std::uint32_t>(x);
    return x != x ? 0x7fc0u : (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  }
};

struct F16 : Halves<F16> {
  static constexpr double kLeastTrusted = 0.0, kLargest = 65504.0;  // the square of its smallest number is 2^-48
  static __device__ float widened(std::uint32_t bits) { return half_to_float(static_cast<std::uint16_t>(bits)); }
  static __device__ std::uint32_t rounded(float x) { return float_to_half(x); }
};

// 8-bit floats, of which only magnitudes are read. Exponent and mantissa, moved to float32's places, are the number
// but for the difference of the biases; subnormal ones too.
struct F8 {
  using Part = float;
  static constexpr int kBytes = 1, kReals = 16, kInFlight = 2;  // decoding is the work here
  static constexpr int kJoined = 4;
  static constexpr std::uint32_t kEvenSigns = 0x80808080u, kOddSigns = 0x80808080u;
  static constexpr double kLeastTrusted = 0.0;
  int exponent_bits;
  bool fnuz;      // the one special code is 0x80, a NaN; else those above `largest`
  float unit;     // 2 to the difference of the biases
  std::uint32_t largest;  // finite code
  __device__ explicit F8(DType dtype)
      : exponent_bits(dtype == DType::f8_e4m3fn || dtype == DType::f8_e4m3fnuz ? 4 : 5),
        fnuz(dtype == DType::f8_e4m3fnuz || dtype == DType::f8_e5m2fnuz),
        unit(bit_cast<float>((254u - ((1u << (exponent_bits - 1)) - (fnuz ? 0 : 1))) << 23)),
        largest(fnuz ? 0x7fu : exponent_bits == 5 ? 0x7bu : 0x7eu) {}
  __device__ float magnitude(std::uint32_t code) const {
    const std::uint32_t bits = code & 0x7fu;
    if (bits > largest) return exponent_bits == 5 && bits == 0x7cu ? static_cast<float>(INFINITY) : static_cast<float>(NAN);
    return fnuz && code == 0x80u ? static_cast<float>(NAN) : bit_cast<float>(bits << (16 + exponent_bits)) * unit;
  }
  __device__ void decode(const Vector& raw, float (&x)[16]) const {
#pragma unroll
    for (int k = 0; k < 16; ++k) x[k] = magnitude(word(raw, k / 4) >> 8 * (k % 4) & 0xffu);
  }
};

// Calls fn with the format of a dtype's reals.
template <class Fn>
__device__ void visit(DType dtype, Fn fn) {
  switch (dtype) {
    case DType::f32: case DType::c64: return fn(F32{});
    case DType::bf16: return fn(Bf16{});
    case DType::f16: return fn(F16{});
    case DType::f64: case DType::c128: return fn(F64{});
    default: return fn(F8(dtype));
  }
}

__host__ __device__ inline std::uint32_t bytes_of(DType dtype) {  // of an element
  switch (dtype) {
    case DType::c128: return 16;
    case DType::f64: case DType::c64: return 8;
    case DType::f32: return 4;
    case DType::bf16: case DType::f16: return 2;
    default: return 1;
  }
}

__device__ inline bool is_complex(DType dtype) { return dtype == DType::c64 || dtype == DType::c128; }

// Sum of the squares of all reals of a vector.
template <class Format>
__device__ double squares(const Format& format, const Vector& raw) {
  typename Format::Part x[Format::kReals];
  format.decode(raw, x);
  double sum = 0.0;
#pragma unroll
  for (int k = 0; k < Format::kReals; k += Format::kJoined) {
    if constexpr (Format::kJoined == 1) {
      sum = fma(x[k], x[k], sum);
    } else {
      float joined = fmaf(x[k + 1], x[k + 1], x[k] * x[k]);
      if constexpr (Format::kJoined == 4) joined += fmaf(x[k + 3], x[k + 3], x[k + 2] * x[k + 2]);
      sum += static_cast<double>(joined);
    }
  }
  return sum;
}

// Magnitudes of elements are told in the type in which they are exact: float for reals of up to 32 bits, double for
// the others and for complex numbers.
__device__ inline bool is_narrow(DType dtype) { return dtype != DType::f64 && !is_complex(dtype); }

// Calls see(|x|) for each element of the first `bytes` of a vector.
template <class See>
__device__ void see_magnitudes(float, DType dtype, const Vector& raw, std::uint32_t bytes, See see) {
  const auto see_reals = [&](const auto& format) {
    using Format = std::decay_t<decltype(format)>;
    float x[Format::kReals];
    format.decode(raw, x);
#pragma unroll
    for (std::uint32_t k = 0; k < Format::kReals; ++k)
      if (k * Format::kBytes < bytes) see(fabsf(x[k]));
  };
  if (dtype == DType::f32) see_reals(F32{});
  else if (dtype == DType::bf16) see_reals(Bf16{});
  else if (dtype == DType::f16) see_reals(F16{});
  else {
    const F8 format(dtype);
#pragma unroll 1
    for (std::uint32_t k = 0; k < bytes; ++k) see(format.magnitude(word(raw, k / 4) >> 8 * (k % 4) & 0xffu));
  }
}

// A complex number with a NaN part is a NaN.
template <class See>
__device__ void see_magnitudes(double, DType dtype, const Vector& raw, std::uint32_t bytes, See see) {
  if (dtype == DType::c64) {
    float x[4];
    F32{}.decode(raw, x);
#pragma unroll
    for (std::uint32_t k = 0; k < 2; ++k) {  // exact squares: no overflow, and NaN wins over Inf
      const double re = x[2 * k], im = x[2 * k + 1];
      if (8 * k < bytes) see(sqrt(fma(re, re, im * im)));
    }
    return;
  }
  double x[2];
  F64{}.decode(raw, x);
  if (dtype == DType::c128) {
    const bool finite = fabs(x[0]) <= DBL_MAX && fabs(x[1]) <= DBL_MAX;  // hypot(Inf, NaN) is Inf
    const double length = x[0] != x[0] || x[1] != x[1] ? kNaN : hypot(x[0], x[1]);
    see(finite ? saturate(length) : length);
    return;
  }
  see(fabs(x[0]));
  if (bytes > 8) see(fabs(x[1]));
}

}  // namespace fastclip::cuda
