"""Public docstrings: their examples run and print what they say, and help() shows every argument in plain text."""

import doctest
import inspect
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import kdfast

RESULTS = (kdfast.KDMetrics, kdfast.SparseKDMetrics)  # which no one makes
PUBLIC = [x for x in map(kdfast.__dict__.get, kdfast.__all__) if callable(x)]
WITH_EXAMPLES = [x for x in PUBLIC if x not in RESULTS]
FUNCTIONS = [x for x in PUBLIC if inspect.isfunction(x)]
SOURCES = sorted(Path(kdfast.__file__).parent.rglob("*.py"))


@pytest.mark.parametrize("function", WITH_EXAMPLES, ids=lambda x: x.__name__)
def test_an_example_of_a_docstring_runs_as_shown(function: Callable) -> None:
    text = inspect.getdoc(function) or ""
    names = {"torch": torch} | {name: getattr(kdfast, name) for name in kdfast.__all__}
    example = doctest.DocTestParser().get_doctest(text, names, function.__name__, None, 0)
    assert example.examples, f"{function.__name__} shows no example"
    result = doctest.DocTestRunner().run(example)
    assert result.failed == 0


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda x: x.__name__)
def test_a_docstring_has_every_argument_once(function: Callable) -> None:
    parameters = inspect.signature(function).parameters.values()
    wanted = [("**" if p.kind is p.VAR_KEYWORD else "") + p.name for p in parameters if p.name != "unknown"]
    text = inspect.getdoc(function) or ""
    sections = re.findall(r"^Args:.*\n((?:    .*\n)+)", text, flags=re.MULTILINE)
    lines = re.findall(r"^    (\S[^:\n]*): ", "".join(sections), flags=re.MULTILINE)
    named = [name for line in lines for name in line.split(", ")]
    assert sorted(named) == sorted(wanted)


@pytest.mark.parametrize("path", SOURCES, ids=lambda x: x.stem)
def test_docstrings_have_no_markup_of_sphinx(path: Path) -> None:
    """Names are in single backticks, as Markdown has them; help() shows text as it stands."""
    found = re.findall(r".*(?::[a-z]+:`|``|^ *\.\. |^ *====+|\w::$).*", path.read_text(), flags=re.MULTILINE)
    assert not found
