"""The Python of the package, and what makes wheels of it."""

from planted.mutant import Mutant

CALLS, LIMITS, ARGUMENTS = ("test_calls.py",), ("test_limits.py",), ("test_arguments.py",)
AUTOGRAD, INPLACE, BACKENDS = ("test_autograd.py",), ("test_inplace.py",), ("test_backends.py",)
REFERENCE, METRICS, COMPILE = ("test_reference.py",), ("test_metrics.py",), ("test_compile.py",)
BUILD = ("test_build.py",)
CHECKS, TEACHERS, FUNCTIONS = "kdfast/checks.py", "kdfast/teachers.py", "kdfast/autograd.py"
OPERATORS, FAKES, CHOICE = "kdfast/ops.py", "kdfast/fakes.py", "kdfast/choice.py"
TRUTH, CLASSIFIERS = "kdfast/reference.py", "kdfast/classifiers.py"
GPU_CHOICE = "kdfast/gpu_choice.py"
OPTIONS, ROWS = "kdfast/options.py", "kdfast/rows.py"

OF_ARGUMENTS = [
    Mutant("default-alpha", CHECKS,
           "(0.9 if labelled else 1.0)", "(0.5 if labelled else 1.0)",
           "Without alpha both terms have the same weight.", ("test_module.py", "test_peers.py", "test_limits.py")),
    Mutant("temperature-0", CHECKS,
           "if not 0 < number < math.inf:", "if not 0 <= number < math.inf:",
           "A temperature of 0 is no error.", ARGUMENTS),
    # beta = 0 alone
    Mutant("beta-0-is-an-error", CHECKS,
           'number = as_number("beta", beta)\n    if not 0 <= number <= 1:',
           'number = as_number("beta", beta)\n    if not 0 < number <= 1:',
           "beta=0 is an error and not the divergence that it stands for.", REFERENCE),
    Mutant("inplace-on-a-view-of-a-leaf", CHECKS,
           "        base = student._base\n", "        pass\n",
           "inplace=True overwrites a leaf through its view.", INPLACE),
    Mutant("normalizer-may-require-grad", CHECKS,
           "if value.requires_grad and torch.is_grad_enabled():",
           "if value.requires_grad and not torch.is_grad_enabled():",
           "A normalizer that requires grad silently gets none.", ARGUMENTS),
    Mutant("metrics-without-a-teacher", "kdfast/arguments.py",
           "return self.alpha != 0 or self.metrics", "return self.alpha != 0",
           "With alpha=0 the metrics know of no teacher.", METRICS),
    Mutant("metrics-spoil-a-loss", "kdfast/arguments.py",
           "(settings.alpha == 0 and is_soft) or (settings.hard_weight == 0", "(settings.hard_weight == 0",
           "What is infinite in a metric without a weight spoils the loss.", METRICS),
    Mutant("teacher-weights-as-given", TEACHERS,
           "return [w / total for w in weights]", "return weights",
           "Weights of teachers that do not sum to 1 scale the teacher.", CALLS),
    # the second teacher alone
    Mutant("second-teacher-of-weight-0", TEACHERS,
           "0.0 in weights", "0.0 == weights[0]",
           "A teacher of weight 0 is read if it is not the first.", ("test_dropped_terms.py",)),
    # a teacher of just as many classes as there are
    Mutant("teacher-of-vocab-size", TEACHERS,
           "teacher.shape[-1] < vocab_size", "teacher.shape[-1] <= vocab_size",
           "A teacher without padding beside a padded student is an error.", CALLS),
    Mutant("ends-of-jsd", "kdfast/divergences.py",
           'at_0="forward_kl",\n        at_1="reverse_kl",', 'at_0="reverse_kl",\n        at_1="forward_kl",',
           "At its ends JSD is the other KL.", REFERENCE),
    Mutant("teachers-temperature-is-1", OPTIONS,
           "teacher_temperatures = temperatures\n", "teacher_temperatures = None\n",
           "Temperatures per row are the student's alone.", CALLS),
    Mutant("module-without-normalizer", "kdfast/losses.py",
           'self.options() | {"row_weight": row_weight, "normalizer": normalizer}',
           'self.options() | {"row_weight": row_weight, "normalizer": None}',
           "KDLoss ignores its normalizer.", ("test_module.py",)),
    Mutant("softmaxs-log-is-any-object", "kdfast/softmax.py",
           'check_bool("log", log)', "log = bool(log)",
           'tempered_softmax(log="no") gives logarithms.', ARGUMENTS),
]  # fmt: skip

OF_AUTOGRAD = [
    Mutant("no-version-bump", FUNCTIONS,
           "loss, metrics = ops.loss_grad_(student, *inputs, *settings)\n            _mark_overwritten(student)",
           "loss, metrics = ops.loss_grad_(student, *inputs, *settings)",
           "Who saved the logits before inplace=True uses a gradient in their place.", INPLACE),
    # fp16, and reduction "none", alone
    Mutant("no-version-bump-in-backward", FUNCTIONS,
           "_mark_overwritten(student)  # so that a second", "pass  # so that a second",
           "A second backward of an in-place loss takes its gradient for logits.", INPLACE),
    Mutant("kept-graph-scales-in-place", FUNCTIONS,
           "elif graph_is_kept():", "elif not ctx.needs_input_grad[0]:",
           "With retain_graph=True the second backward is scaled twice.", AUTOGRAD),
    # fp16 alone
    Mutant("fp16-gradient-in-forward", FUNCTIONS,
           'settings.reduction == "none" or student.dtype == torch.float16', 'settings.reduction == "none"',
           "Small fp16 gradients are 0 before a loss scaler can save them.", ("test_training.py",)),
    Mutant("double-backward-is-silent", FUNCTIONS,
           "if torch.is_grad_enabled() and not torch.compiler.is_compiling():\n        raise RuntimeError(",
           "if torch.is_grad_enabled() and torch.compiler.is_compiling():\n        raise RuntimeError(",
           "With create_graph=True the gradient looks like a constant.", AUTOGRAD),
    Mutant("softmaxs-double-backward-is-silent", FUNCTIONS,
           "not torch.compiler.is_compiling():\n            return reference",
           "torch.compiler.is_compiling():\n            return reference",
           "The gradient of tempered_softmax looks like a constant.", ("test_tempered_softmax.py",)),
    Mutant("inference-tensors-are-saved", FUNCTIONS,
           "if t is not None and t.is_inference()}", "if t is not None and t.is_inference() and t.requires_grad}",
           'A teacher made under inference_mode is an error with reduction="none".', AUTOGRAD),
    # ---- memory alone: numbers stay right ----
    Mutant("teacher-is-kept", FUNCTIONS,
           "ctx.ops, ctx.inplace, ctx.has_run = ops, inplace, False",
           "ctx.ops, ctx.inplace, ctx.has_run, ctx.inputs = ops, inplace, False, inputs",
           "A loss whose gradient is made holds on to its teacher.", AUTOGRAD),
    Mutant("gradient-scaled-elsewhere", FUNCTIONS,
           "        ctx.ops.scale_(grad, grad_loss)\n        return grad, None",
           "        return grad * grad_loss, None",
           "backward() makes a second tensor of the logits' size.", AUTOGRAD),
]  # fmt: skip

OF_OPERATORS = [
    Mutant("fake-metrics-by-row", FAKES,
           '*(student.shape[:-1] if settings.reduction == "none" else ())', "",
           "A compiled graph takes the metrics of rows for means.", COMPILE),
    Mutant("fake-softmaxs-dtype", FAKES,
           "logits.new_empty(\n        logits.shape, dtype=dtype\n    )",
           "logits.new_empty(\n        logits.shape\n    )",
           "A compiled graph takes tempered_softmax for one of the logits' dtype.", COMPILE),
    Mutant("fake-gradients-strides", FAKES,
           "return student.new_empty(student.shape)", "return student.clone()",
           "A compiled graph takes a slice's gradient for one with gaps.", COMPILE),
    Mutant("warning-at-every-call", OPERATORS,
           "_warned.add(device)", "pass",
           "Without kernels every call warns.", BACKENDS),
    Mutant("one-old-device-excludes-all", CHOICE,
           "best = max(range(", "best = min(range(",
           "A device before sm_80 keeps the CUDA kernels from the H100 beside it.", BACKENDS),
    Mutant("cuda-without-its-options", "kdfast/cuda_ops.py",
           "gpu_choice.check_cuda(student, inputs.teachers, settings)", "pass",
           "backend='cuda' leaves out what it does not have.", ("test_cuda_launches.py",)),
    Mutant("cuda-where-it-cannot", GPU_CHOICE,
           'return "reference" if rule.must else "cuda"', 'return "cuda"',
           "Without Triton the CUDA kernels get what they do not have.", ("test_gpu_choice.py",)),
    Mutant("triton-for-any-device", CHOICE,
           "return None if works_on == device else f", "return None if works_on else f",
           "backend='triton' takes tensors that it does not launch on.", BACKENDS),
]  # fmt: skip

OF_THE_REFERENCE = [
    Mutant("reference-population-deviation", CLASSIFIERS,
           "/ max(1, z.shape[-1] - 1)", "/ z.shape[-1]",
           "The truth standardises by the population's deviation.", REFERENCE),
    Mutant("reference-label-behind-the-last", ROWS,
           "(labels < 0) | (labels >= vocab)", "(labels < 0) | (labels > vocab)",
           "The label V is no error of its own.", ARGUMENTS),
    Mutant("dropped-rows-spoil-metrics", ROWS,
           "torch.where(weights != 0, metrics * weights, 0)", "metrics * weights",
           "The metrics' means are NaN where a row drops out.", METRICS),
    Mutant("batchmean-of-the-rows", ROWS,
           "float(student.shape[0]) if student.dim() > 1 else 1.0", "float(rows)",
           "batchmean divides by all rows, and not by the first dimension.", CALLS),
    Mutant("ignored-rows-count", ROWS,
           "return torch.ops.aten.threshold_backward(weight, keep, 0.5)", "return weight",
           "A row with a weight is never ignored.", CALLS),
    Mutant("module-checks-once", "kdfast/modules.py",
           'self.__dict__.pop("_checked", None)', "pass",
           "An option that is changed between calls changes nothing.", ("test_module.py",)),
    Mutant("metrics-by-rows", ROWS,
           "/ weights.sum()", "/ (weights != 0).sum()",
           "The metrics' means are divided by the number of rows and not by their weights.", METRICS),
    Mutant("reference-softcap-unmasks", TRUTH,
           "return torch.where(masked, -math.inf, cap * torch.tanh(torch.where(masked, 0, z) / cap))",
           "return cap * torch.tanh(z / cap)",
           "The truth gives a masked class the logit -cap under a softcap.", LIMITS),
    Mutant("reference-geometric-of-one", TRUTH,
           'is_given = len(teachers) == 1 and settings.target != "logits"', 'is_given = settings.target != "logits"',
           "The truth's geometric ensemble of probabilities is not normalised.", CALLS),
    Mutant("reference-dkds-weights-swapped", CLASSIFIERS,
           "divergence = divergence + weights[1] * times(", "divergence = divergence + weights[0] * times(",
           "The truth weighs both parts of dkd with the target's weight.", REFERENCE),
]  # fmt: skip

OF_THE_BUILD = [
    Mutant("wheel-without-types", "pyproject.toml",
           'package-data = { kdfast = ["py.typed"] }', "package-data = {}",
           "The wheel does not say that it has types.", BUILD),
    Mutant("cuda-never-built", "setup.py",
           '"OFF" if os.environ.get("KDFAST_CUDA") == "0" else "ON"',
           '"OFF" if os.environ.get("KDFAST_CUDA") in ("0", "") else "ON"',
           "An empty KDFAST_CUDA leaves the CUDA kernels out, although nvcc is there.", BUILD),
    Mutant("compiler-is-taken-for-granted", "setup.py",
           'if not os.environ.get("CXX") and not any(', 'if os.environ.get("CXX") == "" and not any(',
           "Without a compiler the install fails instead of being pure Python.", BUILD),
    Mutant("pure-python-passes-for-compiled", "setup.py",
           'if reason and os.environ.get("KDFAST_BUILD_EXT") == "1":',
           'if reason and os.environ.get("KDFAST_BUILD_EXT") == "yes":',
           "KDFAST_BUILD_EXT=1 does not insist on the compiled package.", BUILD),
]  # fmt: skip

MUTANTS = [*OF_ARGUMENTS, *OF_AUTOGRAD, *OF_OPERATORS, *OF_THE_REFERENCE, *OF_THE_BUILD]
