"""What the compiler makes of the CUDA kernels' loops, without a GPU: instructions a class on sm_90, fetches, spills."""

import re
import subprocess
from functools import lru_cache
from operator import ge
from pathlib import Path
from typing import NamedTuple

import emulated
import pytest

import kdfast

WHY_NOT = emulated.why_not()
if WHY_NOT is None:
    from ptxemu import static

    if not all(map(static.tool, ("ptxas", "cuobjdump", "nvdisasm"))):
        WHY_NOT = "needs ptxas, and cuobjdump and nvdisasm, which come with Triton"
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))
CLASSES = 8  # of a pack of bf16
SPECIAL = "MUFU"  # exps, logarithms, reciprocals: a quarter as many a cycle, or fewer


class Line(NamedTuple):
    at: int
    guarded: bool
    op: str  # without what follows its first dot
    arguments: str


def entry(unit: str, name: str, capability: int) -> str:
    """The PTX of one kernel, whose name contains these letters."""
    emulated.compiled()
    ptx = (emulated.BUILD / f"{unit}.{capability}.ptx").read_text()
    head, *kernels = re.split(r"^(?=\.entry )", ptx, flags=re.MULTILINE)
    (found,) = (kernel for kernel in kernels if name in kernel.split("(")[0])
    return head + found


@lru_cache
def sass(divergence: str, tmp: Path) -> list[Line]:
    """The machine code, for sm_90, of the kernel that keeps rows of bf16."""
    source, cubin = tmp / f"{divergence}.ptx", tmp / f"{divergence}.cubin"
    source.write_text(entry("rows_bf16", f"block_rowsI13__nv_bfloat16NS0_{len(divergence)}{divergence}ELb1", 90))
    done = subprocess.run(
        [static.tool("ptxas"), "-v", "-arch=sm_90", source, "-o", cubin], capture_output=True, text=True, check=True
    )
    (report,) = static.parse_ptxas(done.stderr + done.stdout).values()
    assert report.spill_bytes == report.stack == 0
    text = subprocess.run([static.tool("cuobjdump"), "-sass", cubin], capture_output=True, text=True, check=True).stdout
    found = re.findall(r"^\s*/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+ )?\s*([A-Z]\w*)(.*?);", text, re.MULTILINE)
    return [Line(int(at, 16), bool(guard), op, rest) for at, guard, op, rest in found]


def target(line: Line) -> int | None:
    found = re.search(r"0x([0-9a-f]+)", line.arguments) if line.op == "BRA" else None
    return int(found[1], 16) if found else None


def loops(code: list[Line]) -> list[list[Line]]:
    """The innermost loops."""
    index = {line.at: i for i, line in enumerate(code)}
    ends = [(index[to], i) for i, line in enumerate(code) if (to := target(line)) is not None and to < line.at]
    inner = [span for span in ends if not any(span[0] <= a and b <= span[1] and (a, b) != span for a, b in ends)]
    return [code[a : b + 1] for a, b in inner]


def shortest(loop: list[Line], counted: dict[str, int]) -> dict[str, int] | None:
    """The instructions of the shortest way round the loop that has at least so many of each of these.

    What is longer is for a new largest logit, masked classes, the label's pack, another temperature or alignment.
    """
    index = {line.at: i for i, line in enumerate(loop)}
    ways, seen, best = [(0, 0, (0,) * len(counted))], {}, None
    while ways:
        at, length, counts = ways.pop()
        if at == len(loop):
            if all(map(ge, counts, counted.values())) and (best is None or length < best["all"]):
                best = {"all": length, **dict(zip(counted, counts, strict=True))}
            continue
        if seen.get((at, counts), length + 1) <= length:
            continue
        seen[at, counts] = length
        line = loop[at]
        counts = tuple(n + (line.op == op) for n, op in zip(counts, counted, strict=True))
        to = None if at == len(loop) - 1 else target(line)
        if to in index:
            ways.append((index[to], length + 1, counts))
        if to is None or line.guarded or re.search(r"\bU?P\d", line.arguments):
            ways.append((at + 1, length + 1, counts))
    return best


@pytest.mark.parametrize(
    ("divergence", "instructions", "special"), [("CrossEntropy", 36, 4), ("ForwardKL", 40, 4), ("JSD", 100, 10)]
)
def test_so_many_instructions_a_class(
    divergence: str, instructions: int, special: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """At temperatures 1 and 2, or without a hard term. 53 take as long on an H100 as its memory takes for 6 bytes."""
    exps, found = 2 * CLASSES, {}
    for loop in loops(sass(divergence, tmp_path_factory.getbasetemp())):
        ops = {line.op for line in loop}
        if "LDGSTS" in ops:  # and copies the packs to come
            name, least = "A", {SPECIAL: exps, "LDGSTS": 2}
        elif "STG" in ops:
            name, least = "C", {SPECIAL: exps, "STG": 1}
        else:  # metrics have no other than exps
            name, least = "B", {SPECIAL: exps + 1}
        if (way := shortest(loop, least)) is not None:
            assert name not in found
            found[name] = way
    assert sorted(found) == (["A", "B", "C"] if divergence == "JSD" else ["A", "C"])
    assert sum(way["all"] for way in found.values()) <= instructions * CLASSES, found
    assert sum(way[SPECIAL] for way in found.values()) <= special * CLASSES, found


@pytest.mark.parametrize("divergence", ["CrossEntropy", "JSD"])
def test_nothing_is_waited_for_before_a_rows_first_fetch(
    divergence: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Neither the label, nor the other blocks of the cluster: memory is asked at once."""
    code = sass(divergence, tmp_path_factory.getbasetemp())
    first = [line.op for line in code].index("LDGSTS")
    logits = [line for line in code[:first] if line.op == "LDG" and line.arguments.startswith(".E.U16")]
    assert len(logits) <= 2  # of the classes before or after all packs
    assert not {"BAR", "MEMBAR", "UCGABAR_WAIT"} & {line.op for line in code[:first]}
    assert sum(line.op == "LDG" for line in code[:first]) == len(logits)


def test_every_device_from_sm_80_on_finds_code() -> None:
    """Its own major version's, or PTX; sm_87, a Jetson, takes no other's machine code. That of sm_120 would not do."""
    library = Path(kdfast.__file__).with_name("libkdfast_cuda.so")
    if not library.exists():
        pytest.skip("this build has no CUDA kernels")
    command = [static.tool("cuobjdump"), "--list-elf", "--list-ptx", library]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    code, ptx = (set(re.findall(rf"sm_(\d+)\w*\.{kind}", listed)) for kind in ("cubin", "ptx"))
    assert {"80", "90"} <= code
    assert ptx in ({"80", "90"}, {"80", "100"})
