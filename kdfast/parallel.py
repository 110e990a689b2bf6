"""kd_loss of logits whose classes are split over the processes of a group (tensor parallel).

Every process has some of the classes of all rows, and gets the loss and the gradient that one process with all of
them would get. sharded_rows.py computes them; sharded_linear.py is the same for hidden states and heads, and
dtensors.py for DTensors.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from kdfast import checks, choice
from kdfast.arguments import Inputs, Settings, as_metrics
from kdfast.autograd import Stats
from kdfast.classes_last import classes_last
from kdfast.derivatives import is_transformed
from kdfast.exchange import IGNORED, local_indices, local_labels
from kdfast.options import check_inputs
from kdfast.overlap import check_inplace
from kdfast.sharded_operators import NO_TRANSFORMS, compiled
from kdfast.sharded_rows import ShardedRows
from kdfast.sparse import TopKTargets, check_entries
from kdfast.tensor_checks import check_logits
from kdfast.torch_private import apply_function, below_autograd


class Shard(NamedTuple):
    """Which classes this process has."""

    group: Any
    start: int | None  # the first one; None: it is exchanged


def check_group(options: dict[str, Any]) -> Shard:
    group, start = options["process_group"], options["vocab_start"]
    if start is not None and checks.as_integer("vocab_start", start) < 0:
        raise ValueError(f"vocab_start: {start} must be at least 0")
    if group is None:
        raise ValueError("vocab_start: given without process_group")
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError("process_group: given, but torch.distributed.init_process_group() was not called")
    if torch.compiler.is_compiling():
        return Shard(group, start)
    if not isinstance(group, dist.ProcessGroup):
        hint = "; of a DeviceMesh pass get_group()" if hasattr(group, "get_group") else ""
        raise TypeError(f"process_group: must be a torch.distributed.ProcessGroup, not {type(group).__name__}{hint}")
    if dist.get_rank(group) < 0:
        raise ValueError("process_group: this process is not one of the group's")
    if is_transformed():
        raise RuntimeError(NO_TRANSFORMS)
    return Shard(group, start)


def sharded_loss(student: Any, teacher: Any, labels: Tensor | None, options: dict[str, Any], settings: Settings) -> Any:
    """kd_loss of a process's classes."""
    shard, inplace = check_group(options), options["inplace"]
    if torch.compiler.is_compiling():
        operators: Any = compiled(choice.namespace(options["backend"], student), shard.group)
        student, inputs, settings = _arguments(student, teacher, labels, options, settings, shard, operators)
        wants_grad = student.requires_grad and torch.is_grad_enabled()
        operator = operators.stats_for_inplace if inplace and wants_grad else operators.stats
        results = operator(student, *inputs, *settings)
    else:
        operators = ShardedRows(None, shard.group, labels)
        try:
            operators.ops = choice.namespace(options["backend"], student)
            student, inputs, settings = _arguments(student, teacher, labels, options, settings, shard, operators)
        except Exception:
            operators.exchange.fail(student)
            raise
        if student.requires_grad and torch.is_grad_enabled():
            results = apply_function(Stats, student, inputs, settings, operators, inplace, True)
        else:
            with below_autograd():
                results = operators.stats(student, *inputs, *settings)
    return (results[0], as_metrics(results[2])) if settings.metrics else results[0]


def _arguments(
    student: Any,
    teacher: Any,
    labels: Tensor | None,
    options: dict[str, Any],
    settings: Settings,
    shard: Shard,
    operators: Any,
) -> tuple[Tensor, Inputs, Settings]:
    """The checked arguments of stats, with the classes in the last dimension."""
    dim = check_logits("student_logits", student, checks.as_integer("dim", options["dim"]), least=0)
    start: int | Tensor | None = shard.start
    if start is None:
        start = operators.first_class(student.movedim(dim, -1), student.shape[dim])
    inputs, settings = local_arguments(student, teacher, labels, options, settings, start, dim)
    given = teacher if type(teacher) in (list, tuple) else [] if isinstance(teacher, TopKTargets) else [teacher]
    tell_teachers(operators, [t.shape[dim] for t in given if t is not None], student.shape[dim], start)
    student = classes_last(student, dim, options["inplace"])
    if options["inplace"]:
        check_inplace(student, inputs)
    return student, inputs, settings


def tell_teachers(operators: Any, classes: Sequence[int], here: int, start: int | Tensor) -> None:
    """Keeps for the agreement which teachers are whole; classes: of each, here: of the student in this process."""
    if isinstance(operators, ShardedRows) and isinstance(start, int):
        whole = sum(1 << i for i, n in enumerate(classes) if n != here)
        operators.exchange.teachers = whole, sum(1 << i for i, n in enumerate(classes) if n == here and start)


def as_number(start: int | Tensor, why: str) -> int:
    """The first class. Reading it from a GPU waits for the device."""
    if isinstance(start, Tensor) and torch.compiler.is_compiling():
        raise ValueError(f"vocab_start: must be given under torch.compile with {why}")
    return int(start)


def real_classes(vocab_size: int, start: int, here: int) -> int:
    """How many of the classes that are here are among the first vocab_size."""
    return min(max(vocab_size - start, 0), here)


def local_arguments(
    student: Tensor,
    teacher: Any,
    labels: Tensor | None,
    options: dict[str, Any],
    settings: Settings,
    start: int | Tensor,
    dim: int,
) -> tuple[Inputs, Settings]:
    """check_inputs of this process's classes, with labels counted from the first of them."""
    here = vocab = student.shape[dim]
    if settings.vocab_size >= 0:
        start = as_number(start, "vocab_size")
        vocab = real_classes(settings.vocab_size, start, here)
    several = type(teacher) in (list, tuple)
    parts = [_own_classes(t, student, start, vocab, dim) for t in (teacher if several else [teacher])]
    options = options | {"vocab_size": None if settings.vocab_size < 0 else vocab}
    settings = settings._replace(vocab_size=-1 if settings.vocab_size < 0 else vocab)
    inputs, settings = check_inputs(student, parts if several else parts[0], labels, options, settings, least=0)
    if inputs.indices is not None:
        if student.device.type == "cpu" and not torch.compiler.is_compiling():
            check_entries(student.movedim(dim, -1), inputs, settings, None)
        inputs = inputs._replace(indices=local_indices(inputs.indices, start, vocab))
    if inputs.labels is not None:
        own = local_labels(inputs.labels, settings.ignore_index, start, vocab)
        inputs, settings = inputs._replace(labels=own), settings._replace(ignore_index=IGNORED)
    return inputs, settings


def _own_classes(teacher: Any, student: Tensor, start: int | Tensor, vocab: int, dim: int) -> Any:
    """The teacher's classes of this process: all of its own where it is split likewise, else some of a whole one."""
    here = student.shape[dim]
    if not isinstance(teacher, Tensor) or teacher.dim() != student.dim() or teacher.shape[dim] == here:
        return teacher
    start = as_number(start, "a teacher that is whole")
    if teacher.shape[dim] < start + vocab:
        return teacher  # check_inputs names the sizes
    return teacher.narrow(dim, start, min(here, teacher.shape[dim] - start))
