"""DTensors as arguments: what each process has of them, its group and its first class. Imported where one is given."""

from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from kdfast.linear_checks import PARTS_OF_A_HEAD
from kdfast.tensor_checks import is_dtensor

_LOGITS = (
    "its classes may be split on one mesh dimension, and every other placement must be Replicate(). Of rows that are "
    "split, as over sequences or batches, pass to_local() and the normalizer of all rows; of other layouts to_local() "
    "and process_group"
)
_ROWS = "must be Replicate() on every mesh dimension: pass a tensor of all rows"
_TENSOR_PARALLEL = (
    "; for one that is split over a tensor-parallel mesh dimension, pass process_group=mesh.get_group(dim) too"
)


def local_call(
    student: Any, teacher: Any, labels: Any, options: dict[str, Any]
) -> tuple[Any, Any, Any, dict[str, Any]]:
    """kd_loss's arguments as this process has them; with process_group where classes are split."""
    if options["process_group"] is not None or options["vocab_start"] is not None:
        raise ValueError(
            "process_group: given with student_logits that are a DTensor, which has its own; pass to_local()"
        )
    dim = _dimension(student, options["dim"])
    at = _split_on("student_logits", student, dim, _LOGITS)
    if options["inplace"] and student.is_leaf and student.requires_grad and torch.is_grad_enabled():
        raise RuntimeError("inplace: student_logits is a leaf (or a view of one) that requires grad")
    several = type(teacher) in (list, tuple)
    parts = [_local_like("teacher", t, student, dim, at, _LOGITS) for t in (teacher if several else [teacher])]
    options = _local_rows(options)
    if at is not None:
        options |= _shard_of(student, dim, at)
    return student.to_local(), parts if several else parts[0], _whole("labels", labels, _ROWS), options


def local_heads(
    student: tuple[Any, Any, Any], teacher: tuple[Any, Any, Any], labels: Any, options: dict[str, Any]
) -> tuple[tuple[Any, Any, Any], tuple[Any, Any, Any], Any, dict[str, Any]]:
    """linear_kd_loss's arguments as this process has them."""
    hidden, weight, bias = student
    teacher_hidden, *teacher_head = teacher
    options = _local_rows(options)
    at = None
    if is_dtensor(weight):
        at = _split_on("student_weight", weight, 0, PARTS_OF_A_HEAD)
    if at is not None:
        found, given = _shard_of(weight, 0, at), options["process_group"]
        if given is None and not is_dtensor(hidden):  # it may be FSDP2's, whose processes have different rows
            raise TypeError(
                "student_weight: is a DTensor, of which each process holds a part; "
                + PARTS_OF_A_HEAD
                + _TENSOR_PARALLEL
            )
        if given is not None and _ranks(given) != _ranks(found["process_group"]):
            raise ValueError(
                "process_group: has other processes than the mesh dimension over which student_weight is split; "
                + PARTS_OF_A_HEAD
            )
        options |= found if given is None else {"vocab_start": found["vocab_start"]}
    heads = [
        _local_like(f"teacher_{name}", x, weight, 0, at, PARTS_OF_A_HEAD)
        for name, x in zip(("weight", "bias"), teacher_head, strict=True)
    ]
    if is_dtensor(weight):
        bias, weight = (
            _local_like("student_bias", bias, weight, 0, at, PARTS_OF_A_HEAD, detach=False),
            weight.to_local(),
        )
    if is_dtensor(hidden):
        _split_on("student_hidden", hidden, None, "must be Replicate(): redistribute() rows that are split")
        partial = [
            Partial() if not options["reduce_hidden"] and i == at else Replicate()
            for i in range(hidden.device_mesh.ndim)
        ]
        hidden = hidden.to_local(grad_placements=partial)
    teacher_hidden = _whole("teacher_hidden", teacher_hidden, _ROWS)
    return (hidden, weight, bias), (teacher_hidden, *heads), _whole("labels", labels, _ROWS), options


def _dimension(x: DTensor, dim: Any) -> int:
    return int(dim) % max(1, x.dim())  # what it must be, check_logits says


def _split_on(name: str, x: DTensor, dim: int | None, rule: str) -> int | None:
    """The mesh dimension on which this dimension is split; None where all processes have the whole."""
    found = [i for i, p in enumerate(x.placements) if not p.is_replicate()]
    if not found:
        return None
    placement = x.placements[found[0]]
    if len(found) > 1 or type(placement) is not Shard or placement.dim % x.dim() != dim:
        raise TypeError(f"{name}: is a DTensor with placements {tuple(x.placements)}; {rule}")
    return found[0]


def _local_like(name: str, x: Any, student: Any, dim: int, at: int | None, rule: str, detach: bool = True) -> Any:
    """A teacher, or a bias: split as the student is, or whole."""
    if not is_dtensor(x):
        return x
    own = _split_on(name, x, dim, rule)
    if own is not None and (at != own or x.device_mesh != student.device_mesh):
        raise TypeError(f"{name}: is a DTensor that is split over other processes than the student's; {rule}")
    return (x.detach() if detach else x).to_local()


def _whole(name: str, x: Any, rule: str) -> Any:
    if not is_dtensor(x):
        return x
    _split_on(name, x, None, rule)
    return x.to_local()


def _local_rows(options: dict[str, Any]) -> dict[str, Any]:
    names = ("temperature", "teacher_temperature", "row_weight", "normalizer")
    return options | {name: _whole(name, options[name], _ROWS) for name in names}


def _shard_of(x: DTensor, dim: int, at: int) -> dict[str, Any]:
    """process_group and vocab_start: as torch.chunk divides, all processes have ceil(V / n) classes but the last."""
    classes, mesh = x.shape[dim], x.device_mesh
    most = -(-classes // mesh.size(at))
    return {"process_group": mesh.get_group(at), "vocab_start": min(mesh.get_local_rank(at) * most, classes)}


def _ranks(group: Any) -> list[int]:
    return dist.get_process_group_ranks(group)
