// Launchers of the CUDA kernels: asynchronous on the stream, on the current device; the error of the launch is returned.
#pragma once

#include <cuda_runtime_api.h>

#include "palp_fast/add_noise.h"
#include "palp_fast/renoise.h"
#include "palp_fast/timestep.h"

namespace palp_fast::cuda {

// The CUDA form of RenoiseParams: alpha_bar stays on the device.
struct RenoiseSchedule {
  VectorView alpha_bar, alpha_bar_new;  // [B]; the second absent for u = t
};

template <typename Real>
cudaError_t renoise_fwd(RenoiseParams<Real> params, RenoiseSchedule schedule, cudaStream_t stream);

template <typename Real>
cudaError_t renoise_bwd(RenoiseBackwardParams<Real> params, RenoiseSchedule schedule, cudaStream_t stream);

template <typename Real>
cudaError_t add_noise_fwd(AddNoiseParams params, cudaStream_t stream);

template <typename Real>
cudaError_t add_noise_bwd(AddNoiseBackwardParams params, cudaStream_t stream);

cudaError_t timestep_sample(TimestepSampleParams params, cudaStream_t stream);

cudaError_t timestep_update(TimestepUpdateParams params, cudaStream_t stream);

// out [count, 4] from counters [count, 4] and key [2], contiguous.
cudaError_t philox_words(const int64_t* counters, const int64_t* key, int64_t count, int64_t* out, cudaStream_t stream);

}  // namespace palp_fast::cuda
