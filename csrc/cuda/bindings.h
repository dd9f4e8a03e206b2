#pragma once

#include <pybind11/pybind11.h>

namespace fastclip {

// The CUDA backend's part of the module.
void define_cuda(pybind11::module_& m);

}  // namespace fastclip
