// The CUDA backend's entries: derive, then launch. The GIL is held throughout: a launch doesn't wait for the device,
// and what belongs to one read must reach the stream before the next one's.
#include "bindings.h"

#include "../grad_table.h"
#include "engine.h"
#if defined(FASTCLIP_CUDA_EMULATED)
#include "emulated/fibers.h"
#endif

namespace fastclip {
namespace {

#if defined(FASTCLIP_CUDA_EMULATED)
constexpr int kDeviceType = kDLCPU;
#else
constexpr int kDeviceType = kDLCUDA;
#endif

using cuda::Units;

std::int64_t units_in(const GradTable& table, const Units& units) {
  if (units.empty()) return static_cast<std::int64_t>(table.tensors.size());
  if (units.size() != table.tensors.size()) throw py::value_error("one number of units per tensor is needed");
  std::int64_t sum = 0;
  for (std::size_t i = 0; i < units.size(); ++i) {
    if (units[i] < 0 || (units[i] > 0 && table.tensors[i].size % units[i] != 0))
      throw py::value_error("tensor " + std::to_string(i) + " can't be cut into " + std::to_string(units[i]) + " units");
    sum += units[i];
  }
  return sum;
}

double* doubles(const py::object& tensor, std::int64_t size, Device device, const char* name) {
  return tensor.is_none() ? nullptr : static_cast<double*>(memory(tensor, DType::f64, size, device, name));
}

float* floats(const py::object& tensor, std::int64_t size, Device device, const char* name) {
  return tensor.is_none() ? nullptr : static_cast<float*>(memory(tensor, DType::f32, size, device, name));
}

// A float, or a float32 or float64 tensor of one element.
cuda::Scalar scalar(const py::object& value, Device device, const char* name) {
  cuda::Scalar out;
  if (py::isinstance<py::float_>(value) || py::isinstance<py::int_>(value)) {
    out.value = value.cast<double>();
    return out;
  }
  const TensorRef number = on_device(value, device, name);
  if ((number.dtype != DType::f64 && number.dtype != DType::f32) || number.size != 1)
    throw py::value_error(std::string(name) + " must be one float32 or float64 number");
  out.is_double = number.dtype == DType::f64;
  out.at = number.data;
  return out;
}

cuda::Place place(Device device) { return {device.id, current_stream(device), nullptr, false}; }

// What one read of these needs -> (float64 numbers of workspace, stream, whether a graph is being captured on it)
std::tuple<std::int64_t, std::intptr_t, bool> workspace_for(const GradTable& table, const Units& units, bool extras, bool penalised) {
  units_in(table, units);
  const std::int64_t bytes = cuda::read_workspace_bytes(table.tensors, units, extras, penalised);
  void* stream = current_stream(table.device);
  return {bytes / 8, reinterpret_cast<std::intptr_t>(stream), cuda::is_capturing(table.device.id, stream)};
}

// workspace: float64, all 0 where a read begins and ends; `fresh` if it isn't yet.
cuda::Place place(const GradTable& table, const Units& units, bool extras, bool penalised, const py::object& workspace, bool fresh) {
  const TensorRef given = on_device(workspace, table.device, "workspace");
  if (given.dtype != DType::f64 || 8 * given.size < cuda::read_workspace_bytes(table.tensors, units, extras, penalised))
    throw py::value_error("the workspace is too small");
  cuda::Place at = place(table.device);
  at.workspace = given.data;
  at.fresh_workspace = fresh;
  return at;
}

void read(const GradTable& table, const Units& units, double norm_type, bool extras, const py::object& divisor,
          const py::object& rows, const py::object& totals, const py::object& heads, double max_norm, double eps,
          const py::object& workspace, bool fresh) {
  const Device device = table.device;
  const std::int64_t count = units_in(table, units);
  const cuda::ReadArguments given{norm_type,
                                  extras,
                                  scalar(divisor, device, "divisor"),
                                  doubles(rows, count * (extras ? 6 : 3), device, "rows"),
                                  doubles(totals, 4, device, "totals"),
                                  floats(heads, 2, device, "heads"),
                                  max_norm,
                                  eps};
  cuda::read(table.tensors, units, given, place(table, units, extras, false, workspace, fresh));
}

void read_penalised(const GradTable& table, const GradTable& weights, const py::object& strengths, double norm_type, bool extras,
                    const py::object& rows, const py::object& weight_rows, const py::object& workspace, bool fresh) {
  const Device device = table.device;
  const auto count = static_cast<std::int64_t>(table.tensors.size());
  if (weights.tensors.size() != table.tensors.size()) throw py::value_error("one weight per gradient is needed");
  const cuda::ReadArguments given{norm_type, extras, {}, doubles(rows, count * (extras ? 6 : 3), device, "rows"), nullptr, nullptr, 0, 0};
  cuda::read_penalised(table.tensors, weights.tensors, doubles(strengths, 2 * count, device, "strengths"), given,
                       doubles(weight_rows, 3 * count, device, "weight_rows"), place(table, {}, extras, true, workspace, fresh));
}

void finish(const py::object& rows, std::int64_t fields, std::int64_t count, double norm_type, double max_norm, double eps,
            const py::object& totals, const py::object& heads) {
  const Device device = device_of(rows);
  if (fields < 3) throw py::value_error("rows lacks a field");
  cuda::finish(doubles(rows, fields * count, device, "rows"), count, norm_type, max_norm, eps,
               doubles(totals, 4, device, "totals"), floats(heads, 2, device, "heads"), place(device));
}

void join(const py::object& unit_rows, const Units& units, double norm_type, const py::object& rows) {
  const Device device = device_of(rows);
  std::int64_t count = 0;
  for (const std::int64_t of_tensor : units) count += of_tensor;
  cuda::join(doubles(unit_rows, 3 * count, device, "unit_rows"), units, norm_type,
             doubles(rows, 3 * static_cast<std::int64_t>(units.size()), device, "rows"), place(device));
}

void scale(const GradTable& table, const py::object& factor, const py::object& skip) {
  const Device device = table.device;
  cuda::scale(table.tensors, scalar(factor, device, "factor"), floats(skip, 1, device, "skip"), place(device));
}

void scale_each(const GradTable& table, const Units& units, const py::object& factors, const py::object& skip) {
  const Device device = table.device;
  const std::int64_t count = units_in(table, units);
  cuda::scale_each(table.tensors, units, doubles(factors, count, device, "factors"), floats(skip, 1, device, "skip"),
                   place(device));
}

void clamp(const GradTable& table, double bound, const py::object& skip) {
  cuda::clamp(table.tensors, bound, floats(skip, 1, table.device, "skip"), place(table.device));
}

void zero_nonfinite(const GradTable& table) { cuda::zero_nonfinite(table.tensors, place(table.device)); }

void tally(const py::object& before, const py::object& factor, const py::object& skip, const py::object& found,
           const py::object& after) {
  const Device device = device_of(before);
  const auto counts = [&](const py::object& tensor, const char* name) {
    return static_cast<double*>(memory(tensor, DType::f64, 5, device, name));
  };
  cuda::tally(counts(before, "before"), scalar(factor, device, "factor"), scalar(skip, device, "skip"),
              scalar(found, device, "found"), counts(after, "after"), place(device));
}

}  // namespace

void define_cuda(py::module_& m) {
  m.attr("CUDA") = kDeviceType;
  m.attr("cuda_emulated") = kDeviceType == kDLCPU;
  m.attr("cuda_parameter_bytes") = cuda::parameter_bytes();
  m.def("cuda_unavailable", &cuda::why_unavailable);
  m.def("cuda_workspace", &workspace_for, py::arg("table"), py::arg("units"), py::arg("extras"), py::arg("penalised"));
  m.def("cuda_read", &read, py::arg("table"), py::arg("units"), py::arg("norm_type"), py::arg("extras"), py::arg("divisor"),
        py::arg("rows"), py::arg("totals"), py::arg("heads"), py::arg("max_norm"), py::arg("eps"), py::arg("workspace"),
        py::arg("fresh"));
  m.def("cuda_read_penalised", &read_penalised, py::arg("table"), py::arg("weights"), py::arg("strengths"), py::arg("norm_type"),
        py::arg("extras"), py::arg("rows"), py::arg("weight_rows"), py::arg("workspace"), py::arg("fresh"));
  m.def("cuda_finish", &finish, py::arg("rows"), py::arg("fields"), py::arg("count"), py::arg("norm_type"),
        py::arg("max_norm"), py::arg("eps"), py::arg("totals"), py::arg("heads"));
  m.def("cuda_join", &join, py::arg("unit_rows"), py::arg("units"), py::arg("norm_type"), py::arg("rows"));
  m.def("cuda_scale", &scale, py::arg("table"), py::arg("factor"), py::arg("skip"));
  m.def("cuda_scale_each", &scale_each, py::arg("table"), py::arg("units"), py::arg("factors"), py::arg("skip"));
  m.def("cuda_clamp", &clamp, py::arg("table"), py::arg("bound"), py::arg("skip"));
  m.def("cuda_zero_nonfinite", &zero_nonfinite, py::arg("table"));
  m.def("cuda_tally", &tally, py::arg("before"), py::arg("factor"), py::arg("skip"), py::arg("found"), py::arg("after"));
#if defined(FASTCLIP_CUDA_EMULATED)
  m.def("cuda_set_order", &cuda::set_order, py::arg("seed"), "0: threads in order; else as this seed has it.");
  m.def("cuda_set_idle", &cuda::set_idle, py::arg("is_idle"), "Kernels are launched, and don't run.");
#endif
}

}  // namespace fastclip
