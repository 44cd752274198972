#include "tile.h"

#include "palp_fast/add_noise.h"

namespace palp_fast::cpu::PALP_LEVEL {
namespace {

constexpr int64_t kQuads = kTile / 4;

// The draws of a tile, four at a time: out has room for kTile of them.
void draw_tile(const NoiseStream& stream, Tile tile, float* out) {
  const uint32_t first = uint32_t(tile.first / 4);
  const int64_t quads = (tile.count + 3) / 4;
  uint32_t words[4][kQuads];
  for (int64_t i = 0; i < quads; ++i) {
    const PhiloxWords drawn = stream.words(first + uint32_t(i), tile.sample);
    words[0][i] = drawn.w0;
    words[1][i] = drawn.w1;
    words[2][i] = drawn.w2;
    words[3][i] = drawn.w3;
  }
  for (int64_t i = 0; i < quads; ++i) {
    const NormalPair left = normal_pair(words[0][i], words[1][i]), right = normal_pair(words[2][i], words[3][i]);
    out[4 * i] = left.first;
    out[4 * i + 1] = left.second;
    out[4 * i + 2] = right.first;
    out[4 * i + 3] = right.second;
  }
}

}  // namespace

template <typename Real>
void add_noise_fwd(const AddNoiseParams& params, ParallelFor parallel) {
  const Shape& shape = params.shape;
  const NoiseStream stream = params.key.read();
  const ImageOut& noise_out = params.noise;
  const ImageView stored{
      noise_out.data, noise_out.dtype, shape.image(), shape.height * shape.width, shape.width, 1};
  for_each_tile(shape, parallel, [&](Tile tile, int64_t) {
    float drawn[kTile];
    Real x_buffer[kTile], noise_buffer[kTile], out[kTile];
    draw_tile(stream, tile, drawn);
    store(drawn, noise_out, shape, tile, tile.sample);
    const Real* noise = load(stored, shape, tile, noise_buffer);
    const Real* x = load(params.x0, shape, tile, x_buffer);
    const Real alpha_bar = params.schedule.alpha_bar<Real>(tile.sample);
    const Real a = square_root(alpha_bar), s = square_root(1 - alpha_bar);
    for (int64_t i = 0; i < tile.count; ++i) out[i] = a * x[i] + s * noise[i];
    store(out, params.x_t, shape, tile, tile.sample);
  });
}

template <typename Real>
void add_noise_bwd(const AddNoiseBackwardParams& params, ParallelFor parallel) {
  const Shape& shape = params.shape;
  for_each_tile(shape, parallel, [&](Tile tile, int64_t) {
    Real buffer[kTile], out[kTile];
    const Real* grad = load(params.grad, shape, tile, buffer);
    const Real a = square_root(params.schedule.alpha_bar<Real>(tile.sample));
    for (int64_t i = 0; i < tile.count; ++i) out[i] = a * grad[i];
    store(out, params.d_x0, shape, tile, tile.sample);
  });
}

template void add_noise_fwd<float>(const AddNoiseParams&, ParallelFor);
template void add_noise_fwd<double>(const AddNoiseParams&, ParallelFor);
template void add_noise_bwd<float>(const AddNoiseBackwardParams&, ParallelFor);
template void add_noise_bwd<double>(const AddNoiseBackwardParams&, ParallelFor);

}  // namespace palp_fast::cpu::PALP_LEVEL
