// The CPU engine: runs the kernels over a tensor table, in parallel, and joins what they return.
#pragma once

#include <string>
#include <vector>

#include "../tensor_table.h"
#include "kernels.h"

namespace fastclip::cpu {

// Columns are tensors, rows are these fields. The same order stands in fastclip/types.py.
enum Field { kNorm, kNans, kInfs, kMaxAbs, kSumAbs, kZeros, kFields };
inline constexpr int kAlwaysFields = kMaxAbs;  // norm, nans, infs; the others on request

// The rows of weights. The same order stands in fastclip/types.py.
enum WeightField { kWeightNorm, kWeightMaxAbs, kWeightSumAbs, kWeightFields };

enum Total { kTotalNorm, kClipCoef, kTotalNans, kTotalInfs, kTotals };

// Names of the instruction sets this machine runs, best first. "default" is always there.
std::vector<std::string> capabilities();
// Chooses one of them for all later calls; false if this machine doesn't have it.
bool use_capability(const std::string& name);
std::string capability();

// Norms and magnitudes are divided by `divisor`. rows: out, [kAlwaysFields or kFields][tensors.size()] float64.
void read(const Tensors& tensors, double norm_type, bool extras, double divisor, double* rows, int threads);

// Adds strengths[0][i] * sign(w) + strengths[1][i] * w to gradient i and reads what was written, chunk by chunk. A weight
// of size 0 has no part in it: its gradient is only read, its columns are 0. Two strengths of 0 write nothing.
// strengths: in, [2][grads.size()]. rows: out, as of read. weight_rows: out, [kWeightFields][grads.size()].
void read_penalised(const Tensors& grads, const Tensors& weights, const double* strengths, double norm_type, bool extras,
                    double* rows, double* weight_rows, int threads);

// rows: in, [>= kAlwaysFields][count]. totals: out, [kTotals].
void finish(const double* rows, std::int64_t count, double norm_type, double max_norm, double eps, double* totals);

// Rows of pieces -> rows of the tensors they are pieces of, counts[i] each in order.
// unit_rows: in, [kAlwaysFields][sum of counts]. rows: out, [kAlwaysFields][counts.size()].
void join(const double* unit_rows, const std::vector<std::int64_t>& counts, double norm_type, double* rows);

// factors: one per tensor; a tensor whose factor is 1 is not touched.
void scale(const Tensors& tensors, const double* factors, int threads);
void scale(const Tensors& tensors, double factor, int threads);

// Both return one flag per tensor: was anything in it written?
std::vector<bool> clamp(const Tensors& tensors, double bound, int threads);
std::vector<bool> zero_nonfinite(const Tensors& tensors, int threads);

}  // namespace fastclip::cpu
