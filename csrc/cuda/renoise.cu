#include "kernels.h"
#include "launch.h"

namespace palp_fast::cuda {
namespace {

// Factors of one sample, as RenoiseFactors.
template <typename Real>
struct Factors {
  Real ratio, s_t, s_u;
  bool same;

  __device__ Factors(const RenoiseSchedule& schedule, int64_t sample) {
    const Real old = read_vector<Real>(schedule.alpha_bar, sample, 1);
    const Real fresh = read_vector<Real>(schedule.alpha_bar_new, sample, old);
    same = schedule.alpha_bar_new.data == nullptr;
    ratio = same ? Real(1) : sqrt(fresh) / sqrt(old);
    s_t = sqrt(1 - old);
    s_u = sqrt(1 - fresh);
  }
};

template <typename Real>
__global__ void __launch_bounds__(kThreads, 2) renoise_fwd_kernel(RenoiseParams<Real> params, RenoiseSchedule schedule) {
  const Shape shape = params.shape;
  const int64_t index = thread_index(), numel = shape.numel();
  if (index >= numel) return;
  const int64_t sample = index / shape.image(), element = index % shape.image();
  const Factors<Real> factors(schedule, sample);
  const Real x = read_image<Real>(params.x_t, shape, sample, element);
  const Real eps = read_image<Real>(params.eps_pred, shape, sample, element);
  const Real noise = read_image<Real>(params.noise, shape, sample, element);
  const Real value = factors.same ? x + factors.s_t * (noise - eps)
                                  : factors.ratio * (x - factors.s_t * eps) + factors.s_u * noise;
  for (int64_t copy = 0; copy < params.copies; ++copy) write_element(params.out, copy * numel + index, value);
}

template <typename Real>
__global__ void __launch_bounds__(kThreads, 2)
    renoise_bwd_kernel(RenoiseBackwardParams<Real> params, RenoiseSchedule schedule) {
  const Shape shape = params.shape;
  const int64_t index = thread_index();
  if (index >= shape.numel()) return;
  const int64_t sample = index / shape.image(), element = index % shape.image();
  const Factors<Real> factors(schedule, sample);
  Real total = 0;
  for (int64_t copy = 0; copy < params.copies; ++copy) {
    total += read_image<Real>(params.grad, shape, copy * shape.batch + sample, element);
  }
  const Real d_x = factors.ratio * total;
  write_element(params.d_x_t, index, d_x);
  write_element(params.d_eps_pred, index, -factors.s_t * d_x);
  write_element(params.d_noise, index, factors.s_u * total);
}

}  // namespace

template <typename Real>
cudaError_t renoise_fwd(RenoiseParams<Real> params, RenoiseSchedule schedule, cudaStream_t stream) {
  if (params.shape.numel() == 0) return cudaSuccess;
  renoise_fwd_kernel<Real><<<blocks_for(params.shape.numel()), kThreads, 0, stream>>>(params, schedule);
  return cudaGetLastError();
}

template <typename Real>
cudaError_t renoise_bwd(RenoiseBackwardParams<Real> params, RenoiseSchedule schedule, cudaStream_t stream) {
  if (params.shape.numel() == 0) return cudaSuccess;
  renoise_bwd_kernel<Real><<<blocks_for(params.shape.numel()), kThreads, 0, stream>>>(params, schedule);
  return cudaGetLastError();
}

template cudaError_t renoise_fwd(RenoiseParams<float>, RenoiseSchedule, cudaStream_t);
template cudaError_t renoise_fwd(RenoiseParams<double>, RenoiseSchedule, cudaStream_t);
template cudaError_t renoise_bwd(RenoiseBackwardParams<float>, RenoiseSchedule, cudaStream_t);
template cudaError_t renoise_bwd(RenoiseBackwardParams<double>, RenoiseSchedule, cudaStream_t);

}  // namespace palp_fast::cuda
