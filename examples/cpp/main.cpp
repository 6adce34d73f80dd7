// Our loss from C++, forward and backward, in a process without Python. docs/guides/cpp.md has the commands.
#include <ATen/core/Reduction.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <dlfcn.h>
#include <torch/torch.h>

#include <iostream>

using Loss = at::Tensor(const at::Tensor& input, const at::Tensor& target, const std::optional<at::Tensor>& weight,
                        const std::optional<at::Tensor>& pos_weight, int64_t reduction);

int main(int argc, char** argv) {
  // Loading the library registers its operators. A program that is linked against it (with -Wl,--no-as-needed) need not
  // do this.
  if (argc != 2 || dlopen(argv[1], RTLD_NOW) == nullptr) {
    std::cerr << "usage: " << argv[0] << " path/to/libbce_ext.so\n";
    if (argc == 2) std::cerr << dlerror() << '\n';
    return 2;
  }
  const auto loss_op =
      c10::Dispatcher::singleton().findSchemaOrThrow("bce_ext::binary_cross_entropy_with_logits", "").typed<Loss>();

  torch::manual_seed(0);
  const auto logits = torch::randn({64, 10}, torch::requires_grad());
  const auto target = torch::rand({64, 10});

  const auto ours = loss_op.call(logits, target, std::nullopt, std::nullopt, at::Reduction::Mean);
  const auto gradient = torch::autograd::grad({ours}, {logits})[0];
  const auto native = torch::binary_cross_entropy_with_logits(logits, target);
  const auto native_gradient = torch::autograd::grad({native}, {logits})[0];

  const bool agree = torch::allclose(ours, native) && torch::allclose(gradient, native_gradient);
  std::cout << "loss " << ours.item<float>() << ", torch's own " << native.item<float>() << ", gradients "
            << (agree ? "agree" : "differ") << '\n';
  return agree ? 0 : 1;
}
