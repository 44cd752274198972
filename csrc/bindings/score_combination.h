// Arguments of score_combination, checked, as its kernels on every device take them.
#pragma once

#include <tuple>

#include "palp_fast/score_combination.h"
#include "tensors.h"

namespace palp_fast::bindings {

// As in the schema.
struct ScoreArguments {
  const Tensor &pred, &target;
  const std::vector<Tensor>& predictions;
  const std::vector<double>& factors;
  const OptionalTensor& coefficients;
  double residual_weight;
  const OptionalTensor &residual_scale, &sample_weight, &mask;

  bool any_double() const {
    bool found = bindings::any_double({&pred, &target});
    for (const Tensor& prediction : predictions) found = found || bindings::any_double({&prediction});
    return found;
  }
};

template <typename Real>
ScoreParams<Real> score_params(const ScoreArguments& in) {
  ScoreParams<Real> params;
  params.shape = shape_of(in.pred, "pred");
  const int64_t batch = params.shape.batch;
  params.pred = view_of(in.pred, in.pred, params.shape, "pred");
  params.target = view_of(in.target, in.pred, params.shape, "target");
  params.terms = int64_t(in.predictions.size());
  STD_TORCH_CHECK(
      params.terms <= kMostTerms, "predictions has ", params.terms, " tensors: allowed are at most ", kMostTerms);
  STD_TORCH_CHECK(
      in.factors.size() == in.predictions.size(), "factors has ", in.factors.size(), " values: allowed are ",
      params.terms);
  for (int64_t term = 0; term < params.terms; ++term) {
    params.predictions[term] = view_of(in.predictions[term], in.pred, params.shape, "predictions");
    params.factors[term] = Real(in.factors[term]);
  }
  if (in.coefficients) {
    params.coefficients = table_of(*in.coefficients, in.pred, params.terms, batch, "coefficients");
  }
  params.residual_weight = Real(in.residual_weight);
  if (in.residual_scale) params.residual_scale = vector_of(*in.residual_scale, in.pred, batch, "residual_scale");
  if (in.sample_weight) params.sample_weight = vector_of(*in.sample_weight, in.pred, batch, "sample_weight");
  if (in.mask) params.mask = view_of(*in.mask, in.pred, params.shape, "mask", true);
  return params;
}

// grad_output as a vector of one.
inline VectorView scalar_of(const Tensor& tensor, const Tensor& first, const char* name) {
  check_device(tensor, first, name);
  STD_TORCH_CHECK(tensor.numel() == 1, name, " has ", tensor.numel(), " elements: allowed is a scalar");
  return VectorView{tensor.const_data_ptr(), dtype_of(tensor.scalar_type(), name), 0};
}

}  // namespace palp_fast::bindings
