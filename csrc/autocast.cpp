// Autocast: the losses are on native's list of functions that compute in float32. The kernels do so anyway, so nothing
// is cast here: half precision logits go in as they are, and the loss comes out in the dtype that native's cast would
// give.
#include <ATen/autocast_mode.h>
#include <torch/library.h>

#include "ops.h"

namespace bce_ext {
namespace {

Tensor bce_autocast(const Arguments& arguments, int64_t reduction, std::optional<at::ScalarType> dtype) {
  check_arguments(arguments);
  const auto autocast_key = at::autocast::get_autocast_dispatch_key_from_device_type(arguments.input.device().type());
  c10::impl::ExcludeDispatchKeyGuard no_autocast(autocast_key);
  const auto usual = loss_dtype(arguments);
  return bce(arguments, reduction, dtype.value_or(usual == at::kDouble ? usual : at::kFloat));
}

}  // namespace

TORCH_LIBRARY_IMPL(bce_ext, AutocastCPU, m) { m.impl("_bce", Flat<bce_autocast>::call); }
TORCH_LIBRARY_IMPL(bce_ext, AutocastCUDA, m) { m.impl("_bce", Flat<bce_autocast>::call); }

}  // namespace bce_ext
