// The CPU kernels, as one table of functions per instruction set. Results depend neither on the table nor on the number
// of threads: work is cut into tiles of fixed size, and sums are added in order.
#pragma once

#include "palp_fast/add_noise.h"
#include "palp_fast/layers.h"
#include "palp_fast/optimizer.h"
#include "palp_fast/renoise.h"
#include "palp_fast/score_combination.h"
#include "palp_fast/timestep.h"

namespace palp_fast::cpu {

// Runs body(first, last, context) over parts of [0, count), each of at least `grain`, on the caller's threads.
using ParallelBody = void (*)(int64_t first, int64_t last, void* context);
using ParallelFor = void (*)(int64_t count, int64_t grain, ParallelBody body, void* context);

constexpr int64_t kTile = 1024;  // elements of one image that a task works on at a time

PALP_INLINE int64_t tiles_per_image(const Shape& shape) { return (shape.image() + kTile - 1) / kTile; }

template <typename Real>
struct ImageKernels {
  // gradient: [B, C, H, W] contiguous. sums: [B, tiles per image].
  void (*score_combination_fwd)(const ScoreParams<Real>&, Real* gradient, ScoreSums<double>* sums, ParallelFor);
  // out = factor gradient, rounded once.
  void (*score_combination_bwd)(const Shape&, const ImageView& gradient, Real factor, const ImageOut&, ParallelFor);
  void (*renoise_fwd)(const RenoiseParams&, ParallelFor);
  void (*renoise_bwd)(const RenoiseBackwardParams&, ParallelFor);
  void (*add_noise_fwd)(const AddNoiseParams&, ParallelFor);
  void (*add_noise_bwd)(const AddNoiseBackwardParams&, ParallelFor);
  void (*group_norm_fwd)(const GroupNormParams<Real>&, ParallelFor);
  void (*group_norm_bwd)(const GroupNormBackwardParams<Real>&, ParallelFor);
};

struct OptimizerKernels {
  // Writes norm and verdict.
  void (*gradient_norm)(const NormParams&, ParallelFor);
  // Counts the update and does it, unless the verdict forbids.
  void (*optimizer_update)(const StepParams&, ParallelFor);
};

// keys, ranks: [global_batch], unless draws are uniform; q, upper: [bins].
struct TimestepScratch {
  uint64_t *keys, *ranks;
  double *q, *upper;
};

struct Kernels {
  const char* level;  // "base", "v3" or "v4"
  ImageKernels<float> f32;
  ImageKernels<double> f64;
  OptimizerKernels optimizer;
  void (*geglu)(const GegluParams&, ParallelFor);
  void (*timestep_sample)(const TimestepSampleParams&, const TimestepScratch&);
  void (*timestep_update)(const TimestepUpdateParams&, double* added);  // scratch [2 bins]
  // out [count, 4] from counters [count, 4] and key [2].
  void (*philox_words)(const int64_t* counters, const int64_t* key, int64_t count, int64_t* out);

  template <typename Real>
  const ImageKernels<Real>& image() const {
    if constexpr (sizeof(Real) == sizeof(double)) {
      return f64;
    } else {
      return f32;
    }
  }
};

// The table for this processor, chosen once; PALP_FAST_CPU_LEVEL names a lower one.
const Kernels& kernels();

}  // namespace palp_fast::cpu
