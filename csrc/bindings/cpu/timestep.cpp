// The timestep sampler on the CPU for torch's dispatcher. Schemas and shape functions are in palp_fast/ops_sampler.py.
#include <tuple>

#include "../../cpu/kernels.h"
#include "../draws.h"

namespace palp_fast::bindings {
namespace {

std::tuple<Tensor, Tensor, Tensor> timestep_sample(
    const Tensor& residual_scale, const Tensor& counts, const Tensor& squares, const Tensor& step,
    const Tensor& sample_offset, int64_t seed, int64_t batch, int64_t global_batch, int64_t mode, double floor) {
  TimestepSampleParams params = sample_params(
      residual_scale, counts, squares, step, sample_offset, seed, batch, global_batch, mode, floor);
  Tensor t = empty_like_of(residual_scale, {batch}, ScalarType::Long);
  Tensor weight = empty_like_of(residual_scale, {batch}, ScalarType::Float);
  Tensor scale = empty_like_of(residual_scale, {batch}, ScalarType::Float);
  params.t = static_cast<int64_t*>(t.mutable_data_ptr());
  params.weight = static_cast<float*>(weight.mutable_data_ptr());
  params.scale = static_cast<float*>(scale.mutable_data_ptr());
  std::vector<uint64_t> words(params.mode == TimestepMode::uniform ? 0 : 2 * global_batch);
  std::vector<double> sums(2 * params.bins.count);
  cpu::kernels().timestep_sample(
      params, {words.data(), words.data() + words.size() / 2, sums.data(), sums.data() + params.bins.count});
  return {t, weight, scale};
}

void timestep_update(
    const Tensor& counts, const Tensor& squares, const Tensor& t, const Tensor& norms, int64_t timesteps,
    double memory) {
  const TimestepUpdateParams params = update_params(counts, squares, t, norms, timesteps, memory);
  std::vector<double> added(2 * params.bins.count);
  cpu::kernels().timestep_update(params, added.data());
}

Tensor philox_words(const Tensor& counters, const Tensor& key) {
  const int64_t count = philox_rows(counters, key);
  Tensor out = empty_like_of(counters, {count, 4}, ScalarType::Long);
  cpu::kernels().philox_words(
      static_cast<const int64_t*>(counters.const_data_ptr()), static_cast<const int64_t*>(key.const_data_ptr()), count,
      static_cast<int64_t*>(out.mutable_data_ptr()));
  return out;
}

}  // namespace
}  // namespace palp_fast::bindings

STABLE_TORCH_LIBRARY_IMPL(palp_fast, CPU, library) {
  using namespace palp_fast::bindings;
  library.impl("timestep_sample", TORCH_BOX(&timestep_sample));
  library.impl("timestep_update", TORCH_BOX(&timestep_update));
  library.impl("philox_words", TORCH_BOX(&philox_words));
}
