"""The CUDA kernels and what launches them; without a device tests/emulated.py runs them."""

from planted.mutant import Mutant

CALLS, LIMITS, METRICS = ("test_calls.py", "test_limits.py"), ("test_limits.py",), ("test_metrics.py",)
OPTIONS, LAYOUTS, DROPPED = ("test_calls.py",), ("test_layouts.py",), ("test_dropped_terms.py",)
LAUNCHES, TRAFFIC, DIGITS = ("test_cuda_launches.py",), ("test_cuda_traffic.py",), ("test_cuda_digits.py",)


def _in(name: str) -> str:
    return f"csrc/cuda/{name}"


REDUCE, SUMS, NUMBERS, PASSES, METRIC_SUMS, PACKS, ROW_PACKS, KERNELS = (
    _in(f"{name}.cuh")
    for name in (
        "reduce", "row_sums", "row_numbers", "row_passes", "metric_sums", "packs", "row_packs", "row_kernels",
    )
)  # fmt: skip
MATH, LAUNCH, CALL = "csrc/row_math.h", _in("launch.cu"), _in("call.h")

MUTANTS = [
    # ---- how threads add up their sums ----
    Mutant("cuda-warps-read-unwritten-lines", REDUCE,
           "    __syncthreads();\n    A y = A::identity();", "    A y = A::identity();",
           "A warp reads what another one has not written yet.", CALLS),
    Mutant("cuda-blocks-read-unwritten-lines", REDUCE,
           "    cluster_arrive();\n    cluster_wait();\n    y = A::identity();",
           "    __syncthreads();\n    y = A::identity();",
           "A block of a cluster reads what another one has not written yet.", (*TRAFFIC, *CALLS)),
    Mutant("cuda-lines-written-before-they-are-read", REDUCE,
           "void sync() const {\n    __syncthreads();\n    if (blocks() == 1) return;",
           "void sync() const {\n    if (blocks() == 1) return;",
           "The next sums are written over lines that a warp still reads.", CALLS),
    # clusters alone, and there what no other block knows
    Mutant("cuda-warps-of-a-cluster", REDUCE,
           "if (lane < blocks()) {", "if (lane < warps) {",
           "Of more blocks than warps some are left out.", (*TRAFFIC, *CALLS)),
    Mutant("cuda-parts-offset-negated", SUMS,
           "const float above = ds.log - dt.log;", "const float above = dt.log - ds.log;",
           "At a new offset a KL's running sum moves the wrong way.", CALLS),
    Mutant("cuda-teachers-new-maximum", SUMS,
           "(kSoft && t.exceeds(teacher_offset))", "false",
           "Where the teacher alone has a new maximum its sums stay where they are.", CALLS),
    Mutant("cuda-largest-logits-of-half-a-pack", PACKS,
           "b = max_of_pairs<S>(words.z, words.w)", "b = a",
           "A new largest logit is not seen in the second half of a pack of 16 bits.", DIGITS),
    # far below the others, and before them
    Mutant("cuda-padding-adds-to-a-divergence", SUMS,
           "(1 + teacher_others) * dt.exp, ds.log", "1 + teacher_others, ds.log",
           "What classes far below the others have summed up is multiplied with how far, and infinite.", DIGITS),
    # short rows alone
    Mutant("cuda-a-packs-others-added-to-1", SUMS,
           "if (sum - 1 > 0x1p-8f) return sum - 1;", "return sum - 1;",
           "Of a confident row the classes in the label's pack are lost.", DIGITS),
    Mutant("cuda-logit-mse-of-large-logits", SUMS,
           "is_near ? near : far", "far",
           "A teacher's small logits are added to a student's large ones, and have no digits left.", DIGITS),
    # ---- memory ----
    Mutant("cuda-copies-not-awaited", ROW_PACKS,
           "wait_for_copies<kAhead - 1>();", "wait_for_copies<kAhead>();",
           "Logits are read from shared memory before their copy has arrived.", CALLS),
    Mutant("cuda-last-class-lost", PACKS,
           "return end < n ? end : -1;", "return end < n - 1 ? end : -1;",
           "The last class of a row that ends within a pack is left out.", CALLS),
    # rows shorter than what lies before the first vector
    Mutant("cuda-prefix-longer-than-its-row", PACKS,
           "return prefix < n ? prefix : n;", "return prefix;",
           "Short rows that begin off a vector are read and written beyond their end.", LAYOUTS),
    # bf16 alone, every other class
    Mutant("cuda-bf16-with-its-neighbours-bits", PACKS,
           "__uint_as_float(word[i] & 0xffff0000u)", "__uint_as_float(word[i])",
           "Every other bf16 logit has its neighbour's bits below its own.", CALLS),
    Mutant("cuda-dropped-row-keeps-its-memory", ROW_PACKS,
           "store(class_of(i), zeros);", ";",
           "A row that drops out has as its gradient what was in memory.", DROPPED),
    # one alignment: 8 bytes apart
    Mutant("cuda-teacher-half-a-pack-off", CALL,
           "((uintptr_t)a.data - (uintptr_t)b.data) % 16 == 0", "((uintptr_t)a.data - (uintptr_t)b.data) % 8 == 0",
           "Teachers that lie 8 bytes off the student's vectors are read as if they lay alike.", (*LAUNCHES, *CALLS)),
    # a slice of odd rows beside its gradient, which has none
    Mutant("cuda-gradient-by-the-logits-vectors", ROW_PACKS,
           "has_grad_vectors = ((uintptr_t)grad + prefix * grad_bytes(a)) % (kN * grad_bytes(a)) == 0;",
           "has_grad_vectors = true;",
           "A gradient that lies otherwise than the logits is written across 16-byte places.", CALLS),
    # of fp32 logits
    Mutant("cuda-narrow-gradients-are-bf16", PACKS,
           "if (dtype == DType::kHalf) return f(__half{});", "if (dtype == DType::kHalf) return f(__nv_bfloat16{});",
           "Gradients for fp16 heads are bf16's bits.", ("test_narrow_gradients.py",)),
    # fp16 alone, and reductions to one number
    Mutant("cuda-grad-output-by-row", CALL,
           "args_.grad_loss_step = grad_loss.numel() > 1;", "args_.grad_loss_step = 1;",
           "A mean's fp16 gradient reads a gradient of the loss for each row.", ("test_training.py", "test_calls.py")),
    # in place, logit_mse, metrics
    Mutant("cuda-metrics-write-a-gradient", CALL,
           "a.grad.data = nullptr;", "",
           "logit_mse's metrics overwrite the logits before its gradient is made of them.", METRICS),
    # ---- numbers ----
    Mutant("cuda-share-of-0-times-infinity", MATH,
           "if (share != 0) {  // or there", "{  // or there",
           "Reverse KL is NaN where forward KL would be infinite.", LIMITS),
    Mutant("cuda-table-without-its-row", NUMBERS,
           "a.table + (int64_t)row.index * kCoefficients", "a.table",
           "Every row's gradient in backward is of the first row's coefficients.", LAUNCHES),
    Mutant("cuda-z-loss-gradient-halved", MATH,
           "c.hard += lse * r.factor * (2 * r.z_loss);", "c.hard += lse * (2 * r.z_loss);",
           "z_loss's gradient knows no weight and no mean.", OPTIONS),
    Mutant("cuda-ends-of-symmetric-kl-swapped", LAUNCH,
           "    a.beta = 0;", "    a.beta = 1;",
           "Reverse KL is forward KL.", CALLS),
    Mutant("cuda-masked-class-spoils-its-row", SUMS,
           "if (parts.is_nan()) {", "if (false) {",
           "0 times the infinite logarithm of a masked class is NaN.", LIMITS),
    Mutant("cuda-hard-exps-of-another-temperature", NUMBERS,
           "x.temperature != 1 && x.temperature != 2", "x.temperature != 1 && x.temperature < 2",
           "Above a temperature of 2 the hard term's exps are squares.", CALLS),
    Mutant("cuda-slots-of-sweeps-confused", ROW_PACKS,
           "slot = slot + threads < slots ? slot + threads : thread;", "slot = thread;",
           "In sweeps a thread reads the same pack again and again.", TRAFFIC),
    Mutant("cuda-smoothing-adds-up-no-logits", SUMS,
           "if (row.smoothed) x.logits = warp_sum(x.logits);", "",
           "A smoothed row's mean logit is that of one thread.", OPTIONS),
    # the loss is right
    Mutant("cuda-smoothing-of-no-class", PASSES,
           "g[i] = -per.uniform;", "g[i] = 0;",
           "Smoothing takes from the label and gives to no class.", OPTIONS),
    Mutant("cuda-last-of-equal-maxima", METRIC_SUMS,
           "__float_as_int(x_class) < __float_as_int(argmax)", "__float_as_int(x_class) > __float_as_int(argmax)",
           "The last of equal maxima counts as the argmax.", METRICS),
    # ---- speed alone: numbers stay right ----
    Mutant("cuda-scaled-by-1", _in("scale.cu"),
           "if (factor == 1) return;", "",
           "backward() of the loss itself reads and writes the whole gradient.", TRAFFIC),
    Mutant("cuda-barrier-after-the-last-row", KERNELS,
           "if (index + team.row_stride() < (uint32_t)a.rows) team.sync();", "team.sync();",
           "Blocks wait until all of the cluster have stored their gradients.", TRAFFIC),
    Mutant("cuda-exps-at-temperature-1-always", NUMBERS,
           "scale.powers = hard && x.temperature != 1", "scale.powers = x.temperature != 1",
           "Exps at temperature 1 are computed where no term has them.", ("test_cuda_static.py", *TRAFFIC)),
    Mutant("cuda-few-rows-undivided", LAUNCH,
           "return 2 * (int64_t)a.rows * blocks <= device.multiprocessors",
           "return 4 * (int64_t)a.rows * blocks <= device.multiprocessors",
           "Few and long rows have half of the blocks that they could have.", LAUNCHES),
    Mutant("cuda-no-smaller-cluster", LAUNCH,
           "if (best.grid && most <= kPortableBlocks) break;", "break;",
           "Where the largest cluster finds no room rows are read twice.", LAUNCHES),
    Mutant("cuda-largest-cluster-at-any-price", LAUNCH,
           "if (best.grid && most <= kPortableBlocks) break;", "if (best.grid) break;",
           "A cluster of 16 is taken where it leaves more of the device idle than one of 8.", LAUNCHES),
    Mutant("cuda-failed-query-remembered", LAUNCH,
           "if (error != cudaErrorInvalidClusterSize) return 0;", "",
           "A query that failed once keeps rows from their clusters for good.", LAUNCHES),
]  # fmt: skip
