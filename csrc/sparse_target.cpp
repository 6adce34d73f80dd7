#include "sparse_target.h"

#include <ATen/Dispatch.h>
#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <c10/util/Load.h>
#include <c10/util/irange.h>

#include <algorithm>
#include <optional>
#include <string>

#include "autograd.h"
#include "pass.h"

namespace bce_ext {

bool is_readable(const Tensor& tensor) {
  constexpr c10::DispatchKeySet lazy({c10::DispatchKey::Negative, c10::DispatchKey::ZeroTensor});
  return tensor.is_cpu() && is_plain(tensor) && !tensor.requires_grad() && !has_tangent(tensor) &&
         !tensor.key_set().has_any(lazy) && !transform_is_active() && is_aligned(tensor);
}

bool has_addition(at::ScalarType type) { return type == at::kBool || type == at::kLong || is_arithmetic(type); }

namespace {

// A condition on what a tensor holds. Where the host cannot look without waiting, the device checks it.
template <typename... Words>
void check_values(const char* loss, const Tensor& is_valid, const Words&... words) {
  if (!is_plain(is_valid) || is_valid.is_meta()) return;
  if (is_valid.is_cpu()) {
    TORCH_CHECK(is_valid.all().item<bool>(), loss, words...);
  } else {
    at::_assert_async(is_valid.all(), std::string(loss) + ": the target is not valid");
  }
}

// ---- what a sparse tensor consists of ----

struct Parts {
  Tensor values;     // (nnz)
  Tensor crow;       // (rows + 1), where the values of each row begin; undefined for COO
  Tensor places;     // the labels (nnz) for CSR, the indices (dimensions, nnz) for COO
  const char* loss;  // whose target it is
};

Parts parts_of_csr(const Tensor& target, const char* loss) {
  TORCH_CHECK(target.dim() == 2 && target.dense_dim() == 0, loss,
              ": expected a sparse CSR target of two dimensions, but got ", target.dim(), " and ", target.dense_dim(),
              " dense ones");
  Parts parts{target.values(), target.crow_indices(), target.col_indices(), loss};
  check_storage(parts.crow, "the crow_indices of target");
  check_storage(parts.places, "the col_indices of target");
  check_storage(parts.values, "the values of target");
  const int64_t count = parts.values.size(0);
  TORCH_CHECK(parts.crow.dim() == 1 && parts.crow.size(0) == target.size(0) + 1 && parts.places.dim() == 1 &&
                  parts.places.size(0) == count,
              loss, ": expected crow_indices of size ", target.size(0) + 1, " and as many col_indices as values (",
              count, "), but got sizes ", parts.crow.sizes(), " and ", parts.places.sizes());
  parts.crow = parts.crow.to(at::kLong);
  parts.places = parts.places.to(at::kLong);
  return parts;
}

Parts parts_of_coo(const Tensor& target, const char* loss) {
  TORCH_CHECK(target.dense_dim() == 0, loss, ": expected a sparse COO target without dense dimensions, but got ",
              target.dense_dim());
  Parts parts{target._values(), Tensor(), target._indices(), loss};
  check_storage(parts.places, "the indices of target");
  check_storage(parts.values, "the values of target");
  TORCH_CHECK(parts.values.dim() == 1 && parts.places.dim() == 2 && parts.places.size(0) == target.dim() &&
                  parts.places.size(1) == parts.values.size(0),
              loss, ": expected as many indices of ", target.dim(), " dimensions as values, but got sizes ",
              parts.places.sizes(), " and ", parts.values.sizes());
  if (!target.requires_grad()) return parts;
  // Duplicates are added up anyway; only coalesced values have a derivative.
  const Tensor coalesced = target.coalesce();
  return {coalesced.values(), Tensor(), coalesced.indices(), loss};
}

// ---- on the host ----

bool is_inside(int64_t index, int64_t size) { return static_cast<uint64_t>(index) < static_cast<uint64_t>(size); }

// Calls function(i, row, label) for each value i, and says whether all indices are inside: it ends at the first that is
// not. Several dimensions before the labels are one.
template <typename F>
bool for_each_value(const Parts& parts, at::IntArrayRef size, const F& function) {
  const int64_t count = parts.values.size(0), num_labels = size.back();
  if (parts.crow.defined()) {
    const auto begin = parts.crow.accessor<const int64_t, 1>();
    const auto label = parts.places.accessor<const int64_t, 1>();
    if (begin[0] != 0 || begin[size[0]] != count) return false;
    for (const auto row : c10::irange(size[0])) {
      if (begin[row + 1] < begin[row] || begin[row + 1] > count) return false;
      for (int64_t i = begin[row]; i < begin[row + 1]; ++i) {
        if (!is_inside(label[i], num_labels)) return false;
        function(i, row, label[i]);
      }
    }
    return true;
  }
  const auto place = parts.places.accessor<const int64_t, 2>();
  const int64_t last = static_cast<int64_t>(size.size()) - 1;
  for (const auto i : c10::irange(count)) {
    int64_t row = 0;
    for (const auto d : c10::irange(last)) {
      if (!is_inside(place[d][i], size[d])) return false;
      row = row * size[d] + place[d][i];
    }
    if (!is_inside(place[last][i], num_labels)) return false;
    function(i, row, place[last][i]);
  }
  return true;
}

bool has_readable_indices(const Parts& parts) {
  return is_readable(parts.places) && (!parts.crow.defined() || is_readable(parts.crow));
}

// Row and label of each value; undefined where an index is outside.
Tensor indices_on_host(const Parts& parts, at::IntArrayRef size) {
  const int64_t count = parts.values.size(0);
  const Tensor indices = at::empty({2, count}, parts.places.options());
  auto* rows = indices.mutable_data_ptr<int64_t>();
  auto* labels = rows + count;
  const bool is_valid = for_each_value(parts, size, [&](int64_t i, int64_t row, int64_t label) {
    rows[i] = row;
    labels[i] = label;
  });
  return is_valid ? indices : Tensor();
}

// Most targets list ones, each place once. As bool they are a fourth of the memory of float32 to write and to read.
// Undefined where a value is something else, or two have the same place, or an index is outside.
template <typename T>
Tensor dense_ones_on_host(const Parts& parts, at::IntArrayRef size) {
  const auto value = parts.values.accessor<const T, 1>();
  for (const auto i : c10::irange(value.size(0))) {
    if (c10::load(&value[i]) != T(1)) return {};
  }
  Tensor dense = at::zeros(size, parts.values.options().dtype(at::kBool));
  auto* out = dense.mutable_data_ptr<bool>();
  bool is_distinct = true;
  const bool is_valid = for_each_value(parts, size, [&](int64_t /*i*/, int64_t row, int64_t label) {
    bool& place = out[row * size.back() + label];
    is_distinct = is_distinct && !place;
    place = true;
  });
  return is_valid && is_distinct ? dense : Tensor();
}

// Undefined where an index is outside, operations on a part are followed, or the values have a dtype without addition.
Tensor dense_on_host(Parts parts, at::IntArrayRef size, at::ScalarType input_dtype) {
  if (!has_readable_indices(parts) || !is_readable(parts.values)) return {};
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  if (!has_addition(parts.values.scalar_type())) {
    if (!is_label_type(parts.values.scalar_type())) return {};
    parts.values = parts.values.to(at::kLong);
  }
  const at::ScalarType dtype = parts.values.scalar_type();
  // Values of a wider dtype make that of the loss wider.
  const bool may_be_bool = at::promoteTypes(input_dtype, dtype) == input_dtype;
  Tensor dense;
  AT_DISPATCH_FLOATING_TYPES_AND4(at::kHalf, at::kBFloat16, at::kBool, at::kLong, dtype, kLinearName, [&] {
    if (may_be_bool) dense = dense_ones_on_host<scalar_t>(parts, size);
    if (dense.defined()) return;
    dense = at::zeros(size, parts.values.options());
    const auto value = parts.values.accessor<const scalar_t, 1>();
    auto* out = dense.mutable_data_ptr<scalar_t>();
    const bool is_valid = for_each_value(parts, size, [&](int64_t i, int64_t row, int64_t label) {
      add_to(out[row * size.back() + label], c10::load(&value[i]));
    });
    if (!is_valid) dense = Tensor();
  });
  return dense;
}

// ---- by operations of ATen, which can be followed: they serve other devices, transforms and derivatives ----

Tensor rows_of_csr(const Parts& parts) {
  const Tensor& crow = parts.crow;
  const int64_t count = parts.values.size(0);
  const Tensor is_monotone = (crow.diff() >= 0).all();
  check_values(parts.loss, is_monotone.logical_and(crow[0] == 0).logical_and(crow[-1] == count),
               ": expected crow_indices that rise from 0 to the number of values (", count, ")");
  // A search stays inside of any crow_indices, where counting through them would not.
  return at::searchsorted(crow, at::arange(count, crow.options()), /*out_int32=*/false, /*right=*/true) - 1;
}

Tensor rows_of_coo(const Parts& parts, at::IntArrayRef size) {
  Tensor rows = at::zeros({parts.places.size(1)}, parts.places.options());
  for (const auto d : c10::irange(size.size() - 1)) {
    const Tensor position = parts.places.select(0, d);
    check_values(parts.loss, (position >= 0).logical_and(position < size[d]),
                 ": expected indices of the sparse target below its size (", size[d], ") in dimension ", d);
    rows = rows * size[d] + position;
  }
  return rows;
}

Tensor indices_of(const Parts& parts, at::IntArrayRef size) {
  const Tensor rows = parts.crow.defined() ? rows_of_csr(parts) : rows_of_coo(parts, size);
  const Tensor labels = parts.crow.defined() ? parts.places : parts.places.select(0, -1);
  check_values(parts.loss, (labels >= 0).logical_and(labels < size.back()),
               ": expected the sparse target to have labels from 0 to ", size.back() - 1);
  return at::stack({rows, labels});
}

Parts parts_of(const Tensor& target, const char* loss) {
  // Views that autograd knows of take longer to make than to read. They are made where somebody may ask for them.
  constexpr c10::DispatchKeySet wrapped({c10::DispatchKey::Python, c10::DispatchKey::Functionalize});
  const bool is_followed = target.requires_grad() || has_tangent(target) || transform_is_active() ||
                           target.key_set().has_any(wrapped) || c10::impl::TorchDispatchModeTLS::any_modes_set();
  std::optional<at::AutoDispatchBelowADInplaceOrView> below_autograd;
  if (!is_followed) below_autograd.emplace();
  return target.layout() == at::kSparse ? parts_of_coo(target, loss) : parts_of_csr(target, loss);
}

}  // namespace

SparseTarget split_sparse(const Tensor& target, const char* loss) {
  Parts parts = parts_of(target, loss);
  Tensor indices;
  if (has_readable_indices(parts)) indices = indices_on_host(parts, target.sizes());
  if (!indices.defined()) indices = indices_of(parts, target.sizes());  // which says what is wrong, if anything is
  return {std::move(parts.values), std::move(indices)};
}

Tensor readable_dense_of(const Tensor& target, at::ScalarType input_dtype, const char* loss) {
  return dense_on_host(parts_of(target, loss), target.sizes(), input_dtype);
}

Tensor dense_of(const SparseTarget& target, const c10::SymInt& num_rows, const c10::SymInt& num_labels,
                at::ScalarType input_dtype) {
  const auto rows = num_rows.maybe_as_int(), labels = num_labels.maybe_as_int();
  if (rows && labels) {
    Tensor dense = dense_on_host({target.values, Tensor(), target.indices, kLinearName}, {*rows, *labels}, input_dtype);
    if (dense.defined()) return dense;
  }
  const Tensor zeros = at::zeros_symint({num_rows, num_labels}, target.values.options());
  return zeros.index_put({target.indices.select(0, 0), target.indices.select(0, 1)}, target.values,
                         /*accumulate=*/true);
}

// ---- class indices ----

bool are_class_indices(const Tensor& target, const Tensor& input) {
  return target.layout() == at::kStrided && target.dim() + 1 == input.dim() &&
         at::isIntegralType(target.scalar_type(), /*includeBool=*/false);
}

void check_class_indices(const Tensor& target, const c10::SymInt& num_labels) {
  if (!is_plain(target) || target.is_meta() || target.numel() == 0) return;
  // As int64, the largest numbers of uint64 would be negative: no label.
  const bool is_unsigned = target.scalar_type() == at::kUInt64;
  if (!target.is_cpu())
    return check_values(kLinearName, target.to(is_unsigned ? at::kDouble : at::kLong) < num_labels.expect_int());
  check_storage(target, "target");
  const Tensor indices = readable(target.to(at::kLong).resolve_neg().contiguous());
  const auto* begin = indices.const_data_ptr<int64_t>();
  const auto check_largest = [&](const auto* in) {
    const auto largest = *std::max_element(in, in + indices.numel());
    TORCH_CHECK_INDEX(static_cast<double>(largest) < static_cast<double>(num_labels.expect_int()), kLinearName,
                      ": expected class indices below the number of labels (", num_labels, "), but one is ", largest);
  };
  is_unsigned ? check_largest(reinterpret_cast<const uint64_t*>(begin)) : check_largest(begin);
}

Tensor one_hot(const Tensor& target, const c10::SymInt& num_labels) {
  if (!is_plain(target) || !target.is_cpu()) {
    c10::SymDimVector size(target.sym_sizes());
    size.push_back(num_labels);
    const Tensor none = at::zeros_symint(size, target.options().dtype(at::kBool));
    if (TORCH_GUARD_OR_FALSE(num_labels.sym_eq(0))) return none;
    // Scattering refuses an index that is too large, where check_class_indices cannot read it.
    const Tensor labels = target.to(at::kLong).unsqueeze(-1);
    return none.scatter(-1, labels.clamp_min(0), labels >= 0);
  }
  const Tensor indices = readable(target.to(at::kLong).resolve_neg().contiguous());
  c10::DimVector size(target.sizes());
  size.push_back(num_labels.expect_int());
  const Tensor dense = at::zeros(size, target.options().dtype(at::kBool));
  const auto* label = indices.const_data_ptr<int64_t>();
  auto* row = dense.mutable_data_ptr<bool>();
  for (const auto i : c10::irange(indices.numel())) {
    if (label[i] >= 0 && label[i] < size.back()) row[i * size.back() + label[i]] = true;
  }
  return dense;
}

}  // namespace bce_ext
