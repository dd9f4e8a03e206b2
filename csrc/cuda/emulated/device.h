// What the kernels need of the machine, on a CPU: the twin of ../nvidia/device.h, for tests alone.
//
// Every thread of every block is a fiber (see fibers.h). One runs at a time, until it waits at a barrier or a
// shuffle; which one comes next is in order, or as a seed has it. Memory is the CPU's, so AddressSanitizer sees
// every access, and UBSan every misaligned one. What can't be seen here is the order in which memory becomes
// visible: fences do nothing.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>

#include "fibers.h"

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
#define FASTCLIP_PARAMETERS(Type) const Type&
#define FASTCLIP_SHARED(Type, name) Type& name = *static_cast<Type*>(fastclip::cuda::shared_memory(sizeof(Type)))
#define threadIdx (fastclip::cuda::fiber().thread)
#define blockIdx (fastclip::cuda::fiber().block_index)
#define gridDim (fastclip::cuda::fiber().grid)

struct alignas(16) uint4 {
  std::uint32_t x, y, z, w;
};

namespace fastclip::cuda {

// Those of an nvcc before 12.1 are 4,096.
#if !defined(FASTCLIP_PARAMETER_BYTES)
#define FASTCLIP_PARAMETER_BYTES 32764
#endif
inline constexpr int kParameterBytes = FASTCLIP_PARAMETER_BYTES;

// ---- inside a kernel -------------------------------------------------------------------------------

using Vector = uint4;

template <class T>
T shuffle_xor(T value, int lanes) {
  static_assert(sizeof(T) <= sizeof(std::uint64_t));
  std::uint64_t mine = 0, theirs;
  std::memcpy(&mine, &value, sizeof value);
  theirs = exchange(mine, lanes);
  std::memcpy(&value, &theirs, sizeof value);
  return value;
}

inline double load_shared_between_blocks(const double* at) { return *at; }

inline std::uint32_t funnel_right(std::uint32_t low, std::uint32_t high, int bits) {
  return static_cast<std::uint32_t>(((std::uint64_t{high} << 32) | low) >> bits);
}

inline float half_to_float(std::uint16_t bits) {
  _Float16 value;
  std::memcpy(&value, &bits, sizeof value);
  return static_cast<float>(value);
}

inline std::uint16_t float_to_half(float value) {
  const auto half = static_cast<_Float16>(value);
  std::uint16_t bits;
  std::memcpy(&bits, &half, sizeof bits);
  return bits;
}

// ---- on the host -----------------------------------------------------------------------------------

struct DeviceGuard {
  explicit DeviceGuard(int) {}
};

// As of a small device: several blocks at once, so that work is shared out, but more chunks than blocks.
template <class Params>
int resident_blocks(void (*)(const Params&), int) { return 3; }

template <class Params>
void launch(void (*kernel)(const Params&), int blocks, int threads, void*, const Params& params, const std::string&) {
  run_grid(blocks, threads, [&] { kernel(params); });
}

inline void fill_zero(void* memory, std::size_t bytes, void*) { std::memset(memory, 0, bytes); }
inline bool stream_is_capturing(void*) { return false; }
inline std::string why_no_device() { return ""; }

}  // namespace fastclip::cuda

inline void __syncthreads() { fastclip::cuda::wait_for_block(); }
inline void __threadfence() {}
inline std::uint32_t atomicAdd(std::uint32_t* at, std::uint32_t value) {
  fastclip::cuda::let_others_run();
  const std::uint32_t before = *at;
  *at += value;
  return before;
}
