#include "kernels.h"

namespace palp_fast::cpu::PALP_LEVEL {
namespace {

// Stable, by bits 32 to 63: four passes over bytes, so that the result ends where it began. other: as many words.
void sort_by_high_half(uint64_t* words, uint64_t* other, int64_t count) {
  for (int shift = 32; shift < 64; shift += 8) {
    int64_t place[256] = {};
    for (int64_t i = 0; i < count; ++i) ++place[words[i] >> shift & 255];
    int64_t total = 0;
    for (int64_t& entry : place) {
      const int64_t own = entry;
      entry = total;
      total += own;
    }
    for (int64_t i = 0; i < count; ++i) other[place[words[i] >> shift & 255]++] = words[i];
    uint64_t* const filled = other;
    other = words;
    words = filled;
  }
}

// ranks[number]: the stratum of sample `number` of the global batch. keys: scratch of as many words.
void rank_samples(const TimestepSampleParams& params, uint64_t* keys, uint64_t* ranks) {
  for (int64_t number = 0; number < params.global_batch; ++number) {
    keys[number] = uint64_t(stratum_key(params, number)) << 32 | uint64_t(number);
  }
  sort_by_high_half(keys, ranks, params.global_batch);
  for (int64_t rank = 0; rank < params.global_batch; ++rank) ranks[keys[rank] & 0xffffffffu] = uint64_t(rank);
}

// q per bin and its running sums.
void make_proposal(const TimestepSampleParams& params, double* q, double* upper) {
  double squares = 0, share = 0, total = 0, sum = 0;
  for (int64_t bin = 0; bin < params.bins.count; ++bin) {
    squares += params.bins.pi(bin) * mean_square(params, bin);
    share += seen_share(params, bin);
  }
  const double overall = squares / at_least_tiny(share);
  for (int64_t bin = 0; bin < params.bins.count; ++bin) total += q[bin] = bin_mass(params, bin, overall);
  for (int64_t bin = 0; bin < params.bins.count; ++bin) {
    q[bin] = mixed(params, bin, q[bin], total);
    upper[bin] = sum += q[bin];
  }
}

}  // namespace

void timestep_sample(const TimestepSampleParams& params, const TimestepScratch& scratch) {
  if (params.mode != TimestepMode::uniform) rank_samples(params, scratch.keys, scratch.ranks);
  if (params.mode == TimestepMode::adaptive) make_proposal(params, scratch.q, scratch.upper);
  for (int64_t i = 0; i < params.batch; ++i) {
    const int64_t sample = params.sample(i);
    const int64_t stratum = params.mode == TimestepMode::uniform
                                ? 0
                                : int64_t(scratch.ranks[floor_mod(sample, params.global_batch)]);
    const Point point = point_of(params, sample, stratum);
    if (params.mode == TimestepMode::adaptive) {
      draw_by_proposal(params, i, point, scratch.q, scratch.upper);
    } else {
      draw_evenly(params, i, point);
    }
  }
}

void timestep_update(const TimestepUpdateParams& params, double* added) {
  double* const counts = added;
  double* const squares = added + params.bins.count;
  for (int64_t bin = 0; bin < 2 * params.bins.count; ++bin) added[bin] = 0;
  for (int64_t i = 0; i < params.count; ++i) {
    const Seen seen = seen_at(params, i);
    if (seen.bin < 0) continue;
    counts[seen.bin] += 1;
    squares[seen.bin] += seen.square;
  }
  for (int64_t bin = 0; bin < params.bins.count; ++bin) {
    params.counts[bin] = params.counts[bin] * params.keep + counts[bin];
    params.squares[bin] = params.squares[bin] * params.keep + squares[bin];
  }
}

void philox_words(const int64_t* counters, const int64_t* key, int64_t count, int64_t* out) {
  for (int64_t i = 0; i < count; ++i) philox_row(counters + 4 * i, key, out + 4 * i);
}

}  // namespace palp_fast::cpu::PALP_LEVEL
