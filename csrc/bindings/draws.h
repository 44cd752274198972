// The arguments of random draws, as the kernels of either device see them.
#pragma once

#include <cmath>

#include "palp_fast/add_noise.h"
#include "palp_fast/timestep.h"
#include "tensors.h"

namespace palp_fast::bindings {

// A number on the CPU is read here, one on the device of `first` by the kernel.
inline Counter counter_of(const Tensor& value, const Tensor& first, const char* name) {
  STD_TORCH_CHECK(
      value.dim() == 0 && value.scalar_type() == ScalarType::Long, name, ": allowed is a 0-d int64 tensor");
  const auto* data = static_cast<const int64_t*>(value.const_data_ptr());
  Counter counter;
  if (value.is_cpu()) {
    counter.value = *data;
  } else {
    check_device(value, first, name);
    counter.device = data;
  }
  return counter;
}

// [count] int64 on the device of `first`.
inline const int64_t* indices_of(const Tensor& tensor, const Tensor& first, int64_t count, const char* name) {
  check_device(tensor, first, name);
  STD_TORCH_CHECK(
      tensor.dim() == 1 && tensor.sizes()[0] == count && tensor.scalar_type() == ScalarType::Long, name,
      ": allowed is an int64 vector of ", count);
  return static_cast<const int64_t*>(tensor.const_data_ptr());
}

inline NoiseSchedule schedule_of(const Tensor& t, const Tensor& alphas_cumprod, const Tensor& first, int64_t batch) {
  NoiseSchedule schedule;
  schedule.t = indices_of(t, first, batch, "t");
  schedule.t_stride = t.strides()[0];
  STD_TORCH_CHECK(
      alphas_cumprod.dim() == 1 && alphas_cumprod.sizes()[0] > 0, "alphas_cumprod: allowed is [T] with T >= 1");
  schedule.timesteps = alphas_cumprod.sizes()[0];
  schedule.alphas_cumprod = vector_of(alphas_cumprod, first, schedule.timesteps, "alphas_cumprod");
  return schedule;
}

inline NoiseKey noise_key_of(
    const Tensor& seed, const Tensor& step, const Tensor& sample_offset, int64_t stream, const Tensor& first) {
  STD_TORCH_CHECK(stream >= 0 && stream < int64_t(1) << 32, "stream=", stream, ": allowed is 0 to 2^32 - 1");
  return NoiseKey{
      counter_of(seed, first, "seed"), counter_of(step, first, "step"),
      counter_of(sample_offset, first, "sample_offset"), uint32_t(stream)};
}

// Contiguous [count] of one type on the device of `first`.
inline void check_row(
    const Tensor& tensor, const Tensor& first, int64_t count, ScalarType type, const char* name) {
  check_device(tensor, first, name);
  STD_TORCH_CHECK(
      tensor.dim() == 1 && tensor.sizes()[0] == count && tensor.scalar_type() == type && tensor.is_contiguous(), name,
      ": allowed is a contiguous ", type == ScalarType::Double ? "float64" : "float32", " vector of ", count);
}

inline Bins bins_of(const Tensor& counts, const Tensor& squares, const Tensor& first, int64_t timesteps) {
  STD_TORCH_CHECK(counts.dim() == 1, "counts has ", counts.dim(), " dimensions: allowed is [bins]");
  const Bins bins{counts.sizes()[0], timesteps};
  STD_TORCH_CHECK(
      bins.count >= 1 && bins.count <= kMaxBins && bins.count <= timesteps, "counts has ", bins.count,
      " bins: allowed are 1 to ", kMaxBins, ", no more than timesteps (", timesteps, ")");
  check_row(counts, first, bins.count, ScalarType::Double, "counts");
  check_row(squares, first, bins.count, ScalarType::Double, "squares");
  return bins;
}

// All but the outputs.
inline TimestepSampleParams sample_params(
    const Tensor& residual_scale, const Tensor& counts, const Tensor& squares, const Tensor& step,
    const Tensor& sample_offset, int64_t seed, int64_t batch, int64_t global_batch, int64_t mode, double floor) {
  TimestepSampleParams params;
  STD_TORCH_CHECK(mode >= 0 && mode <= int64_t(TimestepMode::adaptive), "mode=", mode, ": allowed are 0, 1, 2");
  params.mode = TimestepMode(mode);
  STD_TORCH_CHECK(residual_scale.dim() == 1, "residual_scale: allowed is [T]");
  const int64_t timesteps = residual_scale.sizes()[0];
  check_row(residual_scale, residual_scale, timesteps, ScalarType::Float, "residual_scale");
  params.bins = bins_of(counts, squares, residual_scale, timesteps);
  const int64_t most = (int64_t(1) << 31) / timesteps - kStrata;
  STD_TORCH_CHECK(batch >= 0, "batch=", batch, ": allowed is an int >= 0");
  STD_TORCH_CHECK(
      global_batch >= 1 && global_batch <= most, "global_batch=", global_batch, ": allowed is 1 to ", most);
  params.floor = floor;
  params.residual_scale = static_cast<const float*>(residual_scale.const_data_ptr());
  params.counts = static_cast<const double*>(counts.const_data_ptr());
  params.squares = static_cast<const double*>(squares.const_data_ptr());
  params.seed = seed;
  params.step = counter_of(step, residual_scale, "step");
  params.sample_offset = counter_of(sample_offset, residual_scale, "sample_offset");
  params.batch = batch;
  params.global_batch = global_batch;
  return params;
}

inline TimestepUpdateParams update_params(
    const Tensor& counts, const Tensor& squares, const Tensor& t, const Tensor& norms, int64_t timesteps,
    double memory) {
  TimestepUpdateParams params;
  params.bins = bins_of(counts, squares, counts, timesteps);
  STD_TORCH_CHECK(t.dim() == 1, "t has ", t.dim(), " dimensions: allowed is [N]");
  params.count = t.sizes()[0];
  params.t = indices_of(t, counts, params.count, "t");
  params.t_stride = t.strides()[0];
  params.norms = vector_of(norms, counts, params.count, "norms");
  params.keep = std::pow(memory, double(params.count));
  params.counts = static_cast<double*>(counts.mutable_data_ptr());
  params.squares = static_cast<double*>(squares.mutable_data_ptr());
  return params;
}

// The number of rows of counters [N, 4], after checks of both arguments of philox_words.
inline int64_t philox_rows(const Tensor& counters, const Tensor& key) {
  STD_TORCH_CHECK(
      counters.dim() == 2 && counters.sizes()[1] == 4 && counters.scalar_type() == ScalarType::Long &&
          counters.is_contiguous(),
      "counters: allowed is a contiguous int64 [N, 4]");
  STD_TORCH_CHECK(key.is_contiguous(), "key: allowed is a contiguous int64 [2]");
  indices_of(key, counters, 2, "key");
  return counters.sizes()[0];
}

}  // namespace palp_fast::bindings
