"""Other libraries' functions replaced by kdfast's, and put back."""

import importlib
import inspect
import warnings
from collections.abc import Callable
from types import TracebackType
from typing import Any

from typing_extensions import Self


class FallbackWarning(UserWarning):
    """A trainer asked for what kdfast does not compute, so that its own code ran."""


class Patch:
    """Attributes that have been replaced. `undo()`, or the end of a `with` statement, puts the old ones back.

    Args:
        library: the name of the package that is patched, for errors.
        tested: the version of it that the replacements were tested with.
    """

    def __init__(self, library: str, tested: str) -> None:
        self.library = library
        self.tested = tested
        self._before: list[tuple[Any, str, Any]] = []

    def replace(self, module: str, name: str, replacement: Callable[[Any], Any]) -> None:
        """Sets `module.name` to `replacement(original)`. Does nothing where that was done.

        Args:
            module: the module to import.
            name: an attribute of it, with dots for one of a class.
            replacement: takes the original and returns what stands in its place. It may call the original for what
                kdfast does not compute.

        Raises:
            ImportError: the module cannot be imported. As after an AttributeError, nothing stays patched.
            AttributeError: the library has no such attribute.
        """
        try:
            owner: Any = importlib.import_module(module)
        except ImportError:
            self.undo()
            raise
        *path, last = name.split(".")
        try:
            for part in path:
                owner = getattr(owner, part)
            original = getattr(owner, last)
        except AttributeError:
            self.undo()
            version = getattr(importlib.import_module(self.library), "__version__", "this version")
            raise AttributeError(
                f"{module}.{name}: not found in {self.library} {version}. kdfast.integrations was tested with "
                f"{self.library} {self.tested}"
            ) from None
        if hasattr(original, "kdfast_original"):
            return
        replaced = replacement(original)
        replaced.kdfast_original = original
        before = inspect.getattr_static(owner, last, original)  # getattr has taken a static method out of its object
        self._before.append((owner, last, before))
        setattr(owner, last, staticmethod(replaced) if isinstance(before, staticmethod) else replaced)

    def undo(self) -> None:
        """Puts the originals back. A second call does nothing."""
        while self._before:
            setattr(*self._before.pop())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, error: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()


_warned: set[tuple[str, str]] = set()


def warn_fallback(where: str, reason: str) -> None:
    """Warns, once for each place and reason, that the trainer's own code runs."""
    if (where, reason) not in _warned:
        _warned.add((where, reason))
        warnings.warn(f"{where}: kdfast does not compute {reason}; the trainer's own code runs", FallbackWarning, 3)
