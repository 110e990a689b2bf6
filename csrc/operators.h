// The arguments that the operators of a loss take beside the student's logits and what comes between: a flat
// list, in the order of kdfast/arguments.py. KDFAST_PASS hands them on.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <vector>

#define KDFAST_INPUTS                                                                                       \
  std::vector<torch::stable::Tensor> teachers, std::optional<torch::stable::Tensor> labels,                 \
      std::optional<torch::stable::Tensor> row_weight, std::optional<torch::stable::Tensor> normalizer,     \
      std::optional<torch::stable::Tensor> temperatures,                                                    \
      std::optional<torch::stable::Tensor> teacher_temperatures, double temperature,                        \
      double teacher_temperature, double alpha, double hard_weight, bool t_squared, std::string divergence, \
      double beta, std::string target, std::string ensemble, std::vector<double> teacher_weights,           \
      int64_t vocab_size, int64_t ignore_index, std::string reduction, double divisor,                      \
      double label_smoothing, double z_loss, double softcap, double teacher_softcap, bool standardize,      \
      std::vector<double> dkd_weights, bool metrics
#define KDFAST_PASS                                                                                    \
  teachers, labels, row_weight, normalizer, temperatures, teacher_temperatures, temperature,           \
      teacher_temperature, alpha, hard_weight, t_squared, divergence, beta, target, ensemble,          \
      teacher_weights, vocab_size, ignore_index, reduction, divisor, label_smoothing, z_loss, softcap, \
      teacher_softcap, standardize, dkd_weights, metrics

// The functions of these names in kdfast as the operators.
#define KDFAST_REGISTER_LOSS(m)                         \
  m.impl("loss_grad", TORCH_BOX(&kdfast::loss_grad));   \
  m.impl("loss_grad_", TORCH_BOX(&kdfast::loss_grad_)); \
  m.impl("stats", TORCH_BOX(&kdfast::stats));           \
  m.impl("grad", TORCH_BOX(&kdfast::grad));             \
  m.impl("grad_", TORCH_BOX(&kdfast::grad_));           \
  m.impl("scale_", TORCH_BOX(&kdfast::scale_))
