// One thread per element of a [B, C, H, W] image.
#pragma once

#include <cuda_runtime.h>

#include "palp_fast/element.h"

namespace palp_fast::cuda {

constexpr int kThreads = 256;

// Index of this thread among all.
__device__ inline int64_t thread_index() { return int64_t(blockIdx.x) * kThreads + threadIdx.x; }

inline unsigned blocks_for(int64_t count) { return unsigned((count + kThreads - 1) / kThreads); }

}  // namespace palp_fast::cuda
