// How a warp or a block goes over a stretch of memory: in vectors of 16 bytes, each thread every so many, whatever
// the address. Which thread gets which element depends on its index alone, so that the same numbers at another
// address give the same sums.
#pragma once

#include <cstdint>

#include "engine.h"
#include "formats.h"
#include "table.h"

namespace fastclip::cuda {

// The threads that work on one stretch together: a warp, or a whole block.
struct BlockSlots {
  std::uint64_t values[2][kWarps];
};

struct Group {
  std::uint32_t rank, size;
  BlockSlots* slots;  // null for a warp
  int phase = 0;

  // Joins the values of all threads; every thread gets the same bits.
  template <class T, class Join>
  __device__ T reduce(T value, Join join) {
#pragma unroll
    for (int lanes = kWarpSize / 2; lanes > 0; lanes /= 2) value = join(value, shuffle_xor(value, lanes));
    if (slots == nullptr) return value;
    // Two sets of slots, used in turn: who is still reading one can't be overtaken, for between two uses of it
    // lies the barrier of the other.
    std::uint64_t* own = slots->values[phase];
    phase ^= 1;
    if (threadIdx.x % kWarpSize == 0) memcpy(&own[threadIdx.x / kWarpSize], &value, sizeof value);
    __syncthreads();
    T joined;
    memcpy(&joined, &own[0], sizeof joined);
#pragma unroll
    for (int warp = 1; warp < kWarps; ++warp) {
      T next;
      memcpy(&next, &own[warp], sizeof next);
      joined = join(joined, next);
    }
    return joined;
  }
};

__device__ inline Group whole_block(BlockSlots* slots) { return {threadIdx.x, kThreads, slots}; }
__device__ inline Group own_warp() { return {threadIdx.x % kWarpSize, kWarpSize, nullptr}; }

struct Add {
  template <class T> __device__ T operator()(T a, T b) const { return a + b; }
};
struct Or {
  __device__ std::uint32_t operator()(std::uint32_t a, std::uint32_t b) const { return a | b; }
};
struct Largest {
  template <class T> __device__ T operator()(T a, T b) const { return a > b ? a : b; }
};
struct Smallest {
  template <class T> __device__ T operator()(T a, T b) const { return a < b ? a : b; }
};

__device__ inline double read_scalar(const Scalar& scalar) {
  if (scalar.at == nullptr) return scalar.value;
  return scalar.is_double ? *static_cast<const double*>(scalar.at) : *static_cast<const float*>(scalar.at);
}

// ---- loads ------------------------------------------------------------------------------------------

__device__ inline Vector load_bytes(const char* from, std::uint32_t bytes) {  // the rest of the vector is 0
  std::uint32_t words[4] = {0, 0, 0, 0};
#pragma unroll
  for (std::uint32_t k = 0; k < 16; ++k)
    if (k < bytes) words[k / 4] |= static_cast<std::uint32_t>(static_cast<unsigned char>(from[k])) << 8 * (k % 4);
  return {words[0], words[1], words[2], words[3]};
}

__device__ inline void store_bytes(char* to, const Vector& raw, std::uint32_t bytes) {
#pragma unroll
  for (std::uint32_t k = 0; k < 16; ++k)
    if (k < bytes) to[k] = static_cast<char>(word(raw, k / 4) >> 8 * (k % 4));
}

// Vector `index` of a stretch that begins `shift` bytes after a multiple of 16, cut out of two aligned ones: both must lie
// inside of it, so it is none of the first and the last.
__device__ inline Vector cut_out(const char* data, std::uint32_t index, std::uint32_t shift) {
  const auto* aligned = reinterpret_cast<const Vector*>(data - shift) + index;
  const Vector low = aligned[0], high = aligned[1];
  std::uint32_t words[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
  if (shift & 8) {
#pragma unroll
    for (int k = 0; k < 6; ++k) words[k] = words[k + 2];
  }
  if (shift & 4) {
#pragma unroll
    for (int k = 0; k < 5; ++k) words[k] = words[k + 1];
  }
  const int bits = 8 * (shift & 3);
  return {funnel_right(words[0], words[1], bits), funnel_right(words[1], words[2], bits),
          funnel_right(words[2], words[3], bits), funnel_right(words[3], words[4], bits)};
}

__device__ inline Vector load_shifted(const char* data, std::uint32_t index, std::uint32_t bytes, std::uint32_t shift) {
  return index == 0 || 16 * (index + 2) - shift > bytes ? load_bytes(data + 16 * index, 16) : cut_out(data, index, shift);
}

__device__ inline std::uint32_t misalignment(const char* data) {
  return static_cast<std::uint32_t>(reinterpret_cast<std::uintptr_t>(data) % 16);
}

// Vector `index` of a stretch, all of which lies inside of it.
__device__ inline Vector load_vector(const char* data, std::uint32_t index, std::uint32_t bytes, std::uint32_t shift) {
  return shift == 0 ? reinterpret_cast<const Vector*>(data)[index] : load_shifted(data, index, bytes, shift);
}

// Calls see(vector, bytes) for each of this thread's vectors; what lies past `bytes` of the last one is 0.
// kInFlight loads are on their way before the first is used.
template <int kInFlight, class See>
__device__ void for_vectors(const Group& group, const char* data, std::uint32_t bytes, See see) {
  const std::uint32_t whole = bytes / 16, rest = bytes % 16, shift = misalignment(data);
  std::uint32_t index = group.rank;
  if constexpr (kInFlight > 1) {
    if (shift == 0) {
      const auto* vectors = reinterpret_cast<const Vector*>(data);
      for (; index + (kInFlight - 1) * group.size < whole; index += kInFlight * group.size) {
        Vector raw[kInFlight];
#pragma unroll
        for (int k = 0; k < kInFlight; ++k) raw[k] = vectors[index + k * group.size];
#pragma unroll
        for (int k = 0; k < kInFlight; ++k) see(raw[k], 16);
      }
    } else {
      constexpr int kCuts = 4;  // of two loads each
      if (index == 0 && whole > 0) {
        see(load_bytes(data, 16), 16);
        index = group.size;
      }
#pragma unroll 1
      for (; 16 * (index + (kCuts - 1) * group.size + 2) - shift <= bytes; index += kCuts * group.size) {
        Vector raw[kCuts];
#pragma unroll
        for (int k = 0; k < kCuts; ++k) raw[k] = cut_out(data, index + k * group.size, shift);
#pragma unroll
        for (int k = 0; k < kCuts; ++k) see(raw[k], 16);
      }
    }
  }
#pragma unroll 1
  for (; index < whole; index += group.size)
    see(load_vector(data, index, bytes, shift), 16);
  if (index == whole && rest > 0) see(load_bytes(data + 16 * whole, rest), rest);
}

// ---- writes -----------------------------------------------------------------------------------------

__device__ inline bool differ(const Vector& a, const Vector& b) { return a.x != b.x || a.y != b.y || a.z != b.z || a.w != b.w; }

// Replaces every vector by map(vector), where that changes it; elements are independent of each other.
template <class Map>
__device__ void map_vectors(const Group& group, char* data, std::uint32_t bytes, std::uint32_t element_bytes, Map map) {
  const auto map_bytes = [&](char* at, std::uint32_t count) {
    const Vector before = load_bytes(at, count);
    const Vector after = map(before);
    if (differ(before, after)) store_bytes(at, after, count);
  };
  const std::uint32_t shift = misalignment(data), rank = group.rank;
  std::uint32_t head = shift > 0 ? 16 - shift : 0;  // bytes before the first aligned vector
  if (head > bytes || (head & (element_bytes - 1)) != 0) head = bytes;
  for (std::uint32_t at = rank * element_bytes; at < head; at += group.size * element_bytes) map_bytes(data + at, element_bytes);
  auto* vectors = reinterpret_cast<Vector*>(data + head);
  const std::uint32_t whole = (bytes - head) / 16;
  const auto map_vector = [&](std::uint32_t at, const Vector& before) {
    const Vector after = map(before);
    if (differ(before, after)) vectors[at] = after;
  };
  constexpr int kInFlight = 4;  // loads, before the first store: the compiler can't tell that they may pass each other
  std::uint32_t index = rank;
#pragma unroll 1
  for (; index + (kInFlight - 1) * group.size < whole; index += kInFlight * group.size) {
    Vector before[kInFlight];
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) before[k] = vectors[index + k * group.size];
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) map_vector(index + k * group.size, before[k]);
  }
#pragma unroll 1
  for (; index < whole; index += group.size) map_vector(index, vectors[index]);
  for (std::uint32_t at = head + 16 * whole + rank * element_bytes; at < bytes; at += group.size * element_bytes)
    map_bytes(data + at, element_bytes);
}

}  // namespace fastclip::cuda
