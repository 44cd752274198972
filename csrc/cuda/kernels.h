// Launchers of the CUDA kernels: asynchronous on the stream, on the current device; a failed launch is returned.
#pragma once

#include <cuda_runtime_api.h>

#include "palp_fast/add_noise.h"
#include "palp_fast/optimizer.h"
#include "palp_fast/renoise.h"
#include "palp_fast/score_combination.h"
#include "palp_fast/timestep.h"

namespace palp_fast::cuda {

template <typename Real>
cudaError_t renoise_fwd(RenoiseParams params, cudaStream_t stream);

template <typename Real>
cudaError_t renoise_bwd(RenoiseBackwardParams params, cudaStream_t stream);

constexpr int kSumsPerTile = 4;

// Parts that an image is cut into, each summed by one block.
int64_t score_tiles(const Shape& shape);

template <typename Real>
struct ScoreOut {
  Real *loss, *stats, *gradient;  // [], [B, 3], [B, C, H, W]
  double* sums;                   // scratch [B, score_tiles, kSumsPerTile]
};

template <typename Real>
cudaError_t score_combination_fwd(const ScoreParams<Real>& params, ScoreOut<Real> out, cudaStream_t stream);

// out = grad_output gradient, rounded once.
template <typename Real>
cudaError_t score_combination_bwd(
    Shape shape, ImageView gradient, VectorView grad_output, ImageOut out, cudaStream_t stream);

// Writes norm and verdict. ticket: 0 before and after. begin: also count the update of every tensor and prepare it.
cudaError_t gradient_norm(const NormParams& params, unsigned* ticket, bool begin, cudaStream_t stream);

// begin: first count and prepare, in a launch of its own; else gradient_norm has done that.
cudaError_t optimizer_update(const StepParams& params, bool begin, cudaStream_t stream);

// Host words to device memory as kernel arguments: safe in a captured graph, whatever becomes of the host's copy.
cudaError_t write_words(const int64_t* words, int64_t count, int64_t* out, cudaStream_t stream);

template <typename Real>
cudaError_t add_noise_fwd(AddNoiseParams params, cudaStream_t stream);

template <typename Real>
cudaError_t add_noise_bwd(AddNoiseBackwardParams params, cudaStream_t stream);

cudaError_t timestep_sample(TimestepSampleParams params, cudaStream_t stream);

cudaError_t timestep_update(TimestepUpdateParams params, cudaStream_t stream);

// out [count, 4] from counters [count, 4] and key [2], contiguous.
cudaError_t philox_words(const int64_t* counters, const int64_t* key, int64_t count, int64_t* out, cudaStream_t stream);

}  // namespace palp_fast::cuda
