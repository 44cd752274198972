#include "tile.h"
#include "vector.h"

namespace palp_fast::cpu::PALP_LEVEL {
namespace {

constexpr int64_t kLanes = 16;  // independent sums, so that the compiler may vectorise without reordering
constexpr int64_t kRun = 256;   // elements worked on at a time: all operands of them stay in the first cache

template <typename Real>
struct Lanes {
  Real squares[kLanes] = {}, residual[kLanes] = {}, gradient[kLanes] = {}, product[kLanes] = {};

  PALP_INLINE void add(int64_t lane, const ScoreSums<Real>& sums) {
    squares[lane] += sums.squares;
    residual[lane] += sums.residual;
    gradient[lane] += sums.gradient;
    product[lane] += sums.product;
  }

  PALP_INLINE ScoreSums<double> total() const {
    ScoreSums<double> out{};
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      out.add(ScoreSums<Real>{squares[lane], residual[lane], gradient[lane], product[lane]});
    }
    return out;
  }
};

// What a tile's elements have in common.
template <typename Real>
struct TileFactors {
  Real coefficients[kMostTerms], pull, share;

  PALP_INLINE TileFactors(const ScoreParams<Real>& params, int64_t sample) {
    for (int64_t term = 0; term < params.terms; ++term) coefficients[term] = score_coefficient(params, term, sample);
    pull = score_pull(params, sample);
    share = score_share(params, sample);
  }
};

// residual += sum of coefficients[term] values[term], term by term.
template <int kTerms, typename Real>
void add_terms(const Real* const* values, const Real* coefficients, int64_t count, Real* PALP_RESTRICT residual) {
  for (int64_t i = 0; i < count; ++i) {
    Real sum = residual[i];
    for (int term = 0; term < kTerms; ++term) sum += coefficients[term] * values[term][i];
    residual[i] = sum;
  }
}

template <typename Real>
void combine(const ScoreParams<Real>& params, const Real* coefficients, Tile run, Real* residual) {
  constexpr int64_t kAtOnce = 4;
  Real buffers[kAtOnce][kRun];
  const Real* values[kAtOnce];
  for (int64_t i = 0; i < run.count; ++i) residual[i] = 0;
  for (int64_t first = 0; first < params.terms; first += kAtOnce) {
    const int64_t terms = least(kAtOnce, params.terms - first);
    for (int64_t term = 0; term < terms; ++term) {
      values[term] = load(params.predictions[first + term], params.shape, run, buffers[term]);
    }
    switch (terms) {
      case 1: add_terms<1>(values, coefficients + first, run.count, residual); break;
      case 2: add_terms<2>(values, coefficients + first, run.count, residual); break;
      case 3: add_terms<3>(values, coefficients + first, run.count, residual); break;
      default: add_terms<4>(values, coefficients + first, run.count, residual);
    }
  }
}

template <typename Real>
struct RunValues {
  const Real *pred, *target, *mask, *residual;
};

// Whole groups of lanes only: local arrays that constants alone index stay in registers. Returns where it ends.
template <typename Real>
int64_t finish_groups(
    RunValues<Real> in, Real pull, Real share, int64_t count, Lanes<Real>& sums, Real* PALP_RESTRICT gradient) {
  Real squares[kLanes] = {}, residual[kLanes] = {}, gradients[kLanes] = {}, product[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const int64_t at = i + lane;
      const ScoreElement<Real> element(in.pred[at], in.target[at], in.mask[at], in.residual[at], pull);
      squares[lane] += element.sums.squares;
      residual[lane] += element.sums.residual;
      gradients[lane] += element.sums.gradient;
      product[lane] += element.sums.product;
      gradient[at] = share * element.gradient;
    }
  }
  for (int64_t lane = 0; lane < kLanes; ++lane) {
    sums.add(lane, {squares[lane], residual[lane], gradients[lane], product[lane]});
  }
  return i;
}

template <typename Real>
void finish_run(
    const RunValues<Real>& in, const TileFactors<Real>& factors, int64_t count, Lanes<Real>& sums, Real* gradient) {
  int64_t i = finish_groups(in, factors.pull, factors.share, count, sums, gradient);
  for (int64_t lane = 0; i < count; ++i, ++lane) {
    const ScoreElement<Real> element(in.pred[i], in.target[i], in.mask[i], in.residual[i], factors.pull);
    sums.add(lane, element.sums);
    gradient[i] = factors.share * element.gradient;
  }
}

#ifdef PALP_VECTOR

// Sums of the lanes of one register.
struct RegisterSums {
  Floats squares = 0.0f, residual = 0.0f, gradient = 0.0f, product = 0.0f;

  PALP_INLINE void add_to(Lanes<float>& sums, int64_t first) const {
    float lanes[4][kWidth];
    store_floats(squares, lanes[0]);
    store_floats(residual, lanes[1]);
    store_floats(gradient, lanes[2]);
    store_floats(product, lanes[3]);
    for (int64_t i = 0; i < kWidth; ++i) sums.add(first + i, {lanes[0][i], lanes[1][i], lanes[2][i], lanes[3][i]});
  }
};

// As combine and finish_groups, to the last bit, without buffers between memory and registers.
template <int kTerms, typename Stored>
int64_t direct_groups(
    const ScoreParams<float>& params, const TileFactors<float>& factors, Tile run, Lanes<float>& sums,
    float* PALP_RESTRICT gradient) {
  constexpr int64_t kParts = kLanes / kWidth, kAhead = 1024;  // bytes
  const Stored *pred = start_of<Stored>(params.pred, run), *target = start_of<Stored>(params.target, run);
  const Stored* values[kTerms];
  for (int term = 0; term < kTerms; ++term) values[term] = start_of<Stored>(params.predictions[term], run);
  RegisterSums parts[kParts];
  int64_t i = 0;
  for (; i + kLanes <= run.count; i += kLanes) {
    ask_for(pred + i, kAhead, 1);
    ask_for(target + i, kAhead, 1);
    for (int term = 0; term < kTerms; ++term) ask_for(values[term] + i, kAhead, 1);
    for (int64_t part = 0; part < kParts; ++part) {
      const int64_t at = i + part * kWidth;
      RegisterSums& all = parts[part];
      Floats residual = 0.0f;
      for (int term = 0; term < kTerms; ++term) {
        residual = residual + Floats(factors.coefficients[term]) * widened(values[term] + at);
      }
      const Floats value = widened(pred + at), error = value - widened(target + at);
      const Floats pull = Floats(2.0f) * error - Floats(factors.pull) * residual;
      all.squares = all.squares + error * error;
      all.residual = all.residual + residual * residual;
      all.gradient = all.gradient + pull * pull;
      all.product = all.product + residual * value;
      store_floats(Floats(factors.share) * pull, gradient + at);
    }
  }
  for (int64_t part = 0; part < kParts; ++part) parts[part].add_to(sums, part * kWidth);
  return i;
}

using DirectGroups =
    int64_t (*)(const ScoreParams<float>&, const TileFactors<float>&, Tile, Lanes<float>&, float* PALP_RESTRICT);

template <typename Stored>
DirectGroups direct_for(int64_t terms) {
  return terms == 4 ? direct_groups<4, Stored> : terms == 3 ? direct_groups<3, Stored>
       : terms == 2 ? direct_groups<2, Stored> : nullptr;
}

// Null unless all images hold one type without gaps and nothing is masked.
DirectGroups direct(const ScoreParams<float>& params) {
  const DType dtype = params.pred.dtype;
  const auto fits = [&](const ImageView& view) {
    return view.dtype == dtype && view.image_is_contiguous(params.shape);
  };
  if (params.mask.data || !fits(params.pred) || !fits(params.target)) return nullptr;
  for (int64_t term = 0; term < params.terms; ++term) {
    if (!fits(params.predictions[term])) return nullptr;
  }
  return dtype == DType::float32  ? direct_for<float>(params.terms)
       : dtype == DType::bfloat16 ? direct_for<BFloat16>(params.terms)
       : dtype == DType::float16  ? direct_for<Half>(params.terms)
                                  : nullptr;
}

#else

using DirectGroups =
    int64_t (*)(const ScoreParams<float>&, const TileFactors<float>&, Tile, Lanes<float>&, float* PALP_RESTRICT);
DirectGroups direct(const ScoreParams<float>&) { return nullptr; }

#endif

template <typename Real>
ScoreSums<double> score_tile(const ScoreParams<Real>& params, Tile tile, Real* gradient, DirectGroups direct) {
  Real residual[kRun], pred[kRun], target[kRun], mask[kRun];
  const TileFactors<Real> factors(params, tile.sample);
  Lanes<Real> lanes;
  RunValues<Real> in{nullptr, nullptr, mask, residual};
  for (int64_t i = 0; i < (direct ? kLanes : kRun); ++i) mask[i] = 1;
  for (int64_t start = 0; start < tile.count; start += kRun) {
    Tile run{tile.sample, tile.first + start, least(kRun, tile.count - start)};
    Real* to = gradient + start;
    if constexpr (same_type<Real, float>) {
      const int64_t done = direct ? direct(params, factors, run, lanes, to) : 0;
      if (done == run.count) continue;
      run = Tile{run.sample, run.first + done, run.count - done};
      to += done;
    }
    combine(params, factors.coefficients, run, residual);
    in.pred = load(params.pred, params.shape, run, pred);
    in.target = load(params.target, params.shape, run, target);
    if (params.mask.data) in.mask = load(params.mask, params.shape, run, mask);
    finish_run(in, factors, run.count, lanes, to);
  }
  return lanes.total();
}

}  // namespace

template <typename Real>
void score_combination_fwd(
    const ScoreParams<Real>& params, Real* gradient, ScoreSums<double>* sums, ParallelFor parallel) {
  DirectGroups groups = nullptr;
  if constexpr (same_type<Real, float>) groups = direct(params);
  for_each_tile(params.shape, parallel, [&](Tile tile, int64_t index) {
    sums[index] = score_tile(params, tile, gradient + tile.sample * params.shape.image() + tile.first, groups);
  });
}

template <typename Real>
void score_combination_bwd(
    const Shape& shape, const ImageView& gradient, Real factor, const ImageOut& out, ParallelFor parallel) {
  for_each_tile(shape, parallel, [&](Tile tile, int64_t) {
    Real buffer[kTile], scaled_buffer[kTile];
    const Real* values = load(gradient, shape, tile, buffer);
    Real* PALP_RESTRICT scaled = place(out, shape, tile, tile.sample, scaled_buffer);
    for (int64_t i = 0; i < tile.count; ++i) scaled[i] = factor * values[i];
    store(scaled, out, shape, tile, tile.sample);
  });
}

template void score_combination_fwd(const ScoreParams<float>&, float*, ScoreSums<double>*, ParallelFor);
template void score_combination_fwd(const ScoreParams<double>&, double*, ScoreSums<double>*, ParallelFor);
template void score_combination_bwd(const Shape&, const ImageView&, float, const ImageOut&, ParallelFor);
template void score_combination_bwd(const Shape&, const ImageView&, double, const ImageOut&, ParallelFor);

}  // namespace palp_fast::cpu::PALP_LEVEL
