#include <cstring>
#include <initializer_list>

#include "tile.h"
#include "vector.h"

namespace palp_fast::cpu::PALP_LEVEL {
namespace {

constexpr int64_t kLarge = 16 << 20;  // bytes of a result that no cache holds when it is read

// The other copies, from the first while that is in the first cache.
void copy_first(const RenoiseParams& params, Tile tile) {
  const Shape& shape = params.shape;
  const int64_t size = size_of(params.out.dtype), apart = shape.numel() * size;
  const int64_t bytes = tile.count * size;
  char* const first = static_cast<char*>(params.out.data) + (tile.sample * shape.image() + tile.first) * size;
  const bool aligned = (reinterpret_cast<uintptr_t>(first) | uintptr_t(apart) | uintptr_t(bytes)) % 64 == 0;
  const bool streamed = aligned && params.copies * apart >= kLarge;
  for (int64_t copy = 1; copy < params.copies; ++copy) {
    char* const to = first + copy * apart;
    if (streamed) {
      stream_bytes(first, bytes, to);
    } else {
      std::memcpy(to, first, size_t(bytes));
    }
  }
}

// Whether all images hold one type without gaps: then a tile goes from memory to memory in one pass.
bool is_direct(const RenoiseParams& params) {
  for (const ImageView* image : {&params.x_t, &params.eps_pred, &params.noise}) {
    if (image->dtype != params.out.dtype || !image->image_is_contiguous(params.shape)) return false;
  }
  return true;
}

template <typename Stored, typename Real>
void renoise_direct(const RenoiseParams& params, const RenoiseFactors<Real> factors, Tile tile) {
  const Stored *x = start_of<Stored>(params.x_t, tile), *eps = start_of<Stored>(params.eps_pred, tile);
  const Stored* noise = start_of<Stored>(params.noise, tile);
  Stored* PALP_RESTRICT out = static_cast<Stored*>(params.out.data) + tile.sample * params.shape.image() + tile.first;
  if (factors.same) {
    for (int64_t i = 0; i < tile.count; ++i) {
      round_to(factors.apply_same(Real(widen(x[i])), Real(widen(eps[i])), Real(widen(noise[i]))), out[i]);
    }
  } else {
    for (int64_t i = 0; i < tile.count; ++i) {
      round_to(factors.apply(Real(widen(x[i])), Real(widen(eps[i])), Real(widen(noise[i]))), out[i]);
    }
  }
}

// The next tile of an image without gaps; of another it is a guess.
void ask_for_next(const RenoiseParams& params, Tile tile) {
  for (const ImageView* image : {&params.x_t, &params.eps_pred, &params.noise}) {
    const int64_t size = size_of(image->dtype), first = tile.sample * image->batch_stride + tile.first;
    ask_for(image->data, (first + tile.count) * size, tile.count * size);
  }
}

template <typename Real>
void renoise_tile(const RenoiseParams& params, const RenoiseFactors<Real> factors, Tile tile) {
  const Shape& shape = params.shape;
  Real x_buffer[kTile], eps_buffer[kTile], noise_buffer[kTile], out_buffer[kTile];
  const Real* x = load(params.x_t, shape, tile, x_buffer);
  const Real* eps = load(params.eps_pred, shape, tile, eps_buffer);
  const Real* noise = load(params.noise, shape, tile, noise_buffer);
  Real* PALP_RESTRICT out = place(params.out, shape, tile, tile.sample, out_buffer);
  if (factors.same) {
    for (int64_t i = 0; i < tile.count; ++i) out[i] = factors.apply_same(x[i], eps[i], noise[i]);
  } else {
    for (int64_t i = 0; i < tile.count; ++i) out[i] = factors.apply(x[i], eps[i], noise[i]);
  }
  store(out, params.out, shape, tile, tile.sample);
}

}  // namespace

template <typename Real>
void renoise_fwd(const RenoiseParams& params, ParallelFor parallel) {
  const bool direct = is_direct(params);
  for_each_tile(params.shape, parallel, [&](Tile tile, int64_t) {
    const RenoiseFactors<Real> factors(params.alpha_bar, params.alpha_bar_new, tile.sample);
    ask_for_next(params, tile);
    if (direct && params.out.dtype == DType::bfloat16) {
      renoise_direct<BFloat16>(params, factors, tile);
    } else if (direct && params.out.dtype == DType::float16) {
      renoise_direct<Half>(params, factors, tile);
    } else {
      renoise_tile(params, factors, tile);
    }
    copy_first(params, tile);
  });
}

template <typename Real>
void renoise_bwd(const RenoiseBackwardParams& params, ParallelFor parallel) {
  const Shape& shape = params.shape;
  for_each_tile(shape, parallel, [&](Tile tile, int64_t) {
    Real buffer[kTile], total[kTile], d_x_buffer[kTile], d_eps_buffer[kTile], d_noise_buffer[kTile];
    for (int64_t i = 0; i < tile.count; ++i) total[i] = 0;
    for (int64_t copy = 0; copy < params.copies; ++copy) {
      const Tile source{copy * shape.batch + tile.sample, tile.first, tile.count};
      const Real* grad = load(params.grad, shape, source, buffer);
      for (int64_t i = 0; i < tile.count; ++i) total[i] += grad[i];
    }
    const RenoiseFactors<Real> factors(params.alpha_bar, params.alpha_bar_new, tile.sample);
    Real* PALP_RESTRICT d_x = place(params.d_x_t, shape, tile, tile.sample, d_x_buffer);
    Real* PALP_RESTRICT d_eps = place(params.d_eps_pred, shape, tile, tile.sample, d_eps_buffer);
    Real* PALP_RESTRICT d_noise = place(params.d_noise, shape, tile, tile.sample, d_noise_buffer);
    for (int64_t i = 0; i < tile.count; ++i) {
      d_x[i] = factors.ratio * total[i];
      d_eps[i] = -factors.s_t * d_x[i];
      d_noise[i] = factors.s_u * total[i];
    }
    store(d_x, params.d_x_t, shape, tile, tile.sample);
    store(d_eps, params.d_eps_pred, shape, tile, tile.sample);
    store(d_noise, params.d_noise, shape, tile, tile.sample);
  });
}

template void renoise_fwd<float>(const RenoiseParams&, ParallelFor);
template void renoise_fwd<double>(const RenoiseParams&, ParallelFor);
template void renoise_bwd<float>(const RenoiseBackwardParams&, ParallelFor);
template void renoise_bwd<double>(const RenoiseBackwardParams&, ParallelFor);

}  // namespace palp_fast::cpu::PALP_LEVEL
