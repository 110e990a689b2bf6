"""dim: where the classes are, as F.softmax has it. (N, C, H, W) and (N, C, L) are taken as they lie."""

import pytest
import torch
import torch.nn.functional as F
from cases import F32, batch
from torch import Tensor

from kdfast import KDLoss, kd_loss, linear_kd_loss

SHAPE = (2, 21, 3, 5)  # (N, C, H, W): no two sizes are alike
# the shape of the logits and where their classes are
PLACES = [(SHAPE, 1), (SHAPE, -3), ((4, 21, 6), 1), ((21, 4, 6), 0), ((4, 21, 6), -2), ((6, 21), 1), ((21,), 0)]


def images(shape: tuple[int, ...] = SHAPE, dim: int = 1, dtype: torch.dtype = F32) -> tuple[Tensor, Tensor, Tensor]:
    """Student and teacher of a shape, contiguous, and labels of the shape without the classes."""
    vocab = shape[dim]
    rows = list(shape)
    del rows[dim]
    student, teacher, labels = batch(torch.Size(rows).numel(), vocab, dtype)
    labels[0] = -100
    student, teacher = (x.view(*rows, vocab).movedim(-1, dim).contiguous() for x in (student, teacher))
    return student, teacher, labels.view(rows)


def gradient(student: Tensor, *args: object, **settings: object) -> tuple[Tensor, Tensor]:
    leaf = student.detach().requires_grad_()
    logits = leaf * 1 if settings.get("inplace") else leaf
    loss = kd_loss(logits, *args, **settings)
    loss.sum().backward()
    assert leaf.grad is not None
    return loss.detach(), leaf.grad


def recipe(s: Tensor, t: Tensor, y: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Each row's loss and the mean's gradient by PyTorch in fp64, with T = 2, alpha = 0.7 and forward_kl."""
    wide = s.double().requires_grad_()
    q, p = (torch.log_softmax(x / 2, dim) for x in (wide, t.double()))
    soft = F.kl_div(q, p, reduction="none", log_target=True).sum(dim)
    label = y.clamp_min(0).unsqueeze(dim)
    hard = -torch.log_softmax(wide, dim).gather(dim, label).squeeze(dim)
    losses = torch.where(y == -100, 0, 0.7 * 4 * soft + 0.3 * hard)
    (losses.sum() / (y != -100).sum().clamp_min(1)).backward()
    assert wide.grad is not None
    return losses.detach(), wide.grad


OPTIONS = {"divergence": "forward_kl", "temperature": 2.0, "alpha": 0.7}


@pytest.mark.parametrize(("shape", "dim"), PLACES)
def test_the_numbers_are_those_of_pytorchs_recipe(backend: str, shape: tuple[int, ...], dim: int) -> None:
    s, t, y = images(shape, dim)
    losses, want = recipe(s, t, y, dim)
    mean = (losses.sum() / (y != -100).sum().clamp_min(1)).float()
    for inplace in (False, True):
        loss, grad = gradient(s, t, y, dim=dim, inplace=inplace, backend=backend, **OPTIONS)
        torch.testing.assert_close(loss, mean)
        torch.testing.assert_close(grad, want.float(), rtol=1e-5, atol=1e-7)
    loss, grad = gradient(s, t, y, dim=dim, reduction="none", backend=backend, **OPTIONS)
    torch.testing.assert_close(loss, losses.float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad / (y != -100).sum().clamp_min(1), want.float(), rtol=1e-5, atol=1e-7)


def test_alpha_0_is_f_cross_entropy_of_images(backend: str) -> None:
    s, _, y = images()
    for reduction in ("mean", "sum", "none"):
        want = F.cross_entropy(s.double(), y, reduction=reduction).float()
        loss = kd_loss(s, None, y, alpha=0, dim=1, reduction=reduction, backend=backend)
        torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-6)


def test_row_values_have_the_shape_without_the_classes() -> None:
    s, t, y = images()
    settings = {"row_weight": torch.rand(y.shape), "temperature": 1 + torch.rand(y.shape), "reduction": "none"}
    settings |= {"teacher_temperature": 1 + torch.rand(y.shape), "return_metrics": True}
    loss, metrics = kd_loss(s, [t, t + s], y, dim=1, **settings)
    last = [x.movedim(1, -1).contiguous() for x in (s, t, t + s)]
    want, their_metrics = kd_loss(last[0], last[1:], y, **settings)
    assert loss.shape == y.shape == metrics.kl.shape
    torch.testing.assert_close((loss, *metrics), (want, *their_metrics), equal_nan=True, rtol=0, atol=0)


def test_padded_heads_are_padded_in_their_dimension() -> None:
    s, t, y = images()
    y = y.clamp_max(18)
    want = kd_loss(s[:, :19].contiguous(), t[:, :19].contiguous(), y, dim=1)
    loss, grad = gradient(s, t[:, :20], y, dim=1, vocab_size=19)
    torch.testing.assert_close(loss, want)
    assert not grad[:, 19:].any()


def test_batchmean_divides_by_the_first_dimension_that_is_not_of_classes() -> None:
    for shape, dim, size in ((SHAPE, 1, 2), ((21, 4, 6), 0, 4), ((4, 21, 6), 1, 4)):
        s, t, y = images(shape, dim)
        total = kd_loss(s, t, y, dim=dim, reduction="sum")
        torch.testing.assert_close(kd_loss(s, t, y, dim=dim, reduction="batchmean"), total / size)


def allocated(call: object) -> int:
    """Bytes that a call allocates, of tensors that are not small."""
    with torch.profiler.profile(profile_memory=True) as profile:
        call()
    sizes = (event.cpu_memory_usage for event in profile.events() if event.name.startswith("aten::empty"))
    return sum(size for size in sizes if size > 100_000)


def test_channels_last_logits_are_read_and_written_where_they_lie(cpu: str) -> None:
    s, t, y = images((4, 21, 32, 32), 1)
    s, t = (x.to(memory_format=torch.channels_last) for x in (s, t))
    leaf = s.requires_grad_()
    size = s.numel() * 4
    assert allocated(lambda: kd_loss(leaf, t, y, dim=1, backend=cpu).backward()) == size, "the gradient alone"
    assert leaf.grad.is_contiguous(memory_format=torch.channels_last)
    logits = leaf * 1
    assert allocated(lambda: kd_loss(logits, t, y, dim=1, inplace=True, backend=cpu)) == 0
    torch.testing.assert_close(logits.detach(), leaf.grad)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_gradient_has_the_students_layout(backend: str, reduction: str, memory_format: torch.memory_format) -> None:
    s, t, y = images()
    given = []
    logits = s.to(memory_format=memory_format).requires_grad_() * 1
    logits.register_hook(lambda grad: given.append(grad.is_contiguous(memory_format=memory_format)))
    kd_loss(logits, t, y, dim=1, reduction=reduction, backend=backend).sum().backward()
    assert given == [True]


def test_a_compiled_call_takes_any_dimension() -> None:
    s, t, y = images()
    call = torch.compile(lambda s, t, y: kd_loss(s, t, y, dim=1), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(call(s, t, y), kd_loss(s, t, y, dim=1))


def test_labels_that_fit_dimension_1_say_so() -> None:
    s, t, y = images()
    for shape, labels in ((SHAPE, y), ((2, 21, 15), y.view(2, 15))):
        words = r"fit classes in dimension 1: pass dim=1"
        with pytest.raises(ValueError, match=rf"^labels: has shape .*{words}"):
            kd_loss(s.view(shape), t.view(shape), labels)
    with pytest.raises(ValueError, match=r"^labels: has shape \(3,\), .* it must be \(2, 21, 3\)$"):
        kd_loss(s, t, y[0, :, 0])


def test_wrong_dimensions_and_shapes_raise() -> None:
    s, t, y = images()
    for dim in (4, -5):
        with pytest.raises(IndexError, match=rf"^dim: {dim} must lie in \[-4, 3\], the dimensions of student_logits"):
            kd_loss(s, t, y, dim=dim)
    with pytest.raises(TypeError, match="^dim: must be an int, not 1.0"):
        kd_loss(s, t, y, dim=1.0)
    with pytest.raises(ValueError, match=r"^teacher: has shape \(2, 21, 3\), .* it must be \(2, V, 3, 5\)"):
        kd_loss(s, t[..., 0], y, dim=1)
    with pytest.raises(ValueError, match="^teacher: has 20 classes, but student_logits has 21"):
        kd_loss(s, t[:, :20], y, dim=1)
    with pytest.raises(ValueError, match=r"^labels: .* must be \(2, 3, 5\)$"):
        kd_loss(s, t, y[0], dim=1)
    with pytest.raises(ValueError, match="^student_logits: has shape .* it must be V in dimension 1 with V >= 1"):
        kd_loss(s[:, :0], t[:, :0], y, dim=1)
    with pytest.raises(TypeError, match="unexpected keyword argument 'dim'"):
        linear_kd_loss(torch.ones(3, 4), torch.ones(5, 4), torch.ones(3, 5), None, dim=0)


def test_the_module_takes_dim() -> None:
    s, t, y = images()
    assert torch.equal(KDLoss(dim=1)(s, t, y), kd_loss(s, t, y, dim=1))
