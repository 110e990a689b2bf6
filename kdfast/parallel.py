"""kd_loss of logits whose classes are split over the processes of a group (tensor parallel), and of DTensors.

Every process has some of the classes of all rows, and gets the loss and the gradient that one process with all of
them would get. sharded_rows.py exchanges sums of rows; sharded_reference.py has what these do not serve.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from kdfast import checks, choice
from kdfast.arguments import Inputs, KDMetrics, Settings
from kdfast.autograd import Stats
from kdfast.classes_last import classes_last
from kdfast.options import check_inputs
from kdfast.overlap import check_inplace
from kdfast.processes import gather
from kdfast.sharded_rows import IGNORED, ShardedRows, local_labels
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
    if dist.get_rank(group) < 0:
        raise ValueError("process_group: this process is not one of the group's")
    return Shard(group, start)


def sharded_loss(student: Any, teacher: Any, labels: Tensor | None, options: dict[str, Any], settings: Settings) -> Any:
    """kd_loss of a process's classes."""
    shard = check_group(options)
    dim = check_logits("student_logits", student, checks.as_integer("dim", options["dim"]), least=0)
    operators = ShardedRows(choice.namespace(options["backend"], student), shard.group, labels)
    try:
        start = _first_class(student, dim, shard)
        inputs, settings = local_arguments(student, teacher, labels, options, settings, start, dim)
        student = classes_last(student, dim, options["inplace"])
        if options["inplace"]:
            check_inplace(student, inputs)
    except Exception:
        operators.fail(student.movedim(dim, -1))
        raise
    if student.requires_grad and torch.is_grad_enabled():
        results = apply_function(Stats, student, inputs, settings, operators, options["inplace"], True)
    else:
        with below_autograd():
            results = operators.stats(student, *inputs, *settings)
    return (results[0], KDMetrics(*results[2].unbind())) if settings.metrics else results[0]


def _first_class(student: Tensor, dim: int, shard: Shard) -> int:
    if shard.start is not None:
        return shard.start
    sizes = gather(torch.full((1,), student.shape[dim], device=student.device), shard.group)
    return int(sizes[: dist.get_rank(shard.group)].sum())


def local_arguments(
    student: Tensor,
    teacher: Any,
    labels: Tensor | None,
    options: dict[str, Any],
    settings: Settings,
    start: int,
    dim: int,
) -> tuple[Inputs, Settings]:
    """check_inputs of this process's classes, with labels counted from the first of them."""
    here = student.shape[dim]
    vocab = here if settings.vocab_size < 0 else min(max(settings.vocab_size - start, 0), here)
    several = type(teacher) in (list, tuple)
    parts = [_own_classes(t, student, start, vocab, dim) for t in (teacher if several else [teacher])]
    options = options | {"vocab_size": None if settings.vocab_size < 0 else vocab}
    settings = settings._replace(vocab_size=-1 if settings.vocab_size < 0 else vocab)
    inputs, settings = check_inputs(student, parts if several else parts[0], labels, options, settings, least=0)
    if inputs.labels is not None:
        own = local_labels(inputs.labels, settings.ignore_index, start, vocab)
        inputs, settings = inputs._replace(labels=own), settings._replace(ignore_index=IGNORED)
    return inputs, settings


def _own_classes(teacher: Any, student: Tensor, start: int, vocab: int, dim: int) -> Any:
    """The teacher's classes of this process: all of its own where it is split likewise, else some of a whole one."""
    here = student.shape[dim]
    if not isinstance(teacher, Tensor) or teacher.dim() != student.dim() or teacher.shape[dim] == here:
        return teacher
    if teacher.shape[dim] < start + vocab:
        return teacher  # check_inputs names the sizes
    return teacher.narrow(dim, start, min(here, teacher.shape[dim] - start))
