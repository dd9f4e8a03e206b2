// What is written in place: scaled, clamped, or without its NaN and Inf. A vector that stays as it is is not written.
#include "engine.h"
#include "walk.h"

namespace fastclip::cuda {
namespace {

enum class Change { scale, scale_each, clamp, zero_nonfinite };

struct WriteParams {
  TensorTable table;
  Scalar scalar;          // the factor, or the bound
  const double* factors;  // of each unit; this launch's begin here
  const float* skip;      // unless it is 0 nothing is written; may be null
};
static_assert(sizeof(WriteParams) <= kParameterBytes);

// A factor below float32's normal range, from a norm above 1e38, would lose its bits as a float: two whose product it is, of
// which the first is a power of two. What loses bits when multiplied by that is far too small for the product to show it.
struct TwoFactors {
  float first = 1.0f, second;
  __device__ explicit TwoFactors(double factor) : second(static_cast<float>(factor)) {
    if (factor == 0.0 || !(fabs(factor) < FLT_MIN)) return;
    const int half = ilogb(factor) / 2;
    first = static_cast<float>(ldexp(1.0, half));
    second = static_cast<float>(ldexp(factor, -half));
  }
};

// Multiplies reals of one format: of 64 bits by the factor, of 32 in float64 where the factor is no float, of 16 by the two.
template <class Format>
struct Scaled {
  Format format;
  double factor;
  TwoFactors two;
  __device__ Vector operator()(Vector raw) const {
    constexpr int kCount = Format::kReals;
    typename Format::Part x[kCount];
    format.decode(raw, x);
    const bool tiny = factor != 0.0 && fabs(factor) < FLT_MIN;
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      if constexpr (Format::kBytes == 8) x[k] *= factor;
      else if constexpr (Format::kBytes == 2) x[k] *= two.first, x[k] *= two.second;
      else x[k] = tiny ? static_cast<float>(x[k] * factor) : x[k] * static_cast<float>(factor);
    }
    return format.encode(x);
  }
};

// |x| > bound becomes sign(x) * bound; NaN stays.
template <class Format>
struct Clamped {
  Format format;
  typename Format::Part bound;
  __device__ Vector operator()(Vector raw) const {
    constexpr int kCount = Format::kReals;
    typename Format::Part x[kCount];
    format.decode(raw, x);
#pragma unroll
    for (int k = 0; k < kCount; ++k) x[k] = x[k] > bound ? bound : x[k] < -bound ? -bound : x[k];
    return format.encode(x);
  }
};

template <class Part>
__device__ bool is_finite(Part x) { return fabs(x) < static_cast<Part>(INFINITY); }

// An element of which a part is not finite becomes 0.
template <class Format>
struct Zeroed {
  Format format;
  bool complex;
  __device__ Vector operator()(Vector raw) const {
    constexpr int kCount = Format::kReals;
    typename Format::Part x[kCount];
    format.decode(raw, x);
#pragma unroll
    for (int k = 0; k < kCount; k += 2) {
      const bool first = is_finite(x[k]), second = is_finite(x[k + 1]);
      x[k] = first && (second || !complex) ? x[k] : 0;
      x[k + 1] = second && (first || !complex) ? x[k + 1] : 0;
    }
    return format.encode(x);
  }
};

// The bound as the format's own numbers have it, to nearest even; past the largest of them nothing is clamped.
template <class Format>
__device__ typename Format::Part own_bound(const Format& format, double bound) {
  if (bound > Format::kLargest) return static_cast<typename Format::Part>(INFINITY);
  typename Format::Part x[Format::kReals] = {static_cast<typename Format::Part>(bound)};
  format.decode(format.encode(x), x);
  return x[0];
}

template <Change kChange>
__device__ void change(const Group& group, DType dtype, char* data, std::uint32_t bytes, double scalar) {
  const std::uint32_t element_bytes = bytes_of(dtype);
  if (scalar == 1.0 && (kChange == Change::scale || kChange == Change::scale_each)) return;
  visit(dtype, [&](const auto& format) {
    using Format = std::decay_t<decltype(format)>;
    if constexpr (Format::kBytes > 1) {  // 8-bit floats are refused at the border
      if constexpr (kChange == Change::clamp)
        map_vectors(group, data, bytes, element_bytes, Clamped<Format>{format, own_bound(format, scalar)});
      else if constexpr (kChange == Change::zero_nonfinite)
        map_vectors(group, data, bytes, element_bytes, Zeroed<Format>{format, is_complex(dtype)});
      else
        map_vectors(group, data, bytes, element_bytes, Scaled<Format>{format, scalar, TwoFactors(scalar)});
    }
  });
}

template <Change kChange>
__global__ void __launch_bounds__(kThreads, 6) write_kernel(FASTCLIP_PARAMETERS(WriteParams) a) {
  const TensorTable& table = a.table;
  const double scalar = read_scalar(a.scalar);
  const float skip = a.skip == nullptr ? 0.0f : *a.skip;
  if ((kChange == Change::scale && scalar == 1.0) || skip != 0.0f) return;  // the host could not know it
  std::uint32_t tensor = 0;
  for (std::uint32_t chunk = blockIdx.x; chunk < table.first_chunk[table.tensors]; chunk += gridDim.x) {
    tensor = find(table, chunk, tensor, chunk == blockIdx.x ? table.tensors : gridDim.x);
    const std::int64_t unit_bytes = table.unit_bytes[tensor];
    const std::uint32_t units = table.first_unit[tensor + 1] - table.first_unit[tensor];
    const DType dtype = table.dtype[tensor];
    const ChunkView view = view_of(cut_of(unit_bytes, units), unit_bytes, units, chunk - table.first_chunk[tensor]);
    char* data = table.data[tensor] + view.unit * unit_bytes + view.begin;
    const auto factor_of = [&](std::uint32_t unit) {
      return kChange == Change::scale_each ? a.factors[table.first_unit[tensor] + unit] : scalar;
    };
    if (view.units == 1) {
      change<kChange>(whole_block(nullptr), dtype, data, view.bytes, factor_of(view.unit));
      continue;
    }
    for (std::uint32_t k = threadIdx.x / kWarpSize; k < view.units; k += kWarps)
      change<kChange>(own_warp(), dtype, data + k * unit_bytes, view.bytes, factor_of(view.unit + k));
  }
}

template <Change kChange>
void write(const char* name, const Tensors& tensors, const Units& units, const Scalar& scalar,
           const double* factors, const float* skip, const Place& place) {
  const DeviceGuard guard(place.device);
  WriteParams params;
  params.scalar = scalar;
  params.skip = skip;
  for_launches(params.table, tensors, units, [&](std::int64_t first_unit, bool) {
    params.factors = factors == nullptr ? nullptr : factors + first_unit;
    const int blocks = blocks_for(write_kernel<kChange>, place.device, params.table.first_chunk[params.table.tensors]);
    launch(write_kernel<kChange>, blocks, kThreads, place.stream, params, over(name, tensors.size()));
  });
}

}  // namespace

void scale(const Tensors& tensors, const Scalar& factor, const float* skip, const Place& place) {
  if (factor.at == nullptr && factor.value == 1.0) return;
  write<Change::scale>("scale", tensors, {}, factor, nullptr, skip, place);
}

void scale_each(const Tensors& tensors, const Units& units, const double* factors, const float* skip, const Place& place) {
  write<Change::scale_each>("scale", tensors, units, {}, factors, skip, place);
}

void clamp(const Tensors& tensors, double bound, const float* skip, const Place& place) {
  Scalar scalar;
  scalar.value = bound;
  write<Change::clamp>("clamp", tensors, {}, scalar, nullptr, skip, place);
}

void zero_nonfinite(const Tensors& tensors, const Place& place) {
  write<Change::zero_nonfinite>("zero_nonfinite", tensors, {}, {}, nullptr, nullptr, place);
}

}  // namespace fastclip::cuda
