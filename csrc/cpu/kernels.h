// The CPU kernels. Results do not depend on the number of threads: work is cut into tiles of fixed size, and sums are
// added tile by tile in order.
#pragma once

#include "palp_fast/renoise.h"
#include "palp_fast/score_combination.h"

namespace palp_fast::cpu {

// Runs body(first, last, context) over parts of [0, count), each of at least `grain`, on the caller's threads.
using ParallelBody = void (*)(int64_t first, int64_t last, void* context);
using ParallelFor = void (*)(int64_t count, int64_t grain, ParallelBody body, void* context);

// gradient: [B, C, H, W] contiguous, before division by numel. sums: [B].
template <typename Real>
void score_combination_fwd(const ScoreParams<Real>& params, Real* gradient, ScoreSums* sums, ParallelFor parallel);

// out = factor gradient, rounded once.
template <typename Real>
void score_combination_bwd(
    const Shape& shape, const ImageView& gradient, Real factor, const ImageOut& out, ParallelFor parallel);

template <typename Real>
void renoise_fwd(const RenoiseParams<Real>& params, ParallelFor parallel);

template <typename Real>
void renoise_bwd(const RenoiseBackwardParams<Real>& params, ParallelFor parallel);

}  // namespace palp_fast::cpu
