"""The fast path itself; both_ways.py tests at every launch of all tests that it does what the numpy code does."""

import threading

import both_ways
import numpy as np
import pytest
from ptxemu import native
from ptxemu.cuda import load_ptx
from ptxtool import kernel

pytestmark = pytest.mark.skipif(native.library() is None, reason="no C compiler, or PTXEMU_NATIVE=0")
SUM = kernel(
    ".reg .f32 %f<3>; .reg .pred %q;",
    """mad.wide.u32 %o, %t, 4, %p0_; ld.global.f32 %f0, [%o];
setp.lt.u32 %q, %t, 7; @%q add.f32 %f0, %f0, 0f3F800000; ex2.approx.f32 %f1, %f0;
mad.wide.u32 %o, %t, 4, %p1_; st.global.f32 [%o], %f1;""",
    2,
)


def test_plain_code_has_no_stops():
    m = load_ptx(SUM)
    x, y = np.arange(64, dtype=np.float32) / 8, np.zeros(64, np.float32)
    rep = m.launch("k", 1, 64, (x, y))
    assert not rep.findings
    program = m.mod.programs["k"]
    stops = [
        i.full
        for i, row in zip(program.code, program.native.code, strict=False)
        if i is not None and row["op"] == native.STOP
    ]
    assert stops == ["ret"]
    np.testing.assert_allclose(y, np.exp2(x + (np.arange(64) < 7)), rtol=2e-7)


def test_launches_of_several_threads_do_not_meet():
    m = load_ptx(SUM)
    found = {}

    def run(k):
        x, y = np.full(256, k, np.float32), np.zeros(256, np.float32)
        for _ in range(5):
            m.launch("k", 1, 256, (x, y))
        found[k] = y

    threads = [threading.Thread(target=run, args=(k,)) for k in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for k, y in found.items():
        assert (y[7:] == 2.0**k).all() and (y[:7] == 2.0 ** (k + 1)).all()


def test_what_is_not_clean_is_found_by_the_numpy_code():
    m = load_ptx(SUM)
    before = both_ways.compared
    x, y = np.zeros(64, np.float32), np.zeros(60, np.float32)
    rep = m.launch("k", 1, 64, (x, y))
    assert rep.kinds() == {"global_oob"} and rep.findings[0].count == 4
    assert both_ways.compared == before + 1
