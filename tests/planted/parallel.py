"""Vocabularies that are split over processes."""

from planted.mutant import Mutant

TESTS = ("test_parallel.py",)
ROWS, REFERENCE, EXCHANGE = "kdfast/sharded_rows.py", "kdfast/sharded_reference.py", "kdfast/exchange.py"
PROCESSES, DTENSORS, LINEAR = "kdfast/processes.py", "kdfast/dtensors.py", "kdfast/sharded_linear.py"
PARALLEL = "kdfast/parallel.py"
TOKEN_OPS = "kdfast/sharded_token_ops.py"

MUTANTS = [
    # what other libraries had
    Mutant("parallel-gradient-times-ranks", REFERENCE,
           "    def backward(ctx: Any, grad: Tensor) -> Any:\n        return grad, None",
           "    def backward(ctx: Any, grad: Tensor) -> Any:\n        return 2 * grad, None",
           "A sum over processes has a summing derivative: the gradient is multiplied by their number.", TESTS),
    Mutant("parallel-q-half-lost", REFERENCE,
           "return all_reduce(grad.clone(), ctx.group), None", "return grad, None",
           "What other shards' classes cause in this shard's gradient is lost.", TESTS),
    Mutant("parallel-hidden-gradient-of-one-shard", ROWS,
           "if heads.grad_hidden and self.reduce_hidden:", "if False:",
           "The hidden states' gradient is that of this process's classes.", TESTS),
    Mutant("parallel-hidden-gradient-rounded-before-the-sum", "kdfast/linear_ops.py",
           "        if wide_hidden:\n", "        if False:\n",
           "16-bit parts of the hidden states' gradient are rounded before they are added.", TESTS),
    # uneven and empty shards
    Mutant("parallel-pass-b-of-one-shard", ROWS,
           "gather(own, self.group).sum(0)", "own",
           "A divergence that is not linear has phi and psi of this process's classes.", TESTS),
    Mutant("parallel-apart-by-one-shard", ROWS,
           "columns = 3 if", "columns = 2 if",
           "Which psi skewed forward KL takes is asked of a sum that is not exchanged.", TESTS),
    Mutant("parallel-chunks-of-the-own-shard", ROWS,
           "chunks.default_rows(max(1, *classes), hidden", "chunks.default_rows(max(1, here), hidden",
           "Uneven shards take chunks of different rows, and wait for each other.", TESTS),
    Mutant("parallel-first-class-of-the-next", EXCHANGE,
           "return sum(of_all[:before])", "return sum(of_all[: before + 1])",
           "The first class that is exchanged is the next process's.", TESTS),
    Mutant("parallel-even-dtensors", DTENSORS,
           "most = -(-classes // mesh.size(at))", "most = classes // mesh.size(at)",
           "DTensors of a vocabulary that the mesh does not divide begin too early.", TESTS),
    # errors
    Mutant("parallel-gradient-of-ids-elsewhere", TOKEN_OPS,
           "grad_log_rest, elsewhere\n", "grad_log_rest, None\n",
           "A shard's gradient lacks what the ids of the other shards have in it.", TESTS),
    Mutant("parallel-exps-of-ids-elsewhere", TOKEN_OPS,
           "h, elsewhere / _LN2], -1)", "h, elsewhere - math.inf], -1)",
           "A shard's q is of its own ids and of the others alone.", TESTS),
    Mutant("parallel-sparse-gradients-rounded-before-the-sum", ROWS,
           "wide = student.to(rows.loss_dtype(student))", "wide = student",
           "A bf16 gradient of a sparse teacher and labels is a sum of two rounded ones.", TESTS),
    Mutant("parallel-rows-not-compared", PROCESSES,
           "if len(set(rows)) > 1:", "if False:",
           "Processes with other numbers of rows end each other's program.", TESTS),
    Mutant("parallel-failure-not-told", PARALLEL,
           "operators.exchange.fail(student)", "pass",
           "The other processes wait for one that has raised.", TESTS),
    Mutant("parallel-kernel-failure-not-told", ROWS,
           "self.exchange.fail(student)", "pass",
           "The other processes wait for one whose kernel has raised.", TESTS),
    Mutant("parallel-labels-of-no-shard", EXCHANGE,
           "(is_found := every[..., -2].amax(0) > 0).all()", "(is_found := every[..., -2].amax(0) >= 0).all()",
           "A label that no process has adds nothing, silently.", TESTS),
    Mutant("parallel-teachers-cut-differently", PROCESSES,
           "if reduce(or_, whole) & reduce(or_, split):", "if False:",
           "A whole teacher with as many classes as a shard is taken for its part, in that process alone.", TESTS),
    Mutant("parallel-any-group-of-a-head", DTENSORS,
           "if given is not None and _ranks(given) != _ranks", "if False and _ranks(given) != _ranks",
           "A head that FSDP2 shards over other processes passes for a split vocabulary.", TESTS),
]  # fmt: skip
