// The table of one instruction set: this file and every kernel are compiled once for each.
#include "kernels.h"

namespace palp_fast::cpu::PALP_LEVEL {

template <typename Real>
void score_combination_fwd(const ScoreParams<Real>&, Real*, ScoreSums<double>*, ParallelFor);
template <typename Real>
void score_combination_bwd(const Shape&, const ImageView&, Real, const ImageOut&, ParallelFor);
template <typename Real>
void renoise_fwd(const RenoiseParams&, ParallelFor);
template <typename Real>
void renoise_bwd(const RenoiseBackwardParams&, ParallelFor);
template <typename Real>
void add_noise_fwd(const AddNoiseParams&, ParallelFor);
template <typename Real>
void add_noise_bwd(const AddNoiseBackwardParams&, ParallelFor);
template <typename Real>
void group_norm_fwd(const GroupNormParams<Real>&, ParallelFor);
template <typename Real>
void group_norm_bwd(const GroupNormBackwardParams<Real>&, ParallelFor);

void gradient_norm(const NormParams&, ParallelFor);
void optimizer_update(const StepParams&, ParallelFor);
void geglu(const GegluParams&, ParallelFor);
void timestep_sample(const TimestepSampleParams&, const TimestepScratch&);
void timestep_update(const TimestepUpdateParams&, double*);
void philox_words(const int64_t*, const int64_t*, int64_t, int64_t*);

#define PALP_TEXT(name) PALP_QUOTE(name)
#define PALP_QUOTE(name) #name

template <typename Real>
constexpr ImageKernels<Real> image_kernels{
    score_combination_fwd<Real>, score_combination_bwd<Real>, renoise_fwd<Real>,
    renoise_bwd<Real>,           add_noise_fwd<Real>,         add_noise_bwd<Real>,
    group_norm_fwd<Real>,        group_norm_bwd<Real>};

extern const Kernels table;
const Kernels table{PALP_TEXT(PALP_LEVEL), image_kernels<float>, image_kernels<double>,
                    {gradient_norm, optimizer_update}, geglu, timestep_sample, timestep_update, philox_words};

}  // namespace palp_fast::cpu::PALP_LEVEL
