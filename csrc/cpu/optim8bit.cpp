#include "blockwise_part.h"
#include "kernels.h"
#include "palp_fast/convert.h"

namespace palp_fast::cpu::PALP_LEVEL {
namespace {

constexpr int64_t kPart = 256;  // elements worked on at a time: what is kept of them stays in the first cache
constexpr int64_t kChunksPerTask = 8;
constexpr int64_t kAhead = 2 * kPart;  // elements from what is worked on to what is asked for

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
PALP_INLINE float larger_magnitude(float most, float value) {
  const uint32_t left = float_bits(most), right = float_bits(value) & 0x7fffffffu;
  return bits_float(left > right ? left : right);
}

struct Scales {
  float first = 0, second = 0;
};

// Some elements of a tensor on their way through a step.
struct Part {
  int64_t at, count;
  const float* grad;
  float* param;  // the tensor's own memory where that is fp32 and may be written
  float first[kPart], second[kPart];
  float grads[kPart], params[kPart];
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
    const Scales old{tensor_.first_scales[block], kTwo ? tensor_.second_scales[block] : 0.0f};
    const bool fits = end - begin <= kPart;
    Scales scales, seen;
    Part part;
    for (int pass = fits ? 1 : 0; pass < 2; ++pass) {
      const bool write = pass == 1;
      for (int64_t at = begin; at < end; at += kPart) {
        read(at, smaller(kPart, end - at), write, part);
        renew(old, part, seen);
        if (!write) continue;
        if (fits) scales = seen;
        finish(scales, part);
        this->write(part);
      }
      scales = seen;
    }
    tensor_.first_scales[block] = scales.first;
    if (kTwo) tensor_.second_scales[block] = scales.second;
  }

  // State in 32 bits.
  void plain(int64_t begin, int64_t end) const {
    Part part;
    for (int64_t at = begin; at < end; at += kPart) {
      read(at, smaller(kPart, end - at), true, part);
      apply(part, floats(tensor_.first) + at, kTwo ? floats(tensor_.second) + at : part.second);
      write(part);
    }
  }

 private:
  static constexpr bool kTwo = UpdateRule::kTwoMoments;

  static float* floats(void* data) { return static_cast<float*>(data); }
  uint8_t* first_codes(const Part& part) const { return static_cast<uint8_t*>(tensor_.first) + part.at; }
  uint8_t* second_codes(const Part& part) const { return static_cast<uint8_t*>(tensor_.second) + part.at; }

  void read(int64_t at, int64_t count, bool write, Part& part) const {
    part.at = at;
    part.count = count;
    part.grad = load(gradient_.data, DType(gradient_.dtype), at, count, part.grads);
    const bool in_place = write && type_ == DType::float32;
    part.param = in_place ? floats(tensor_.param) + at : part.params;
    if (!in_place) copy(tensor_.param, type_, at, count, part.params);
  }

  void write(const Part& part) const {
    if (part.param == part.params) store(part.param, type_, part.at, part.count, tensor_.param);
    if (tensor_.shadow) store(part.param, DType(tensor_.types / 256), part.at, part.count, tensor_.shadow);
  }

  // What comes before the scales of the block are known: its moments, and parameters that do not wait.
  template <typename Real>
  PALP_INLINE static void begin(const StepConstants& c, Real grad, Real& first, Real& second, Real& param) {
    if constexpr (UpdateRule::kParamLast) {
      UpdateRule::moments(c, grad, first, second);
    } else {
      UpdateRule::apply(c, grad, first, second, param);
    }
  }

  // New moments into the part; their largest magnitudes into `seen`, if larger.
  void renew(Scales old, Part& part, Scales& seen) const {
    const StepConstants c = constants_;
    const float factor = factor_;
    const uint8_t *first_codes = this->first_codes(part), *second_codes = kTwo ? this->second_codes(part) : nullptr;
    int64_t i = 0;
#ifdef PALP_VECTOR
    const VectorLevels<true> first_of(kSignedMap, old.first);
    const VectorLevels<false> second_of(kUnsignedMap, old.second);
    Words first_bits(0), second_bits(0);
    for (; i + kWidth <= part.count; i += kWidth) {
      Floats first = first_of(first_codes + i), second = kTwo ? second_of(second_codes + i) : Floats(0.0f);
      Floats param = UpdateRule::kParamLast ? Floats(0.0f) : load_floats(part.param + i);
      begin(c, load_floats(part.grad + i) * factor, first, second, param);
      store_floats(first, part.first + i);
      first_bits = larger(first_bits, bits(first) & Words(0x7fffffff));
      if (!UpdateRule::kParamLast) store_floats(param, part.param + i);
      if (!kTwo) continue;
      store_floats(second, part.second + i);
      second_bits = larger(second_bits, bits(second));
    }
    seen.first = larger_magnitude(seen.first, bits_float(uint32_t(largest(first_bits))));
    seen.second = larger_magnitude(seen.second, bits_float(uint32_t(largest(second_bits))));
#endif
    for (int64_t j = i; j < part.count; ++j) {
      part.first[j] = level_of(first_codes[j], kSignedMap) * old.first;
      part.second[j] = kTwo ? level_of(second_codes[j], kUnsignedMap) * old.second : 0.0f;
    }
    for (int64_t j = i; j < part.count; ++j) {
      begin(c, part.grad[j] * factor, part.first[j], part.second[j], part.param[j]);
    }
    for (int64_t j = i; j < part.count; ++j) {
      seen.first = larger_magnitude(seen.first, part.first[j]);
      seen.second = larger_magnitude(seen.second, part.second[j]);
    }
  }

  // Codes of the moments, and parameters that have waited. Divisions and roots take their time beside the look-ups.
  void finish(Scales scales, Part& part) const {
    const StepConstants c = constants_;
    uint8_t *first_codes = this->first_codes(part), *second_codes = kTwo ? this->second_codes(part) : nullptr;
    int64_t i = 0;
#ifdef PALP_VECTOR
    const VectorCodes<true> first_of(kSignedMap, scales.first);
    const VectorCodes<false> second_of(kUnsignedMap, scales.second);
    for (; i + 4 * kWidth <= part.count; i += 4 * kWidth) {
      ask_ahead(part.at + i + kAhead, 4 * kWidth);
      if constexpr (UpdateRule::kParamLast) {
        for (int64_t j = i; j < i + 4 * kWidth; j += kWidth) {
          const Floats first = load_floats(part.first + j), second = load_floats(part.second + j);
          store_floats(UpdateRule::param(c, first, second, load_floats(part.param + j)), part.param + j);
        }
      }
      first_of(part.first + i, first_codes + i);
      if (kTwo) second_of(part.second + i, second_codes + i);
    }
#endif
    if constexpr (UpdateRule::kParamLast) {
      for (int64_t j = i; j < part.count; ++j) {
        part.param[j] = UpdateRule::param(c, part.first[j], part.second[j], part.param[j]);
      }
    }
    const float first_inverse = inverse_of(scales.first), second_inverse = inverse_of(scales.second);
    for (int64_t j = i; j < part.count; ++j) {
      first_codes[j] = nearest_code(part.first[j] * first_inverse, kSignedMap);
      if (kTwo) second_codes[j] = nearest_code(part.second[j] * second_inverse, kUnsignedMap);
    }
  }

  void ask_ahead(int64_t at, int64_t count) const {
    const int64_t grad_size = size_of(DType(gradient_.dtype)), param_size = size_of(type_);
    ask_for(gradient_.data, at * grad_size, count * grad_size);
    ask_for(tensor_.param, at * param_size, count * param_size);
    ask_for(tensor_.first, at, count);
    if (kTwo) ask_for(tensor_.second, at, count);
  }

  // The whole rule.
  void apply(Part& part, float* first, float* second) const {
    const StepConstants c = constants_;
    const float factor = factor_;
    int64_t i = 0;
#ifdef PALP_VECTOR
    for (; i + kWidth <= part.count; i += kWidth) {
      Floats m = load_floats(first + i), v = kTwo ? load_floats(second + i) : Floats(0.0f);
      Floats param = load_floats(part.param + i);
      UpdateRule::apply(c, load_floats(part.grad + i) * factor, m, v, param);
      store_floats(m, first + i);
      if (kTwo) store_floats(v, second + i);
      store_floats(param, part.param + i);
    }
#endif
    for (; i < part.count; ++i) UpdateRule::apply(c, part.grad[i] * factor, first[i], second[i], part.param[i]);
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
    const int64_t size = size_of(DType(gradient.dtype));
    ask_for(gradient.data, (at + 4 * kLanes) * size, kLanes * size);
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
