#include "blockwise_part.h"
#include "kernels.h"
#include "palp_fast/convert.h"

namespace palp_fast::cpu::PALP_LEVEL {
namespace {

constexpr int64_t kPart = 256;  // elements worked on at a time: what is kept of them stays in the first cache
constexpr int64_t kChunksPerTask = 8;

constexpr DynamicMap<true> kSignedMap;
constexpr DynamicMap<false> kUnsignedMap;

template <typename Stored>
void widen_part(const void* data, int64_t first, int64_t count, float* out) {
  const Stored* source = static_cast<const Stored*>(data) + first;
  for (int64_t i = 0; i < count; ++i) out[i] = float(widen(source[i]));
}

void copy(const void* data, DType dtype, int64_t first, int64_t count, float* out) {
  switch (dtype) {
    case DType::float16: return widen_part<Half>(data, first, count, out);
    case DType::bfloat16: return widen_part<BFloat16>(data, first, count, out);
    case DType::float64: return widen_part<double>(data, first, count, out);
    default: return widen_part<float>(data, first, count, out);
  }
}

// Some elements as float: in place where the tensor holds that, else in the buffer.
const float* load(const void* data, DType dtype, int64_t first, int64_t count, float* buffer) {
  if (dtype == DType::float32) return static_cast<const float*>(data) + first;
  copy(data, dtype, first, count, buffer);
  return buffer;
}

template <typename Stored>
void round_part(const float* values, int64_t first, int64_t count, void* data) {
  Stored* out = static_cast<Stored*>(data) + first;
  for (int64_t i = 0; i < count; ++i) round_to(values[i], out[i]);
}

void store(const float* values, DType dtype, int64_t first, int64_t count, void* data) {
  switch (dtype) {
    case DType::float16: return round_part<Half>(values, first, count, data);
    case DType::bfloat16: return round_part<BFloat16>(values, first, count, data);
    case DType::float64: return round_part<double>(values, first, count, data);
    default: return round_part<float>(values, first, count, data);
  }
}

// Magnitudes order as their bits.
float largest_magnitude(float largest, const float* values, int64_t count) {
  int32_t bits = int32_t(float_bits(largest));
  for (int64_t i = 0; i < count; ++i) {
    const int32_t other = int32_t(float_bits(values[i]) & 0x7fffffffu);
    bits = bits > other ? bits : other;
  }
  return bits_float(uint32_t(bits));
}

struct Moments {
  float first[kPart], second[kPart];
};

// The update of one tensor.
template <typename UpdateRule>
class Update {
 public:
  Update(const StepParams& params, int64_t index)
      : tensor_(params.tensors[index]),
        gradient_(params.gradients[index]),
        constants_(params.constants[index]),
        factor_(params.verdict->factor),
        type_(DType(tensor_.types % 256)) {}

  // The moments of a block longer than a part are not kept: a first pass finds the scales, a second computes them anew.
  void quantised(int64_t block) const {
    const int64_t begin = block * tensor_.block_size, end = smaller(begin + tensor_.block_size, tensor_.numel);
    const float old_first = tensor_.first_scales[block];
    const float old_second = kTwo ? tensor_.second_scales[block] : 0.0f;
    float first = 0, second = 0;  // the new scales
    const bool fits = end - begin <= kPart;
    Moments moments;
    for (int pass = fits ? 1 : 0; pass < 2; ++pass) {
      for (int64_t at = begin; at < end; at += kPart) {
        const int64_t count = smaller(kPart, end - at);
        dequantise(kSignedMap, codes(tensor_.first) + at, old_first, count, moments.first);
        if (kTwo) dequantise(kUnsignedMap, codes(tensor_.second) + at, old_second, count, moments.second);
        step(at, count, pass == 1, moments.first, moments.second);
        if (pass == 0 || fits) {
          first = largest_magnitude(first, moments.first, count);
          if (kTwo) second = largest_magnitude(second, moments.second, count);
        }
        if (pass == 0) continue;
        quantise(kSignedMap, moments.first, first, count, codes(tensor_.first) + at);
        if (kTwo) quantise(kUnsignedMap, moments.second, second, count, codes(tensor_.second) + at);
      }
    }
    tensor_.first_scales[block] = first;
    if (kTwo) tensor_.second_scales[block] = second;
  }

  // State in 32 bits.
  void plain(int64_t begin, int64_t end) const {
    float unused[kPart];
    for (int64_t at = begin; at < end; at += kPart) {
      float* second = kTwo ? floats(tensor_.second) + at : unused;
      step(at, smaller(kPart, end - at), true, floats(tensor_.first) + at, second);
    }
  }

 private:
  static constexpr bool kTwo = UpdateRule::kTwoMoments;

  static float* floats(void* data) { return static_cast<float*>(data); }
  static uint8_t* codes(void* data) { return static_cast<uint8_t*>(data); }

  // The rule on some elements; parameters in fp32 are changed in place.
  void step(int64_t at, int64_t count, bool write, float* first, float* second) const {
    float grads[kPart], params[kPart];
    const float* grad = load(gradient_.data, DType(gradient_.dtype), at, count, grads);
    const bool in_place = write && type_ == DType::float32;
    float* param = in_place ? floats(tensor_.param) + at : params;
    if (!in_place) copy(tensor_.param, type_, at, count, params);
    const StepConstants constants = constants_;
    const float factor = factor_;
    for (int64_t i = 0; i < count; ++i) UpdateRule::apply(constants, grad[i] * factor, first[i], second[i], param[i]);
    if (!write) return;
    if (!in_place) store(param, type_, at, count, tensor_.param);
    if (tensor_.shadow) store(param, DType(tensor_.types / 256), at, count, tensor_.shadow);
  }

  const TensorRow& tensor_;
  const GradientRow& gradient_;
  const StepConstants& constants_;
  float factor_;
  DType type_;
};

template <typename UpdateRule>
void update_chunks(const StepParams& params, int64_t begin, int64_t end) {
  for (int64_t index = begin; index < end; ++index) {
    const ChunkView chunk(params, index);
    const TensorRow& tensor = params.tensors[chunk.tensor];
    if (params.gradients[chunk.tensor].data == nullptr) continue;
    const Update<UpdateRule> update(params, chunk.tensor);
    if (tensor.first_scales == nullptr) {
      update.plain(chunk.begin, chunk.end);
    } else {
      for (int64_t at = chunk.begin; at < chunk.end; at += tensor.block_size) update.quantised(at / tensor.block_size);
    }
  }
}

double sum_lanes(double* lanes) {
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}

double sum_of_squares(const GradientRow& gradient, const ChunkView& chunk) {
  double lanes[kLanes] = {};
  float buffer[kLanes];
  for (int64_t at = chunk.begin; at < chunk.end; at += kLanes) {
    const int64_t count = smaller(kLanes, chunk.end - at);
    const float* grad = load(gradient.data, DType(gradient.dtype), at, count, buffer);
    for (int64_t i = 0; i < count; ++i) lanes[i] += double(grad[i]) * double(grad[i]);
  }
  return sum_lanes(lanes);
}

void norm_chunks(const NormParams& params, int64_t begin, int64_t end) {
  for (int64_t index = begin; index < end; ++index) {
    const ChunkView chunk(params.step, index);
    const GradientRow& gradient = params.step.gradients[chunk.tensor];
    params.partial[index] = gradient.data ? sum_of_squares(gradient, chunk) : 0.0;
  }
}

template <typename Params, void (*Body)(const Params&, int64_t, int64_t)>
void for_chunks(int64_t count, const Params& params, ParallelFor parallel) {
  if (count == 0) return;
  Params copy = params;
  parallel(
      count, kChunksPerTask,
      [](int64_t begin, int64_t end, void* raw) { Body(*static_cast<const Params*>(raw), begin, end); }, &copy);
}

}  // namespace

void gradient_norm(const NormParams& params, ParallelFor parallel) {
  const int64_t count = params.step.chunk_count;
  for_chunks<NormParams, norm_chunks>(count, params, parallel);
  double lanes[kLanes] = {};
  for (int64_t i = 0; i < count; ++i) lanes[i % kLanes] += params.partial[i];
  *params.step.verdict = judge(sum_lanes(lanes), params);
}

void optimizer_update(const StepParams& params, ParallelFor parallel) {
  for (int64_t i = 0; i < params.tensor_count; ++i) begin_update(params, i);
  if (params.verdict->finite == 0) return;
  if (params.rule == Rule::adamw) {
    for_chunks<StepParams, update_chunks<AdamW>>(params.chunk_count, params, parallel);
  } else {
    for_chunks<StepParams, update_chunks<Lion>>(params.chunk_count, params, parallel);
  }
}

}  // namespace palp_fast::cpu::PALP_LEVEL
