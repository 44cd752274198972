// The timestep sampler: how a draw becomes a timestep, and the statistics behind the adaptive proposal
// (palp_fast/sampler.py says what the modes mean, palp_fast/reference/timestep.py is the same in PyTorch).
#pragma once

#include "palp_fast/elementary.h"
#include "palp_fast/element.h"
#include "palp_fast/philox.h"

namespace palp_fast {

enum class TimestepMode : int64_t { uniform, stratified, adaptive };

constexpr int64_t kMaxBins = 1024;
constexpr int64_t kStrata = 32;   // a smaller global batch is stratified over consecutive steps, too
constexpr double kPrior = 4.0;    // samples' worth of the mean over all timesteps in every bin's estimate
constexpr double kTiny = 1e-300;  // keeps 0 / 0 away where nothing has been seen

// Equal ranges of the schedule: bin j holds the timesteps from ceil(j T / bins) on.
struct Bins {
  int64_t count, timesteps;

  PALP_INLINE int64_t start(int64_t bin) const { return (bin * timesteps + count - 1) / count; }
  PALP_INLINE int64_t size(int64_t bin) const { return start(bin + 1) - start(bin); }
  PALP_INLINE double pi(int64_t bin) const { return double(size(bin)) / double(timesteps); }
  PALP_INLINE int64_t of(int64_t t) const { return t * count / timesteps; }
};

struct TimestepSampleParams {
  TimestepMode mode = TimestepMode::uniform;
  Bins bins;
  double floor = 0;
  const float* residual_scale = nullptr;  // [timesteps]
  const double* counts = nullptr;         // [bins]
  const double* squares = nullptr;        // [bins]
  int64_t seed = 0;
  Counter step, sample_offset;
  int64_t batch = 0, global_batch = 1;
  int64_t* t = nullptr;      // [batch]
  float* weight = nullptr;   // [batch]: pi / q
  float* scale = nullptr;    // [batch]

  PALP_INLINE int64_t sample(int64_t i) const { return int64_t(uint64_t(sample_offset.get()) + uint64_t(i)); }

  // Steps that share one set of strata. Adaptive q changes between steps, so its strata end with the step.
  PALP_INLINE int64_t cycle() const {
    return mode == TimestepMode::stratified ? (kStrata + global_batch - 1) / global_batch : 1;
  }
};

PALP_INLINE int64_t floor_mod(int64_t value, int64_t divisor) {
  const int64_t rest = value % divisor;
  return rest < 0 ? rest + divisor : rest;
}

PALP_INLINE int64_t floor_div(int64_t value, int64_t divisor) { return (value - floor_mod(value, divisor)) / divisor; }

PALP_INLINE uint32_t timestep_word(int64_t seed, int64_t element, int64_t sample, int64_t step, uint32_t stream) {
  return philox(
      {uint32_t(uint64_t(element)), uint32_t(uint64_t(sample)), uint32_t(uint64_t(step)), stream}, philox_key(seed)).w0;
}

// Ranks of these keys are the order in which the samples of a step take its strata.
PALP_INLINE uint32_t stratum_key(const TimestepSampleParams& params, int64_t number) {
  return timestep_word(params.seed, 0, number, params.step.get(), kStreamStrata);
}

// Which part of its stratum a step takes: over a cycle of steps each part comes once, in an order of the stratum's own.
PALP_INLINE int64_t part_of_stratum(const TimestepSampleParams& params, int64_t stratum) {
  const int64_t cycle = params.cycle(), step = params.step.get(), turn = floor_mod(step, cycle);
  const int64_t round = floor_div(step, cycle);
  const uint32_t own = timestep_word(params.seed, 1 + turn, stratum, round, kStreamStrata);
  int64_t rank = 0;
  for (int64_t part = 0; part < cycle; ++part) {
    const uint32_t key = timestep_word(params.seed, 1 + part, stratum, round, kStreamStrata);
    rank += key < own || (key == own && part < turn);
  }
  return rank;
}

// A point of [0, 1): numerator / (cells 2^32). Alone it is uniform; together the points of a step fill the strata.
struct Point {
  int64_t numerator, cells;
};

PALP_INLINE Point point_of(const TimestepSampleParams& params, int64_t sample, int64_t stratum) {
  const int64_t word = timestep_word(params.seed, 0, sample, params.step.get(), kStreamTimestep);
  if (params.mode == TimestepMode::uniform) return {word, 1};
  const int64_t cell = stratum * params.cycle() + part_of_stratum(params, stratum);
  return {cell * (int64_t(1) << 32) + word, params.global_batch * params.cycle()};
}

PALP_INLINE void write_draw(const TimestepSampleParams& params, int64_t i, int64_t t, double weight) {
  params.t[i] = t;
  params.weight[i] = float(weight);
  params.scale[i] = params.residual_scale[t];
}

// Every timestep alike. The product stays below 2^63: the caller allows no more than 2^31 / T cells.
PALP_INLINE void draw_evenly(const TimestepSampleParams& params, int64_t i, Point point) {
  write_draw(params, i, ((point.numerator * params.bins.timesteps) >> 32) / point.cells, 1);
}

// By the inverse of q's distribution function; upper: running sums of q.
PALP_INLINE void draw_by_proposal(
    const TimestepSampleParams& params, int64_t i, Point point, const double* q, const double* upper) {
  const Bins& bins = params.bins;
  const double total = upper[bins.count - 1];
  const double target = (double(point.numerator) + 0.5) / (double(point.cells) * 4294967296.0) * total;
  int64_t low = 0, high = bins.count - 1;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (upper[middle] > target) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  const int64_t size = bins.size(low);
  int64_t inside = int64_t((target - (upper[low] - q[low])) / q[low] * double(size));
  inside = inside < 0 ? 0 : inside < size ? inside : size - 1;
  write_draw(params, i, bins.start(low) + inside, bins.pi(low) / q[low]);
}

PALP_INLINE double at_least_tiny(double value) { return value > kTiny ? value : kTiny; }

// The proposal, in the three steps between which sums over all bins are taken, in order.
PALP_INLINE double mean_square(const TimestepSampleParams& params, int64_t bin) {
  return params.counts[bin] > 0 ? params.squares[bin] / at_least_tiny(params.counts[bin]) : 0.0;
}

PALP_INLINE double seen_share(const TimestepSampleParams& params, int64_t bin) {
  return params.counts[bin] > 0 ? params.bins.pi(bin) : 0.0;
}

// pi times the estimated root mean square; `overall` is the mean square over what has been seen.
PALP_INLINE double bin_mass(const TimestepSampleParams& params, int64_t bin, double overall) {
  const double moment = (params.squares[bin] + kPrior * overall) / (params.counts[bin] + kPrior);
  return params.bins.pi(bin) * square_root(moment);
}

PALP_INLINE double mixed(const TimestepSampleParams& params, int64_t bin, double mass, double total) {
  const double pi = params.bins.pi(bin), q_hat = total > 0 ? mass / at_least_tiny(total) : pi;
  return params.floor * pi + (1 - params.floor) * q_hat;
}

struct TimestepUpdateParams {
  Bins bins;
  double keep = 1;                   // what the statistics keep of what they were
  const int64_t* t = nullptr;        // [count]
  int64_t t_stride = 0, count = 0;   // in elements
  VectorView norms;                  // [count]
  double* counts = nullptr;          // [bins]
  double* squares = nullptr;         // [bins]
};

// The bin of a sample and its squared norm; bin -1: left out, not finite or outside of the schedule.
struct Seen {
  int64_t bin;
  double square;
};

PALP_INLINE Seen seen_at(const TimestepUpdateParams& params, int64_t i) {
  const int64_t t = params.t[i * params.t_stride];
  const double norm = read_vector<double>(params.norms, i, 0.0);
  // Infinity and NaN alone give NaN here.
  if (t < 0 || t >= params.bins.timesteps || norm - norm != 0) return {-1, 0.0};
  return {params.bins.of(t), norm * norm};
}

}  // namespace palp_fast
