#include "tile.h"

#include "palp_fast/elementary.h"

namespace palp_fast::cpu::PALP_LEVEL {
namespace {

constexpr int64_t kChunk = 256;       // numbers at a time, all of which stay in the first cache
constexpr int64_t kPerTask = 1 << 14;  // numbers of the result

template <typename Real>
PALP_INLINE Real normal_cdf(Real g) {
  return fma_of(erf_of(g * Real(0.70710678118654752440)), Real(0.5), Real(0.5));
}

template <typename Stored, typename Real>
void forward_row(const Stored* x, int64_t width, Stored* y) {
  Real h[kChunk], g[kChunk];
  for (int64_t first = 0; first < width; first += kChunk) {
    const int64_t count = least(kChunk, width - first);
    load_contiguous(x + first, count, h);
    load_contiguous(x + width + first, count, g);
    for (int64_t i = 0; i < count; ++i) h[i] = h[i] * (g[i] * normal_cdf(g[i]));
    for (int64_t i = 0; i < count; ++i) round_to(h[i], y[first + i]);
  }
}

// d/dg g cdf(g) = cdf(g) + g density(g).
template <typename Stored, typename Real>
void backward_row(const Stored* grad, const Stored* x, int64_t width, Stored* dx) {
  Real dy[kChunk], h[kChunk], g[kChunk];
  for (int64_t first = 0; first < width; first += kChunk) {
    const int64_t count = least(kChunk, width - first);
    load_contiguous(grad + first, count, dy);
    load_contiguous(x + first, count, h);
    load_contiguous(x + width + first, count, g);
    for (int64_t i = 0; i < count; ++i) {
      const Real cdf = normal_cdf(g[i]);
      const Real density = exp_of(Real(-0.5) * g[i] * g[i]) * Real(0.39894228040143267794);
      const Real dh = dy[i] * (g[i] * cdf), dg = dy[i] * h[i] * fma_of(g[i], density, cdf);
      h[i] = dh;
      g[i] = dg;
    }
    for (int64_t i = 0; i < count; ++i) round_to(h[i], dx[first + i]);
    for (int64_t i = 0; i < count; ++i) round_to(g[i], dx[width + first + i]);
  }
}

template <typename Stored, typename Real>
void run_rows(const GegluParams& params, ParallelFor parallel) {
  if (params.rows == 0 || params.width == 0) return;
  parallel(
      params.rows, (kPerTask + params.width - 1) / params.width,
      [](int64_t begin, int64_t end, void* raw) {
        const GegluParams& p = *static_cast<const GegluParams*>(raw);
        const Stored *x = static_cast<const Stored*>(p.x), *grad = static_cast<const Stored*>(p.grad);
        Stored* out = static_cast<Stored*>(p.out);
        for (int64_t row = begin; row < end; ++row) {
          if (grad) {
            const int64_t at = row * p.width;
            backward_row<Stored, Real>(grad + at, x + 2 * at, p.width, out + 2 * at);
          } else {
            forward_row<Stored, Real>(x + 2 * row * p.width, p.width, out + row * p.width);
          }
        }
      },
      const_cast<GegluParams*>(&params));
}

}  // namespace

void geglu(const GegluParams& params, ParallelFor parallel) {
  switch (params.dtype) {
    case DType::float16: return run_rows<Half, float>(params, parallel);
    case DType::bfloat16: return run_rows<BFloat16, float>(params, parallel);
    case DType::float64: return run_rows<double, double>(params, parallel);
    default: return run_rows<float, float>(params, parallel);
  }
}

}  // namespace palp_fast::cpu::PALP_LEVEL
