"""The examples in the public docstrings run and print what they say."""

import doctest
import inspect
from collections.abc import Callable

import pytest
import torch

import kdfast

RESULTS = (kdfast.KDMetrics, kdfast.SparseKDMetrics)  # which no one makes
WITH_EXAMPLES = [x for x in map(kdfast.__dict__.get, kdfast.__all__) if callable(x) and x not in RESULTS]


@pytest.mark.parametrize("function", WITH_EXAMPLES, ids=lambda x: x.__name__)
def test_an_example_of_a_docstring_runs_as_shown(function: Callable) -> None:
    text = inspect.getdoc(function) or ""
    names = {"torch": torch} | {name: getattr(kdfast, name) for name in kdfast.__all__}
    example = doctest.DocTestParser().get_doctest(text, names, function.__name__, None, 0)
    assert example.examples, f"{function.__name__} shows no example"
    result = doctest.DocTestRunner().run(example)
    assert result.failed == 0
