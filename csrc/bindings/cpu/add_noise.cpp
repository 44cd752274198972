// add_noise on the CPU for torch's dispatcher. Schema, shape function and autograd are in palp_fast/ops.py.
#include <tuple>

#include "../../cpu/kernels.h"
#include "../draws.h"

namespace palp_fast::bindings {
namespace {

void check_timesteps(const NoiseSchedule& schedule, int64_t batch) {
  for (int64_t i = 0; i < batch; ++i) {
    const int64_t t = schedule.t[i * schedule.t_stride];
    STD_TORCH_CHECK(
        t >= 0 && t < schedule.timesteps, "t[", i, "]=", t, ": allowed are 0 to ", schedule.timesteps - 1);
  }
}

std::tuple<Tensor, Tensor> add_noise(
    const Tensor& x0, const Tensor& t, const Tensor& alphas_cumprod, const Tensor& seed, const Tensor& step,
    const Tensor& sample_offset, int64_t stream) {
  AddNoiseParams params;
  params.shape = shape_of(x0, "x0");
  const Shape& s = params.shape;
  params.x0 = view_of(x0, x0, s, "x0");
  params.schedule = schedule_of(t, alphas_cumprod, x0, s.batch);
  check_timesteps(params.schedule, s.batch);
  params.key = noise_key_of(seed, step, sample_offset, stream, x0);
  const std::vector<int64_t> sizes{s.batch, s.channels, s.height, s.width};
  Tensor x_t = empty_like_of(x0, sizes, x0.scalar_type()), noise = empty_like_of(x0, sizes, x0.scalar_type());
  params.x_t = out_of(x_t);
  params.noise = out_of(noise);
  const cpu::Kernels& kernels = cpu::kernels();
  (any_double({&x0}) ? kernels.f64.add_noise_fwd : kernels.f32.add_noise_fwd)(params, parallel_for);
  return {x_t, noise};
}

Tensor add_noise_bwd(const Tensor& grad, const Tensor& t, const Tensor& alphas_cumprod) {
  AddNoiseBackwardParams params;
  params.shape = shape_of(grad, "grad");
  const Shape& s = params.shape;
  params.grad = view_of(grad, grad, s, "grad");
  params.schedule = schedule_of(t, alphas_cumprod, grad, s.batch);
  check_timesteps(params.schedule, s.batch);
  Tensor d_x0 = empty_like_of(grad, {s.batch, s.channels, s.height, s.width}, grad.scalar_type());
  params.d_x0 = out_of(d_x0);
  const cpu::Kernels& kernels = cpu::kernels();
  (any_double({&grad}) ? kernels.f64.add_noise_bwd : kernels.f32.add_noise_bwd)(params, parallel_for);
  return d_x0;
}

}  // namespace
}  // namespace palp_fast::bindings

STABLE_TORCH_LIBRARY_IMPL(palp_fast, CPU, library) {
  using namespace palp_fast::bindings;
  library.impl("add_noise", TORCH_BOX(&add_noise));
  library.impl("add_noise_bwd", TORCH_BOX(&add_noise_bwd));
}
