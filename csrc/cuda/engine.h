// The CUDA engine as the module sees it: plain C++. Addresses are of the device's memory; nothing here waits for it.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "../tensor_table.h"

namespace fastclip::cuda {

// A number that the host knows, or that lies on the device.
struct Scalar {
  double value = 1.0;
  const void* at = nullptr;   // float32 or float64
  bool is_double = false;
};

// Where and when to work.
struct Place {
  int device;
  void* stream;
  void* workspace;       // read_workspace_bytes; 0 where a read begins and ends
  bool fresh_workspace;  // not 0 yet
};

struct ReadArguments {
  double norm_type;
  bool extras;
  Scalar divisor;   // of the norms
  double* rows;     // out, [6 with extras, else 3][units]
  double* totals;   // out, [4], see Total in ../cpu/engine.h; null if not wanted
  float* heads;    // out, [2]: total_norm in float32, found_inf; with totals
  double max_norm, eps;
};

inline constexpr std::int64_t kTicketBytes = 16;

// Of how many units each tensor consists; empty for one each.
using Units = std::vector<std::int64_t>;

std::int64_t read_workspace_bytes(const Tensors& tensors, const Units& units, bool extras, bool penalised);
void read(const Tensors& tensors, const Units& units, const ReadArguments& given, const Place& place);

// See ../cpu/engine.h. strengths: in, [2][grads.size()]. weight_rows: out, [3][grads.size()].
void read_penalised(const Tensors& grads, const Tensors& weights, const double* strengths, const ReadArguments& given,
                    double* weight_rows, const Place& place);

// rows: in, [>= 3][count].
void finish(const double* rows, std::int64_t count, double norm_type, double max_norm, double eps, double* totals,
            float* heads, const Place& place);

// unit_rows: in, [3][sum of units]. rows: out, [3][units.size()].
void join(const double* unit_rows, const Units& units, double norm_type, double* rows, const Place& place);

// By one factor for all; returns at once where that is 1, or `skip` not 0: one float32 on the device, or null.
void scale(const Tensors& tensors, const Scalar& factor, const float* skip, const Place& place);
// By one float64 factor per unit.
void scale_each(const Tensors& tensors, const Units& units, const double* factors, const float* skip, const Place& place);
void clamp(const Tensors& tensors, double bound, const float* skip, const Place& place);
void zero_nonfinite(const Tensors& tensors, const Place& place);

// before: in, [5]: steps, clipped, skipped, skipped in a row, and with NaN or Inf. after: out, the same with one step
// more, which is skipped unless `skip` is 0, and else clipped unless `factor` is 1, and bad unless `found` is 0.
void tally(const double* before, const Scalar& factor, const Scalar& skip, const Scalar& found, double* after,
           const Place& place);

int parameter_bytes();  // that a launch may have
std::string why_unavailable();
bool is_capturing(int device, void* stream);

}  // namespace fastclip::cuda
