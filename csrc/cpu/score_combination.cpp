#include "tile.h"

namespace palp_fast::cpu::PALP_LEVEL {
namespace {

constexpr int64_t kLanes = 8;   // independent sums, so that the compiler may vectorise without reordering
constexpr int64_t kRun = 256;   // elements summed in Real before the lanes go into doubles

// What one element adds to the sums, and its gradient.
template <typename Real>
struct Element {
  Real squares, gradient;

  Element(Real pred, Real target, Real mask, Real residual, Real weight) {
    const Real error = pred - target;
    squares = mask * (error * error);
    gradient = mask * (2 * error) - weight * residual;
  }
};

template <typename Real>
struct Lanes {
  Real squares[kLanes] = {}, residual[kLanes] = {}, gradient[kLanes] = {}, product[kLanes] = {};

  void flush_into(ScoreSums& sums) const {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      sums.squares += squares[lane];
      sums.residual += residual[lane];
      sums.gradient += gradient[lane];
      sums.product += product[lane];
    }
  }
};

template <typename Real>
struct TileValues {
  const Real *pred, *target, *mask, *residual;
  Real weight, sample_weight;
};

// One element in one lane.
template <typename Real>
inline void add_element(const TileValues<Real>& in, int64_t i, int64_t lane, Lanes<Real>& lanes, Real* gradient) {
  const Real pred = in.pred[i], residual = in.residual[i];
  const Element<Real> element(pred, in.target[i], in.mask[i], residual, in.weight);
  lanes.squares[lane] += element.squares;
  lanes.residual[lane] += residual * residual;
  lanes.gradient[lane] += element.gradient * element.gradient;
  lanes.product[lane] += residual * pred;
  gradient[i] = in.sample_weight * element.gradient;
}

template <typename Real>
ScoreSums finish_tile(const TileValues<Real>& in, int64_t count, Real* gradient) {
  ScoreSums sums;
  for (int64_t start = 0; start < count; start += kRun) {
    const int64_t stop = least(start + kRun, count);
    Lanes<Real> lanes;
    int64_t i = start;
    for (; i + kLanes <= stop; i += kLanes) {
      for (int64_t lane = 0; lane < kLanes; ++lane) add_element(in, i + lane, lane, lanes, gradient);
    }
    for (int64_t lane = 0; i < stop; ++i, ++lane) add_element(in, i, lane, lanes, gradient);
    lanes.flush_into(sums);
  }
  return sums;
}

template <typename Real>
ScoreSums score_tile(const ScoreParams<Real>& params, Tile tile, Real* gradient) {
  Real residual[kTile], pred[kTile], target[kTile], other[kTile];
  for (int64_t i = 0; i < tile.count; ++i) residual[i] = 0;
  for (int64_t term = 0; term < params.terms; ++term) {
    const Real* values = load(params.predictions[term], params.shape, tile, other);
    const Real factor = params.coefficients[term * params.shape.batch + tile.sample];
    for (int64_t i = 0; i < tile.count; ++i) residual[i] += factor * values[i];
  }
  TileValues<Real> in;
  in.pred = load(params.pred, params.shape, tile, pred);
  in.target = load(params.target, params.shape, tile, target);
  in.mask = other;
  if (params.mask) {
    in.mask = load(*params.mask, params.shape, tile, other);
  } else {
    for (int64_t i = 0; i < tile.count; ++i) other[i] = 1;
  }
  in.residual = residual;
  in.weight = params.residual_weight[tile.sample];
  in.sample_weight = params.sample_weight[tile.sample];
  return finish_tile(in, tile.count, gradient + tile.sample * params.shape.image() + tile.first);
}

}  // namespace

template <typename Real>
void score_combination_fwd(const ScoreParams<Real>& params, Real* gradient, ScoreSums* sums, ParallelFor parallel) {
  for_each_tile(params.shape, parallel, [&](Tile tile, int64_t index) {
    sums[index] = score_tile(params, tile, gradient);
  });
}

template <typename Real>
void score_combination_bwd(
    const Shape& shape, const ImageView& gradient, Real factor, const ImageOut& out, ParallelFor parallel) {
  for_each_tile(shape, parallel, [&](Tile tile, int64_t) {
    Real buffer[kTile], scaled[kTile];
    const Real* values = load(gradient, shape, tile, buffer);
    for (int64_t i = 0; i < tile.count; ++i) scaled[i] = factor * values[i];
    store(scaled, out, shape, tile, tile.sample);
  });
}

template void score_combination_fwd(const ScoreParams<float>&, float*, ScoreSums*, ParallelFor);
template void score_combination_fwd(const ScoreParams<double>&, double*, ScoreSums*, ParallelFor);
template void score_combination_bwd(const Shape&, const ImageView&, float, const ImageOut&, ParallelFor);
template void score_combination_bwd(const Shape&, const ImageView&, double, const ImageOut&, ParallelFor);

}  // namespace palp_fast::cpu::PALP_LEVEL
