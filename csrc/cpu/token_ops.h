// The torch glue of token_stats and token_grad.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>
#include <vector>

#include "parallel.h"
#include "tensors.h"

namespace kdfast {
namespace {

// The arguments that both operators have, and the tensors that hold what the kernels' point to.
struct TokenCall {
  TokenArgs args{};
  Tensor logits, ids;
  std::vector<Tensor> owned;

  TokenCall(const Tensor& logits_, const Tensor& ids_, const std::optional<Tensor>& temperatures,
            double temperature, double logit_scale, double softcap, int64_t vocab_size)
      : logits(readable(logits_)), ids(as_contiguous(ids_)) {
    TokenArgs& a = args;
    a.student = matrix(logits);
    a.rows = rows_of(logits);
    a.width = classes_of(logits);
    a.vocab = vocab_size < 0 ? a.width : vocab_size;
    a.temperature = temperature;
    a.temperatures = doubles(temperatures);
    a.teacher_temperature = a.teacher_logit_scale = 1;
    a.logit_scale = logit_scale;
    a.softcap = softcap;
    a.divergence = Divergence::kNone;
    a.entries.count = classes_of(ids);
    a.entries.indices = ids.const_data_ptr();
    a.entries.wide = true;
    a.scale = 1;
    a.wide = a.student.dtype == DType::kDouble;
  }

  const double* doubles(const std::optional<Tensor>& values) {
    if (!values) return nullptr;
    owned.push_back(as_doubles(*values));
    return (const double*)owned.back().const_data_ptr();
  }
  Tensor result(std::vector<int64_t> shape) const {
    return empty_tensor(shape, args.wide ? ScalarType::Double : ScalarType::Float);
  }
  // An id below 0 that is not allowed has been made one that is far too large.
  static int64_t as_given(int64_t id) { return id >= (int64_t)1 << 62 ? id + INT64_MIN : id; }
  void check_ids() const {
    const int64_t count = args.entries.count;
    const int64_t* data = (const int64_t*)args.entries.indices;
    for (int64_t i = 0; i < args.rows * count; ++i) {
      if (data[i] < args.vocab) continue;
      fail<std::out_of_range>("ids: ", as_given(data[i]), " in row ", i / count, ", entry ", i % count,
                              " is out of range: with V = ", args.vocab, " it must be in [0, ",
                              args.vocab - 1, "]");
    }
    for (int64_t row = 0; args.temperatures && row < args.rows; ++row) {
      if (!is_row_value(args.temperatures[row], false) && !args.is_ignored(row))
        fail_row_value("temperature", args.temperatures[row], row, false);
    }
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor> token_stats(Tensor logits, Tensor ids,
                                                       std::optional<Tensor> temperatures, double temperature,
                                                       double logit_scale, double softcap, int64_t vocab_size,
                                                       bool entropy) {
  TokenCall call(logits, ids, temperatures, temperature, logit_scale, softcap, vocab_size);
  TokenArgs& a = call.args;
  call.check_ids();
  const auto sizes = ids.sizes();
  const std::vector<int64_t> shape(sizes.begin(), sizes.end()), rows(sizes.begin(), sizes.end() - 1);
  Tensor log_probs = call.result(shape), log_rest = call.result(rows);
  Tensor entropies = call.result(entropy ? rows : std::vector<int64_t>{0});
  Tensor stats = call.result({a.rows, kTokenStats});
  a.has_entropy = entropy;
  a.log_probs = log_probs.mutable_data_ptr();
  a.log_rest = log_rest.mutable_data_ptr();
  a.entropy = entropies.mutable_data_ptr();
  a.stats = stats.mutable_data_ptr();
  in_parallel(a.rows, a.vocab, [&](int64_t begin, int64_t end) { kernels().token_stats(a, begin, end); });
  return {log_probs, entropies, log_rest, stats};
}

Tensor token_grad(Tensor logits, Tensor ids, Tensor stats, std::optional<Tensor> grad_log_probs,
                  std::optional<Tensor> grad_entropy, std::optional<Tensor> grad_log_rest,
                  std::optional<Tensor> grad_elsewhere, std::optional<Tensor> temperatures,
                  double temperature, double logit_scale, double softcap, int64_t vocab_size) {
  TokenCall call(logits, ids, temperatures, temperature, logit_scale, softcap, vocab_size);
  TokenArgs& a = call.args;
  a.stats = stats.mutable_data_ptr();
  a.grad_log_probs = call.doubles(grad_log_probs);
  a.grad_entropy = call.doubles(grad_entropy);
  a.grad_log_rest = call.doubles(grad_log_rest);
  a.grad_elsewhere = call.doubles(grad_elsewhere);
  Tensor grad = empty_tensor(call.logits.sizes(), call.logits.scalar_type());
  advise_huge_pages(grad);
  a.grad = grad.mutable_data_ptr();
  a.grad_layout = matrix(grad);
  in_parallel(a.rows, a.vocab, [&](int64_t begin, int64_t end) { kernels().token_grad(a, begin, end); });
  return grad;
}

}  // namespace
}  // namespace kdfast
