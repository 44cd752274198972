// renoise on the CPU for torch's dispatcher. Schema, shape function and autograd are in palp_fast/ops.py.
#include "../renoise.h"

#include <tuple>

#include "../../cpu/kernels.h"
#include "kept_memory.h"

namespace palp_fast::bindings {
namespace {

Tensor renoise(
    const Tensor& x_t, const Tensor& eps_pred, const Tensor& noise, const Tensor& alpha_bar,
    const OptionalTensor& alpha_bar_new, int64_t copies, std::optional<ScalarType> dtype) {
  check_cpu(x_t, "x_t");
  RenoiseParams params = renoise_params(x_t, eps_pred, noise, alpha_bar, alpha_bar_new, copies);
  const Tensor out = result_image(params.shape, dtype.value_or(x_t.scalar_type()), copies);
  params.out = out_of(out);
  const cpu::Kernels& kernels = cpu::kernels();
  const bool wide = any_double({&x_t, &eps_pred, &noise});
  (wide ? kernels.f64.renoise_fwd : kernels.f32.renoise_fwd)(params, parallel_for);
  return out;
}

std::tuple<Tensor, Tensor, Tensor> renoise_bwd(
    const Tensor& grad, const Tensor& alpha_bar, const OptionalTensor& alpha_bar_new, int64_t copies,
    ScalarType compute, ScalarType x_dtype, ScalarType eps_dtype, ScalarType noise_dtype) {
  check_cpu(grad, "grad");
  RenoiseBackwardParams params = renoise_backward_params(grad, alpha_bar, alpha_bar_new, copies);
  const Tensor d_x = result_image(params.shape, x_dtype), d_eps = result_image(params.shape, eps_dtype);
  const Tensor d_noise = result_image(params.shape, noise_dtype);
  params.d_x_t = out_of(d_x);
  params.d_eps_pred = out_of(d_eps);
  params.d_noise = out_of(d_noise);
  const cpu::Kernels& kernels = cpu::kernels();
  (compute == ScalarType::Double ? kernels.f64.renoise_bwd : kernels.f32.renoise_bwd)(params, parallel_for);
  return {d_x, d_eps, d_noise};
}

}  // namespace
}  // namespace palp_fast::bindings

STABLE_TORCH_LIBRARY_IMPL(palp_fast, CPU, library) {
  using namespace palp_fast::bindings;
  library.impl("renoise", TORCH_BOX(&renoise));
  library.impl("renoise_bwd", TORCH_BOX(&renoise_bwd));
}
