// A call through the dispatcher.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>

namespace bce_ext {

template <typename Signature>
auto find_operator(const char* name, const char* overload = "") {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, overload).typed<Signature>();
}

}  // namespace bce_ext
