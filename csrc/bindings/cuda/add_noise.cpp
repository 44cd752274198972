// add_noise on CUDA for torch's dispatcher. Schema, shape function and autograd are in palp_fast/ops.py.
#include <tuple>

#include "../../cuda/kernels.h"
#include "../draws.h"
#include "stream.h"

namespace palp_fast::bindings {
namespace {

std::tuple<Tensor, Tensor> add_noise(
    const Tensor& x0, const Tensor& t, const Tensor& alphas_cumprod, const Tensor& seed, const Tensor& step,
    const Tensor& sample_offset, int64_t stream) {
  const OnDeviceOf device(x0, "x0");
  AddNoiseParams params;
  params.shape = shape_of(x0, "x0");
  const Shape& s = params.shape;
  params.x0 = view_of(x0, x0, s, "x0");
  params.schedule = schedule_of(t, alphas_cumprod, x0, s.batch);
  params.key = noise_key_of(seed, step, sample_offset, stream, x0);
  const std::vector<int64_t> sizes{s.batch, s.channels, s.height, s.width};
  Tensor x_t = empty_like_of(x0, sizes, x0.scalar_type()), noise = empty_like_of(x0, sizes, x0.scalar_type());
  params.x_t = out_of(x_t);
  params.noise = out_of(noise);
  const auto forward = any_double({&x0}) ? cuda::add_noise_fwd<double> : cuda::add_noise_fwd<float>;
  check_cuda(forward(params, device.stream()), "add_noise");
  return {x_t, noise};
}

Tensor add_noise_bwd(const Tensor& grad, const Tensor& t, const Tensor& alphas_cumprod) {
  const OnDeviceOf device(grad, "grad");
  AddNoiseBackwardParams params;
  params.shape = shape_of(grad, "grad");
  const Shape& s = params.shape;
  params.grad = view_of(grad, grad, s, "grad");
  params.schedule = schedule_of(t, alphas_cumprod, grad, s.batch);
  Tensor d_x0 = empty_like_of(grad, {s.batch, s.channels, s.height, s.width}, grad.scalar_type());
  params.d_x0 = out_of(d_x0);
  const auto backward = any_double({&grad}) ? cuda::add_noise_bwd<double> : cuda::add_noise_bwd<float>;
  check_cuda(backward(params, device.stream()), "add_noise_bwd");
  return d_x0;
}

}  // namespace
}  // namespace palp_fast::bindings

STABLE_TORCH_LIBRARY_IMPL(palp_fast, CUDA, library) {
  using namespace palp_fast::bindings;
  library.impl("add_noise", TORCH_BOX(&add_noise));
  library.impl("add_noise_bwd", TORCH_BOX(&add_noise_bwd));
}
