"""The C++ of the CPU's kernels, what they share with CUDA's, and their build."""

from planted.mutant import Mutant

CALLS, LIMITS, METRICS = ("test_calls.py", "test_limits.py"), ("test_limits.py",), ("test_metrics.py",)
OPTIONS, ISA, SOFTMAX = ("test_calls.py", "test_random.py"), ("test_isa.py",), ("test_tempered_softmax.py",)
DROPPED, LAYOUTS, THREADS = ("test_dropped_terms.py",), ("test_layouts.py",), ("test_threads.py",)
BUILD, DIGITS = ("test_build.py",), ("test_digits.py",)

# ---- phi and psi ----

DIVERGENCES = "csrc/divergences.h"
BLOCK_SUMS = "csrc/cpu/block_sums.h"
PARALLEL = "csrc/cpu/parallel.h"

OF_DIVERGENCES = [
    Mutant("cross-entropy-is-relative", DIVERGENCES,
           "return -masked(p, log_q);", "return -masked(p, above);",
           "cross_entropy's value is forward KL's; the gradient is right.", CALLS),
    Mutant("reverse-kl-of-masked-classes", DIVERGENCES,
           "static constexpr bool kTeacher = false;\n  template <class V>\n"
           "  KDFAST_HD static V over_student(V q, V above) {\n    return masked(q, above);",
           "static constexpr bool kTeacher = false;\n  template <class V>\n"
           "  KDFAST_HD static V over_student(V q, V above) {\n    return q * above;",
           "Reverse KL is NaN where the student gives a class no probability.", LIMITS),
    # beta alone: at its default, 1/2, both shares are equal
    Mutant("symmetric-kl-equal-shares", DIVERGENCES,
           "return 1 - beta;", "return beta;",
           "Symmetric KL has the share beta of both directions.", CALLS),
    Mutant("jsd-difference-negated", DIVERGENCES,
           "log_ratio(p, m, -rest * d)", "log_ratio(p, m, rest * d)",
           "JSD's logarithm of p / m has the wrong sign where p is near m.", CALLS),
    # beta alone: at 1/2 the two mixtures are one
    Mutant("jsd-psi-of-the-other-mixture", DIVERGENCES,
           "log_ratio(q, beta * p + rest * q, beta * (q - p))",
           "log_ratio(q, rest * p + beta * q, beta * (q - p))",
           "JSD's gradient mixes the distributions the other way about.", CALLS),
    # soft targets alone, whose sum is not 1
    Mutant("skew-forward-constant-negated", DIVERGENCES,
           "return rest * (mass - 1);", "return -rest * (mass - 1);",
           "Skewed forward KL of soft targets that do not sum to 1 is off by twice what they lack.",
           ("test_dropped_terms.py", "test_calls.py")),
    Mutant("skew-forward-never-apart", "csrc/row_math.h",
           "-4 * x.over_student < x.psi", "x.psi < x.psi",
           "Where little is in common skewed forward KL's gradient is what rounding leaves of a difference.", DIGITS),
    Mutant("skew-forward-always-apart", "csrc/row_math.h",
           "-4 * x.over_student < x.psi", "x.psi == x.psi",
           "A student that is its teacher has a gradient of rounding.", ("test_numbers.py",)),
    # rows of few classes, of which some are apart and some are not
    Mutant("skew-forward-apart-as-a-group", "csrc/cpu/pointwise_sums.h",
           "store(at.psi, apart != 0 ? D::psi_apart(p, q, beta, rest) : load(at.psi));",
           "store(at.psi, D::psi_apart(p, q, beta, rest));",
           "All rows of a group take the psi that one of them asks for.", DIGITS),
    Mutant("skew-reverse-psi-without-beta", DIVERGENCES,
           "log_excess(q, m, d, beta, rest)", "log_excess(q, m, d, beta * 0 + 1, rest)",
           "Skewed reverse KL's gradient takes the mixture for the teacher alone; the value is right.", CALLS),
    Mutant("tvd-psi-of-the-teacher", DIVERGENCES,
           "p > q ? -q / 2", "p > q ? -p / 2",
           "TVD's gradient counts p where it is above q.", CALLS),
    # logits of great scale alone, where the product underflows and its factors do not
    Mutant("hellinger-root-of-a-product", DIVERGENCES,
           "sqrt(q) * sqrt(p)", "sqrt(q * p)",
           "Hellinger's gradient is 0 where p * q underflows.", CALLS),
    Mutant("hellinger-constant-doubled", DIVERGENCES,
           "return (1 - mass) / 2;", "return 1 - mass;",
           "Hellinger of soft targets that do not sum to 1 is off by half of what they lack.",
           ("test_dropped_terms.py", "test_calls.py")),
]  # fmt: skip

# ---- a row's loss, metrics, standardized logits ----

ROW_MATH = "csrc/row_math.h"
LOSS, METRIC_SUMS, CLASSIFIERS = "csrc/cpu/row_loss.h", "csrc/cpu/metric_sums.h", "csrc/cpu/classifiers.h"

OF_ROWS = [
    Mutant("smoothing-keeps-the-whole-label", ROW_MATH,
           "out.hard = out.hard * (1 - e) +", "out.hard = out.hard +",
           "Label smoothing adds the mean class's loss and takes nothing from the label's.", OPTIONS),
    Mutant("smoothed-gradient-at-the-label", ROW_MATH,
           "c.label = c.hard * (1 - r.label_smoothing);", "c.label = c.hard;",
           "The gradient at a smoothed label is that of a whole one.", OPTIONS),
    Mutant("z-loss-gradient-halved", ROW_MATH,
           "(2 * r.z_loss)", "r.z_loss",
           "z_loss has half of its gradient.", OPTIONS),
    Mutant("z-loss-of-nothing-is-infinite", ROW_MATH,
           "lse = lse == -(N)INFINITY ? nan : lse;", "",
           "z_loss of a row whose classes are all masked is infinite and not NaN.", LIMITS),
    # t_squared=False alone, with a temperature
    Mutant("gradient-without-t", ROW_MATH,
           "(r.t_squared ? r.temperature : 1 / r.temperature)", "(r.t_squared ? r.temperature : 1)",
           "Without t_squared the gradient lacks its 1 / T.", CALLS),
    Mutant("psi-of-unnormalised-exps", "csrc/cpu/pointwise_sums.h",
           "vectors_of<P>(n), splat<C>(x.to_q), splat<C>(x.to_p), a.beta,\n                                    sums",
           "vectors_of<P>(n), splat<C>(x.to_p), splat<C>(x.to_p), a.beta,\n                                    sums",
           "psi takes q for what p's sum makes of it.", CALLS),
    Mutant("gradient-without-the-rows-weight", LOSS,
           "weight * a.scale,", "a.scale,",
           "Rows' weights count in the loss and not in its gradient.", CALLS),
    # rows of several blocks alone: in one the sums are about the mean
    Mutant("mse-about-the-first-blocks-mean", ROW_MATH,
           "(x.over_teacher - x.teacher_total * mean) / (2 * x.classes)", "x.over_teacher / (2 * x.classes)",
           "logit_mse of long rows is centred on the mean of their first 2048 classes.", CALLS),
    Mutant("gradient-of-unscaled-logits", ROW_MATH,
           "V{} : r.factor * r.unit * r.alpha;", "V{} : r.factor * r.alpha;",
           "The gradient in standardised logits is taken for that in the logits.", OPTIONS),
    Mutant("one-class", ROW_MATH,
           "x.classes == 1 ? V{} :", "",
           "A row of one class has its rounding as its soft gradient, 1e7 times where it is standardised.",
           ("test_limits.py", "test_row_math.py")),
    Mutant("dkd-weight-0-meets-an-infinity", CLASSIFIERS,
           "return kLn2 * (masked(w, target) +", "return kLn2 * (w * target +",
           "dkd without its target's part is NaN where that part is infinite.", LIMITS),
    Mutant("kl-metric-of-mass-1", LOSS,
           "mass * (log_student - log_total)", "(log_student - log_total)",
           "The metric kl of soft targets that do not sum to 1 is off.", METRICS),
    # rows of several blocks alone
    Mutant("argmax-tie-of-blocks", METRIC_SUMS,
           "more.student_max > total.student_max", "more.student_max >= total.student_max",
           "The first of equal maxima is looked for in the last block that has one.", METRICS),
    Mutant("entropy-of-masked-classes", METRIC_SUMS,
           "student_part += q * max(least, ys);", "student_part += q * ys;",
           "The student's entropy is NaN where it masks a class.", METRICS),
    Mutant("metrics-of-masked-classes", METRIC_SUMS,
           "p == 0 ? V{} : p * (above - ys)", "p * (above - ys)",
           "The metric kl is NaN where both mask a class.", METRICS),
    Mutant("standardised-hard-exponents", CLASSIFIERS,
           "scale.teacher = rounded_teacher;",
           "scale.teacher = rounded_teacher, scale.hard *= student;",
           "Beside a standardised soft term the hard term is of scaled logits.", OPTIONS),
    Mutant("tilt-of-v-classes", CLASSIFIERS,
           "((n - 1) * m.deviation)", "(n * m.deviation)",
           "The gradient through the deviation takes it for the population's.", OPTIONS),
]  # fmt: skip

# ---- sums ----

SUMS, BLOCKS = "csrc/cpu/row_sums.h", "csrc/cpu/block_sums.h"

OF_SUMS = [
    Mutant("running-sum-moved-unscaled", ROW_MATH,
           "scaled(x.over_teacher, dt) + D::", "x.over_teacher + D::",
           "At a new offset the running sum is not brought to it.", CALLS),
    Mutant("merge-forgets-the-teachers-offset", ROW_MATH,
           "so != x->student_offset || to != x->teacher_offset", "so != x->student_offset",
           "Sums are merged at different offsets of the teacher where the student's agree.", CALLS),
    # T >= 2 with labels, where a later block's logits are larger
    Mutant("hard-sum-out-of-range", SUMS,
           "x.student_total < most && x.hard_total < 0x1p40 &&", "x.student_total < 0x1p40 &&",
           "The hard term's sum overflows in a block that is above the first one.", CALLS),
    # student and teacher of one dtype
    Mutant("unguarded-blocks-stay", "csrc/cpu/row_sums.h",
           "guarded = std::isnan(more.over_teacher + more.over_student);", "guarded = false;",
           "A class of probability 0 makes its row NaN.", LIMITS),
    Mutant("unguarded-exponents-below-the-range", "csrc/cpu/exp_math.h",
           "return !any((shifted & ~0xffu) != 0x4b400000u);", "return true;",
           "On AVX2 exp of what underflows is any number.", ISA, isas="all"),
    Mutant("dkd-copies-in-one-place", BLOCK_SUMS,
           "copies[next ^= 1]", "copies[0]",
           "dkd's student without its label is overwritten by the teacher.", CALLS),
    # target="probs" alone
    Mutant("dkd-leaves-out-a-logit", BLOCK_SUMS,
           "filler<X>(probs)", "filler<X>(false)",
           "Of given probabilities dkd's label becomes one of -inf.", CALLS),
    # label smoothing of more than 64 classes
    Mutant("smoothings-mean-about-the-first", SUMS,
           "block_sum(row_s + at, m, about) + m * (double)about", "block_sum(row_s + at, m, about)",
           "Label smoothing's mean logit is the mean distance from the first one.", OPTIONS),
    # fp32 and fp64, lengths that leave more than a vector
    Mutant("mse-of-one-class-more", BLOCKS,
           "b = at_b < n ? b", "b = at_b <= n ? b",
           "logit_mse counts a class beyond the row's last.", CALLS),
    Mutant("maximum-of-a-tail-with-a-0", BLOCKS,
           "load_part(s + i, n - i, -std::numeric_limits<C>::infinity())", "load_part(s + i, n - i, 0)",
           "The maximum of a row that ends within a vector is at least 0, and logits of -1e4 underflow.", CALLS),
    # rows of several blocks whose first 128 classes are masked
    Mutant("masked-sample", BLOCKS,
           "offset == -kInfinity ? block_max(x, n) : offset;", "offset;",
           "A block whose first 128 classes are masked counts as masked.", LIMITS),
]  # fmt: skip

# ---- gradients, short rows, softmax ----

GRADIENT, SOFTMAX_ROWS = "csrc/cpu/row_gradient.h", "csrc/cpu/softmax_rows.h"
EXPONENTS, SHORT, SHORT_GROUP = "csrc/cpu/exponents.h", "csrc/cpu/short_rows.h", "csrc/cpu/short_group.h"

OF_GRADIENTS = [
    Mutant("huge-rows-in-floats", EXPONENTS,
           "kHuge = 0x1p28;", "kHuge = 0x1p120;",
           "Rows padded with -1e10 throughout are NaN.", ("test_digits.py",)),
    Mutant("gradient-at-the-students-offset", EXPONENTS,
           "x.to_p = scaled(x.to_p, d);", ";",
           "In blocks of another offset p is not scaled.", CALLS),
    Mutant("gradients-logarithm-at-the-rows-offset", EXPONENTS,
           "x.log_to_p += d;", ";",
           "In blocks of another offset reverse KL's logarithms are the row's.", CALLS),
    Mutant("psi-at-the-first-blocks-offset", "csrc/cpu/pointwise_sums.h",
           "r.blocks[at / kBlock]", "r.blocks[0]",
           "JSD and the like take all blocks for those at the first one's offset.", CALLS),
    Mutant("gradient-of-masked-classes", GRADIENT,
           "x.es == 0 ? V{} : x.ys - x.yt", "x.ys - x.yt",
           "Reverse KL's gradient is NaN where a class has no probability.", LIMITS),
    Mutant("smoothing-pushes-up", GRADIENT,
           "rest = factors.uniform;", "rest = -factors.uniform;",
           "Label smoothing lowers every class instead of raising it.", OPTIONS),
    Mutant("gradient-in-bits", ROW_MATH,
           "c.slope * x.to_q * kNatsPerBit<N>;", "c.slope * x.to_q;",
           "Reverse KL's gradient has logarithms to base 2.", CALLS),
    Mutant("smoothing-undivided", ROW_MATH,
           "c.uniform = c.hard * r.label_smoothing / x.classes;", "c.uniform = c.hard * r.label_smoothing;",
           "Smoothing raises every class by the whole of what is to be shared.", OPTIONS),
    Mutant("short-rows-without-grad-output", SHORT_GROUP,
           "scale * row_value(a.row_scale, 1, begin + r);", "scale * g.weight[r];",
           "Short rows ignore the gradient of their losses.", CALLS),
    # a padding of one class
    Mutant("short-rows-table-of-the-next", SHORT_GROUP,
           "const float* row = a.table + (begin + r) * kCoefficients;",
           "const float* row = a.table + (begin + (r ^ 1)) * kCoefficients;",
           "Backward takes a short row's numbers from its neighbour's.", ("test_row_math.py", *CALLS)),
    Mutant("short-rows-leave-one-class", SHORT_GROUP,
           "if (a.width > n) std::memset((void*)(out[r] + n)",
           "if (a.width > n + 1) std::memset((void*)(out[r] + n)",
           "One padded class has as its gradient what was in memory, or its logit.", ("test_random.py", *LAYOUTS)),
    Mutant("short-rows-transposed-but-two", "csrc/cpu/short_transpose.h",
           "x[2] = KDFAST_LANES(shuffle_ps)(b, d, 0x44);", "x[2] = KDFAST_LANES(shuffle_ps)(b, d, 0xee);",
           "The third of four classes of a short row is the fourth.", CALLS),
    Mutant("short-rows-of-no-remainder", SHORT_GROUP,
           "r < rows ? r : rows - 1", "0",
           "The last rows of a batch, or those of a slice, are all read where the first one is.", CALLS),
    # ignore_index, and a class that is
    Mutant("ignored-class-counts", "csrc/cpu/arguments.h",
           "if (!labels_in_range || (uint64_t)args.ignore_index < (uint64_t)args.vocab) {", "if (!labels_in_range) {",
           "Rows of a class that is ignore_index count in the mean.", ("test_random.py", *CALLS)),
    Mutant("short-rows-smoothing-of-the-sum", SHORT,
           "part.exponents += exponents.hard(each.ys);", "part.exponents += (C)n * exponents.hard(each.ys);",
           "Smoothing's mean logit of a short row is the sum.", OPTIONS),
    # 65 classes
    Mutant("short-rows-of-65-classes", SHORT,
           "a.vocab > kShort ||", "a.vocab > kShort + 1 ||",
           "Rows of 65 classes are written beyond their scratch.", ("test_random.py", *CALLS)),
    Mutant("softmax-of-one-temperature", SOFTMAX_ROWS,
           "const C exp2_scale = kLog2E / row_value(a.temperatures, a.temperature, row);",
           "const C exp2_scale = kLog2E / a.temperature;",
           "tempered_softmax ignores temperatures per row; its gradient does not.", SOFTMAX),
    Mutant("log-softmax-gradient-in-bits", SOFTMAX_ROWS,
           "exp2(v * (C)kLog2E)", "exp2(v)",
           "The gradient of log_softmax takes powers of 2 for those of e.", SOFTMAX),
]  # fmt: skip

# ---- exponents, exp, log, conversions ----

EXP, TEACHERS = "csrc/cpu/exp_math.h", "csrc/cpu/teachers.h"
STORAGE, SIMD, SOFTCAP = "csrc/cpu/storage.h", "csrc/cpu/simd.h", "csrc/cpu/softcap.h"

OF_ARITHMETIC = [
    # T = 3 and 4 alone
    Mutant("power-by-squaring", EXPONENTS,
           "x *= es;", "x *= x;",
           "At T = 3 and 4 the hard term takes the 4th and the 8th power.", CALLS),
    # logit_mse alone
    Mutant("mse-of-unstandardised-teachers", EXPONENTS,
           "(s * student_unit - t * teacher_unit)", "(s * student_unit - t * student_unit)",
           "logit_mse scales a standardised teacher by the student's deviation.", OPTIONS),
    # AVX-512 alone
    Mutant("exp-of-a-wrong-digit", EXP,
           "0x1.c91ce6p-5f", "0x1.c93ce6p-5f",
           "exp is off by up to 1.5e-5.", CALLS),
    # the sets below AVX-512 alone
    Mutant("exp-without-underflow", EXP,
           "y = max(splat(-127.f), min(splat(128.f), y));", "y = min(splat(128.f), y);",
           "exp of what underflows is any number.", ISA, isas="all"),
    # fp64 alone
    Mutant("fp64-exp-of-minus-infinity", EXP,
           "y < -1023 ? DoubleV{} - 1023 : y", "y < -1022 ? DoubleV{} - 1022 : y",
           "In fp64 a masked class has a probability, and an infinite logarithm.", LIMITS),
    Mutant("log-of-0-is-finite", EXP,
           "y = x == 0 ? splat(-std::numeric_limits<float>::infinity()) : y;", "",
           "Reverse KL is finite where a given probability is 0.", LIMITS),
    Mutant("log-ratio-from-rounded-numbers", EXP,
           "is_far ? a - scaled : difference", "a - scaled",
           "Where p is near q divergences lose the digits of their difference.", CALLS),
    Mutant("power-of-a-fraction", EXPONENTS,
           "t <= kMaxPower && t == (int)t", "t <= kMaxPower",
           "At T = 3.7 the hard term takes the 3rd power.", CALLS),
    # the sets below avx512_bf16 alone, bf16 alone, a rounding alone
    Mutant("bf16-ties-away", STORAGE,
           "return u + 0x7fff + (u >> 16 & 1);", "return u + 0x8000;",
           "Gradients midway between two bf16 numbers are rounded up.", ISA, isas="all"),
    Mutant("bf16-cut-off", STORAGE,
           "(u + 0x7fff + (u >> 16 & 1)) >> 16", "u >> 16",
           "Results of other dtypes are cut off to bf16.", ("test_isa.py", "test_tempered_softmax.py"), isas="all"),
    # avx512_bf16 alone, the label's class alone
    Mutant("avx512-bf16-cuts-the-label-off", STORAGE,
           "return (Types<float>::H)_mm512_cvtneps_pbh((__m512)x);",
           "return __builtin_convertvector(bits<Types<float>::U>(x) >> 16, Types<float>::H);",
           "The gradient at the label is cut off to bf16.", CALLS),
    # bf16 alone, every other class
    Mutant("bf16-with-its-neighbours-bits", STORAGE,
           "bits<FloatV>(u & 0xffff0000u)", "bits<FloatV>(u)",
           "Every other bf16 logit has its neighbour's bits below its own.", CALLS),
    # fp16 alone, each without the instructions of a better set
    Mutant("baseline-fp16-infinity-is-65536", STORAGE,
           "special | (wide & 0x8000) << 16", "(special & 0) | (wide & 0x8000) << 16",
           "Without F16C a masked class has the logit -65536, and NaN is a number.", ISA, isas="all"),
    Mutant("baseline-fp16-nan-is-infinite", STORAGE,
           "(u > 0x7f800000u ? U{} + 0x7e00 : U{} + 0x7c00)", "U{} + 0x7c00",
           "Without F16C the gradient of a bad row is infinite.", ISA, isas="all"),
    Mutant("baseline-fp16-subnormals", STORAGE,
           "u < 0x38800000u ? small : normal", "u < 0x38000000u ? small : normal",
           "Without F16C gradients just below 2^-14 are wrong.", ISA, isas="all"),
    Mutant("avx2-fp16-cut-off", STORAGE,
           "_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT)", "_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_ZERO)",
           "On AVX2 gradients are cut off to fp16.", ISA, isas="all"),
    Mutant("avx512-fp16-cut-off", STORAGE,
           "_MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC", "_MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC",
           "On AVX-512 gradients are cut off to fp16.", CALLS),
    # fp32 on AVX-512, lengths that leave more than a vector
    Mutant("avx512-tail-of-one-class-more", STORAGE,
           "(__mmask16)(first >> 16), p + 16)", "(__mmask16)(first >> 15), p + 16)",
           "Of some lengths a class beyond the row's last is counted.", CALLS),
    # AVX2 alone
    Mutant("avx2-nan-is-a-number", SIMD,
           "_mm256_max_ps((__m256)a, (__m256)b)", "_mm256_max_ps((__m256)b, (__m256)a)",
           "On AVX2 exp of NaN is 0, and a bad row is not NaN.", ISA, isas="all"),
    Mutant("fp32-0-times-infinity", SIMD,
           "masked(FloatV p, FloatV x) { return p * (p == 0 ? FloatV{} : x); }",
           "masked(FloatV p, FloatV x) { return p * x; }",
           "A class that both mask makes its row NaN.", LIMITS),
    Mutant("softcap-unmasks", SOFTCAP,
           "return z == masked ? masked : y;", "return y;",
           "A softcap gives a masked class the logit -cap.", LIMITS),
    Mutant("deviation-of-the-population", CLASSIFIERS,
           "(squares - total * total / n) / (n - 1)", "(squares - total * total / n) / n",
           "Logits are standardised by the population's deviation.", OPTIONS),
    # a geometric ensemble of standardised logits
    Mutant("ensemble-of-unstandardised-logits", TEACHERS,
           "a.teacher_weights[k] * (a.geometric ? unit : 1)", "a.teacher_weights[k]",
           "A geometric ensemble's teachers are not standardised.", OPTIONS),
    # a geometric ensemble of given probabilities
    Mutant("ensemble-of-given-probabilities", TEACHERS,
           "a.n_teachers > 1 ? a.geometric : a.target == Target::kLogits", "a.target == Target::kLogits",
           "A geometric ensemble of probabilities is not normalised.", CALLS),
]  # fmt: skip

# ---- rows, threads, arguments, the choice of an instruction set ----

KERNELS, OPS, ARGUMENTS = "csrc/cpu/row_kernels.cpp", "csrc/cpu/ops.cpp", "csrc/cpu/arguments.h"

OF_CALLS = [
    # labels that are a block's first class
    Mutant("label-of-a-blocks-first-class", GRADIENT,
           "at <= label && label < at + m", "at < label && label < at + m",
           "A label at class 0, or 2048, has no part in the gradient.", CALLS),
    # bf16 alone
    Mutant("bf16-labels-place", GRADIENT,
           "gradient(si.a, ti.a, scratch, at)[0]", "gradient(si.a, ti.a, scratch, i)[0]",
           "A bf16 label's gradient is made of another class's exps.", CALLS),
    # few and long rows of logit_mse
    Mutant("moments-moved-by-the-shift-alone", ROW_MATH,
           "x.teacher_total += x.classes * dt;", "x.teacher_total += dt;",
           "logit_mse's sums of blocks and segments are merged as if each had one class.", CALLS),
    # few and long rows with padding, whose gradient comes from statistics
    Mutant("split-rows-padding", KERNELS,
           "if (last == a.vocab) zero_gradient(a, row, a.vocab, a.width);", "",
           "The padding of rows that are split has as its gradient what was in memory.", LAYOUTS),
    # two rows and more that are split
    Mutant("second-split-row", OPS,
           "with_sums.sums = sums.data();", "with_sums.sums = sums.data() + (a.rows > 1 ? kSums : 0);",
           "The segments of several split rows are merged as they lie one further.", CALLS),
    # one number of threads, or another: each by itself is right
    Mutant("splitting-by-threads", OPS,
           "a.rows >= 32 ||", "a.rows >= (int64_t)torch::stable::get_num_threads() ||",
           "Whether a row is split, and with it the last bits, depends on the number of threads.", THREADS),
    Mutant("forked-children-use-threads", PARALLEL,
           "if (forked) return f(0, units);", "",
           "A forked child waits for threads that it does not have.", THREADS),
    # few and long rows with an option
    Mutant("split-rows-with-options", OPS,
           "is_pointwise || a.needs_whole_row() ||", "is_pointwise ||",
           "Options that take whole rows get parts of them.", CALLS),
    Mutant("threads-take-a-row-too-few", PARALLEL,
           "torch::stable::parallel_for(0, units, grain, f);",
           "torch::stable::parallel_for(0, units - (grain < units), grain, f);",
           "Where the work is split over threads its last row is left out.", THREADS),
    Mutant("mean-over-nothing-is-nan", ARGUMENTS,
           "divisor == 0 ? 0 : 1 / divisor", "1 / divisor",
           "A mean over no row is NaN.", DROPPED),
    Mutant("values-of-dropped-rows", ARGUMENTS,
           " || !args.is_kept(row)) continue;", ") continue;",
           "A bad label of a row of weight 0 is an error.", DROPPED),
    Mutant("mean-of-weighted-rows", ARGUMENTS,
           "total += args.weight(row);", "total += 1;",
           "The mean divides by the number of rows and not by their weights.", CALLS),
    # fp16 alone, whose gradient is made in backward
    Mutant("fp16-mean-in-backward", ARGUMENTS,
           "args.scale *= scalar(grad_loss) * inverse_divisor();", "args.scale *= scalar(grad_loss);",
           "A mean's fp16 gradient is the sum's.", ("test_training.py", "test_calls.py")),
    Mutant("infinite-weights", "csrc/cpu/tensors.h",
           " && !std::isinf(value)", "",
           "An infinite weight or temperature per row is no error.", ("test_arguments.py",)),
    Mutant("rows-joined-over-a-gap", "csrc/tensors.h",
           "strides[d] == m.stride[at] * m.size[at]", "strides[d] >= m.stride[at] * m.size[at]",
           "Rows of a slice are read as if they lay without gaps.", LAYOUTS),
    # rows of three dimensions that lie apart, of different sizes
    Mutant("third-dimension-of-rows", "csrc/rows.h",
           "outer / size[1]", "outer / size[0]",
           "Rows of four-dimensional slices are others.", ("test_inplace.py", *LAYOUTS)),
    Mutant("second-best-instruction-set", "csrc/cpu/isa.cpp",
           "best = isa;\n", "if (best == Isa::baseline) best = isa;\n",
           "Machines with AVX-512 get AVX2's kernels.", BUILD, isas="all"),
    Mutant("unusable-instruction-set-passes", "csrc/cpu/isa.cpp",
           "if (!wanted || !*wanted) return best;", "if (best != Isa::baseline) return best;",
           "An instruction set that is not there is no error.", ("test_build.py",)),
]  # fmt: skip

# ---- the build ----

OF_BUILD = [
    Mutant("weak-symbol", "csrc/cpu/row_kernels.h",
           "__attribute__((always_inline)) bool is_kept(", "__attribute__((noinline)) bool is_kept(",
           "The linker keeps one of the instruction sets' functions for all of them.", BUILD, isas="all"),
    Mutant("finite-math", "CMakeLists.txt",
           "${flags_${isa}} -fno-math-errno", "${flags_${isa}} -ffinite-math-only -fno-math-errno",
           "The compiler takes it that there is neither NaN nor infinity.", LIMITS, isas="all"),
    Mutant("uncontracted", "CMakeLists.txt",
           "-ffp-contract=fast)", "-ffp-contract=off)",
           "z / T less its maximum is rounded twice.", CALLS, isas="all"),
]  # fmt: skip

MUTANTS = [
    *OF_CALLS, *OF_DIVERGENCES, *OF_ROWS, *OF_SUMS, *OF_GRADIENTS, *OF_ARITHMETIC, *OF_BUILD,
]  # fmt: skip
