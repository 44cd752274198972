// Launchers of the CUDA kernels: asynchronous on the stream, on the current device; the error of the launch is returned.
#pragma once

#include <cuda_runtime_api.h>

#include "palp_fast/renoise.h"

namespace palp_fast::cuda {

// The CUDA form of RenoiseParams: alpha_bar stays on the device.
struct RenoiseSchedule {
  VectorView alpha_bar, alpha_bar_new;  // [B]; the second absent for u = t
};

template <typename Real>
cudaError_t renoise_fwd(RenoiseParams<Real> params, RenoiseSchedule schedule, cudaStream_t stream);

template <typename Real>
cudaError_t renoise_bwd(RenoiseBackwardParams<Real> params, RenoiseSchedule schedule, cudaStream_t stream);

}  // namespace palp_fast::cuda
