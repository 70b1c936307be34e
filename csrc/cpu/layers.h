#pragma once

#include <nanobind/nanobind.h>

namespace trunkline {

void bind_layers(nanobind::module_& m);

}  // namespace trunkline
