"""Log-probabilities of tokens."""

from planted.mutant import Mutant

TOKENS, LINEAR, AUTOGRAD = ("test_tokens.py",), ("test_linear_tokens.py",), ("test_token_autograd.py",)
ARGUMENTS, RECIPES = ("test_token_arguments.py",), ("test_token_recipes.py",)
DTYPES = ("test_linear_dtypes.py",)
PUBLIC, FUNCTIONS, TRUTH = "kdfast/tokens.py", "kdfast/token_autograd.py", "kdfast/reference_tokens.py"
OPS, KERNELS = "kdfast/linear_token_ops.py", "kdfast/operator_autograd.py"

MUTANTS = [
    Mutant("tokens-negative-id-is-absent", PUBLIC,
           "IGNORED, refuse_negative(entries))", "IGNORED, entries)",
           "A negative id of a row has log-probability -inf and is no error.", ARGUMENTS),
    Mutant("tokens-one-ignored-id-ignores-the-row", PUBLIC,
           "(entries == ignore_index).all(-1, keepdim=True)", "(entries == ignore_index).any(-1, keepdim=True)",
           "A row is ignored where one of its ids is ignore_index.", TOKENS),
    Mutant("tokens-changing-scale-is-forgotten", PUBLIC,
           "rows / numbers.logit_scale, numbers._replace(logit_scale=1.0)", "rows, numbers._replace(logit_scale=1.0)",
           "A compiled call whose logit_scale changes has scale 1.", AUTOGRAD),
    # each value would compile
    Mutant("tokens-temperature-is-a-constant-of-graphs", PUBLIC,
           "(rows is not None or has_static_value(numbers.temperature))", "True",
           "A compiled call compiles again for each temperature.", AUTOGRAD),
    Mutant("tokens-gradients-of-two-results-swapped", FUNCTIONS,
           "[check_backward(ctx, grad, grads[3:]) for grad in grads[:3]]",
           "[check_backward(ctx, grads[i], grads[3:]) for i in (0, 2, 1)]",
           "The gradient of the entropy is taken for that of the rest.", TOKENS),
    Mutant("tokens-gradients-that-are-missing-are-zeros", FUNCTIONS,
           "        ctx.set_materialize_grads(False)\n", "",
           "Backward computes the gradient of results that are not used.", AUTOGRAD),
    Mutant("tokens-penalty-is-silently-0", FUNCTIONS,
           "return [check_backward(ctx, grad, grads[3:]) for grad in grads[:3]]", "return list(grads[:3])",
           "The gradient of a gradient is a constant, and no error.", AUTOGRAD),
    Mutant("tokens-tangents-are-dropped", FUNCTIONS,
           "raise RuntimeError(NO_TANGENTS)", "return (None,) * 4",
           "Forward-mode AD returns no tangent, and no error.", AUTOGRAD),
    Mutant("tokens-ignored-rows-are-read", TRUTH,
           "z = torch.where(ignored.unsqueeze(-1), 0, z).to(loss_dtype(logits))", "z = z.to(loss_dtype(logits))",
           "An ignored row that holds NaN has NaN as its gradient.", TOKENS),
    Mutant("tokens-entropy-of-an-ignored-row", TRUTH,
           "h, log_rest = torch.where(ignored, 0, h), ", "h, log_rest = h, ",
           "An ignored row has the entropy of a row of zeros.", TOKENS),
    Mutant("tokens-absent-ids-are-class-0", TRUTH,
           "scatter_add_(-1, places, (~absent).int()) > 0", "scatter_(-1, places, (~absent).int()) > 0",
           "An absent id takes class 0 out of the ids.", TOKENS),
    Mutant("tokens-temperatures-are-not-checked", TRUTH,
           'check_row_values("temperature", temperatures,', 'check_row_values("temperature", None,',
           "A row's temperature of 0 is no error.", ARGUMENTS),
    # more than one chunk
    Mutant("linear-tokens-of-the-first-rows", OPS,
           "ops.token_stats(chunk.logits, ids[chunk.rows], *call)",
           "ops.token_stats(chunk.logits, ids[: len(chunk.logits)], *call)",
           "Every chunk has the ids of the first.", LINEAR),
    Mutant("linear-tokens-gradients-of-the-first-rows", OPS,
           "grad[chunk.rows] for grad in grads]", "grad[: len(chunk.logits)] for grad in grads]",
           "Every chunk has the first one's gradients of its results.", LINEAR),
    Mutant("linear-tokens-temperatures-in-forward-alone", OPS,
           "call = chunk.inputs.temperatures, temperature, logit_scale, softcap, -1\n",
           "call = None, temperature, logit_scale, softcap, -1\n",
           "Temperatures of rows count in the values and not in the gradient.", LINEAR),
    # on a GPU
    Mutant("linear-tokens-gradient-rounded-by-another-kernel", OPS,
           "if gradients.narrow_dtype is None:", "if True:",
           "The row kernel writes the logits' gradient in float32 for the products of 16 bits.", DTYPES),
    Mutant("linear-tokens-multiply-ignored-rows", OPS,
           "ids[..., 0] != IGNORED", "ids[..., 0] != 1 - IGNORED",
           "A row that is ignored takes part in products with whatever it holds.", LINEAR),
    Mutant("linear-tokens-check-after-the-products", OPS,
           "    check_ids(product_like(hidden, weight), ids, vocab_size, temperatures)\n", "",
           "An id that is out of range is found after the first product.", ARGUMENTS),
    Mutant("tokens-operators-temperature-may-want-a-gradient", KERNELS,
           'check_constant("temperatures", temperatures)', "pass",
           "An operator's temperature that requires grad has gradient 0 and no error.", AUTOGRAD),
]  # fmt: skip
