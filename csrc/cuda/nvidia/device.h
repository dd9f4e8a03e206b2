// What the kernels need of the machine, on a real GPU. Its twin in ../emulated offers the same names on a CPU.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#define FASTCLIP_SHARED(Type, name) __shared__ Type name
#define FASTCLIP_PARAMETERS(Type) const __grid_constant__ Type  // stays in constant memory, also where it is indexed

namespace fastclip::cuda {

// Since CUDA 12.1 the parameters of a kernel may take 32,764 bytes; they are compiled for compute capability 7.0
// and above, which is where larger ones work.
#if CUDART_VERSION >= 12010
inline constexpr int kParameterBytes = 32764;
#else
inline constexpr int kParameterBytes = 4096;
#endif

// ---- inside a kernel -------------------------------------------------------------------------------

using Vector = uint4;  // what one thread loads at a time: 16 bytes

template <class T>
__device__ T shuffle_xor(T value, int lanes) { return __shfl_xor_sync(0xffffffffu, value, lanes); }

// Past the first-level caches, which don't see what other multiprocessors wrote during the kernel.
__device__ inline double load_shared_between_blocks(const double* at) { return __ldcg(at); }

__device__ inline std::uint32_t funnel_right(std::uint32_t low, std::uint32_t high, int bits) {
  return __funnelshift_r(low, high, bits);
}

__device__ inline float half_to_float(std::uint16_t bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
}

__device__ inline std::uint16_t float_to_half(float value) {
  std::uint16_t bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}

// ---- on the host -----------------------------------------------------------------------------------

inline void check(cudaError_t status, const std::string& during) {
  if (status != cudaSuccess)
    throw std::runtime_error("CUDA: " + std::string(cudaGetErrorString(status)) + ", " + during);
}

// Makes a device the current one for as long as it lives; -1, of a table without a tensor, leaves it as it is.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check(cudaGetDevice(&before_), "asking for the current device");
    changed_ = device >= 0 && device != before_;
    if (changed_) check(cudaSetDevice(device), "changing to device " + std::to_string(device));
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

// Blocks of the current device that run `kernel` at the same time.
template <class Params>
int resident_blocks(void (*kernel)(Params), int threads) {
  int device = 0, multiprocessors = 0, each = 0;
  check(cudaGetDevice(&device), "asking for the current device");
  check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device), "asking for its size");
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, threads, 0), "asking how many blocks fit");
  return multiprocessors * (each > 0 ? each : 1);
}

// `what` names the kernel and its tensors, for the message of an error.
template <class Params>
void launch(void (*kernel)(Params), int blocks, int threads, void* stream, const Params& params, const std::string& what) {
  void* arguments[] = {const_cast<Params*>(&params)};
  check(cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(blocks), dim3(threads), arguments, 0,
                         static_cast<cudaStream_t>(stream)),
        "launching " + what);
}

inline void fill_zero(void* memory, std::size_t bytes, void* stream) {
  check(cudaMemsetAsync(memory, 0, bytes, static_cast<cudaStream_t>(stream)), "clearing the workspace");
}

inline bool stream_is_capturing(void* stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check(cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &status), "asking whether a graph is captured");
  return status == cudaStreamCaptureStatusActive;
}

inline std::string version_of(int number) { return std::to_string(number / 1000) + "." + std::to_string(number % 1000 / 10); }

// "" if there is a GPU that this build has code for.
inline std::string why_no_device() {
  int driver = 0, count = 0, best = 0;
  if (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0) return "no NVIDIA driver was found on this machine";
  const cudaError_t status = cudaGetDeviceCount(&count);
  // parameters of more than 4 KB need a driver that knows them, also where the runtime would do with an older one
  if (status == cudaErrorInsufficientDriver || (kParameterBytes > 4096 && driver < 12010))
    return "the NVIDIA driver serves CUDA " + version_of(driver) + ", and fastclip was built with CUDA " +
           version_of(CUDART_VERSION) + ": update the driver, or build fastclip with an older nvcc";
  if (status == cudaErrorNoDevice || (status == cudaSuccess && count == 0))
    return "there is an NVIDIA driver, but no GPU that this process may use";
  if (status != cudaSuccess) return cudaGetErrorString(status);
  for (int device = 0; device < count; ++device) {
    int major = 0, minor = 0;
    check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "asking for the compute capability");
    check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), "asking for the compute capability");
    best = 10 * major + minor > best ? 10 * major + minor : best;
  }
  if (best >= FASTCLIP_LEAST_CAPABILITY) return "";
  return "this GPU has compute capability " + version_of(100 * best) + ", and the kernels need " +
         version_of(100 * FASTCLIP_LEAST_CAPABILITY);
}

}  // namespace fastclip::cuda
