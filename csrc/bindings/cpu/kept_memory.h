// Memory of results that comes back when they are gone, for the next call: what the system has just given is slow, since
// the first write to every 4 KiB of it is a fault, which takes several times as long as these operators work on them.
#pragma once

#include "../tensors.h"

namespace palp_fast::bindings {

// Contiguous and not yet written, on the CPU; without the dispatcher, which takes longer than a small image does.
Tensor result_of(const std::vector<int64_t>& sizes, ScalarType dtype);

// The same of [copies B, C, H, W]. At most 64 MiB that no tensor uses are kept.
// Before torch 2.11, which cannot tell when a tensor is gone, and outside of Linux it is result_of.
Tensor result_image(const Shape& shape, ScalarType dtype, int64_t copies = 1);

}  // namespace palp_fast::bindings
