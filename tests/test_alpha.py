"""alpha = 0 is plain cross-entropy, which has no temperature."""

import pytest
import torch
import torch.nn.functional as F

from kdfast import kd_loss


# whole, small: exps at 1 are powers of those at T; others: not, and there is no soft term to take them for
@pytest.mark.parametrize("temperature", (1.0, 2.0, 0.5, 3.7, 20.0))
@pytest.mark.parametrize("vocab", (10, 3000))  # by columns, by blocks
def test_without_a_soft_term_the_temperature_does_not_matter(backend: str, temperature: float, vocab: int) -> None:
    s = torch.randn(4, vocab, requires_grad=True)
    labels = torch.randint(0, vocab, (4,))
    for value in (temperature, torch.full((4,), temperature)):
        for reduction in ("mean", "none"):
            loss = kd_loss(s, None, labels, alpha=0, temperature=value, reduction=reduction, backend=backend)
            want = F.cross_entropy(s, labels, reduction=reduction)
            torch.testing.assert_close(loss, want)
            torch.testing.assert_close(
                torch.autograd.grad(loss.sum(), s)[0], torch.autograd.grad(want.sum(), s)[0], rtol=1e-5, atol=1e-7
            )
