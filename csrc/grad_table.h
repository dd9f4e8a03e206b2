// The tensor table as Python sees it. No libtorch: tensors cross through DLPack's C exchange table.
#pragma once

#include <dlpack/dlpack.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <vector>

#include "tensor_table.h"

namespace fastclip {

namespace py = pybind11;

// A table holds tensors of one device only.
struct Device {
  int type = 0;  // kDLCPU, kDLCUDA, ...; 0 for a table without a tensor
  int id = 0;
};

struct GradTable {
  Tensors tensors;
  Device device;
  py::list grads;      // keeps every address in `tensors` alive, also while the GIL is released
  py::list positions;  // of the served tensors in the list that was given; empty if all are served
  py::dict refused;    // position -> why it can't be served
  py::dict readonly;   // position -> why it can be read but not written
  bool wide = false;   // holds float64 or complex128
  py::bytes facts = py::reinterpret_steal<py::bytes>(py::handle());  // see facts(), which makes it
};

// torch's classes and its exchange table; before anything else.
void bind(const py::type& tensor, const py::type& parameter);

// Over the tensors on the first device of this type that there is; 0 for the first tensor's.
GradTable table_of(const py::list& grads, int device_type);

// -> (grads, positions, table): every gradient once, where in `tensors` it stood (None: at 0, 1, 2, ...), and the table
// over those on the first one's device, made while each tensor's header is in cache. With take_grad=false the tensors
// themselves are the gradients.
py::tuple gather(const py::list& tensors, bool take_grad);

// For each tensor in how many equal pieces of memory its units lie; 0 if they don't lie so. A unit are the elements
// that differ only in the dimensions of the tensor's mask; units follow each other in the order of the others.
std::vector<std::int64_t> pieces(const GradTable& table, const std::vector<std::uint64_t>& masks);

// A table over counts[i] equal consecutive pieces of each tensor, in order; 0 leaves a tensor out.
GradTable split(const GradTable& table, const std::vector<std::int64_t>& counts);

// A table over the weights of `table`'s gradients, each at its gradient's place; one that lies otherwise in memory than
// its gradient has size 0 there, and its reason in `refused`.
GradTable partners(const GradTable& table, const py::list& weights);

// Of all tensors together.
std::int64_t size_bytes(const GradTable& table);

// Address, elements and dtype of each tensor, as int64; equal bytes mean the same tensors at the same places. Made once.
const py::bytes& facts(GradTable& table);

// Where the elements of a dense tensor on this device lie; `name` is for the error.
TensorRef on_device(const py::object& tensor, Device device, const char* name);

// The memory of one with exactly `size` numbers of this dtype, which the caller allocated.
void* memory(const py::object& tensor, DType dtype, std::int64_t size, Device device, const char* name);

Device device_of(const py::object& tensor);

// The stream on which torch works now.
void* current_stream(Device device);

}  // namespace fastclip
