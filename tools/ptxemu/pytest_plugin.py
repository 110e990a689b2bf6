"""pytest plugin: fixture `gpu` that runs Triton kernels on the emulator.

    pytest -p ptxemu.pytest_plugin

    def test_kernel(gpu):                              # capability 80
    @pytest.mark.parametrize('gpu', [75, 80, 90], indirect=True)
    def test_kernel_everywhere(gpu):

The fixture gives an object with .cap, .last, .reports, .check() and
.static().  At teardown the test fails when any launch left a finding of
severity error; warnings fail it as well under `gpu.strict = True`.
Findings that a test expects are taken off with gpu.reports.clear().
"""

import pytest


class Emulated:
    def __init__(self, cap, driver, reports):
        self.cap, self.driver, self.reports = cap, driver, reports
        self.strict = False

    @property
    def last(self):
        return self.reports[-1] if self.reports else None

    def static(self, report=None):
        return self.driver.static_report(report or self.last, self.cap)

    def problems(self):
        return [f"{r.kernel}: {f}" for r in self.reports for f in (r.findings if self.strict else r.errors)]

    def check(self):
        bad = self.problems()
        if bad:
            pytest.fail("the emulator found:\n" + "\n".join(bad), pytrace=False)


@pytest.fixture
def gpu(request, monkeypatch):
    from ptxemu import triton_driver

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    cap = getattr(request, "param", 80)
    before, options = triton_driver._active, triton_driver.options
    triton_driver.activate(cap=cap)
    with triton_driver.record() as reports:
        g = Emulated(cap, triton_driver, reports)
        yield g
        triton_driver.deactivate(before)
        triton_driver.options = options
        g.check()
