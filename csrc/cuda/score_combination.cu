#include "kernels.h"
#include "launch.h"

namespace palp_fast::cuda {
namespace {

constexpr int kItems = 4;                // elements per thread, kThreads apart: neighbouring threads read neighbours
constexpr int kTile = kItems * kThreads;  // elements per block, all of one image
constexpr int kWarp = 32, kWarps = kThreads / kWarp;

template <typename Stored, typename Real>
__device__ void read_items(const void* data, const int64_t (&offsets)[kItems], Real (&out)[kItems]) {
#pragma unroll
  for (int item = 0; item < kItems; ++item) {
    out[item] = offsets[item] < 0 ? Real(0) : Real(widen(static_cast<const Stored*>(data)[offsets[item]]));
  }
}

// Elements first, first + kThreads, .. of a sample's image; 0 past its end.
template <typename Real>
__device__ void read_items(
    const ImageView& view, const Shape& shape, int64_t sample, int64_t first, Real (&out)[kItems]) {
  int64_t offsets[kItems];
#pragma unroll
  for (int item = 0; item < kItems; ++item) {
    const int64_t index = first + item * kThreads;
    offsets[item] = index < shape.image() ? image_offset(view, shape, sample, index) : -1;
  }
  switch (view.dtype) {
    case DType::float16: return read_items<Half>(view.data, offsets, out);
    case DType::bfloat16: return read_items<BFloat16>(view.data, offsets, out);
    case DType::float64: return read_items<double>(view.data, offsets, out);
    default: return read_items<float>(view.data, offsets, out);
  }
}

// Over a warp, in fixed order: lane 0 has the sum.
__device__ double warp_sum(double value) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) value += __shfl_down_sync(~0u, value, distance);
  return value;
}

__device__ ScoreSums<double> warp_sum(const ScoreSums<double>& sums) {
  return {warp_sum(sums.squares), warp_sum(sums.residual), warp_sum(sums.gradient), warp_sum(sums.product)};
}

// One block per tile: the gradient, and the tile's sums.
template <typename Real>
__global__ void __launch_bounds__(kThreads, 2)
    score_tile_kernel(const __grid_constant__ ScoreParams<Real> params, ScoreOut<Real> out, int64_t tiles) {
  const Shape& shape = params.shape;
  const int64_t sample = blockIdx.x / tiles, first = blockIdx.x % tiles * kTile + threadIdx.x;
  Real residual[kItems] = {}, values[kItems], pred[kItems], target[kItems], mask[kItems];
  for (int64_t term = 0; term < params.terms; ++term) {
    read_items(params.predictions[term], shape, sample, first, values);
    const Real coefficient = score_coefficient(params, term, sample);
#pragma unroll
    for (int item = 0; item < kItems; ++item) residual[item] += coefficient * values[item];
  }
  read_items(params.pred, shape, sample, first, pred);
  read_items(params.target, shape, sample, first, target);
#pragma unroll
  for (int item = 0; item < kItems; ++item) mask[item] = 1;
  if (params.mask.data) read_items(params.mask, shape, sample, first, mask);

  const Real pull = score_pull(params, sample), share = score_share(params, sample);
  ScoreSums<Real> own{};
#pragma unroll
  for (int item = 0; item < kItems; ++item) {
    const int64_t index = first + item * kThreads;
    const ScoreElement<Real> element(pred[item], target[item], mask[item], residual[item], pull);
    own.add(element.sums);  // of an element past the end: 0
    if (index < shape.image()) out.gradient[sample * shape.image() + index] = share * element.gradient;
  }

  __shared__ double of_warps[kWarps][kSumsPerTile];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const ScoreSums<double> sums = warp_sum(ScoreSums<double>{
      double(own.squares), double(own.residual), double(own.gradient), double(own.product)});
  if (lane == 0) {
    of_warps[warp][0] = sums.squares;
    of_warps[warp][1] = sums.residual;
    of_warps[warp][2] = sums.gradient;
    of_warps[warp][3] = sums.product;
  }
  __syncthreads();
  if (threadIdx.x >= kSumsPerTile) return;
  double total = 0;
  for (int i = 0; i < kWarps; ++i) total += of_warps[i][threadIdx.x];
  out.sums[int64_t(blockIdx.x) * kSumsPerTile + threadIdx.x] = total;
}

// One block: stats and loss from the sums of the tiles. Each warp takes every kWarps-th sample.
template <typename Real>
__global__ void __launch_bounds__(kThreads, 2)
    score_finish_kernel(const __grid_constant__ ScoreParams<Real> params, ScoreOut<Real> out, int64_t tiles) {
  __shared__ double of_warps[kWarps];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  double loss = 0;
  for (int64_t sample = warp; sample < params.shape.batch; sample += kWarps) {
    ScoreSums<double> own{};
    for (int64_t tile = lane; tile < tiles; tile += kWarp) {
      const double* sums = out.sums + (sample * tiles + tile) * kSumsPerTile;
      own.add(ScoreSums<double>{sums[0], sums[1], sums[2], sums[3]});
    }
    const ScoreSums<double> sum = warp_sum(own);
    if (lane == 0) loss += finish_sample(params, sum, sample, out.stats);
  }
  if (lane == 0) of_warps[warp] = loss;
  __syncthreads();
  if (threadIdx.x != 0) return;
  double total = 0;
  for (int i = 0; i < kWarps; ++i) total += of_warps[i];
  *out.loss = Real(total / score_numel(params.shape));
}

template <typename Real>
__global__ void __launch_bounds__(kThreads, 2)
    score_bwd_kernel(Shape shape, ImageView gradient, VectorView grad_output, ImageOut out) {
  const int64_t index = thread_index();
  if (index >= shape.numel()) return;
  const Real factor = read_vector<Real>(grad_output, 0, 1);
  const int64_t sample = index / shape.image(), element = index % shape.image();
  write_element(out, index, factor * read_image<Real>(gradient, shape, sample, element));
}

}  // namespace

int64_t score_tiles(const Shape& shape) { return (shape.image() + kTile - 1) / kTile; }

template <typename Real>
cudaError_t score_combination_fwd(const ScoreParams<Real>& params, ScoreOut<Real> out, cudaStream_t stream) {
  const int64_t tiles = score_tiles(params.shape), blocks = params.shape.batch * tiles;
  if (blocks > 0) {
    score_tile_kernel<Real><<<unsigned(blocks), kThreads, 0, stream>>>(params, out, tiles);
    if (const cudaError_t error = cudaGetLastError(); error != cudaSuccess) return error;
  }
  score_finish_kernel<Real><<<1, kThreads, 0, stream>>>(params, out, tiles);
  return cudaGetLastError();
}

template <typename Real>
cudaError_t score_combination_bwd(
    Shape shape, ImageView gradient, VectorView grad_output, ImageOut out, cudaStream_t stream) {
  if (shape.numel() == 0) return cudaSuccess;
  score_bwd_kernel<Real><<<blocks_for(shape.numel()), kThreads, 0, stream>>>(shape, gradient, grad_output, out);
  return cudaGetLastError();
}

template cudaError_t score_combination_fwd(const ScoreParams<float>&, ScoreOut<float>, cudaStream_t);
template cudaError_t score_combination_fwd(const ScoreParams<double>&, ScoreOut<double>, cudaStream_t);
template cudaError_t score_combination_bwd<float>(Shape, ImageView, VectorView, ImageOut, cudaStream_t);
template cudaError_t score_combination_bwd<double>(Shape, ImageView, VectorView, ImageOut, cudaStream_t);

}  // namespace palp_fast::cuda
