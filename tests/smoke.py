"""Uses an install as a user would: `python smoke.py cpu` for a compiled one, `reference` for a pure-Python one."""

import sys
import warnings

import torch

import kdfast

expected = sys.argv[1]
torch.manual_seed(0)
student, teacher = torch.randn(2, 16, 1000)
labels = torch.randint(1000, (16,))
student.requires_grad_()


def loss_and_grad(**keywords: str) -> tuple[torch.Tensor, torch.Tensor]:
    loss = kdfast.kd_loss(student, teacher, labels, temperature=2.0, **keywords)
    return loss.detach(), torch.autograd.grad(loss, student)[0]


with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    results = [loss_and_grad() for _ in range(2)]
warned = [str(warning.message) for warning in caught if "kdfast" in str(warning.message)]
facts = kdfast.backends()

torch.testing.assert_close(results[0], loss_and_grad(backend="reference"))
assert facts["by_device"]["cpu"] == expected, facts
assert len(warned) == (expected == "reference"), warned
print(f"kdfast {kdfast.__version__} from {kdfast.__path__[0]}: {facts['cpu']}", *warned, sep="\n")
