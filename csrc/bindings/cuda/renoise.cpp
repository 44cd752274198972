// renoise on CUDA for torch's dispatcher. Schema, shape function and autograd are in palp_fast/ops.py.
#include "../renoise.h"

#include <tuple>

#include "../../cuda/kernels.h"
#include "stream.h"

namespace palp_fast::bindings {
namespace {

Tensor renoise(
    const Tensor& x_t, const Tensor& eps_pred, const Tensor& noise, const Tensor& alpha_bar,
    const OptionalTensor& alpha_bar_new, int64_t copies, std::optional<ScalarType> dtype) {
  const OnDeviceOf device(x_t, "x_t");
  RenoiseParams params = renoise_params(x_t, eps_pred, noise, alpha_bar, alpha_bar_new, copies);
  const Tensor out = empty_image(x_t, params.shape, dtype.value_or(x_t.scalar_type()), copies);
  params.out = out_of(out);
  const auto launch = any_double({&x_t, &eps_pred, &noise}) ? cuda::renoise_fwd<double> : cuda::renoise_fwd<float>;
  check_cuda(launch(params, device.stream()), "renoise");
  return out;
}

std::tuple<Tensor, Tensor, Tensor> renoise_bwd(
    const Tensor& grad, const Tensor& alpha_bar, const OptionalTensor& alpha_bar_new, int64_t copies,
    ScalarType compute, ScalarType x_dtype, ScalarType eps_dtype, ScalarType noise_dtype) {
  const OnDeviceOf device(grad, "grad");
  RenoiseBackwardParams params = renoise_backward_params(grad, alpha_bar, alpha_bar_new, copies);
  const Tensor d_x = empty_image(grad, params.shape, x_dtype), d_eps = empty_image(grad, params.shape, eps_dtype);
  const Tensor d_noise = empty_image(grad, params.shape, noise_dtype);
  params.d_x_t = out_of(d_x);
  params.d_eps_pred = out_of(d_eps);
  params.d_noise = out_of(d_noise);
  const auto launch = compute == ScalarType::Double ? cuda::renoise_bwd<double> : cuda::renoise_bwd<float>;
  check_cuda(launch(params, device.stream()), "renoise_bwd");
  return {d_x, d_eps, d_noise};
}

}  // namespace
}  // namespace palp_fast::bindings

STABLE_TORCH_LIBRARY_IMPL(palp_fast, CUDA, library) {
  using namespace palp_fast::bindings;
  library.impl("renoise", TORCH_BOX(&renoise));
  library.impl("renoise_bwd", TORCH_BOX(&renoise_bwd));
}
