"""Every launch twice, by the numpy code alone and with native.c: memory, counts and findings must be the same."""

import copy

import numpy as np
from ptxemu import machine, native

launch = machine.Machine.launch
compared = 0  # launches


def facts(rep):
    """All that a report says, as plain values."""
    arrays = {n: {k: v for k, v in vars(a).items()} for n, a in rep.arrays.items()}
    findings = [(f.kind, f.line, f.text, f.source, f.count, f.threads, f.message) for f in rep.findings]
    return {
        "instructions": rep.warp_instructions,
        "opcodes": rep.opcodes,
        "loads": rep.load_widths,
        "stores": rep.store_widths,
        "shared": rep.shared,
        "arrays": arrays,
        "findings": findings,
        "printed": rep.printed,
        "completed": rep.completed,
    }


def same(a, b):
    """Whether two arrays of bytes are the same, but for the signs and payloads of what are NaN in both."""
    for bits, exponent in ((64, 0x7FF0000000000000), (32, 0x7F800000), (16, 0x7F80), (16, 0x7C00)):
        if np.array_equal(a, b):
            return True
        n = a.size * 8 // bits
        x, y = (v[: n * bits // 8].copy().view(f"u{bits // 8}") for v in (a, b))
        top = (1 << bits - 1) - 1
        nan = ((x & top) > exponent) & ((y & top) > exponent)
        x[nan] = y[nan] = 0
        if np.array_equal(x, y) and np.array_equal(a[n * bits // 8 :], b[n * bits // 8 :]):
            return True
    return False


def both(self):
    global compared
    if self.lib is None:
        return launch(self)
    regions = {**self.gmem.regions, **{r.id: r for r in self.prog.mod.regions.values()}}
    before = {i: r.data.copy() for i, r in regions.items()}
    twin = copy.copy(self)
    twin.lib, twin.c = None, native.MachineC()
    twin.report = copy.deepcopy(self.report)
    want = facts(launch(twin))
    after = {i: r.data.copy() for i, r in regions.items()}
    for i, r in regions.items():
        r.data[:] = before[i]
        r.reset()
    rep = launch(self)
    got = facts(rep)
    for key in want:
        assert got[key] == want[key], f"{rep.kernel}: {key}: {got[key]} with native.c instead of {want[key]}"
    for i, r in regions.items():
        if not same(r.data, after[i]):
            at = np.flatnonzero(r.data != after[i])
            raise AssertionError(
                f"{rep.kernel}: {at.size} bytes of {r.name} differ with native.c, the first at {at[0]}"
            )
    compared += 1
    return rep


def install():
    machine.Machine.launch = both
