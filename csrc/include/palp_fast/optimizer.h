// One optimizer step over many tensors: the tables that describe them, the gradient norm, the update rules.
#pragma once

#include <cmath>
#include <cstdint>

#include "palp_fast/elementary.h"
#include "palp_fast/image.h"

namespace palp_fast {

enum class Rule : int64_t { adamw, lion };

// One parameter tensor, contiguous, and its state. Twelve 8-byte words: Python writes the table as int64 [tensors, 12].
struct TensorRow {
  void* param;
  void* shadow;  // a copy of the parameter in another type, or null
  void* first;  // uint8 [blocks, block_size], or float of that shape where first_scales is null
  void* second;  // as first; null for Lion
  float* first_scales;  // [blocks]
  float* second_scales;
  float* step;  // updates done so far
  int64_t numel;
  int64_t block_size;  // a power of two
  int64_t group;
  int64_t first_chunk;
  int64_t types;  // DType of param + 256 DType of shadow
};
static_assert(sizeof(TensorRow) == 12 * 8, "the table in Python has 12 words per tensor");

// The gradient of one parameter, contiguous. Null data: this step leaves the parameter alone.
struct GradientRow {
  const void* data;
  int64_t dtype;
};
static_assert(sizeof(GradientRow) == 2 * 8, "the table in Python has 2 words per gradient");

struct GroupRow {
  double lr, beta1, beta2, eps, weight_decay;
};
static_assert(sizeof(GroupRow) == 5 * 8, "Python writes float64 [groups, 5]");

// What the update of one tensor needs besides the tensor.
struct StepConstants {
  float beta1, rest1, beta2, rest2;  // rest = 1 - beta
  float step_size;  // lr over the bias correction of the first moment
  float inverse_root;  // 1 over the root of the bias correction of the second moment
  float eps;
  float decay;  // 1 - lr weight_decay
};
static_assert(sizeof(StepConstants) == 4 * 8, "the workspace has 4 words per tensor");

// What the norm decides for the update.
struct Verdict {
  float factor;  // on every gradient
  float finite;  // 1, or 0: nothing changes
};

// Threads work on chunks: consecutive elements of one tensor, whole blocks.
constexpr int64_t kChunk = 4096;
PALP_INLINE int64_t chunk_size(int64_t block_size) { return block_size > kChunk ? block_size : kChunk; }
PALP_INLINE int64_t smaller(int64_t left, int64_t right) { return left < right ? left : right; }

struct StepParams {
  Rule rule = Rule::adamw;
  const TensorRow* tensors = nullptr;
  const GradientRow* gradients = nullptr;
  const GroupRow* groups = nullptr;
  const int32_t* owner = nullptr;  // [chunks]: the tensor of each
  int64_t tensor_count = 0, chunk_count = 0;
  Verdict* verdict = nullptr;
  StepConstants* constants = nullptr;  // [tensors], scratch
};

struct NormParams {
  StepParams step;
  double max_norm = 0;  // infinite: no clipping
  const float* grad_scale = nullptr;  // the gradients are this many times too large; null: 1
  const float* found_inf = nullptr;  // not 0: a gradient was found that is not finite; null: 0
  double* partial = nullptr;  // [chunks], scratch: sums of squares
  float* norm = nullptr;  // before clipping
  int64_t* skipped = nullptr;  // incremented if a gradient is not finite; or null
};

// One chunk of the table.
struct ChunkView {
  int64_t tensor, begin, end;  // elements begin .. end - 1

  PALP_INLINE ChunkView(const StepParams& params, int64_t chunk) : tensor(params.owner[chunk]) {
    const TensorRow& row = params.tensors[tensor];
    const int64_t size = chunk_size(row.block_size);
    begin = (chunk - row.first_chunk) * size;
    end = smaller(begin + size, row.numel);
  }
};

// Lane l of a chunk's sum of squares takes elements l, l + kLanes, ...; then the upper half of the lanes is added to
// the lower until one is left. The chunks' sums are added likewise. So the norm is the same number on every device.
constexpr int kLanes = 256;

PALP_INLINE Verdict judge(double sum_of_squares, const NormParams& params) {
  const double scale = params.grad_scale ? 1 / double(*params.grad_scale) : 1.0;
  const double norm = sqrt(sum_of_squares) * scale;
  const double clip = params.max_norm / (norm + 1e-6);  // as torch.nn.utils.clip_grad_norm_
  const float factor = float(clip < 1 ? scale * clip : scale);
  const bool finite = norm < double(INFINITY) && factor < INFINITY && !(params.found_inf && *params.found_inf != 0);
  *params.norm = float(norm);
  if (!finite && params.skipped) ++*params.skipped;
  return Verdict{factor, finite ? 1.0f : 0.0f};
}

// base^exponent by squaring: the same number on every device, which a library's pow is not.
PALP_INLINE double power(double base, int64_t exponent) {
  double result = 1;
  for (; exponent > 0; exponent >>= 1, base *= base) {
    if (exponent & 1) result *= base;
  }
  return result;
}

// Counts the update of a tensor that has a gradient, and prepares it.
PALP_INLINE void begin_update(const StepParams& params, int64_t index) {
  if (params.verdict->finite == 0 || params.gradients[index].data == nullptr) return;
  const TensorRow& tensor = params.tensors[index];
  const GroupRow& group = params.groups[tensor.group];
  const float step = *tensor.step + 1;
  *tensor.step = step;
  const bool corrected = params.rule == Rule::adamw;
  const double first = corrected ? 1 - power(group.beta1, int64_t(step)) : 1.0;
  const double second = corrected ? 1 - power(group.beta2, int64_t(step)) : 1.0;
  StepConstants& constants = params.constants[index];
  constants.beta1 = float(group.beta1);
  constants.rest1 = float(1 - group.beta1);
  constants.beta2 = float(group.beta2);
  constants.rest2 = float(1 - group.beta2);
  constants.step_size = float(group.lr / first);
  constants.inverse_root = float(1 / sqrt(second));
  constants.eps = float(group.eps);
  constants.decay = float(1 - group.lr * group.weight_decay);
}

// The rules, on one element or a vector: moments and parameter go to their new values. `moments` comes first, `param`
// may wait until the moments of a whole block are known.
PALP_INLINE float at_most(float value, float limit) { return value < limit ? value : limit; }
PALP_INLINE float sign_of(float value) { return value > 0 ? 1.0f : value < 0 ? -1.0f : 0.0f; }

// Loshchilov and Hutter, arXiv 1711.05101.
struct AdamW {
  static constexpr bool kTwoMoments = true, kParamLast = true;

  template <typename Real>
  PALP_INLINE static void moments(const StepConstants& c, Real grad, Real& first, Real& second) {
    first = c.beta1 * first + c.rest1 * grad;
    // Infinity would become NaN in 8 bits.
    second = at_most(c.beta2 * second + c.rest2 * (grad * grad), 0x1.fffffep127f);
  }

  template <typename Real>
  PALP_INLINE static Real param(const StepConstants& c, Real first, Real second, Real param) {
    return param * c.decay - c.step_size * first / (square_root(second) * c.inverse_root + c.eps);
  }

  template <typename Real>
  PALP_INLINE static void apply(const StepConstants& c, Real grad, Real& first, Real& second, Real& value) {
    moments(c, grad, first, second);
    value = param(c, first, second, value);
  }
};

// Chen et al., arXiv 2302.06675.
struct Lion {
  static constexpr bool kTwoMoments = false, kParamLast = false;

  template <typename Real>
  PALP_INLINE static void apply(const StepConstants& c, Real grad, Real& first, Real&, Real& value) {
    value = value * c.decay - c.step_size * sign_of(c.beta1 * first + c.rest1 * grad);
    first = c.beta2 * first + c.rest2 * grad;
  }
};

}  // namespace palp_fast
