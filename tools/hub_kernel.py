"""Writes kdfast as a kernel of the Hugging Face Hub: `python tools/hub_kernel.py build/hub`.

The layout is that of huggingface/kernels' kernel-builder: build.toml, torch-ext/ and the C++ sources. Nothing of it is
in the repository: all is made of csrc/, kdfast/ and CMakeLists.txt. A Hub kernel must load beside another version of
itself, so its imports are relative, and its operators are in namespaces that begin with the build's id. It has the CPU
and the Triton kernels; not the CUDA kernels, nor kdfast.cache and kdfast.integrations, which import other packages.
"""

import ast
import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
LEAST_TORCH = "2.10"  # what pyproject.toml asks for; CMakeLists.txt's TORCH_TARGET_VERSION
LEFT_OUT = ("cache", "integrations")

# A string that names a namespace of operators, whole or up to ::, and an attribute of torch.ops.
NAMESPACE_STRING = re.compile(r'f?"kdfast((?:_(?:reference|triton|cuda_rows|cuda|sharded))?)(::|")')
NAMESPACE_ATTRIBUTE = re.compile(r"torch\.ops\.kdfast(\w*)(?!\w|\.\*)")

NAMESPACE_MODULE = '''"""The namespace of this build's operators, and the file that has its CPU kernels."""

from pathlib import Path

from . import _ops

NAMESPACE = _ops.add_op_namespace_prefix("").removesuffix("::")
EXTENSION = Path(getattr(_ops, NAMESPACE).__file__).name
'''

BUILD_TOML = """[general]
name = "kdfast"
version = 0
edition = 5
license = "bsd-3-clause"
backends = ["cpu"]

[torch]
src = ["torch-ext/torch_binding.cpp"]
include = ["csrc", "csrc/cpu"]

[torch.stable-abi]
cpu = "{torch}"

[kernel.shared]
backend = "cpu"
depends = ["torch"]
include = ["csrc", "csrc/cpu"]
src = [{shared}]
"""

ROW_KERNELS_TOML = """
[kernel.{isa}]
backend = "cpu"
depends = ["torch"]
include = ["csrc", "csrc/cpu"]
cxx-flags = [{flags}]
src = ["csrc/cpu/row_kernels_{isa}.cpp"]
"""

CARD = """---
library_name: kernels
license: bsd-3-clause
---

# kdfast

Fused knowledge-distillation losses for PyTorch: a loss and its gradient in one pass over the logits.

```python
from kernels import get_local_kernel

kdfast = get_local_kernel(path)  # from the Hub: get_kernel(repository, version=0)
loss = kdfast.kd_loss(student_logits, teacher_logits, labels, temperature=2.0)
```

It has kdfast's functions and classes, {names}. The Python package has CUDA kernels, `kdfast.cache` and
`kdfast.integrations` as well.
"""

FLAKE = """{
  description = "kdfast: fused knowledge-distillation losses";
  inputs.kernel-builder.url = "github:huggingface/kernels";
  outputs = { self, kernel-builder }: kernel-builder.lib.genKernelFlakeOutputs { inherit self; path = ./.; };
}
"""


def replace_once(text: str, old: str, new: str) -> str:
    if text.count(old) != 1:
        raise ValueError(f"{old!r} must be there once, and was {text.count(old)} times")
    return text.replace(old, new)


# -- Python ------------------------------------------------------------------------------------------------------------


def relative(line: str, depth: int) -> str:
    """A line that begins an import of kdfast, as a relative one from a module that is `depth` packages down."""
    dots = "." * (depth + 1)
    line = re.sub(r"from kdfast\.([\w.]+) import", rf"from {dots}\1 import", line)
    line = re.sub(r"from kdfast import", f"from {dots} import", line)
    return re.sub(r"import kdfast\.(\w+)", rf"from {dots} import \1", line)


def imports_kdfast(node: ast.AST) -> bool:
    if isinstance(node, ast.ImportFrom):
        return node.module is not None and node.module.split(".")[0] == "kdfast"
    return isinstance(node, ast.Import) and any(name.name.split(".")[0] == "kdfast" for name in node.names)


def hub_module(source: str, depth: int) -> str:
    """A module of kdfast, as a Hub kernel has it."""
    tree = ast.parse(source)
    lines = source.splitlines()
    for node in ast.walk(tree):
        if imports_kdfast(node):
            lines[node.lineno - 1] = relative(lines[node.lineno - 1], depth)
    text = "\n".join(lines) + "\n"
    text = NAMESPACE_ATTRIBUTE.sub(r'getattr(torch.ops, f"{NAMESPACE}\1")', text)
    text = NAMESPACE_STRING.sub(r'f"{NAMESPACE}\1\2', text)
    text = text.replace('"libkdfast.so"', "EXTENSION")
    needed = [name for name in ("EXTENSION", "NAMESPACE") if re.search(rf"\b{name}\b", text)]
    if needed:
        first = next(node.lineno for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom))
        lines = text.splitlines()
        lines.insert(first - 1, f"from {'.' * (depth + 1)}namespace import {', '.join(needed)}")
        text = "\n".join(lines) + "\n"
    if any(imports_kdfast(node) for node in ast.walk(ast.parse(text))):
        raise ValueError("an import of kdfast is not relative")
    return text


def write_python(to: Path) -> None:
    package = ROOT / "kdfast"
    for path in sorted(package.rglob("*.py")):
        inside = path.relative_to(package)
        if inside.parts[0] not in LEFT_OUT:
            target = to / inside
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(hub_module(path.read_text(), len(inside.parts) - 1))
    (to / "namespace.py").write_text(NAMESPACE_MODULE)


# -- C++ ---------------------------------------------------------------------------------------------------------------


def isa_flags() -> dict[str, list[str]]:
    """The flags that CMakeLists.txt compiles the row kernels with, by instruction set."""
    text = (ROOT / "CMakeLists.txt").read_text()
    found: dict[str, list[str]] = {}
    for isa, flags in re.findall(r"^set\(flags_(\w+) (.*)\)$", text, re.MULTILINE):
        words = [found[word[8:-1]] if word.startswith("${flags_") else [word] for word in flags.split()]
        found[isa] = [flag for several in words for flag in several if flag != '""']
    return found


def write_cpp(to: Path) -> None:
    shutil.copytree(ROOT / "csrc", to / "csrc", ignore=shutil.ignore_patterns("cuda"))
    cpu = to / "csrc" / "cpu"
    # kernel-builder compiles a file once: a file for each set includes the row kernels.
    for isa in isa_flags():
        text = f'#define KDFAST_ISA {isa}\n#include "row_kernels.cpp"\n'
        (cpu / f"row_kernels_{isa}.cpp").write_text(text)
    sets = "#define KDFAST_ISAS X(baseline)"
    every = "#define KDFAST_ISAS " + " ".join(f"X({isa})" for isa in isa_flags())
    (cpu / "isa.h").write_text(replace_once((cpu / "isa.h").read_text(), sets, every))
    build_info = (cpu / "build_info.cpp").read_text()
    (cpu / "build_info.cpp").write_text(replace_once(build_info, "KDFAST_COMPILER", "__VERSION__"))
    binding = (cpu / "ops.cpp").read_text()
    binding = replace_once(binding, '#include "arguments.h"', '#include "arguments.h"\n#include "registration.h"')
    ours, theirs = "LIBRARY_IMPL(kdfast, CPU, m)", "LIBRARY_IMPL_EXPAND(TORCH_EXTENSION_NAME, CPU, m)"
    binding = replace_once(binding, ours, theirs)
    (to / "torch-ext" / "torch_binding.cpp").write_text(binding + "\nREGISTER_EXTENSION(TORCH_EXTENSION_NAME)\n")
    (cpu / "ops.cpp").unlink()


def quoted(words: list[str]) -> str:
    return ", ".join(f'"{word}"' for word in words)


def build_toml() -> str:
    shared = [f"csrc/cpu/{name}.cpp" for name in ("build_info", "isa", "older_libraries")]
    text = BUILD_TOML.format(torch=LEAST_TORCH, shared=quoted(shared))
    for isa, flags in isa_flags().items():
        flags = [*flags, "-O2", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"]
        text += ROW_KERNELS_TOML.format(isa=isa, flags=quoted(flags))
    return text


def write(to: Path) -> None:
    """Writes the kernel's sources into the folder `to`, in place of what is there."""
    shutil.rmtree(to, ignore_errors=True)
    package = to / "torch-ext" / "kdfast"
    package.mkdir(parents=True)
    write_python(package)
    write_cpp(to)
    (to / "build.toml").write_text(build_toml())
    (to / "flake.nix").write_text(FLAKE)
    names = re.findall(r'^    "(\w+)",$', (ROOT / "kdfast/__init__.py").read_text(), re.MULTILINE)
    (to / "CARD.md").write_text(CARD.format(names=", ".join(f"`{name}`" for name in names)))
    shutil.copy(ROOT / "LICENSE", to)


if __name__ == "__main__":
    write(Path(sys.argv[1]) / "kdfast")
