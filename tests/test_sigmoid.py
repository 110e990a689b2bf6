"""A sigmoid's logit z as the two classes (0, z): the softmax of these is the sigmoid."""

import pytest
import torch
import torch.nn.functional as F
from cases import F64
from torch import Tensor

from kdfast import kd_loss


def two_classes(z: Tensor) -> Tensor:
    return torch.stack((torch.zeros_like(z), z), -1)


@pytest.mark.parametrize("shape", [(12,), (6, 4)], ids=["binary", "multi-label"])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_both_terms_are_those_of_a_sigmoid(backend: str, shape: tuple[int, ...], temperature: float) -> None:
    generator = torch.Generator("cpu").manual_seed(0)
    s, t = (3 * torch.randn(2, *shape, generator=generator, dtype=F64, device="cpu")).unbind()
    y = torch.randint(2, shape, generator=generator, device="cpu")
    leaf = s.clone().requires_grad_()
    hard = F.binary_cross_entropy_with_logits(leaf, y.double())
    soft = temperature**2 * F.binary_cross_entropy_with_logits(leaf / temperature, torch.sigmoid(t / temperature))
    want = 0.7 * soft + 0.3 * hard
    want.backward()

    device = torch.get_default_device()
    s, t, y = s.float().to(device).requires_grad_(), t.float().to(device), y.to(device)
    loss = kd_loss(two_classes(s), two_classes(t), y, temperature=temperature, alpha=0.7, backend=backend)
    loss.backward()
    torch.testing.assert_close(loss.cpu(), want.detach().float())
    torch.testing.assert_close(s.grad.cpu(), leaf.grad.float(), rtol=1e-5, atol=1e-7)


def test_one_class_has_loss_and_gradient_0(backend: str) -> None:
    s, t = torch.randn(5, 1).requires_grad_(), torch.randn(5, 1)
    for labels in (None, torch.zeros(5, dtype=torch.int64)):
        loss = kd_loss(s, t, labels, temperature=2.0, backend=backend)
        (grad,) = torch.autograd.grad(loss, s)
        assert abs(loss.item()) < 1e-6  # a few ulp of the logits
        assert grad.abs().max() < 1e-6
