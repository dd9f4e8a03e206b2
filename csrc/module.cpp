// The Python module fastclip._C.
#include "cpu/engine.h"
#include "grad_table.h"
#if defined(FASTCLIP_CUDA)
#include "cuda/bindings.h"
#endif

using namespace fastclip;

namespace {

double* doubles(const py::object& tensor, std::int64_t size, const char* name) {
  return static_cast<double*>(memory(tensor, DType::f64, size, {kDLCPU, 0}, name));
}

// ---- the CPU backend's entries: derive, then launch with the GIL released --------------------------

void cpu_read(const GradTable& table, double norm_type, bool extras, double divisor, const py::object& rows, int threads) {
  const auto count = static_cast<std::int64_t>(table.tensors.size());
  double* out = doubles(rows, count * (extras ? cpu::kFields : cpu::kAlwaysFields), "rows");
  const py::gil_scoped_release release;
  cpu::read(table.tensors, norm_type, extras, divisor, out, threads);
}

void cpu_read_penalised(const GradTable& table, const GradTable& weights, const py::object& strengths, double norm_type,
                        bool extras, const py::object& rows, const py::object& weight_rows, int threads) {
  const auto count = static_cast<std::int64_t>(table.tensors.size());
  if (weights.tensors.size() != table.tensors.size()) throw py::value_error("one weight per gradient is needed");
  const double* in = doubles(strengths, 2 * count, "strengths");
  double* out = doubles(rows, count * (extras ? cpu::kFields : cpu::kAlwaysFields), "rows");
  double* weight_out = doubles(weight_rows, count * cpu::kWeightFields, "weight_rows");
  const py::gil_scoped_release release;
  cpu::read_penalised(table.tensors, weights.tensors, in, norm_type, extras, out, weight_out, threads);
}

void cpu_finish(const py::object& rows, std::int64_t fields, std::int64_t count, double norm_type, double max_norm,
                double eps, const py::object& totals) {
  if (fields < cpu::kAlwaysFields) throw py::value_error("rows lacks a field");
  cpu::finish(doubles(rows, fields * count, "rows"), count, norm_type, max_norm, eps, doubles(totals, cpu::kTotals, "totals"));
}

void cpu_join(const py::object& unit_rows, const std::vector<std::int64_t>& counts, double norm_type, const py::object& rows) {
  std::int64_t units = 0;
  for (const std::int64_t count : counts) units += count;
  const auto tensors = static_cast<std::int64_t>(counts.size());
  cpu::join(doubles(unit_rows, units * cpu::kAlwaysFields, "unit_rows"), counts, norm_type,
            doubles(rows, tensors * cpu::kAlwaysFields, "rows"));
}

void cpu_scale(const GradTable& table, double factor, int threads) {
  const py::gil_scoped_release release;
  cpu::scale(table.tensors, factor, threads);
}

void cpu_scale_each(const GradTable& table, const py::object& factors, int threads) {
  const double* in = doubles(factors, static_cast<std::int64_t>(table.tensors.size()), "factors");
  const py::gil_scoped_release release;
  cpu::scale(table.tensors, in, threads);
}

// Both -> one bool per tensor: was anything in it written?
std::vector<bool> cpu_clamp(const GradTable& table, double bound, int threads) {
  const py::gil_scoped_release release;
  return cpu::clamp(table.tensors, bound, threads);
}

std::vector<bool> cpu_zero_nonfinite(const GradTable& table, int threads) {
  const py::gil_scoped_release release;
  return cpu::zero_nonfinite(table.tensors, threads);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "fastclip's native core; use it through fastclip.backends.";
  m.attr("CPU") = static_cast<int>(kDLCPU);
  m.def("bind", &bind, py::arg("tensor"), py::arg("parameter"));
  m.def("gather", &gather, py::arg("tensors"), py::arg("take_grad"));

  m.def("pieces", &pieces, py::arg("table"), py::arg("masks"));
  m.def("split", &split, py::arg("table"), py::arg("counts"));
  m.def("partners", &partners, py::arg("table"), py::arg("weights"));

  py::class_<GradTable>(m, "GradTable")
      .def(py::init(&table_of), py::arg("grads"), py::arg("device_type"))
      .def_property_readonly("device_type", [](const GradTable& table) { return table.device.type; })
      .def_readonly("grads", &GradTable::grads)
      .def_readonly("positions", &GradTable::positions)
      .def_readonly("refused", &GradTable::refused)
      .def_readonly("readonly", &GradTable::readonly)
      .def_readonly("wide", &GradTable::wide)
      .def_property_readonly("size_bytes", &size_bytes)
      .def_property_readonly("facts", [](GradTable& table) { return facts(table); })
      .def("__len__", [](const GradTable& table) { return table.tensors.size(); });

#if defined(_OPENMP)
  m.attr("openmp") = true;
#else
  m.attr("openmp") = false;
#endif
  m.def("cpu_capabilities", &cpu::capabilities);
  m.def("cpu_capability", &cpu::capability);
  m.def("cpu_use_capability", &cpu::use_capability, py::arg("name"));
  m.def("cpu_read", &cpu_read, py::arg("table"), py::arg("norm_type"), py::arg("extras"), py::arg("divisor"),
        py::arg("rows"), py::arg("threads"));
  m.def("cpu_read_penalised", &cpu_read_penalised, py::arg("table"), py::arg("weights"), py::arg("strengths"),
        py::arg("norm_type"), py::arg("extras"), py::arg("rows"), py::arg("weight_rows"), py::arg("threads"));
  m.def("cpu_finish", &cpu_finish, py::arg("rows"), py::arg("fields"), py::arg("count"), py::arg("norm_type"),
        py::arg("max_norm"), py::arg("eps"), py::arg("totals"));
  m.def("cpu_join", &cpu_join, py::arg("unit_rows"), py::arg("counts"), py::arg("norm_type"), py::arg("rows"));
  m.def("cpu_scale", &cpu_scale, py::arg("table"), py::arg("factor"), py::arg("threads"));
  m.def("cpu_scale_each", &cpu_scale_each, py::arg("table"), py::arg("factors"), py::arg("threads"));
  m.def("cpu_clamp", &cpu_clamp, py::arg("table"), py::arg("bound"), py::arg("threads"));
  m.def("cpu_zero_nonfinite", &cpu_zero_nonfinite, py::arg("table"), py::arg("threads"));

#if defined(FASTCLIP_CUDA)
  define_cuda(m);
#else
  m.attr("CUDA") = py::none();
#endif
}
