// Launchers of the CUDA kernels: asynchronous on the stream, on the current device; the error of the launch is returned.
#pragma once

#include <cuda_runtime_api.h>

#include "palp_fast/optimizer.h"
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

// Writes norm and verdict. ticket: 0 before and after. begin: also count the update of every tensor and prepare it.
cudaError_t gradient_norm(const NormParams& params, unsigned* ticket, bool begin, cudaStream_t stream);

// begin: first count and prepare, in a launch of its own; else gradient_norm has done that.
cudaError_t optimizer_update(const StepParams& params, bool begin, cudaStream_t stream);

// Host words to device memory as kernel arguments: safe in a captured graph, whatever becomes of the host's copy.
cudaError_t write_words(const int64_t* words, int64_t count, int64_t* out, cudaStream_t stream);

}  // namespace palp_fast::cuda
