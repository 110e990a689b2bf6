"""KDLoss as a module: it is copied, saved and shown like PyTorch's losses.

It calls kd_loss, whatever the backend: the tests use the device's default.
"""

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from cases import batch
from torch import nn

from kdfast import KDLoss, kd_loss
from kdfast.options import CallOptions, Options

SETTINGS = {"temperature": 3.0, "alpha": 0.5, "divergence": "reverse_kl", "ignore_index": 7, "reduction": "sum"}


def saved_and_loaded(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, copy.copy, lambda x: pickle.loads(pickle.dumps(x)), saved_and_loaded],
    ids=["deepcopy", "copy", "pickle", "torch.save"],
)
@pytest.mark.parametrize(
    "more",
    [
        {},
        {"temperature": torch.full((5,), 3.0)},
        {"divergence": "dkd", "dkd_weights": (2.0, 1.0), "softcap": 9.0, "standardize": True, "z_loss": 0.1},
    ],
    ids=["number", "tensor", "options"],
)
def test_a_copy_gives_the_same_loss(copied: Callable[[nn.Module], nn.Module], more):
    s, t, y = batch(5, 100)
    loss = KDLoss(**SETTINGS | more)
    assert torch.equal(copied(loss)(s, t, y), loss(s, t, y))


def test_the_module_calls_kd_loss_with_its_settings():
    s, t, y = batch(5, 100)
    more = SETTINGS | {"return_metrics": True, "label_smoothing": 0.1}
    for settings, of_call in ((SETTINGS, {"row_weight": torch.rand(5)}), (more, {}), ({}, {"normalizer": 3})):
        ours, same = KDLoss(**settings)(s, t, y, **of_call), kd_loss(s, t, y, **settings, **of_call)
        torch.testing.assert_close(ours, same, rtol=0, atol=0)


def test_a_setting_changed_between_calls_takes_effect():
    s, t, y = batch(5, 100)
    loss = KDLoss(temperature=2.0)
    loss(s, t, y)
    loss.temperature = 4.0  # a schedule
    assert torch.equal(loss(s, t, y), kd_loss(s, t, y, temperature=4.0))
    loss.temperature = -1.0
    with pytest.raises(ValueError, match="^temperature: -1.0 must be finite and > 0"):
        loss(s, t, y)


def test_a_tensor_changed_in_place_between_calls_takes_effect():
    s, t, y = batch(5, 100)
    loss = KDLoss(temperature=torch.tensor(2.0), alpha=torch.tensor(0.5))
    loss(s, t, y)
    loss.temperature.fill_(4.0)
    loss.alpha.fill_(0.25)
    assert torch.equal(loss(s, t, y), kd_loss(s, t, y, temperature=4.0, alpha=0.25))


def test_the_module_checks_its_options_when_it_is_built():
    wrong = {"temperature": 0, "alpha": 1.5, "divergence": "kl", "beta": 0.5, "inplace": 1, "dim": 1.0}
    for options in ({name: value} for name, value in wrong.items()):
        (name,) = options
        with pytest.raises((TypeError, ValueError), match=f"^{name}: "):
            KDLoss(**options)
    KDLoss(label_smoothing=0.1, divergence="dkd")  # these need labels, which a call may have
    with pytest.raises(ValueError, match="^label_smoothing: 0.1 without labels"):
        KDLoss(label_smoothing=0.1)(*batch(5, 100)[:2])


def test_the_module_has_no_parameters_and_no_buffers():
    loss = KDLoss(temperature=2.0)
    assert dict(loss.state_dict()) == {}
    assert list(loss.parameters()) == list(loss.buffers()) == []
    loss.load_state_dict({})


def test_the_module_has_the_functions_keywords_and_defaults():
    of_call = KDLoss.forward.__kwdefaults__
    assert set(of_call) == {"row_weight", "normalizer"}, "they are arguments of a call"
    assert KDLoss.defaults | of_call == kd_loss.__kwdefaults__
    typed = {*Options.__annotations__, "dim", "inplace", "return_metrics"}  # what a type checker accepts
    assert typed == KDLoss.defaults.keys()
    assert CallOptions.__annotations__.keys() | typed == kd_loss.__kwdefaults__.keys()


def test_the_repr_shows_the_settings():
    shown = repr(KDLoss(**SETTINGS))
    for name, value in SETTINGS.items():
        assert f"{name}={value!r}" in shown
    assert "inplace" not in shown, "defaults are not shown"
    assert "dkd_weights" not in shown
    assert repr(KDLoss(divergence="dkd", dkd_weights=(1.0, 2.0))).endswith("divergence='dkd', dkd_weights=(1.0, 2.0))")
    assert repr(KDLoss()) == "KDLoss(temperature=1.0, alpha=None, divergence='cross_entropy')"
    assert eval(repr(KDLoss(**SETTINGS))).temperature == 3.0
    assert "KDLoss(temperature=3.0" in repr(nn.ModuleDict({"loss": KDLoss(**SETTINGS)}))
    assert "temperature=tensor([1., 2.])" in repr(KDLoss(temperature=torch.tensor([1.0, 2.0])))
