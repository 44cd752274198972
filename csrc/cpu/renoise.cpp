#include "tile.h"

namespace palp_fast::cpu::PALP_LEVEL {

template <typename Real>
void renoise_fwd(const RenoiseParams<Real>& params, ParallelFor parallel) {
  const Shape& shape = params.shape;
  for_each_tile(shape, parallel, [&](Tile tile, int64_t) {
    Real x_buffer[kTile], eps_buffer[kTile], noise_buffer[kTile], out[kTile];
    const Real* x = load(params.x_t, shape, tile, x_buffer);
    const Real* eps = load(params.eps_pred, shape, tile, eps_buffer);
    const Real* noise = load(params.noise, shape, tile, noise_buffer);
    const Real s_t = params.factors.s_t[tile.sample];
    if (params.factors.ratio) {
      const Real ratio = params.factors.ratio[tile.sample], s_u = params.factors.s_u[tile.sample];
      for (int64_t i = 0; i < tile.count; ++i) out[i] = ratio * (x[i] - s_t * eps[i]) + s_u * noise[i];
    } else {
      for (int64_t i = 0; i < tile.count; ++i) out[i] = x[i] + s_t * (noise[i] - eps[i]);
    }
    for (int64_t copy = 0; copy < params.copies; ++copy) {
      store(out, params.out, shape, tile, copy * shape.batch + tile.sample);
    }
  });
}

template <typename Real>
void renoise_bwd(const RenoiseBackwardParams<Real>& params, ParallelFor parallel) {
  const Shape& shape = params.shape;
  for_each_tile(shape, parallel, [&](Tile tile, int64_t) {
    Real buffer[kTile], total[kTile], d_x[kTile], scaled[kTile];
    for (int64_t i = 0; i < tile.count; ++i) total[i] = 0;
    for (int64_t copy = 0; copy < params.copies; ++copy) {
      const Tile source{copy * shape.batch + tile.sample, tile.first, tile.count};
      const Real* grad = load(params.grad, shape, source, buffer);
      for (int64_t i = 0; i < tile.count; ++i) total[i] += grad[i];
    }
    const Real ratio = params.factors.ratio ? params.factors.ratio[tile.sample] : Real(1);
    const Real s_t = params.factors.s_t[tile.sample], s_u = params.factors.s_u[tile.sample];
    for (int64_t i = 0; i < tile.count; ++i) d_x[i] = ratio * total[i];
    store(d_x, params.d_x_t, shape, tile, tile.sample);
    for (int64_t i = 0; i < tile.count; ++i) scaled[i] = -s_t * d_x[i];
    store(scaled, params.d_eps_pred, shape, tile, tile.sample);
    for (int64_t i = 0; i < tile.count; ++i) scaled[i] = s_u * total[i];
    store(scaled, params.d_noise, shape, tile, tile.sample);
  });
}

template void renoise_fwd(const RenoiseParams<float>&, ParallelFor);
template void renoise_fwd(const RenoiseParams<double>&, ParallelFor);
template void renoise_bwd(const RenoiseBackwardParams<float>&, ParallelFor);
template void renoise_bwd(const RenoiseBackwardParams<double>&, ParallelFor);

}  // namespace palp_fast::cpu::PALP_LEVEL
