"""How the CUDA kernels are launched: by how many threads and blocks, and by whom."""

import ctypes
import math
import re
from typing import Any

import emulated
import pytest
import some_calls
import torch
from calls import LAYOUTS, NOT_IN_CUDA, call
from cases import BF16, F32, KINDS, Batch, batch
from judge import judge
from linear_cases import Case, check
from torch import Tensor

import kdfast
from kdfast import divergences
from kdfast.arguments import Settings
from kdfast.gpu_choice import gpu_backend
from kdfast.modules import KDLoss
from kdfast.options import check_inputs, check_settings
from kdfast.row_math import Coefficients, Sums

pytestmark = pytest.mark.skipif(emulated.why_not() is not None, reason=str(emulated.why_not()))

SETTINGS: dict[str, Any] = {"temperature": 2, "backend": "cuda"}


def launched(capability: int, rows: int, vocab: int, dtype: torch.dtype = BF16) -> tuple[int, int, int]:
    """(threads, blocks of a cluster, bytes of shared memory) of the row kernel."""
    with emulated.kernels(capability, run=False) as plans:
        logits = torch.empty(rows, vocab, dtype=dtype)
        kdfast.kd_loss(logits, logits, **SETTINGS)
    (row,) = (plan.launched for plan in plans if "rows" in plan.launched[0])
    return row[2:]


def test_rows_are_divided_among_the_blocks_of_a_cluster_by_their_length() -> None:
    for blocks in (1, 2, 4, 8, 16):
        assert launched(90, 132, 16384 * blocks)[1:] == (blocks, 64 << 10)
        assert launched(90, 132, 8192 * blocks, F32)[1:] == (blocks, 64 << 10)
    assert launched(90, 132, 262144, F32)[1:] == (16, 128 << 10)
    assert launched(80, 132, 32768)[1:] == (1, 128 << 10)
    assert launched(80, 132, 50257)[1:] == (1, 32 << 10), "in sweeps: as many bytes are in flight"


@pytest.mark.parametrize(("capability", "shared"), [(80, 164), (86, 100), (90, 228), (120, 100)])
def test_a_multiprocessor_has_two_blocks_or_one_of_512_threads(capability: int, shared: int) -> None:
    for vocab in (1032, 4096, 8192, 12000, 16384, 20000, 24000, 32000, 40000, 50257, 100000, 151936, 262144):
        threads, blocks, kept = launched(capability, 132, vocab)
        of_block = kept + (4 << 10)  # declared in the kernel, and the system's
        assert threads == 512 or 2 * of_block <= shared << 10, vocab
        if blocks in (2, 4):  # fewer than there may be
            assert 3 * of_block <= shared << 10, vocab


def test_where_clusters_find_no_room_they_are_smaller_and_rows_are_read_twice_at_last() -> None:
    # of 24 neighbours a cluster of 16 leaves 8 idle
    for most, expected in ((16, (16, 64 << 10)), (8, (8, 128 << 10)), (4, (1, 32 << 10)), (24, (8, 128 << 10))):
        with emulated.clusters_of(most):
            assert launched(90, 132, 262144)[1:] == expected


def test_a_query_that_fails_says_nothing_of_the_next_call() -> None:
    failures = ctypes.c_int.in_dll(emulated.emulator().library, "stub_failures")
    with emulated.clusters_of(17):  # a device of its own: what is known of others stays known
        failures.value = 2  # for a cluster of 16 and one of 8
        assert launched(90, 132, 262144)[1:] == (1, 32 << 10)
        assert launched(90, 132, 262144)[1:] == (16, 64 << 10)


def test_few_and_long_rows_have_more_blocks_where_there_are_clusters() -> None:
    assert [launched(90, rows, 32768)[1] for rows in (1, 8, 16, 33, 66, 67)] == [8, 8, 8, 4, 2, 2]
    assert launched(80, 1, 32768)[1] == 1


def test_a_device_that_the_kernels_have_no_code_for_is_found_before_a_call() -> None:
    library = emulated.emulator().library
    library.kdfast_device_failure.restype = ctypes.c_char_p
    with emulated.kernels(run=False):
        failures = [library.kdfast_device_failure(library.stub_use(capability, 16)) for capability in (75, 80)]
    assert b"kdfast: loading a kernel: CUDA error 209" in failures[0]
    assert failures[1] == b""


def test_the_linear_losses_take_the_cuda_kernels_for_their_chunks() -> None:
    case = Case(rows=7, vocab=1100)  # one is ignored: chunks of 3 and 3
    with emulated.kernels() as reports:
        check(case, case.labels, chunk_rows=4, **SETTINGS)
    assert sum("rows" in report.launched[0] for report in reports) == 2


def test_the_calls_for_compute_sanitizer_take_each_shape_of_kernel_with_four_divergences_and_two_dtypes() -> None:
    with emulated.kernels(80, run=False) as plans:  # which keeps fewer classes: shorter rows are read twice
        some_calls.call("cuda", some_calls.VOCABS[:3])
    assert len({plan.launched.kernel for plan in plans if "rows" in plan.launched.kernel}) >= 3 * 4 * 2


BEYOND = [(axis, value) for axis, values in NOT_IN_CUDA.items() for value in values]


@pytest.mark.parametrize(("axis", "value"), BEYOND, ids=[value for _, value in BEYOND])
def test_what_they_have_not_is_an_error_that_names_it_and_goes_to_triton(axis: str, value: str) -> None:
    arguments, settings = call(**{axis: value, "shape": "3x16", "output": "metrics"}).arguments()
    options = dict(KDLoss.defaults) | settings | {"row_weight": None, "normalizer": None}
    inputs, checked = check_inputs(*arguments, options, check_settings(options, True))
    teachers = inputs.teachers
    assert gpu_backend(("cuda", "triton"), "loss_grad", arguments[0], teachers, checked) == "triton"
    assert gpu_backend(("cuda",), "loss_grad", arguments[0], teachers, checked) == "reference"
    what = {
        "divergence": "divergence='dkd'",
        "dtypes": "float64|a teacher of another dtype than student_logits",
        "teacher": "several teachers|target='probs' and 'log_probs'|a teacher of another dtype than student_logits|"
        "a sparse teacher",
        "option": "softcap|teacher_softcap|standardize",
    }[axis]
    advice = 'use backend="triton", or None, which chooses by call'
    for late in ({}, {"reduction": "none"}):
        with (
            emulated.kernels(),
            pytest.raises(ValueError, match=f"^backend: 'cuda' has no kernel for ({what}); {advice}"),
        ):
            kdfast.kd_loss(*arguments, **settings | late | {"backend": "cuda"})
    with emulated.kernels(), pytest.raises(ValueError, match=f"^backend: 'cuda' has no kernel for ({what}); {advice}"):
        kdfast.kd_loss(arguments[0].requires_grad_(), *arguments[1:], **settings | {"backend": "cuda"})


@pytest.mark.parametrize("inplace", [False, True])
def test_tensors_that_lie_differently_are_copied_where_cuda_is_asked_for_by_name(inplace: bool) -> None:
    """The table sends them to Triton, which reads them as they lie: the copies cost 4 bytes a logit."""
    half_a_vector = {
        "half a vector off": lambda x: torch.cat([x.new_full((4,), torch.nan), x.flatten()])[4:].view_as(x)
    }
    layouts = LAYOUTS | half_a_vector  # 8 bytes
    for layout in ("padded rows", "odd padding", "offset by one", "every second class", *half_a_vector):
        for moved in ((layout, "contiguous"), ("contiguous", layout), (layout, layout)):
            student, teacher, labels = batch(3, 2049, BF16)
            student, teacher = (layouts[name](x) for name, x in zip(moved, (student, teacher), strict=True))
            with emulated.kernels():
                judge(student, teacher, labels, inplace=inplace, **SETTINGS)


def test_the_columns_of_the_table_are_the_ones_of_row_math() -> None:
    header = (emulated.SOURCES / "row_math.h").read_text()
    for kind in (Sums, Coefficients):
        (fields,) = re.findall(rf"struct {kind.__name__} {{(.*?)}};", header, re.DOTALL)
        fields = re.sub(r"//.*", "", fields)
        assert tuple(name for line in re.findall(r"V ([^;]*);", fields) for name in line.split(", ")) == kind._fields


@pytest.mark.parametrize("divergence", KINDS)
@pytest.mark.parametrize(("capability", "vocab"), [(90, 1000), (90, 4097), (80, 50257)], ids=["warp", "kept", "swept"])
def test_a_gradient_is_a_function_of_the_logits_and_the_table_alone(
    capability: int, vocab: int, divergence: str
) -> None:
    """Handed another row's coefficients it is another one: the one that row_math.py says."""
    arguments = batch(2, vocab, F32)
    chosen = {"divergence": divergence, "temperature": 2.5, "teacher_temperature": 1.5, "label_smoothing": 0.1}
    options = dict(KDLoss.defaults) | chosen | {"z_loss": 0.1, "reduction": "none"}
    options |= {"row_weight": None, "normalizer": None}
    inputs, settings = check_inputs(*arguments, options, check_settings(options, True))
    student, grad_loss = arguments.student, torch.tensor([3.0, -0.5])
    with emulated.kernels(capability):
        _, table, _ = torch.ops.kdfast_cuda.stats(student, *inputs, *settings)
        for given in (table, table.flip(0)):
            grad = torch.ops.kdfast_cuda.grad(student, given, grad_loss, *inputs, *settings)
            want, size = by_formula(Coefficients(*given.double().unsqueeze(-1).unbind(1)), arguments, settings)
            # exponents of logits that lie otherwise than the table's row reach some tens: as many ulp
            torch.testing.assert_close(grad.double(), want * grad_loss.unsqueeze(-1), rtol=0, atol=1e-5 * float(size))


def by_formula(c: Coefficients, arguments: Batch, settings: Settings) -> tuple[Tensor, Tensor]:
    """The gradient as kdfast/row_math.py has it, and the largest of its terms."""
    student, teacher, labels = arguments.student.double(), arguments.teacher.double(), arguments.labels
    bits = math.log2(math.e)
    y, y_teacher = (
        (x - offset) * bits / T
        for x, T, offset in (
            (student, settings.temperature, c.student_offset),
            (teacher, settings.teacher_temperature, c.teacher_offset),
        )
    )
    q, p = torch.exp2(y) / c.student_total, torch.exp2(y_teacher) / c.teacher_total
    log_q, log_p = q.log(), p.log()
    terms = [c.hard * torch.exp2((student - c.student_offset) * bits) / c.hard_total, -c.uniform.expand_as(student)]
    terms.append(-c.label * torch.nn.functional.one_hot(labels, student.shape[-1]))
    if settings.divergence == "logit_mse":
        terms.append(c.soft * (student - teacher - c.teacher_offset - c.center))
    else:
        of = divergences.DIVERGENCES[settings.divergence]
        psi = of.psi(p, q, log_p, log_q, settings.beta)
        if of.psi_apart:
            psi = torch.where(c.slope == 0, psi, of.psi_apart(p, q, log_p, log_q, settings.beta))
        else:
            terms.append(q * c.slope * (log_q - log_p))
        terms += [q * c.level, -c.teacher * p, c.soft * (psi - q * c.center)]
    return sum(terms[1:], terms[0]), torch.stack([term.abs().max() for term in terms]).max()
