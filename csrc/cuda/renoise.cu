#include "kernels.h"
#include "launch.h"

namespace palp_fast::cuda {
namespace {

template <typename Real>
__global__ void __launch_bounds__(kThreads, 2) renoise_fwd_kernel(RenoiseParams params) {
  const Shape shape = params.shape;
  const int64_t index = thread_index(), numel = shape.numel();
  if (index >= numel) return;
  const int64_t sample = index / shape.image(), element = index % shape.image();
  const RenoiseFactors<Real> factors(params.alpha_bar, params.alpha_bar_new, sample);
  const Real x = read_image<Real>(params.x_t, shape, sample, element);
  const Real eps = read_image<Real>(params.eps_pred, shape, sample, element);
  const Real noise = read_image<Real>(params.noise, shape, sample, element);
  const Real value = factors.same ? factors.apply_same(x, eps, noise) : factors.apply(x, eps, noise);
  for (int64_t copy = 0; copy < params.copies; ++copy) write_element(params.out, copy * numel + index, value);
}

template <typename Real>
__global__ void __launch_bounds__(kThreads, 2) renoise_bwd_kernel(RenoiseBackwardParams params) {
  const Shape shape = params.shape;
  const int64_t index = thread_index();
  if (index >= shape.numel()) return;
  const int64_t sample = index / shape.image(), element = index % shape.image();
  const RenoiseFactors<Real> factors(params.alpha_bar, params.alpha_bar_new, sample);
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
cudaError_t renoise_fwd(RenoiseParams params, cudaStream_t stream) {
  if (params.shape.numel() == 0) return cudaSuccess;
  renoise_fwd_kernel<Real><<<blocks_for(params.shape.numel()), kThreads, 0, stream>>>(params);
  return cudaGetLastError();
}

template <typename Real>
cudaError_t renoise_bwd(RenoiseBackwardParams params, cudaStream_t stream) {
  if (params.shape.numel() == 0) return cudaSuccess;
  renoise_bwd_kernel<Real><<<blocks_for(params.shape.numel()), kThreads, 0, stream>>>(params);
  return cudaGetLastError();
}

template cudaError_t renoise_fwd<float>(RenoiseParams, cudaStream_t);
template cudaError_t renoise_fwd<double>(RenoiseParams, cudaStream_t);
template cudaError_t renoise_bwd<float>(RenoiseBackwardParams, cudaStream_t);
template cudaError_t renoise_bwd<double>(RenoiseBackwardParams, cudaStream_t);

}  // namespace palp_fast::cuda
