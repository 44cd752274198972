// add_noise: x_t = a_t x0 + s_t noise, a = sqrt(alpha_bar), s = sqrt(1 - alpha_bar) (palp_fast/functional.py).
#pragma once

#include "palp_fast/element.h"
#include "palp_fast/normal.h"
#include "palp_fast/philox.h"

namespace palp_fast {

// alphas_cumprod [timesteps] and one index t per sample, both where the kernel runs.
struct NoiseSchedule {
  const int64_t* t = nullptr;
  int64_t t_stride = 0;  // in elements
  VectorView alphas_cumprod;
  int64_t timesteps = 0;

  // Not a number where t is outside of the schedule: a GPU kernel can neither raise nor read elsewhere.
  template <typename Real>
  PALP_INLINE Real alpha_bar(int64_t sample) const {
    const int64_t index = t[sample * t_stride];
    if (index < 0 || index >= timesteps) return Real(bits_float(0x7fc00000u));
    return read_element<Real>(alphas_cumprod.data, alphas_cumprod.dtype, index * alphas_cumprod.stride);
  }
};

// The noise of one step: counter (element / 4, sample, step, stream) under the key `seed`.
struct NoiseStream {
  PhiloxKey key;
  uint32_t first_sample, step, stream;

  PALP_INLINE PhiloxWords words(uint32_t quad, int64_t sample) const {
    return philox({quad, first_sample + uint32_t(sample), step, stream}, key);
  }
};

struct NoiseKey {
  Counter seed, step, sample_offset;
  uint32_t stream = 0;

  PALP_INLINE NoiseStream read() const {
    return {
        philox_key(seed.get()), uint32_t(uint64_t(sample_offset.get())), uint32_t(uint64_t(step.get())), stream};
  }
};

struct AddNoiseParams {
  Shape shape;
  ImageView x0;
  NoiseSchedule schedule;
  NoiseKey key;
  ImageOut x_t, noise;  // x_t is made from the noise as stored
};

struct AddNoiseBackwardParams {
  Shape shape;
  ImageView grad;
  NoiseSchedule schedule;
  ImageOut d_x0;  // a_t grad
};

}  // namespace palp_fast
