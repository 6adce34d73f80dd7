// Autocast: both losses are on native's list of functions that compute in float32. The kernels do so anyway, so nothing
// is cast here: half precision logits go in as they are, and the loss comes out in the dtype that native's cast would
// give.
#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include "ops.h"

namespace bce_ext {
namespace {

at::ScalarType autocast_dtype(const Arguments& arguments) {
  const auto dtype = loss_dtype(arguments);
  return dtype == at::kDouble ? dtype : at::kFloat;
}

Tensor loss_under_autocast(const Arguments& arguments, int64_t reduction) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("bce_ext::_bce", "")
                             .typed<Tensor(const Tensor&, const Tensor&, const OptionalTensor&, const OptionalTensor&,
                                           bool, int64_t, at::ScalarType)>();
  check_arguments(arguments);
  check_reduction(reduction);
  const auto autocast_key = at::autocast::get_autocast_dispatch_key_from_device_type(arguments.input.device().type());
  c10::impl::ExcludeDispatchKeyGuard no_autocast(autocast_key);
  return op.call(arguments.input, arguments.target, arguments.weight, arguments.pos_weight, arguments.with_logits,
                 reduction, autocast_dtype(arguments));
}

Tensor with_logits_autocast(const Tensor& input, const Tensor& target, const OptionalTensor& weight,
                            const OptionalTensor& pos_weight, int64_t reduction) {
  return loss_under_autocast({input, target, weight, pos_weight, /*with_logits=*/true}, reduction);
}

Tensor probabilities_autocast(const Tensor& input, const Tensor& target, const OptionalTensor& weight,
                              int64_t reduction) {
  return loss_under_autocast({input, target, weight, std::nullopt, /*with_logits=*/false}, reduction);
}

}  // namespace

TORCH_LIBRARY_IMPL(bce_ext, AutocastCPU, m) {
  m.impl("binary_cross_entropy_with_logits", with_logits_autocast);
  m.impl("binary_cross_entropy", probabilities_autocast);
}

TORCH_LIBRARY_IMPL(bce_ext, AutocastCUDA, m) {
  m.impl("binary_cross_entropy_with_logits", with_logits_autocast);
  m.impl("binary_cross_entropy", probabilities_autocast);
}

}  // namespace bce_ext
