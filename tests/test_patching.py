"""kdfast.integrations.patching: a library's attributes are replaced and put back, and a fallback warns once."""

import sys
import warnings
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest

from kdfast.integrations import patching
from kdfast.integrations.patching import FallbackWarning, Patch, warn_fallback


def loss(x: float) -> float:
    return x


def other_loss(x: float) -> float:
    return x


def doubled(original: Callable[..., Any]) -> Callable[..., Any]:
    def replacement(*arguments: Any) -> Any:
        return 2 * original(*arguments)

    return replacement


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A library that can be imported: two functions, and a class with a method."""
    module: Any = ModuleType("patched_library")
    module.__version__ = "1.2.3"
    module.loss, module.other_loss = loss, other_loss
    module.Trainer = type("Trainer", (), {"compute_loss": lambda self, x: x})
    monkeypatch.setitem(sys.modules, "patched_library", module)
    yield module


def patch_of(name: str) -> Patch:
    patch = Patch("patched_library", "1.0.0")
    patch.replace("patched_library", name, doubled)
    return patch


def test_the_replacement_is_called_and_undo_puts_the_original_back(library):
    original = library.loss
    patch = patch_of("loss")
    assert library.loss(3) == 6
    patch.undo()
    assert library.loss is original
    patch.undo()  # a second time does nothing
    assert library.loss is original


def test_a_patch_ends_with_its_with_statement_also_by_an_error(library):
    original = library.loss
    with pytest.raises(ZeroDivisionError), patch_of("loss"):
        assert library.loss(3) == 6
        raise ZeroDivisionError
    assert library.loss is original


def test_an_attribute_of_a_class_is_replaced_and_put_back(library):
    trainer, original = library.Trainer(), library.Trainer.compute_loss
    with patch_of("Trainer.compute_loss"):
        assert trainer.compute_loss(3) == 6
    assert trainer.compute_loss(3) == 3
    assert library.Trainer.compute_loss is original


def test_a_static_method_stays_one(library):
    library.Trainer.static_loss = staticmethod(loss)
    with patch_of("Trainer.static_loss"):
        patch_of("Trainer.static_loss")  # does nothing
        assert library.Trainer().static_loss(3) == library.Trainer.static_loss(3) == 6
    assert library.Trainer().static_loss(3) == library.Trainer.static_loss(3) == 3


def test_a_second_patch_of_a_name_does_nothing_nor_does_its_undo(library):
    first, second = patch_of("loss"), patch_of("loss")
    assert library.loss(3) == 6
    second.undo()
    assert library.loss(3) == 6
    first.undo()
    assert library.loss(3) == 3


def test_the_replacement_knows_the_original(library):
    original = library.loss
    with patch_of("loss"):
        assert library.loss.kdfast_original is original


@pytest.mark.parametrize("missing", ["gone", "Gone.compute_loss", "Trainer.gone"])
def test_a_missing_attribute_is_an_error_that_names_both_versions_and_leaves_nothing_patched(library, missing):
    patch = Patch("patched_library", "1.0.0")
    patch.replace("patched_library", "loss", doubled)
    patch.replace("patched_library", "other_loss", doubled)
    with pytest.raises(AttributeError) as error:
        patch.replace("patched_library", missing, doubled)
    for words in (f"patched_library.{missing}: not found", "patched_library 1.2.3", "patched_library 1.0.0"):
        assert words in str(error.value)
    assert (library.loss, library.other_loss) == (loss, other_loss)


def test_a_module_that_cannot_be_imported_leaves_nothing_patched(library):
    patch = patch_of("loss")
    with pytest.raises(ModuleNotFoundError):
        patch.replace("patched_library.gone", "loss", doubled)
    assert library.loss is loss


def test_a_library_without_a_version_is_named_without_one(library):
    del library.__version__
    with pytest.raises(AttributeError, match="not found in patched_library this version"):
        patch_of("gone")


def test_a_fallback_warns_once_for_each_place_and_reason(monkeypatch):
    monkeypatch.setattr(patching, "_warned", set())
    once = [("library.loss", "top_k=5"), ("library.loss", "add_tail"), ("other", "top_k=5")]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for call in [*once, *once]:
            warn_fallback(*call)
    assert [type(each.message) for each in caught] == [FallbackWarning] * 3
    assert str(caught[0].message) == "library.loss: kdfast does not compute top_k=5; the trainer's own code runs"
    assert {str(each.message).split(":")[0] for each in caught} == {"library.loss", "other"}
