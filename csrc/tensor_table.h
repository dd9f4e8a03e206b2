// The tensor table: addresses, sizes and dtypes of a list of gradients. No decisions live here.
#pragma once

#include <cstdint>
#include <vector>

namespace fastclip {

// Storage formats that the kernels read. Complex tensors are tables of re/im pairs.
enum class DType : std::uint8_t {
  f64,
  f32,
  bf16,
  f16,
  c128,
  c64,
  f8_e4m3fn,
  f8_e4m3fnuz,
  f8_e5m2,
  f8_e5m2fnuz,
};

inline std::int64_t element_bytes(DType dtype) {
  switch (dtype) {
    case DType::c128: return 16;
    case DType::f64: case DType::c64: return 8;
    case DType::f32: return 4;
    case DType::bf16: case DType::f16: return 2;
    default: return 1;
  }
}

// 8-bit floats are read for statistics; torch itself has no arithmetic that writes them.
inline bool writable(DType dtype) { return element_bytes(dtype) > 1; }

struct TensorRef {
  void* data;         // in/out; first byte of one dense block, in any dimension order
  std::int64_t size;  // elements (a complex number is one element)
  DType dtype;
};

using Tensors = std::vector<TensorRef>;

// A piece of one tensor that one worker handles.
struct Chunk {
  std::int64_t tensor;  // index into Tensors
  std::int64_t begin;   // elements
  std::int64_t size;    // elements, 0 < size <= chunk_elements(dtype)
};

// 256 KiB: still in a core's second-level cache when a second look is needed. Larger chunks gained
// nothing on a measured 2-core AVX-512 machine, smaller ones lose to the start of each stream (see
// bench/NOTES.md).
inline constexpr std::int64_t kChunkBytes = 1 << 18;
inline std::int64_t chunk_elements(DType dtype) { return kChunkBytes / element_bytes(dtype); }

// Borders depend on sizes and dtypes only, so the same gradients are always cut, and therefore summed, alike.
inline std::vector<Chunk> chunks_of(const Tensors& tensors) {
  std::vector<Chunk> chunks;
  chunks.reserve(tensors.size());
  for (std::size_t t = 0; t < tensors.size(); ++t) {
    const std::int64_t most = chunk_elements(tensors[t].dtype);
    for (std::int64_t begin = 0; begin < tensors[t].size; begin += most) {
      const std::int64_t left = tensors[t].size - begin;
      chunks.push_back({static_cast<std::int64_t>(t), begin, left < most ? left : most});
    }
  }
  return chunks;
}

}  // namespace fastclip
