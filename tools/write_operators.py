"""Writes csrc/operators.h and csrc/settings.h from kdfast/arguments.py: `python tools/write_operators.py`.

A setting's name, type and position are defined there alone; C++ reads it by name. tests/test_build.py checks that the
files are up to date.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kdfast.arguments import Inputs, Settings

CPP = {
    list[Tensor]: "std::vector<torch::stable::Tensor>", Tensor | None: "std::optional<torch::stable::Tensor>",
    float: "double", bool: "bool", str: "std::string", int: "int64_t", list[float]: "std::vector<double>",
    torch.dtype: "torch::headeronly::ScalarType",
}  # fmt: skip
TAKEN = {str: "kdfast::taken({})", list[Tensor]: "std::move({})", list[float]: "std::move({})"}
NOTE = """// Written by tools/write_operators.py from kdfast/arguments.py, which says what each of these is.
#pragma once
// clang-format off
"""
SETTINGS = """
// The settings that are numbers, as f(type, name).
#define KDFAST_NUMBERS(f){numbers}
"""
OPERATORS = """
#include <torch/csrc/stable/c/shim.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace kdfast {{

struct Inputs {{
{inputs}
}};

struct Settings {{
{settings}
}};

}}  // namespace kdfast

// Both as the arguments of an operator, which torch hands over one by one, and as the structs of these.
#define KDFAST_ARGUMENTS{arguments}
#define KDFAST_CALL \
  kdfast::Inputs{{{inputs_given}}}, \
  kdfast::Settings{{{settings_given}}}
"""


def wrap(items: list[str], between: str = ", ") -> str:
    """The text of a macro, in lines of at most 100 columns."""
    lines, line = [], ""
    for i, item in enumerate(items):
        item += between if i < len(items) - 1 else ""
        if len(line) + len(item) > 94:
            lines, line = [*lines, line.rstrip()], ""
        line += item
    return " \\\n  ".join(["", *lines, line.rstrip()])


def fields(types: dict[str, Any]) -> str:
    return "\n".join(f"  {CPP[kind]} {name};" for name, kind in types.items())


def files() -> dict[str, str]:
    """The text of each file of csrc."""
    inputs, settings = Inputs.__annotations__, Settings.__annotations__
    numbers = [f"f({CPP[kind]}, {name})" for name, kind in settings.items() if kind in (float, bool)]
    types = inputs | settings
    arguments = [f"{'StringHandle' if kind is str else CPP[kind]} {name}" for name, kind in types.items()]
    given = {name: TAKEN.get(kind, "{}").format(name) for name, kind in types.items()}
    operators = OPERATORS.format(
        inputs=fields(inputs), settings=fields(settings), arguments=wrap(arguments),
        inputs_given=wrap([given[name] for name in inputs]), settings_given=wrap([given[name] for name in settings]),
    )  # fmt: skip
    return {
        "settings.h": NOTE + SETTINGS.format(numbers=wrap(numbers, " ")),
        "operators.h": NOTE + operators,
    }


if __name__ == "__main__":
    for name, text in files().items():
        (Path(__file__).parents[1] / "csrc" / name).write_text(text)
