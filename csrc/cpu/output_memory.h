// The memory of what the CPU kernels write.
#pragma once

#include <ATen/core/Tensor.h>

namespace bce_ext {

// An uninitialised CPU tensor. A large one takes over the pages of one that was freed, if there is one that fits.
at::Tensor empty_output(at::IntArrayRef sizes, at::IntArrayRef strides, at::ScalarType dtype);

}  // namespace bce_ext
