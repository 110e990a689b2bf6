"""The fused linear losses."""

from planted.mutant import Mutant

LINEAR, DTYPES, PRODUCTS = ("test_linear.py",), ("test_linear_dtypes.py",), ("test_linear_products.py",)
OPS, CHUNKS, HEADS = "kdfast/linear_ops.py", "kdfast/chunks.py", "kdfast/products.py"

MUTANTS = [
    # more than one chunk
    Mutant("linear-last-chunks-gradient", OPS,
           "self.weight[: self.vocab], self.first)", "self.weight[: self.vocab], True)",
           "The weight's gradient is that of the last chunk.", LINEAR),
    # a GPU's products, few rows
    Mutant("linear-last-kept-gradient", OPS,
           "total, first=i == 0)", "total, first=True)",
           "The weight's gradient is that of the last chunk where all chunks' are kept.", DTYPES),
    # fp16 alone
    Mutant("linear-fp16-gradient-undivided", OPS,
           "total = total.div_(divisor)", "pass",
           "A mean's fp16 gradient is the sum's.", DTYPES),
    # chunks of different weights
    Mutant("linear-metrics-of-chunks-unweighted", OPS,
           "torch.where(total == 0, 0, metrics * total)", "torch.where(total == 0, 0, metrics)",
           "Metrics of several chunks are summed without their weights.", LINEAR),
    # reduction "none" with metrics and dropped rows
    Mutant("linear-dropped-rows-metrics-are-0", OPS,
           "chunks.rows), math.nan)\n\n    def add", "chunks.rows), 0.0)\n\n    def add",
           "The metrics of a row that drops out are 0 and not NaN.", LINEAR),
    Mutant("linear-narrow-accumulator", OPS,
           "wide = torch.promote_types(grad_dtype(weight.dtype), heads.accumulate_dtype)",
           "wide = grad_dtype(weight.dtype)",
           "A 16-bit weight's gradient is rounded after each chunk.", DTYPES),
    Mutant("linear-hidden-gradient-in-order", OPS,
           "as_matrix(self.hidden)[chunk.rows] = self.head.to_hidden(grad)",
           "self.hidden[: len(grad)] = self.head.to_hidden(grad)",
           "The hidden states' gradient of every chunk goes to the first rows.", LINEAR),
    # fp16 alone, weights of which none is 1
    Mutant("linear-fp16-weights-scaled-once", CHUNKS,
           "_replace(row_weight=weight / largest), total / largest", "_replace(row_weight=weight / largest), total",
           "fp16 losses with weights above or below 1 are off by the largest of them.", DTYPES),
    # a GPU's way alone
    Mutant("linear-gpu-dropped-rows-multiplied", CHUNKS,
           "hidden = torch.where(kept.unsqueeze(-1), hidden, 0)", "pass",
           "On a GPU a row that drops out takes part with whatever it holds.", DTYPES),
    # a 16-bit head without instructions for it, more than 4096 classes, a bias
    Mutant("linear-widened-bias-of-the-first-slice", HEADS,
           "torch.addmm(self.bias[part], hidden", "torch.addmm(self.bias[: len(weight)], hidden",
           "Each slice of a widened head has the first one's bias.", ("test_products.py",)),
    # an accumulator wider than the weight, more than one chunk
    Mutant("linear-wide-accumulator-keeps-the-last", HEADS,
           "total[part].copy_(product) if first else total[part].add_(product)", "total[part].copy_(product)",
           "A 16-bit weight's gradient is that of the last chunk.", DTYPES),
    Mutant("linear-bias-wants-what-the-weight-wants", "kdfast/linear_checks.py",
           "grad_bias=_wants_grad(student[2])", "grad_bias=_wants_grad(student[2]) and _wants_grad(student[1])",
           "A bias in training above a frozen weight gets no gradient.", (*PRODUCTS, *LINEAR)),
    # ---- speed and memory alone: numbers stay right ----
    Mutant("linear-chunks-and-a-rest", CHUNKS,
           "size = math.ceil(count / max(1, math.ceil(count / self.chunk_rows)))", "size = self.chunk_rows",
           "The last chunk is whatever is left, however few rows.", PRODUCTS),
    Mutant("linear-dropped-rows-multiplied", CHUNKS,
           "elif not kept.all():", "elif not kept.any():",
           "Rows that drop out take part in all products.", PRODUCTS),
    Mutant("linear-teachers-view-copied", CHUNKS,
           "return teacher[tuple(reversed(places))]",
           "return teacher.reshape(-1, teacher.shape[-1])[index]",
           "A teacher that is a view is copied whole, for each chunk.", LINEAR),
    Mutant("linear-logits-of-every-chunk-are-new", CHUNKS,
           "logits = out[: len(hidden)]", "logits = torch.empty_like(out[: len(hidden)])",
           "There are three and four chunks' logits where two would do.", ("test_memory.py",)),
]  # fmt: skip
