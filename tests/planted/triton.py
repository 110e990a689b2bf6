"""The Triton kernels and what launches them."""

from planted.mutant import Mutant

CALLS, LIMITS, METRICS = ("test_calls.py", "test_limits.py"), ("test_limits.py",), ("test_metrics.py",)
OPTIONS, FAULTS, LAYOUTS = (
    ("test_calls.py", "test_random.py"),
    ("test_gpu_rows.py",),
    ("test_calls.py", "test_layouts.py"),
)
LAUNCHES, STATIC, TRAFFIC = ("test_triton_launches.py",), ("test_triton_static.py",), ("test_triton_traffic.py",)
SPARSE, SPARSE_KERNELS = ("test_sparse.py", "test_sparse_entries.py"), ("test_triton_sparse.py",)
DROPPED, DIGITS, MANY = ("test_dropped_terms.py",), ("test_digits.py",), ("test_many_teachers.py",)


def _in(name: str) -> str:
    return f"kdfast/triton/{name}.py"


PASS_A, SUMS, DIVERGENCES = _in("pass_a"), _in("sums"), _in("divergences")
PASS_B_C, ROW_MATH, KERNELS = _in("pass_b_c"), _in("row_math"), _in("row_kernels")
CLASSIFIERS, PER_ROW = _in("classifiers"), _in("per_row")

OF_NUMBERS = [
    Mutant("triton-parts-offsets-swapped", PASS_A,
           "functions[k](total, dt, ds, beta)", "functions[k](total, ds, dt, beta)",
           "At a new offset the running sums take the student's for the teacher's.", CALLS),
    # rows of several tiles, where a later one is above the first
    Mutant("triton-total-at-an-old-offset", PASS_A,
           "total = teacher.total * tl.exp2(dt)", "total = teacher.total",
           "A lane's sum of the teacher's exps stays at the offset that it had.", CALLS),
    Mutant("triton-lanes-hard-sums-unmoved", SUMS,
           "hard = scaled(hard, exponent(old, hard_scale(row, SPEC), new))", "hard = scaled(hard, ds)",
           "Lanes' sums at temperature 1 are merged as those at T.", CALLS),
    # T = 3 and 4 alone
    Mutant("triton-power-by-squaring", PASS_A,
           "power = power * e", "power = power * power",
           "At T = 3 and 4 the hard term takes the 4th and the 8th power.", CALLS),
    Mutant("triton-smoothing-moved-once", SUMS,
           "sum_pair(exponents + classes * change, classes)", "sum_pair(exponents, classes)",
           "Label smoothing's sums are merged at different offsets.", OPTIONS),
    # vocabulary shards
    Mutant("triton-label-of-another-shard", _in("reductions"),
           "y = tl.where(kept & (label >= 0), y, float(\"-inf\"))", "",
           "A label that is not among a shard's classes counts as one of its own.", ("test_row_math.py",)),
    Mutant("triton-shard-of-no-scale", _in("reductions"),
           "merged = merge(load_parts(parts, index,", "merged = merge(load_parts(parts, 0,",
           "Pass B of a shard, or a segment, takes the first row's sums for each row's.", ("test_row_math.py",)),
    Mutant("triton-reverse-psi-sum", ROW_MATH,
           "level = scale * (of_p - over_student)", "level = scale * of_p",
           "Reverse KL's gradient does not sum to 0.", CALLS),
    # beta alone: at its default, 1/2, both are equal
    Mutant("triton-symmetric-psi", DIVERGENCES,
           "return rest\n\n\n@triton.jit\ndef teacher_log", "return beta\n\n\n@triton.jit\ndef teacher_log",
           "Symmetric KL's gradient weighs log(q / p) with the other share.", CALLS),
    Mutant("triton-series-too-far", DIVERGENCES,
           "tl.abs(w) < 0.125", "tl.abs(w) < 0.5",
           "A series of four terms is taken where it wants more of them.", CALLS),
    # log-probabilities of one teacher
    Mutant("triton-given-logarithms-to-base-e", _in("logits"),
           "return p, tiles[0] * LOG2E", "return p, tiles[0]",
           "Given log-probabilities count as logarithms to base 2.", CALLS),
    # standardize with z_loss
    Mutant("triton-z-loss-of-centred-logits", ROW_MATH,
           "lse += row.scalings.student.mean", "lse += 0",
           "z_loss beside standardised logits is of centred ones.", OPTIONS),
    Mutant("triton-gradient-sees-no-smoothing", ROW_MATH,
           "of_label = hard * (1 - factors.smoothing)", "of_label = hard",
           "The gradient at a smoothed label is that of a whole one.", OPTIONS),
    Mutant("triton-softcap-derivative-of-a-mask", _in("logits"),
           "tl.where(x == -INF, 0, (1 - x) * (1 + x))", "(1 - x) * (1 + x)",
           "A masked class under a softcap has the gradient NaN.", LIMITS),
    Mutant("triton-deviation-of-the-population", CLASSIFIERS,
           "tl.maximum(count - 1, 1)", "tl.maximum(count, 1)",
           "Logits are standardised by the population's deviation.", OPTIONS),
    Mutant("triton-dkd-without-others", CLASSIFIERS,
           "others = tl.where(mass == 0, 0, others)", "",
           "dkd is NaN where no class is left beside the label.", LIMITS),
    Mutant("triton-last-of-equal-maxima", _in("metrics"),
           "tl.min(tl.where(best.value == value, best.index, NO_CLASS), 0)",
           "tl.max(tl.where(best.value == value, best.index, -1), 0)",
           "The last of equal maxima counts as the argmax.", METRICS),
    # rows that begin off a vector, a tie with a class of their prefix
    Mutant("triton-tie-within-a-lane", _in("metrics"),
           "better = (value > best.value) | ((value == best.value) & (index < best.index))",
           "better = value > best.value",
           "Of equal maxima that one lane meets the first met counts, not the first class.", METRICS),
    # logits above 1e9
    Mutant("triton-exponent-less-a-rounded-offset", _in("logits"),
           "return (x - offset) * scale", "return tl.fma(x, scale, -(offset * scale))",
           "Exponents have the rounding error of the offset's own, which may be hundreds of bits.", DIGITS),
    Mutant("triton-negative-divergence", ROW_MATH,
           "tl.where(divergence < 0, 0, divergence)", "divergence",
           "Where p is near q a divergence may be below 0.", DIGITS),
    Mutant("triton-skew-forward-never-apart", ROW_MATH,
           "-4 * found.apart < found.psi", "found.psi < found.psi",
           "Where little is in common skewed forward KL's gradient is what rounding leaves of a difference.", DIGITS),
    # segments of long rows, and shards
    Mutant("triton-skew-forward-apart-of-no-segment", _in("tables"),
           "column(line, 0), (), (), (), ())", "column(line, 2), (), (), (), ())",
           "Of a divided row the sum of one psi is taken for the other's.", ("test_digits.py", "test_row_math.py")),
    Mutant("triton-rest-of-a-rounded-beta", PER_ROW,
           "number(numbers.rest, SPEC.dtype)", "1 - number(numbers.beta, SPEC.dtype)",
           "Where beta is near 1, 1 - beta has two digits.", DIGITS),
    Mutant("triton-mixture-by-a-difference", DIVERGENCES,
           "m, d = beta * p + rest * q, q - p", "m, d = p + rest * (q - p), q - p",
           "Where beta is near 0 jsd's mixture has no digits of a small q.", DIGITS),
    # more than 8 teachers
    Mutant("triton-many-teachers-scaled-twice", _in("many_teachers"),
           "settings = settings._replace(teacher_logit_scale=1.0)", "pass",
           "Of more teachers than a kernel takes the soft-capped logits are scaled once more.", MANY),
    Mutant("triton-many-teachers-tempered-twice", _in("many_teachers"),
           'target="logits", teacher_temperature=1.0', 'target="logits"',
           "Of more teachers than a kernel takes the given log-probabilities are tempered once more.", MANY),
    Mutant("triton-softmax-gradient-without-t", _in("softmax_kernels"),
           "tile.s * (tile.teachers[0] - found) * (1 / row.temperature)", "tile.s * (tile.teachers[0] - found)",
           "The gradient of tempered_softmax lacks its 1 / T.", ("test_tempered_softmax.py",)),
]  # fmt: skip

TILES, REDUCTIONS = _in("tiles"), _in("reductions")

OF_MEMORY = [
    Mutant("triton-tail-counted-twice", TILES,
           "mask = words < (n - prefix) // VEC * VEC // pair", "mask = words < (n - prefix) // pair",
           "Classes after the last whole vector count twice.", CALLS),
    Mutant("triton-last-class-lost", TILES,
           "tl.where(lane < 2 * VEC, lane < prefix, classes < n)",
           "tl.where(lane < 2 * VEC, lane < prefix, classes < n - 1)",
           "The last class of a row that ends within a vector is left out.", CALLS),
    # tensors of more than 2^31 elements
    Mutant("triton-row-offset-in-32-bits", TILES,
           "(row % inner).to(tl.int64) * stride", "(row % inner) * stride",
           "Rows beyond 2^31 elements are read elsewhere.", FAULTS),
    # bf16 and fp16, a teacher that lies otherwise than the student
    Mutant("triton-unaligned-pairs-sign", TILES,
           "(low.to(tl.int32) & 0xFFFF)", "low.to(tl.int32)",
           "Of unaligned 16-bit pairs a negative first number spoils the second.", LAYOUTS),
    # few and long rows that begin off a vector
    Mutant("triton-segments-overlap", PER_ROW,
           "tl.where(part == 0, 0, tl.minimum(prefix + part * segment, vocab))",
           "tl.where(part == 0, 0, tl.minimum(part * segment, vocab))",
           "Segments of a split row that begins off a vector have classes in common.", CALLS),
    Mutant("triton-label-behind-the-last", PER_ROW,
           "(wide >= 0) & (wide < vocab)", "(wide >= 0) & (wide <= vocab)",
           "The label V is taken for a class.", FAULTS),
    # few and long rows whose number is no power of 2
    Mutant("triton-dropped-row-keeps-its-memory", KERNELS,
           "zero(out + span.n, width - span.n, SPEC)", "zero(out + vocab, width - vocab, SPEC)",
           "A dropped row has as its gradient what was in memory.", DROPPED),
    # few and long dropped rows
    Mutant("triton-dropped-split-row", KERNELS,
           "tl.where(kept, segments - 1, 0)", "segments - 1",
           "Of a dropped split row the first segments' gradient is what was in memory.", DROPPED),
    # rows of at most 128 classes
    Mutant("triton-tiny-rows-of-the-first-program", _in("tiny_rows"),
           "at = tl.where(there, index, 0)[:, None]", "at = tl.where(there, index % SPEC.lanes, 0)[:, None]",
           "The losses of tiny rows are those of the first few.", CALLS),
    # few and long rows under an ensemble
    Mutant("triton-table-of-several-teachers", _in("tables"),
           "offset, total, part = read_columns(line, ALL_SUMS",
           "total, offset, part = read_columns(line, ALL_SUMS",
           "In split rows the further teachers' sums are read off their offsets.", CALLS),
    # reduction "none" and fp16
    Mutant("triton-table-of-one-teacher", PASS_B_C,
           "teachers = teachers + (TeacherSoftmax(further[k].offset, further[k].total),)",
           "teachers = teachers + teachers[:1]",
           "Backward takes each teacher's exps relative to the first one's offset and total.", CALLS),
    Mutant("triton-backward-forgets-the-smoothing", _in("tables"),
           "factor * c.uniform", "c.uniform",
           "Label smoothing's share of the gradient is the same whatever the gradient of the row's loss.", OPTIONS),
    Mutant("triton-dkd-label-lacks-its-term", ROW_MATH,
           "whole += hard * of_hard.of_label - of_label - uniform", "whole += hard * of_hard.of_label - uniform",
           "Under dkd the gradient at the label lacks the hard term's -1.", CALLS),
    # one layout: rows apart by no whole vector
    Mutant("triton-aligned-by-the-first-row", _in("matrices"),
           "% vec, *strides]", "% vec]",
           "Rows whose first one is aligned count as aligned, all of them.", LAYOUTS),
    # fp16 alone, whose gradient is made in backward
    Mutant("triton-autotuned-in-place", _in("autotune"),
           "torch.empty_like(output), run)", "output, run)",
           "What is measured in place takes the gradient of a gradient.", LAUNCHES),
]  # fmt: skip

LAUNCH = _in("launch")

# ---- speed and memory alone: numbers stay right ----

OF_SPEED = [
    Mutant("triton-options-have-room", LAUNCH,
           "return (FULL_BUDGET, OPTIONS_BUDGET,", "return (FULL_BUDGET, FULL_BUDGET,",
           "Kernels with an option spill registers.", STATIC),
    Mutant("triton-pointwise-rows-are-whole", _in("prepared"),
           "if not self.plan.tiles and", "if spec.linear and not self.plan.tiles and",
           "Few and long rows of a divergence with a pass B have one program each.", LAUNCHES),
    Mutant("triton-nvidia-by-its-lanes", LAUNCH,
           'gpu.backend == "cuda"', "self.lanes == 32 * self.warps",
           "AMD's devices whose wavefronts have 32 lanes are given an option that NVIDIA's alone have.", STATIC),
    Mutant("triton-exact-divisions-on-amd", DIVERGENCES,
           "if target_info.is_hip() and a.dtype == tl.float32:", "if False:",
           "On AMD's devices jsd divides in ten instructions.", STATIC),
    Mutant("triton-hint-on-an-addition", TILES,
           "first = vector_start(start + prefix, ALIGNED, False, bytes_of_vector)",
           "first = tl.multiple_of(start + prefix, 16)",
           "AMD's devices store a number at a time.", STATIC),
    Mutant("triton-half-the-programs", LAUNCH,
           "65536 // (2 * lanes)", "65536 // lanes",
           "One program of a long row has all registers of a multiprocessor.", STATIC),
    Mutant("triton-one-tile-in-flight", _in("sweep"),
           "2 + min(3, -(-12288 // tile))", "2",
           "Of long rows a program has too few bytes in flight to keep the memory busy.", STATIC),
    Mutant("triton-a-program-for-a-tiny-row", LAUNCH,
           "TINY_CLASSES = 128", "TINY_CLASSES = 0",
           "Each row of ten classes has a program, of which most threads have nothing to do.", TRAFFIC),
    Mutant("triton-longest-kept-row-is-swept", LAUNCH,
           "if vectors > budget.lanes * most:", "if vectors >= budget.lanes * most:",
           "Rows that just fit into the registers are read twice.", TRAFFIC),
    Mutant("triton-scaled-by-1", REDUCTIONS,
           "if by != 1:", "if by == by:",
           "backward() of the loss itself reads and writes the whole gradient.", TRAFFIC),
]  # fmt: skip

OF_SPARSE_TEACHERS = [
    Mutant("triton-sparse-rest-smoothed-with-entries", _in("support"),
           "tile.mask & ~is_given, tile.at)", "tile.mask, tile.at)",
           "Label smoothing counts the entries once more as classes of the rest.", SPARSE),
    Mutant("triton-sparse-ends-miss-an-entry", _in("support"),
           "other=0) < classes), above, at)", "other=0) <= classes), above, at)",
           "An entry among a row's first or last classes is a class of the rest too.", SPARSE),
    Mutant("triton-sparse-entries-written-early", _in("sparse_kernels"),
           "    tl.debug_barrier()  # entries come last\n", "",
           "An entry has the gradient of a class of the rest or its own, whichever thread is last.", SPARSE_KERNELS),
    # the gradient of the same logits in two dtypes
    Mutant("triton-token-gradients-of-one-dtype", _in("tokens"),
           "map(pointer_kind, (grad, self.ids,", "map(pointer_kind, (self.ids,",
           "The kernel that writes a float32 gradient is launched for one in 16 bits.", ("test_narrow_gradients.py",)),
    Mutant("triton-sparse-conditional-reads-rows", _in("sparse"),
           'self.reads_rows = settings.missing != "conditional" or self.spec.hard', "self.reads_rows = True",
           "A teacher of missing='conditional' has the rows of logits read.", SPARSE_KERNELS),
    Mutant("triton-sparse-rows-as-long-as-dense-ones", _in("sparse"),
           "budget = smaller.get(budget, budget)", "pass",
           "Rows and their entries take more registers than there are.", SPARSE_KERNELS),
]  # fmt: skip

MUTANTS = [*OF_NUMBERS, *OF_MEMORY, *OF_SPEED, *OF_SPARSE_TEACHERS]
