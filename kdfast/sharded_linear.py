"""linear_kd_loss of heads whose classes are split over the processes of a group. All of them have all rows."""

from typing import Any

import torch
from torch import Tensor

from kdfast import choice
from kdfast.arguments import Settings, as_metrics
from kdfast.linear_autograd import linear_loss
from kdfast.linear_checks import check_chunk_rows, check_head, check_teacher_head, make_heads, product_like
from kdfast.parallel import Shard, as_number, check_group, local_arguments, tell_teachers
from kdfast.sharded_operators import compiled
from kdfast.sharded_rows import ShardedRows
from kdfast.sparse import TopKTargets

Head = tuple[Any, Any, Any]  # hidden states, weight, bias


def sharded_linear_loss(
    student: Head, teacher: Head, labels: Tensor | None, options: dict[str, Any], settings: Settings
) -> Any:
    """linear_kd_loss of a process's classes."""
    shard = check_group(options)
    if torch.compiler.is_compiling():
        ops = choice.namespace(options["backend"], student[0])
        operators: Any = compiled(ops, shard.group, options["reduce_hidden"])
        arguments = _arguments(student, teacher, labels, options, settings, shard, operators)
    else:
        operators = ShardedRows(None, shard.group, labels, options["reduce_hidden"])
        try:
            operators.ops = choice.namespace(options["backend"], student[0])
            arguments = _arguments(student, teacher, labels, options, settings, shard, operators)
        except Exception:
            operators.exchange.fail(student[0])
            raise
    heads, inputs, settings = arguments
    loss, metrics = linear_loss(heads, inputs, settings, operators)
    return (loss, as_metrics(metrics)) if settings.metrics else loss


def _arguments(
    student: Head,
    teacher: Head,
    labels: Tensor | None,
    options: dict[str, Any],
    settings: Settings,
    shard: Shard,
    operators: Any,
) -> Any:
    """The checked heads, inputs and settings."""
    hidden, weight, bias = check_head("student_", *student, least=0)
    logits = product_like(hidden, weight)
    start: int | Tensor | None = shard.start
    if start is None:
        start = operators.first_class(logits, len(weight))
    teacher_side, like = check_teacher_head(_own_head(teacher, len(weight), start), settings, least=0)
    inputs, settings = local_arguments(logits, like, labels, options, settings, start, logits.dim() - 1)
    given = teacher[0] if teacher[1] is None else teacher[1].t()  # (..., V)
    given = given if type(given) in (list, tuple) else [] if isinstance(given, TopKTargets) else [given]
    tell_teachers(operators, [t.shape[-1] for t in given if t is not None], len(weight), start)
    chunk_rows = options["chunk_rows"]  # 0: the largest shard's default
    chunk_rows = 0 if chunk_rows is None else check_chunk_rows(chunk_rows, 1, logits.device.type)
    heads, inputs = make_heads((hidden, weight, bias), teacher_side, chunk_rows, inputs, settings, options)
    return heads, inputs, settings


def _own_head(teacher: Head, here: int, start: int | Tensor) -> Head:
    """The teacher's head of this process's classes, of one that is whole."""
    hidden, weight, bias = teacher
    if not isinstance(weight, Tensor) or len(weight) == here:
        return teacher
    first = as_number(start, "a teacher's head that is whole")
    own = slice(first, first + here)
    return hidden, weight[own], bias[own] if isinstance(bias, Tensor) else bias
