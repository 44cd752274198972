#include "kernels.h"
#include "launch.h"

namespace palp_fast::cuda {
namespace {

// Rank of `number` among the keys of the global batch, counted tile by tile; every thread of the block calls it.
__device__ int64_t rank_of(const TimestepSampleParams& params, int64_t number) {
  __shared__ uint32_t keys[kThreads];
  const uint32_t own = stratum_key(params, number);
  int64_t rank = 0;
  for (int64_t first = 0; first < params.global_batch; first += kThreads) {
    if (first + threadIdx.x < params.global_batch) keys[threadIdx.x] = stratum_key(params, first + threadIdx.x);
    __syncthreads();
    const int64_t left = params.global_batch - first, count = left < kThreads ? left : kThreads;
    for (int64_t i = 0; i < count; ++i) rank += keys[i] < own || (keys[i] == own && first + i < number);
    __syncthreads();
  }
  return rank;
}

struct Proposal {
  double q[kMaxBins], upper[kMaxBins];
};

// By the whole block; sums over bins by one thread in order, as on the CPU.
__device__ void make_proposal(const TimestepSampleParams& params, Proposal& shared) {
  __shared__ double overall, total;
  const int64_t bins = params.bins.count;
  for (int64_t bin = threadIdx.x; bin < bins; bin += kThreads) {
    shared.q[bin] = params.bins.pi(bin) * mean_square(params, bin);
    shared.upper[bin] = seen_share(params, bin);
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    double squares = 0, share = 0;
    for (int64_t bin = 0; bin < bins; ++bin) {
      squares += shared.q[bin];
      share += shared.upper[bin];
    }
    overall = squares / at_least_tiny(share);
  }
  __syncthreads();
  for (int64_t bin = threadIdx.x; bin < bins; bin += kThreads) shared.q[bin] = bin_mass(params, bin, overall);
  __syncthreads();
  if (threadIdx.x == 0) {
    total = 0;
    for (int64_t bin = 0; bin < bins; ++bin) total += shared.q[bin];
  }
  __syncthreads();
  for (int64_t bin = threadIdx.x; bin < bins; bin += kThreads) {
    shared.q[bin] = mixed(params, bin, shared.q[bin], total);
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    double sum = 0;
    for (int64_t bin = 0; bin < bins; ++bin) shared.upper[bin] = sum += shared.q[bin];
  }
  __syncthreads();
}

// Usually one block: registers matter more than how many blocks fit.
__global__ void __launch_bounds__(kThreads, 1) timestep_sample_kernel(TimestepSampleParams params) {
  __shared__ Proposal proposal;
  const int64_t i = thread_index(), sample = params.sample(i);
  int64_t stratum = 0;
  if (params.mode != TimestepMode::uniform) stratum = rank_of(params, floor_mod(sample, params.global_batch));
  if (params.mode == TimestepMode::adaptive) make_proposal(params, proposal);
  if (i >= params.batch) return;
  const Point point = point_of(params, sample, stratum);
  if (params.mode == TimestepMode::adaptive) {
    draw_by_proposal(params, i, point, proposal.q, proposal.upper);
  } else {
    draw_evenly(params, i, point);
  }
}

// One block; each thread adds up its own bins over all samples in order.
__global__ void __launch_bounds__(kThreads) timestep_update_kernel(TimestepUpdateParams params) {
  __shared__ Seen seen[kThreads];
  for (int64_t first_bin = 0; first_bin < params.bins.count; first_bin += kThreads) {
    const int64_t bin = first_bin + threadIdx.x;
    double counts = 0, squares = 0;
    for (int64_t first = 0; first < params.count; first += kThreads) {
      if (first + threadIdx.x < params.count) seen[threadIdx.x] = seen_at(params, first + threadIdx.x);
      __syncthreads();
      const int64_t left = params.count - first, count = left < kThreads ? left : kThreads;
      for (int64_t i = 0; i < count; ++i) {
        if (seen[i].bin != bin) continue;
        counts += 1;
        squares += seen[i].square;
      }
      __syncthreads();
    }
    if (bin >= params.bins.count) continue;
    params.counts[bin] = params.counts[bin] * params.keep + counts;
    params.squares[bin] = params.squares[bin] * params.keep + squares;
  }
}

}  // namespace

cudaError_t timestep_sample(TimestepSampleParams params, cudaStream_t stream) {
  if (params.batch == 0) return cudaSuccess;
  timestep_sample_kernel<<<blocks_for(params.batch), kThreads, 0, stream>>>(params);
  return cudaGetLastError();
}

cudaError_t timestep_update(TimestepUpdateParams params, cudaStream_t stream) {
  if (params.count == 0) return cudaSuccess;
  timestep_update_kernel<<<1, kThreads, 0, stream>>>(params);
  return cudaGetLastError();
}

}  // namespace palp_fast::cuda
