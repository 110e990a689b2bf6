// Written by tools/write_operators.py from kdfast/arguments.py, which says what each of these is.
#pragma once
// clang-format off

#include <torch/csrc/stable/c/shim.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace kdfast {

struct Inputs {
  std::vector<torch::stable::Tensor> teachers;
  std::optional<torch::stable::Tensor> labels;
  std::optional<torch::stable::Tensor> row_weight;
  std::optional<torch::stable::Tensor> normalizer;
  std::optional<torch::stable::Tensor> temperatures;
  std::optional<torch::stable::Tensor> teacher_temperatures;
  std::optional<torch::stable::Tensor> indices;
  std::optional<torch::stable::Tensor> dynamic_numbers;
};

struct Settings {
  double temperature;
  double teacher_temperature;
  double alpha;
  double hard_weight;
  bool t_squared;
  std::string divergence;
  double beta;
  std::string target;
  std::string missing;
  std::string ensemble;
  std::vector<double> teacher_weights;
  int64_t vocab_size;
  int64_t ignore_index;
  std::string reduction;
  double divisor;
  double label_smoothing;
  double z_loss;
  double logit_scale;
  double teacher_logit_scale;
  double softcap;
  double teacher_softcap;
  bool standardize;
  std::vector<double> dkd_weights;
  bool metrics;
};

}  // namespace kdfast

// Both as the arguments of an operator, which torch hands over one by one, and as the structs of these.
#define KDFAST_ARGUMENTS \
  std::vector<torch::stable::Tensor> teachers, std::optional<torch::stable::Tensor> labels, \
  std::optional<torch::stable::Tensor> row_weight, \
  std::optional<torch::stable::Tensor> normalizer, \
  std::optional<torch::stable::Tensor> temperatures, \
  std::optional<torch::stable::Tensor> teacher_temperatures, \
  std::optional<torch::stable::Tensor> indices, \
  std::optional<torch::stable::Tensor> dynamic_numbers, double temperature, \
  double teacher_temperature, double alpha, double hard_weight, bool t_squared, \
  StringHandle divergence, double beta, StringHandle target, StringHandle missing, \
  StringHandle ensemble, std::vector<double> teacher_weights, int64_t vocab_size, \
  int64_t ignore_index, StringHandle reduction, double divisor, double label_smoothing, \
  double z_loss, double logit_scale, double teacher_logit_scale, double softcap, \
  double teacher_softcap, bool standardize, std::vector<double> dkd_weights, bool metrics
#define KDFAST_CALL   kdfast::Inputs{ \
  std::move(teachers), labels, row_weight, normalizer, temperatures, teacher_temperatures, \
  indices, dynamic_numbers},   kdfast::Settings{ \
  temperature, teacher_temperature, alpha, hard_weight, t_squared, kdfast::taken(divergence), \
  beta, kdfast::taken(target), kdfast::taken(missing), kdfast::taken(ensemble), \
  std::move(teacher_weights), vocab_size, ignore_index, kdfast::taken(reduction), divisor, \
  label_smoothing, z_loss, logit_scale, teacher_logit_scale, softcap, teacher_softcap, \
  standardize, std::move(dkd_weights), metrics}
