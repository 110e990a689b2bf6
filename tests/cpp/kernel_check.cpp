// The row kernels against the formulas in double precision, without torch: on another architecture, under
// emulation. Every instruction set that was compiled and runs here; exits with 1 where a value is off.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <vector>

#include "cpu/isa.h"
#include "cpu/row_kernels.h"

using namespace kdfast;

namespace {

int failures = 0;

// 16-bit floats, one at a time
double from_bits(DType dtype, uint16_t h) {
  if (dtype == DType::kBFloat16) {
    const uint32_t u = (uint32_t)h << 16;
    float f;
    std::memcpy(&f, &u, 4);
    return f;
  }
  const int exponent = h >> 10 & 31, mantissa = h & 1023;
  const double magnitude =
      exponent ? std::ldexp(1 + mantissa / 1024., exponent - 15) : std::ldexp(mantissa, -24);
  return h & 0x8000 ? -magnitude : magnitude;
}
uint16_t to_bits(DType dtype, float x) {  // truncated: any 16-bit value will do
  uint32_t u;
  std::memcpy(&u, &x, 4);
  if (dtype == DType::kBFloat16) return u >> 16;
  const int exponent = (int)(u >> 23 & 255) - 127 + 15;
  const uint16_t sign = u >> 16 & 0x8000;
  return exponent <= 0 ? sign : sign | exponent << 10 | (u >> 13 & 1023);
}

struct Array {
  DType dtype;
  std::vector<char> bytes;
  Array(DType dtype, size_t n) : dtype(dtype), bytes(n * size()) {}
  size_t size() const { return dtype == DType::kDouble ? 8 : dtype == DType::kFloat ? 4 : 2; }
  double get(size_t i) const {
    double d;
    float f;
    uint16_t h;
    switch (dtype) {
      case DType::kDouble:
        std::memcpy(&d, &bytes[8 * i], 8);
        return d;
      case DType::kFloat:
        std::memcpy(&f, &bytes[4 * i], 4);
        return f;
      default:
        std::memcpy(&h, &bytes[2 * i], 2);
        return from_bits(dtype, h);
    }
  }
  void set(size_t i, float x) {
    const double d = x;
    const uint16_t h = size() == 2 ? to_bits(dtype, x) : 0;
    std::memcpy(&bytes[size() * i],
                size() == 8   ? (const void*)&d
                : size() == 4 ? (const void*)&x
                              : &h,
                size());
  }
};

struct Truth {
  std::vector<double> loss, grad;
};

std::vector<double> softmax(const Array& z, size_t row, int v, double t, std::vector<double>& log) {
  double high = -INFINITY, total = 0;
  for (int i = 0; i < v; ++i) high = std::fmax(high, z.get(row * v + i) / t);
  for (int i = 0; i < v; ++i) total += std::exp(z.get(row * v + i) / t - high);
  std::vector<double> p(v);
  log.resize(v);
  for (int i = 0; i < v; ++i) p[i] = std::exp(log[i] = z.get(row * v + i) / t - high - std::log(total));
  return p;
}

Truth truth(const Array& s, const Array& t, const LossArgs& a) {
  const int v = a.vocab;
  Truth out{std::vector<double>(a.rows), std::vector<double>(a.rows * v)};
  for (int64_t row = 0; row < a.rows; ++row) {
    if (!a.is_kept(row)) continue;
    std::vector<double> log_p, log_q, log_q1, gradient(v);
    const auto p = softmax(t, row, v, a.teacher_temperature, log_p),
               q = softmax(s, row, v, a.temperature, log_q);
    const auto q1 = softmax(s, row, v, 1, log_q1);
    double d = 0, psi_sum = 0, mean = 0;
    for (int i = 0; i < v; ++i) mean += (s.get(row * v + i) - t.get(row * v + i)) / v;
    for (int i = 0; i < v; ++i) {
      const double centred = s.get(row * v + i) - t.get(row * v + i) - mean;
      switch (a.divergence) {
        case Divergence::kCrossEntropy:
          d -= p[i] * log_q[i];
          break;
        case Divergence::kForwardKL:
          d += p[i] * (log_p[i] - log_q[i]);
          break;
        case Divergence::kReverseKL:
          d += q[i] * (log_q[i] - log_p[i]);
          break;
        case Divergence::kJSD: {
          const double m = a.beta * p[i] + (1 - a.beta) * q[i];
          gradient[i] = (1 - a.beta) * q[i] * std::log(q[i] / m);  // psi
          psi_sum += gradient[i];
          d += a.beta * p[i] * std::log(p[i] / m) + gradient[i];
          break;
        }
        default:
          d += centred * centred / (2 * v), gradient[i] = centred / v;
      }
    }
    const double t2 = a.t_squared ? a.temperature * a.temperature : 1;
    for (int i = 0; i < v; ++i) {
      if (a.divergence == Divergence::kReverseKL)
        gradient[i] = q[i] * (log_q[i] - log_p[i] - d) / a.temperature;
      if (a.divergence == Divergence::kJSD) gradient[i] = (gradient[i] - q[i] * psi_sum) / a.temperature;
      if (a.divergence < Divergence::kReverseKL) gradient[i] = (q[i] - p[i]) / a.temperature;
      out.grad[row * v + i] =
          a.scale * (a.alpha * t2 * gradient[i] + a.hard_weight * (q1[i] - (i == a.labels[row] ? 1 : 0)));
    }
    out.loss[row] = a.alpha * t2 * d - a.hard_weight * log_q1[a.labels[row]];
  }
  return out;
}

void check(const char* isa, const char* kernel, const LossArgs& a, const std::vector<double>& losses,
           const Array& grad, const Truth& want) {
  const double precision = grad.dtype == DType::kDouble     ? 1e-13
                           : grad.dtype == DType::kFloat    ? 2e-6
                           : grad.dtype == DType::kBFloat16 ? 4.5e-3
                                                            : 6e-4;
  const double of_loss = grad.dtype == DType::kDouble ? 1e-13 : 4e-6;
  double high = 1e-30, grad_error = 0, loss_error = 0;
  for (double g : want.grad) high = std::fmax(high, std::fabs(g));
  for (size_t i = 0; i < want.grad.size(); ++i) {
    const double error = std::fabs(grad.get(i) - want.grad[i]) / high;
    if (!(error <= grad_error)) grad_error = error;  // NaN counts as an error
  }
  for (size_t i = 0; i < want.loss.size(); ++i) {
    const double error = std::fabs(losses[i] - want.loss[i]) / (1 + std::fabs(want.loss[i]));
    if (!(error <= loss_error)) loss_error = error;
  }
  if (grad_error <= precision && loss_error <= of_loss) return;
  ++failures;
  std::printf("%s %s: dtype %d, divergence %d, V %ld, T %g: gradient off by %g, loss by %g\n", isa, kernel,
              (int)grad.dtype, (int)a.divergence, (long)a.vocab, a.temperature, grad_error, loss_error);
}

void check_case(const char* isa, const RowKernels& kernels, DType dtype, Divergence divergence, int v,
                double t) {
  const int rows = 3;
  Array s(dtype, rows * v), teacher(dtype, rows * v), grad(dtype, rows * v);
  uint32_t seed = 1 + v;
  for (int i = 0; i < rows * v; ++i) {
    s.set(i, (float)((seed = seed * 1664525 + 1013904223) >> 8) / (1 << 21) - 4);
    teacher.set(i, (float)((seed = seed * 1664525 + 1013904223) >> 8) / (1 << 21) - 4);
  }
  const int64_t labels[rows] = {0, v - 1, -100};
  std::vector<double> losses(rows);
  LossArgs a{};
  a.rows = rows;
  a.vocab = a.width = v;
  a.student = {s.bytes.data(), dtype, {1, 1, rows}, {0, 0, v}};
  a.grad_layout = a.student;
  const Matrix teachers[] = {{teacher.bytes.data(), dtype, {1, 1, rows}, {0, 0, v}}};
  const double teacher_weights[] = {1};
  a.teachers = teachers;
  a.teacher_weights = teacher_weights;
  a.n_teachers = 1;
  a.logit_scale = a.teacher_logit_scale = 1;
  a.divergence = divergence;
  a.beta = 0.3;
  a.labels = labels;
  a.ignore_index = -100;
  a.temperature = a.teacher_temperature = divergence == Divergence::kLogitMSE ? 1 : t;
  a.alpha = 0.7;
  a.hard_weight = 0.3;
  a.t_squared = true;
  a.scale = 0.5;
  a.losses = losses.data();
  a.grad = grad.bytes.data();
  const Truth want = truth(s, teacher, a);
  kernels.loss_grad(a, 0, rows);
  check(isa, "loss_grad", a, losses, grad, want);
  for (int64_t segments : {int64_t{1}, (v + kSegment - 1) / kSegment}) {
    if (segments > 1 && divergence == Divergence::kJSD) continue;  // pass B is of whole rows
    std::vector<double> sums(rows * segments * kSums), table(rows * kCoefficients);
    std::vector<float> narrow(rows * kCoefficients);
    a.sums = sums.data();
    // short rows' table is fp32's
    (dtype == DType::kDouble || v > 64) ? void(a.wide_table = table.data()) : void(a.table = narrow.data());
    a.scale = 1;
    if (segments == 1) {
      kernels.losses(a, 0, rows);
    } else {
      kernels.sums(a, segments, 0, rows * segments);
      kernels.merge(a, segments);
      kernels.losses_and_coefficients(a, segments);
    }
    a.scale = 0.5;
    kernels.grad(a, segments, 0, rows * segments);
    check(isa, segments == 1 ? "losses, grad" : "sums, losses_and_coefficients, grad by segments", a, losses,
          grad, want);
  }
}

}  // namespace

int main() {
  for (Isa isa : kAllIsas) {
    if (!is_usable(isa)) continue;
    const RowKernels* kernels = nullptr;
#define X(set) \
  if (isa == Isa::set) kernels = &row_kernels_##set();
    KDFAST_ISAS
#undef X
    int cases = 0;
    for (DType dtype : {DType::kFloat, DType::kBFloat16, DType::kHalf, DType::kDouble}) {
      for (auto divergence : {Divergence::kCrossEntropy, Divergence::kForwardKL, Divergence::kReverseKL,
                              Divergence::kJSD, Divergence::kLogitMSE}) {
        for (int v : {2, 7, 16, 100, 2049, 20000}) {
          for (double t : {1., 2., 3.7}) check_case(name(isa), *kernels, dtype, divergence, v, t), ++cases;
        }
      }
    }
    std::printf("%s: %d cases\n", name(isa), cases);
  }
  std::printf("%d failures\n", failures);
  return failures != 0;
}
