// A task has all pixels of a few whole groups of one sample in a buffer of its own: a line of it is a pixel's channels
// where these are neighbours in the result (kLast), else one channel's pixels.
#include <cstdlib>

#include "tile.h"

#include "palp_fast/element.h"
#include "palp_fast/elementary.h"

namespace palp_fast::cpu::PALP_LEVEL {
namespace {

constexpr int64_t kChannels = 32;  // of a task, at least, and whole vectors of kVector if a few groups more do it
constexpr int64_t kVector = 8;
constexpr int64_t kSlice = 128;  // channels summed at a time
constexpr int64_t kPerTask = 1 << 14;  // numbers
constexpr int64_t kPartial = 64;       // terms of a sum before it is added to one in fp64

struct Block {
  int64_t sample, first, channels, group, groups;
};

// How groups are cut into blocks, and what a block needs.
struct Plan {
  int64_t per_group, groups_per_block, blocks, pixels;

  explicit Plan(const GroupNorm& norm)
      : per_group(norm.shape.channels / norm.groups),
        groups_per_block(groups_of_block(norm.groups, per_group)),
        blocks((norm.groups + groups_per_block - 1) / groups_per_block),
        pixels(norm.shape.height * norm.shape.width) {}

  static int64_t groups_of_block(int64_t groups, int64_t per_group) {
    int64_t count = per_group < kChannels ? (kChannels + per_group - 1) / per_group : 1;
    while (per_group < kChannels && count * per_group % kVector) ++count;
    return least(groups, count);
  }

  int64_t channels() const { return groups_per_block * per_group; }
  Block block(int64_t index, const GroupNorm& norm) const {
    const int64_t group = index % blocks * groups_per_block, count = least(groups_per_block, norm.groups - group);
    return {index / blocks, group * per_group, count * per_group, group, count};
  }
};

// Numbers at a distance of `stride`.
template <typename Stored, typename Real>
PALP_INLINE void load_line(const Stored* from, int64_t stride, int64_t count, Real* PALP_RESTRICT to) {
  if (stride == 1) {
    load_contiguous(from, count, to);
  } else {
    for (int64_t i = 0; i < count; ++i) to[i] = Real(widen(from[i * stride]));
  }
}

template <typename Stored, typename Real, bool kLast>
void load_block(const ImageView& view, const Shape& shape, const Block& block, Real* PALP_RESTRICT to) {
  const Stored* from = static_cast<const Stored*>(view.data) + block.sample * view.batch_stride +
                       block.first * view.channel_stride;
  for (int64_t channel = 0; channel < (kLast ? 1 : block.channels); ++channel) {
    for (int64_t row = 0; row < shape.height; ++row) {
      const Stored* line = from + channel * view.channel_stride + row * view.row_stride;
      if constexpr (kLast) {
        for (int64_t column = 0; column < shape.width; ++column, to += block.channels) {
          load_line(line + column * view.column_stride, view.channel_stride, block.channels, to);
        }
      } else {
        load_line(line, view.column_stride, shape.width, to);
        to += shape.width;
      }
    }
  }
}

template <typename Stored, typename Real, bool kLast>
void store_block(const Real* PALP_RESTRICT from, const ImageTarget& target, const Shape& shape, const Block& block) {
  Stored* to = static_cast<Stored*>(target.data) + block.sample * target.batch_stride +
               block.first * target.channel_stride;
  const int64_t pixels = shape.height * shape.width;
  if constexpr (kLast) {
    for (int64_t pixel = 0; pixel < pixels; ++pixel, from += block.channels, to += target.column_stride) {
      for (int64_t c = 0; c < block.channels; ++c) round_to(from[c], to[c]);
    }
  } else {
    for (int64_t i = 0; i < block.channels * pixels; ++i) round_to(from[i], to[i]);
  }
}

// Tensors computed in fp64 are stored in it, and others never.
template <typename Real, bool kLast>
void load(const ImageView& view, const Shape& shape, const Block& block, Real* to) {
  if constexpr (same_type<Real, double>) {
    load_block<double, Real, kLast>(view, shape, block, to);
  } else {
    switch (view.dtype) {
      case DType::float16: return load_block<Half, Real, kLast>(view, shape, block, to);
      case DType::bfloat16: return load_block<BFloat16, Real, kLast>(view, shape, block, to);
      default: return load_block<float, Real, kLast>(view, shape, block, to);
    }
  }
}

template <typename Real, bool kLast>
void store(const Real* from, const ImageTarget& target, const Shape& shape, const Block& block) {
  if constexpr (same_type<Real, double>) {
    store_block<double, Real, kLast>(from, target, shape, block);
  } else {
    switch (target.dtype) {
      case DType::float16: return store_block<Half, Real, kLast>(from, target, shape, block);
      case DType::bfloat16: return store_block<BFloat16, Real, kLast>(from, target, shape, block);
      default: return store_block<float, Real, kLast>(from, target, shape, block);
    }
  }
}

// sums[channel] of term(index in the buffer, channel of the block) over all pixels.
template <typename Real, bool kLast, typename Term>
PALP_INLINE void sum_channels(int64_t channels, int64_t pixels, double* sums, const Term& term) {
  if constexpr (kLast) {
    Real partial[kSlice];
    for (int64_t low = 0; low < channels; low += kSlice) {
      const int64_t some = least(kSlice, channels - low);
      for (int64_t c = 0; c < some; ++c) sums[low + c] = 0;
      for (int64_t first = 0; first < pixels; first += kPartial) {
        const int64_t last = least(pixels, first + kPartial);
        for (int64_t c = 0; c < some; ++c) partial[c] = 0;
        for (int64_t pixel = first; pixel < last; ++pixel) {
          for (int64_t c = 0; c < some; ++c) partial[c] += term(pixel * channels + low + c, low + c);
        }
        for (int64_t c = 0; c < some; ++c) sums[low + c] += double(partial[c]);
      }
    }
  } else {
    for (int64_t c = 0; c < channels; ++c) {
      double sum = 0;
      for (int64_t first = 0; first < pixels; first += kPartial) {
        // Sixteen sums, so that they vectorise, in an order that every instruction set keeps.
        Real partial[16] = {};
        const int64_t count = least(kPartial, pixels - first), whole = count / 16 * 16, start = c * pixels + first;
        for (int64_t i = 0; i < whole; i += 16) {
          for (int64_t lane = 0; lane < 16; ++lane) partial[lane] += term(start + i + lane, c);
        }
        for (int64_t i = whole; i < count; ++i) partial[i - whole] += term(start + i, c);
        for (int64_t lane = 0; lane < 16; ++lane) sum += double(partial[lane]);
      }
      sums[c] = sum;
    }
  }
}

// body(index in the buffer, channel of the block) for every number.
template <bool kLast, typename Body>
PALP_INLINE void for_each(int64_t channels, int64_t pixels, const Body& body) {
  for (int64_t line = 0; line < (kLast ? pixels : channels); ++line) {
    const int64_t length = kLast ? channels : pixels;
    for (int64_t i = 0; i < length; ++i) body(line * length + i, kLast ? i : line);
  }
}

// What a task keeps: one or two buffers of its numbers, and vectors of its channels.
template <typename Real>
struct Scratch {
  Real *values, *more, *mean, *scale, *shift, *weight;
  double *sums, *products;

  Scratch(const Plan& plan, int64_t buffers) {
    const int64_t channels = plan.channels(), numbers = channels * plan.pixels;
    const size_t reals = size_t(buffers * numbers + 4 * channels) * sizeof(Real);
    sums = static_cast<double*>(std::malloc(size_t(2 * channels) * sizeof(double) + reals));
    products = sums + channels;
    values = reinterpret_cast<Real*>(products + channels);
    more = values + (buffers - 1) * numbers;
    mean = values + buffers * numbers;
    scale = mean + channels;
    shift = scale + channels;
    weight = shift + channels;
  }
  ~Scratch() { std::free(sums); }
  Scratch(const Scratch&) = delete;
};

double average(const double* sums, int64_t count, int64_t pixels) {
  double total = 0;
  for (int64_t c = 0; c < count; ++c) total += sums[c];
  return total / double(count * pixels);
}

template <typename Real>
PALP_INLINE Real sigmoid(Real z) {
  return Real(1) / (Real(1) + exp_of(-z));
}

// The value of each group for each of its channels.
template <typename Real>
void spread(const Real* groups, const Block& block, int64_t per_group, Real* to) {
  for (int64_t g = 0; g < block.groups; ++g, to += per_group) {
    for (int64_t c = 0; c < per_group; ++c) to[c] = groups[block.group + g];
  }
}

// scale and shift of z = scale x + shift, from mean (filled) and the groups' rstd.
template <typename Real>
void fill_affine(const GroupNorm& norm, const Block& block, int64_t per_group, const Real* rstd, Scratch<Real>& s) {
  spread(rstd, block, per_group, s.scale);
  for (int64_t c = 0; c < block.channels; ++c) {
    s.weight[c] = read_vector(norm.weight, block.first + c, Real(1));
    s.scale[c] *= s.weight[c];
    s.shift[c] = read_vector(norm.bias, block.first + c, Real(0)) - s.mean[c] * s.scale[c];
  }
}

template <typename Real, bool kLast>
void forward_block(const GroupNormParams<Real>& params, const Plan& plan, const Block& block, Scratch<Real>& s) {
  const GroupNorm& norm = params.norm;
  const int64_t channels = block.channels, pixels = plan.pixels;
  Real *values = s.values, *mean = s.mean, *scale = s.scale, *shift = s.shift;
  Real *means = params.mean + block.sample * norm.groups, *rstds = params.rstd + block.sample * norm.groups;
  load<Real, kLast>(params.x, norm.shape, block, values);
  sum_channels<Real, kLast>(channels, pixels, s.sums, [&](int64_t i, int64_t) { return values[i]; });
  for (int64_t g = 0; g < block.groups; ++g) {
    means[block.group + g] = Real(average(s.sums + g * plan.per_group, plan.per_group, pixels));
  }
  spread(means, block, plan.per_group, mean);
  sum_channels<Real, kLast>(channels, pixels, s.sums, [&](int64_t i, int64_t c) {
    const Real centred = values[i] - mean[c];
    return centred * centred;
  });
  for (int64_t g = 0; g < block.groups; ++g) {
    const double variance = average(s.sums + g * plan.per_group, plan.per_group, pixels);
    rstds[block.group + g] = Real(1 / square_root(variance + params.eps));
  }
  fill_affine(norm, block, plan.per_group, rstds, s);
  if (norm.silu) {
    for_each<kLast>(channels, pixels, [&](int64_t i, int64_t c) {
      const Real z = fma_of(scale[c], values[i], shift[c]);
      values[i] = z * sigmoid(z);
    });
  } else {
    for_each<kLast>(channels, pixels, [&](int64_t i, int64_t c) {
      values[i] = fma_of(scale[c], values[i], shift[c]);
    });
  }
  store<Real, kLast>(values, params.y, norm.shape, block);
}

// With dxhat = weight dz:  dx = rstd (dxhat - average(dxhat) - xhat average(dxhat xhat)) over each group.
template <typename Real, bool kLast>
void backward_block(
    const GroupNormBackwardParams<Real>& params, const Plan& plan, const Block& block, Scratch<Real>& s) {
  const GroupNorm& norm = params.norm;
  const int64_t channels = block.channels, pixels = plan.pixels;
  Real *x = s.values, *dz = s.more, *mean = s.mean, *scale = s.scale, *shift = s.shift;
  const Real *means = params.mean + block.sample * norm.groups, *rstds = params.rstd + block.sample * norm.groups;
  spread(means, block, plan.per_group, mean);
  fill_affine(norm, block, plan.per_group, rstds, s);
  load<Real, kLast>(params.x, norm.shape, block, x);
  load<Real, kLast>(params.grad, norm.shape, block, dz);
  if (norm.silu) {
    for_each<kLast>(channels, pixels, [&](int64_t i, int64_t c) {
      const Real z = fma_of(scale[c], x[i], shift[c]), sigma = sigmoid(z);
      dz[i] *= fma_of(z * sigma, Real(1) - sigma, sigma);
    });
  }
  sum_channels<Real, kLast>(channels, pixels, s.sums, [&](int64_t i, int64_t) { return dz[i]; });
  sum_channels<Real, kLast>(
      channels, pixels, s.products, [&](int64_t i, int64_t c) { return dz[i] * (x[i] - mean[c]); });
  for (int64_t c = 0; c < channels; ++c) {
    s.sums[c] *= double(s.weight[c]);
    s.products[c] *= double(s.weight[c]);
  }
  // dx = scale dz - slope (x - mean) - level, one slope and level for a group.
  Real *slope = s.weight, *level = s.shift;
  for (int64_t g = 0; g < block.groups; ++g) {
    const int64_t first = g * plan.per_group;
    const double rstd = double(rstds[block.group + g]);
    const Real group_level = Real(rstd * average(s.sums + first, plan.per_group, pixels));
    const Real group_slope = Real(rstd * rstd * rstd * average(s.products + first, plan.per_group, pixels));
    for (int64_t c = first; c < first + plan.per_group; ++c) {
      level[c] = group_level;
      slope[c] = group_slope;
    }
  }
  for_each<kLast>(channels, pixels, [&](int64_t i, int64_t c) {
    dz[i] = scale[c] * dz[i] - slope[c] * (x[i] - mean[c]) - level[c];
  });
  store<Real, kLast>(dz, params.dx, norm.shape, block);
}

template <typename Real, typename Params, bool kLast>
void run_block(const Params& params, const Plan& plan, const Block& block, Scratch<Real>& scratch) {
  if constexpr (same_type<Params, GroupNormParams<Real>>) {
    forward_block<Real, kLast>(params, plan, block, scratch);
  } else {
    backward_block<Real, kLast>(params, plan, block, scratch);
  }
}

template <typename Real, typename Params>
void run_blocks(const Params& params, const ImageTarget& target, ParallelFor parallel) {
  struct Context {
    const Params& params;
    const Plan plan;
    const bool last;
  } context{params, Plan(params.norm), target.channel_stride == 1 && params.norm.shape.channels > 1};
  const int64_t numbers = context.plan.channels() * context.plan.pixels;
  if (params.norm.shape.batch == 0) return;
  parallel(
      params.norm.shape.batch * context.plan.blocks, numbers ? (kPerTask + numbers - 1) / numbers : kPerTask,
      [](int64_t begin, int64_t end, void* raw) {
        const Context& c = *static_cast<const Context*>(raw);
        Scratch<Real> scratch(c.plan, same_type<Params, GroupNormParams<Real>> ? 1 : 2);
        for (int64_t index = begin; index < end; ++index) {
          const Block block = c.plan.block(index, c.params.norm);
          if (c.last) {
            run_block<Real, Params, true>(c.params, c.plan, block, scratch);
          } else {
            run_block<Real, Params, false>(c.params, c.plan, block, scratch);
          }
        }
      },
      &context);
}

}  // namespace

template <typename Real>
void group_norm_fwd(const GroupNormParams<Real>& params, ParallelFor parallel) {
  run_blocks<Real>(params, params.y, parallel);
}

template <typename Real>
void group_norm_bwd(const GroupNormBackwardParams<Real>& params, ParallelFor parallel) {
  run_blocks<Real>(params, params.dx, parallel);
}

template void group_norm_fwd<float>(const GroupNormParams<float>&, ParallelFor);
template void group_norm_fwd<double>(const GroupNormParams<double>&, ParallelFor);
template void group_norm_bwd<float>(const GroupNormBackwardParams<float>&, ParallelFor);
template void group_norm_bwd<double>(const GroupNormBackwardParams<double>&, ParallelFor);

}  // namespace palp_fast::cpu::PALP_LEVEL
