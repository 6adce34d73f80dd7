// Targets that are not dense, as a caller gives them: sparse CSR, sparse COO, and class indices.
#pragma once

#include <cstdint>
#include <type_traits>

#include "linear.h"

namespace bce_ext {

// A sparse target as the internal operators take it: the values (nnz), and row and label of each (2, nnz). Several
// dimensions before the labels are one.
struct SparseTarget {
  Tensor values, indices;
};

// Of a sparse CSR or COO tensor, whose indices are checked. `loss` is the name that errors begin with.
SparseTarget split_sparse(const Tensor& target, const char* loss);

// The dense target (num_rows, num_labels) of a sparse one, for an input of this dtype. Values of the same place are
// added up; ones that have a place each may come as bool, which changes no loss.
Tensor dense_of(const SparseTarget& target, const c10::SymInt& num_rows, const c10::SymInt& num_labels,
                at::ScalarType input_dtype);

// The same of a sparse CSR or COO tensor, by one loop on the host. Undefined where that cannot read the tensor, or
// finds it invalid: then split_sparse says why.
Tensor readable_dense_of(const Tensor& target, at::ScalarType input_dtype, const char* loss);

// Whether a target has one of the sparse layouts that are taken.
inline bool is_sparse(const Tensor& target) {
  return target.defined() && (target.layout() == at::kSparse || target.layout() == at::kSparseCsr);
}

// Whether operations on the tensor are followed by nobody, so that the host may read its memory instead.
bool is_readable(const Tensor& tensor);

// The dtypes that elements are added in.
bool has_addition(at::ScalarType type);

// Integers wrap around, as those of ATen do.
template <typename T>
void add_to(T& place, T value) {
  if constexpr (std::is_same_v<T, int64_t>) {
    place = static_cast<int64_t>(static_cast<uint64_t>(place) + static_cast<uint64_t>(value));
  } else {
    place = place + value;
  }
}

// Integers of the size of the logits without their last dimension.
bool are_class_indices(const Tensor& target, const Tensor& input);
void check_class_indices(const Tensor& target, const c10::SymInt& num_labels);

// Class indices as a dense target. A negative index is no label.
Tensor one_hot(const Tensor& target, const c10::SymInt& num_labels);

}  // namespace bce_ext
