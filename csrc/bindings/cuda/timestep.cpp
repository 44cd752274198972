// The timestep sampler on CUDA for torch's dispatcher. Schemas and shape functions are in palp_fast/ops_sampler.py.
#include <tuple>

#include "../../cuda/kernels.h"
#include "../draws.h"
#include "stream.h"

namespace palp_fast::bindings {
namespace {

std::tuple<Tensor, Tensor, Tensor> timestep_sample(
    const Tensor& residual_scale, const Tensor& counts, const Tensor& squares, const Tensor& step,
    const Tensor& sample_offset, int64_t seed, int64_t batch, int64_t global_batch, int64_t mode, double floor) {
  const OnDeviceOf device(residual_scale, "residual_scale");
  TimestepSampleParams params = sample_params(
      residual_scale, counts, squares, step, sample_offset, seed, batch, global_batch, mode, floor);
  Tensor t = empty_like_of(residual_scale, {batch}, ScalarType::Long);
  Tensor weight = empty_like_of(residual_scale, {batch}, ScalarType::Float);
  Tensor scale = empty_like_of(residual_scale, {batch}, ScalarType::Float);
  params.t = static_cast<int64_t*>(t.mutable_data_ptr());
  params.weight = static_cast<float*>(weight.mutable_data_ptr());
  params.scale = static_cast<float*>(scale.mutable_data_ptr());
  check_cuda(cuda::timestep_sample(params, device.stream()), "timestep_sample");
  return {t, weight, scale};
}

void timestep_update(
    const Tensor& counts, const Tensor& squares, const Tensor& t, const Tensor& norms, int64_t timesteps,
    double memory) {
  const OnDeviceOf device(counts, "counts");
  const TimestepUpdateParams params = update_params(counts, squares, t, norms, timesteps, memory);
  check_cuda(cuda::timestep_update(params, device.stream()), "timestep_update");
}

Tensor philox_words(const Tensor& counters, const Tensor& key) {
  const OnDeviceOf device(counters, "counters");
  const int64_t count = philox_rows(counters, key);
  Tensor out = empty_like_of(counters, {count, 4}, ScalarType::Long);
  const cudaError_t error = cuda::philox_words(
      static_cast<const int64_t*>(counters.const_data_ptr()), static_cast<const int64_t*>(key.const_data_ptr()), count,
      static_cast<int64_t*>(out.mutable_data_ptr()), device.stream());
  check_cuda(error, "philox_words");
  return out;
}

}  // namespace
}  // namespace palp_fast::bindings

STABLE_TORCH_LIBRARY_IMPL(palp_fast, CUDA, library) {
  using namespace palp_fast::bindings;
  library.impl("timestep_sample", TORCH_BOX(&timestep_sample));
  library.impl("timestep_update", TORCH_BOX(&timestep_update));
  library.impl("philox_words", TORCH_BOX(&philox_words));
}
