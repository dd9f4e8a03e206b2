#include "grad_table.h"

#include <algorithm>
#include <cstring>
#include <string>

namespace fastclip {
namespace {

// Borrowed for the life of the process: torch's classes are never unloaded.
struct Torch {
  const DLPackExchangeAPI* api = nullptr;
  PyTypeObject* tensor = nullptr;
  PyTypeObject* parameter = nullptr;
  PyObject* grad = nullptr;            // interned "grad"
  PyObject* grad_getter = nullptr;     // the descriptor behind Tensor.grad
} torch;

// A set of object addresses for a few thousand entries: open addressing, no allocation per entry.
class Seen {
 public:
  explicit Seen(std::size_t expected) {
    std::size_t slots = 16;
    while (slots < 2 * expected) slots *= 2;
    slots_.assign(slots, nullptr);
  }
  bool insert(const void* key) {
    std::size_t at = (reinterpret_cast<std::uintptr_t>(key) >> 4) * 0x9e3779b97f4a7c15ull >> 20;
    for (;; ++at) {
      const void*& slot = slots_[at & (slots_.size() - 1)];
      if (slot == key) return false;
      if (slot == nullptr) {
        slot = key;
        return true;
      }
    }
  }

 private:
  std::vector<const void*> slots_;
};

// A dimension order exists in which the tensor is one gapless block of memory.
bool is_dense(const DLTensor& t) {
  if (t.strides == nullptr) return true;
  std::int64_t expected = 1;
  bool contiguous = true;
  for (int d = t.ndim - 1; d >= 0 && contiguous; --d) {
    contiguous = t.shape[d] == 1 || t.strides[d] == expected;
    expected *= t.shape[d];
  }
  if (contiguous) return true;
  std::vector<std::pair<std::int64_t, std::int64_t>> dims;
  for (int d = 0; d < t.ndim; ++d)
    if (t.shape[d] != 1) dims.emplace_back(t.strides[d], t.shape[d]);
  std::sort(dims.begin(), dims.end());
  expected = 1;
  for (const auto& [stride, size] : dims) {
    if (stride != expected) return false;
    expected *= size;
  }
  return true;
}

bool known_dtype(const DLDataType& dtype, DType& out) {
  if (dtype.lanes != 1) return false;
  const auto is = [&](int code, int bits) { return dtype.code == code && dtype.bits == bits; };
  if (is(kDLFloat, 32)) out = DType::f32;
  else if (is(kDLBfloat, 16)) out = DType::bf16;
  else if (is(kDLFloat, 16)) out = DType::f16;
  else if (is(kDLFloat, 64)) out = DType::f64;
  else if (is(kDLComplex, 64)) out = DType::c64;
  else if (is(kDLComplex, 128)) out = DType::c128;
  else if (is(kDLFloat8_e4m3fn, 8)) out = DType::f8_e4m3fn;
  else if (is(kDLFloat8_e4m3fnuz, 8)) out = DType::f8_e4m3fnuz;
  else if (is(kDLFloat8_e5m2, 8)) out = DType::f8_e5m2;
  else if (is(kDLFloat8_e5m2fnuz, 8)) out = DType::f8_e5m2fnuz;
  else return false;
  return true;
}

// Pinned memory is the CPU's, managed memory the GPU's.
Device device_of(const DLTensor& t) {
  switch (t.device.device_type) {
    case kDLCPU: case kDLCUDAHost: return {kDLCPU, 0};
    case kDLCUDA: case kDLCUDAManaged: return {kDLCUDA, t.device.device_id};
    default: return {static_cast<int>(t.device.device_type), t.device.device_id};
  }
}

// "" if the kernels of its device can work on this tensor's memory as it is.
const char* refusal(PyObject* grad, TensorRef& ref, Device& device) {
  // Subclasses may keep their values elsewhere; the exchange table would not say so.
  if (Py_TYPE(grad) != torch.tensor && Py_TYPE(grad) != torch.parameter) return "a tensor subclass";
  DLTensor t;
  if (torch.api->dltensor_from_py_object_no_sync(grad, &t) != 0) {
    PyErr_Clear();  // sparse, quantized, nested: torch has no flat memory to show
    return "not strided memory";
  }
  device = device_of(t);
  if (!known_dtype(t.dtype, ref.dtype)) return "a dtype that the kernels do not read";
  std::int64_t size = 1;
  for (int d = 0; d < t.ndim; ++d) size *= t.shape[d];
  if (size > 0 && t.data == nullptr) return "no memory behind it (fake, meta, functorch, or freed storage)";
  if (size > 0 && !is_dense(t)) return "not one dense block of memory (a strided, expanded or overlapping view)";
  ref.data = static_cast<char*>(t.data) + t.byte_offset;
  ref.size = size;
  return "";
}

// A type of 0 is that of the first tensor; an id of -1 that of the first on a device of this type.
const char* elsewhere(const Device& tensor, Device& wanted) {
  if (wanted.type == 0) wanted.type = tensor.type;
  if (tensor.type != wanted.type) return wanted.type == kDLCPU ? "not in CPU memory" : "not on this type of device";
  if (wanted.id < 0) wanted.id = tensor.id;
  return tensor.id == wanted.id ? "" : "on another device than those before it";
}

void append(GradTable& table, PyObject* grad, Py_ssize_t position) {
  TensorRef ref{};
  Device device;
  const char* reason = refusal(grad, ref, device);
  if (*reason == '\0') reason = elsewhere(device, table.device);
  if (*reason != '\0') {
    table.refused[py::int_(position)] = py::str(reason);
    return;
  }
  if (!writable(ref.dtype))
    table.readonly[py::int_(position)] =
        py::str("8-bit floats are read for statistics only; torch has no arithmetic that writes them");
  table.wide |= ref.dtype == DType::f64 || ref.dtype == DType::c128;
  table.tensors.push_back(ref);
}

// After the last append: `grads` are all that were appended, in order.
void close(GradTable& table, const py::list& grads) {
  if (table.refused.empty()) {
    table.grads = grads;
    return;
  }
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(grads.ptr()); ++i)
    if (!table.refused.contains(py::int_(i))) {
      table.grads.append(PyList_GET_ITEM(grads.ptr(), i));
      table.positions.append(i);
    }
}

// Whether two dense tensors have their elements of the same index at the same place.
bool lie_alike(PyObject* a, PyObject* b) {
  DLTensor one, other;
  if (torch.api->dltensor_from_py_object_no_sync(a, &one) != 0 || torch.api->dltensor_from_py_object_no_sync(b, &other) != 0)
    throw py::error_already_set();
  if (one.ndim != other.ndim) return false;
  std::int64_t expected = 1;
  for (int d = one.ndim - 1; d >= 0; --d) {
    if (one.shape[d] != other.shape[d]) return false;
    const std::int64_t stride = one.strides == nullptr ? expected : one.strides[d];
    if (one.shape[d] != 1 && stride != (other.strides == nullptr ? expected : other.strides[d])) return false;
    expected *= one.shape[d];
  }
  return true;
}

bool is_plain(PyObject* tensor) { return Py_TYPE(tensor) == torch.parameter || Py_TYPE(tensor) == torch.tensor; }

// torch's own getters are called without the attribute look-up, which takes a fifth of the time.
PyObject* getter_named(const py::type& tensor, const char* name) {
  const py::object getter = tensor.attr(name);  // a getset descriptor: asking a type gives itself
  if (Py_TYPE(getter.ptr())->tp_descr_get == nullptr) throw py::type_error(std::string(name) + " of a tensor is not a descriptor");
  return getter.inc_ref().ptr();
}

// -> a new reference, or nullptr with an exception set.
PyObject* get(PyObject* getter, PyObject* tensor) {
  return Py_TYPE(getter)->tp_descr_get(getter, tensor, reinterpret_cast<PyObject*>(Py_TYPE(tensor)));
}

// tensor.grad, a new reference; a subclass may have overridden it.
PyObject* grad_of(PyObject* tensor) {
  return is_plain(tensor) ? get(torch.grad_getter, tensor) : PyObject_GetAttr(tensor, torch.grad);
}

}  // namespace

void bind(const py::type& tensor, const py::type& parameter) {
  const py::capsule capsule = tensor.attr("__dlpack_c_exchange_api__");
  const auto* api = static_cast<const DLPackExchangeAPI*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  if (api == nullptr) throw py::error_already_set();
  if (api->header.version.major != DLPACK_MAJOR_VERSION || api->dltensor_from_py_object_no_sync == nullptr)
    throw std::runtime_error("this torch speaks DLPack " + std::to_string(api->header.version.major) +
                             ", fastclip was built for " + std::to_string(DLPACK_MAJOR_VERSION));
  torch.api = api;
  torch.tensor = reinterpret_cast<PyTypeObject*>(tensor.inc_ref().ptr());
  torch.parameter = reinterpret_cast<PyTypeObject*>(parameter.inc_ref().ptr());
  torch.grad = PyUnicode_InternFromString("grad");
  torch.grad_getter = getter_named(tensor, "grad");
}

GradTable table_of(const py::list& grads, int device_type) {
  GradTable table;
  table.device = {device_type, -1};
  table.tensors.reserve(static_cast<std::size_t>(PyList_GET_SIZE(grads.ptr())));
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(grads.ptr()); ++i) append(table, PyList_GET_ITEM(grads.ptr(), i), i);
  close(table, grads);
  return table;
}

std::vector<std::int64_t> pieces(const GradTable& table, const std::vector<std::uint64_t>& masks) {
  if (masks.size() != table.tensors.size()) throw py::value_error("one mask per tensor is needed");
  std::vector<std::int64_t> counts(masks.size());
  for (std::size_t i = 0; i < masks.size(); ++i) {
    DLTensor t;
    if (torch.api->dltensor_from_py_object_no_sync(PyList_GET_ITEM(table.grads.ptr(), i), &t) != 0)
      throw py::error_already_set();
    std::int64_t units = 1;
    for (int d = 0; d < t.ndim; ++d)
      if (!(masks[i] >> d & 1)) units *= t.shape[d];
    const std::int64_t size = table.tensors[i].size;
    if (units == 0 || size == 0) continue;
    // The tensor is dense in some order, so its units are blocks when every other dimension steps over whole ones.
    bool blocks = true;
    std::int64_t expected = 1, previous = -1;
    for (int d = t.ndim - 1; d >= 0; --d) {
      const std::int64_t stride = t.strides == nullptr ? expected : t.strides[d];
      expected *= t.shape[d];
      if ((masks[i] >> d & 1) || t.shape[d] == 1) continue;
      blocks &= stride >= size / units && stride > previous;
      previous = stride;
    }
    if (blocks) counts[i] = units;
  }
  return counts;
}

GradTable split(const GradTable& table, const std::vector<std::int64_t>& counts) {
  if (counts.size() != table.tensors.size()) throw py::value_error("one count per tensor is needed");
  GradTable pieces;
  pieces.device = table.device;
  pieces.grads = table.grads;
  pieces.wide = table.wide;
  for (std::size_t i = 0; i < counts.size(); ++i) {
    const TensorRef& whole = table.tensors[i];
    if (counts[i] == 0) continue;
    if (counts[i] < 0 || whole.size % counts[i] != 0)
      throw py::value_error("tensor " + std::to_string(i) + " can't be cut into " + std::to_string(counts[i]) + " pieces");
    const std::int64_t size = whole.size / counts[i];
    auto* data = static_cast<char*>(whole.data);
    for (std::int64_t k = 0; k < counts[i]; ++k, data += size * element_bytes(whole.dtype))
      pieces.tensors.push_back({data, size, whole.dtype});
  }
  return pieces;
}

// Whether the memory holds the negative of each number, which DLPack doesn't tell. Reads and multiplications don't mind.
static bool is_negative(PyObject* tensor) {
  static PyObject* const name = PyUnicode_InternFromString("is_neg");
  const auto answer = py::reinterpret_steal<py::object>(PyObject_CallMethodObjArgs(tensor, name, nullptr));
  if (!answer) throw py::error_already_set();
  return answer.ptr() == Py_True;
}

GradTable partners(const GradTable& table, const py::list& weights) {
  if (static_cast<std::size_t>(PyList_GET_SIZE(weights.ptr())) != table.tensors.size())
    throw py::value_error("one weight per gradient is needed");
  GradTable found;
  found.device = table.device;
  found.grads = weights;
  found.tensors.reserve(table.tensors.size());
  for (std::size_t i = 0; i < table.tensors.size(); ++i) {
    TensorRef ref{};
    Device device;
    const char* reason = refusal(PyList_GET_ITEM(weights.ptr(), i), ref, device);
    if (*reason == '\0') reason = elsewhere(device, found.device);
    const TensorRef& grad = table.tensors[i];
    if (*reason == '\0') {
      if (ref.dtype != grad.dtype) reason = "of another dtype than its gradient";
      else if (ref.dtype > DType::f16) reason = "a dtype without a kernel for penalties";
      else if (!lie_alike(PyList_GET_ITEM(weights.ptr(), i), PyList_GET_ITEM(table.grads.ptr(), i)))
        reason = "in another memory order than its gradient";
      else if (is_negative(PyList_GET_ITEM(weights.ptr(), i)) || is_negative(PyList_GET_ITEM(table.grads.ptr(), i)))
        reason = "kept as the negative of what it is, or its gradient";
    }
    if (*reason != '\0') {
      found.refused[py::int_(i)] = py::str(reason);
      ref = {nullptr, 0, grad.dtype};
    }
    found.tensors.push_back(ref);
  }
  return found;
}

py::tuple gather(const py::list& tensors, bool take_grad) {
  const Py_ssize_t count = PyList_GET_SIZE(tensors.ptr());
  GradTable table;
  table.device = {0, -1};
  table.tensors.reserve(count);
  std::vector<py::object> found;
  std::vector<Py_ssize_t> positions;
  found.reserve(count);
  positions.reserve(count);
  Seen seen(static_cast<std::size_t>(count));
  for (Py_ssize_t i = 0; i < count && i < PyList_GET_SIZE(tensors.ptr()); ++i) {
    PyObject* tensor = PyList_GET_ITEM(tensors.ptr(), i);
    if (tensor == Py_None && !take_grad) continue;
    if (!is_plain(tensor) && !PyObject_TypeCheck(tensor, torch.tensor))  // which walks up from a Parameter's class
      throw py::type_error("item " + std::to_string(i) + " is a " + Py_TYPE(tensor)->tp_name + ", not a torch.Tensor");
    auto grad = take_grad ? py::reinterpret_steal<py::object>(grad_of(tensor))
                          : py::reinterpret_borrow<py::object>(tensor);
    if (!grad) throw py::error_already_set();
    if (grad.is_none() || !seen.insert(grad.ptr())) continue;
    append(table, grad.ptr(), static_cast<Py_ssize_t>(found.size()));
    found.push_back(std::move(grad));
    positions.push_back(i);
  }
  py::list grads(found.size());
  for (std::size_t i = 0; i < found.size(); ++i) PyList_SET_ITEM(grads.ptr(), i, found[i].release().ptr());
  close(table, grads);
  const bool in_order = positions.empty() || positions.back() + 1 == static_cast<Py_ssize_t>(positions.size());
  return py::make_tuple(grads, in_order ? py::object(py::none()) : py::object(py::cast(positions)), std::move(table));
}

std::int64_t size_bytes(const GradTable& table) {
  std::int64_t bytes = 0;
  for (const TensorRef& tensor : table.tensors) bytes += tensor.size * element_bytes(tensor.dtype);
  return bytes;
}

const py::bytes& facts(GradTable& table) {
  if (table.facts) return table.facts;
  constexpr std::size_t kNumbers = 3;
  auto made = py::reinterpret_steal<py::bytes>(
      PyBytes_FromStringAndSize(nullptr, static_cast<Py_ssize_t>(kNumbers * sizeof(std::int64_t) * table.tensors.size())));
  if (!made) throw py::error_already_set();
  char* at = PyBytes_AS_STRING(made.ptr());
  for (const TensorRef& tensor : table.tensors) {
    const std::int64_t numbers[kNumbers] = {reinterpret_cast<std::intptr_t>(tensor.data), tensor.size, static_cast<std::int64_t>(tensor.dtype)};
    std::memcpy(at, numbers, sizeof numbers);
    at += sizeof numbers;
  }
  table.facts = std::move(made);
  return table.facts;
}

TensorRef on_device(const py::object& tensor, Device device, const char* name) {
  TensorRef ref{};
  Device own;
  const char* reason = refusal(tensor.ptr(), ref, own);
  if (*reason == '\0') reason = elsewhere(own, device);
  if (*reason != '\0') throw py::type_error(std::string(name) + ": " + reason);
  return ref;
}

void* memory(const py::object& tensor, DType dtype, std::int64_t size, Device device, const char* name) {
  const TensorRef ref = on_device(tensor, device, name);
  if (ref.dtype != dtype || ref.size != size)
    throw py::value_error(std::string(name) + " must hold " + std::to_string(size) +
                          (dtype == DType::f64 ? " float64 numbers" : " float32 numbers"));
  return ref.data;
}

Device device_of(const py::object& tensor) {
  DLTensor t;
  if (torch.api->dltensor_from_py_object_no_sync(tensor.ptr(), &t) != 0) throw py::error_already_set();
  return device_of(t);
}

void* current_stream(Device device) {
  void* stream = nullptr;
  if (torch.api->current_work_stream(static_cast<DLDeviceType>(device.type), device.id, &stream) != 0) throw py::error_already_set();
  return stream;
}

}  // namespace fastclip
