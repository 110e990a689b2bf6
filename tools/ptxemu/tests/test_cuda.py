"""CUDA kernels on the emulator: correct ones against numpy, faulty ones against the expected finding."""

import os
import struct

import numpy as np
import pytest
from ptxemu import PTXError, static
from ptxemu.cuda import load_cu

HERE = os.path.dirname(os.path.abspath(__file__))
pytestmark = pytest.mark.skipif(static.tool("nvcc") is None, reason="needs nvcc, which compiles the kernels")
R = np.random.default_rng(3)


@pytest.fixture(scope="module", params=[75, 80, 90])
def good(request):
    return load_cu(os.path.join(HERE, "kernels.cu"), cap=request.param)


@pytest.fixture(scope="module")
def good90():
    return load_cu(os.path.join(HERE, "kernels.cu"), cap=90)


@pytest.fixture(scope="module")
def bugs():
    return load_cu(os.path.join(HERE, "bugs.cu"), cap=90)


def clean(rep):
    assert rep.completed and not rep.findings, rep.findings
    return rep


def bf16(x):
    return ((x.view(np.uint32) + 0x8000) >> 16).astype(np.uint16)


@pytest.mark.parametrize(
    "name,kind,threads",
    [
        ("row_sum<128,__nv_bfloat16>", "bf16", 128),
        ("row_sum<256,__half>", "f16", 256),
        ("row_sum<256,float>", "f32", 256),
    ],
)
def test_row_sum(good, name, kind, threads):
    v = R.integers(-8, 8, (40, 1024)).astype(np.float32)
    x = {"bf16": bf16(v), "f16": v.astype(np.float16), "f32": v}[kind]
    y = np.zeros(40, np.float32)
    rep = clean(good.launch(name, 40, threads, (x, y, 1024)))
    assert (y == v.sum(1)).all()
    assert rep.load_widths == {16: x.nbytes // 16} and rep.arrays["arg0"].first_read_bytes == x.nbytes
    assert rep.arrays["arg0"].reread_bytes == 0 and rep.bank_conflicts == 0


def test_ambiguous_name(good):
    with pytest.raises(PTXError, match="ambiguous"):
        good.launch("row_sum", 1, 128, (None, None, 0))
    with pytest.raises(PTXError, match="no kernel"):
        good.launch("absent", 1, 128, ())


def test_dynamic_shared(good):
    x, y = R.standard_normal(1000).astype(np.float32), np.zeros(1000, np.float32)
    clean(good.launch("reverse", 4, 256, (x, y, 1000), smem=256 * 4))
    assert (y == x).all()
    rep = good.launch("reverse", 4, 256, (x, y, 1000), smem=128 * 4)
    assert "shared_oob" in rep.kinds()


def test_odd_block_size(good):
    x, y = R.standard_normal(100).astype(np.float32), np.zeros(100, np.float32)
    clean(good.launch("reverse", 3, 37, (x, y, 100), smem=37 * 4))
    assert (y == x).all()


def test_calls_and_constants(good):
    o = np.zeros(300, np.int32)
    before = int(good.global_array("counter", np.int32)[0])
    clean(good.launch("calls", 3, 128, (o, 300)))
    t = [3, 1, 4, 1, 5]
    want = [i * t[i % 5] + i for i in range(300)]
    want = [w * t[3] + 3 if i & 1 else w for i, w in enumerate(want)]
    assert o.tolist() == want
    assert good.global_array("counter", np.int32)[0] == before + 300


def test_struct_by_value(good):
    x, y = R.standard_normal(32), np.zeros(32)
    clean(good.launch("by_value", 1, 32, (x, y, struct.pack("<ifqq", 20, 0.5, 10, -3), 0.25)))
    ref = x * 0.5 + np.where(np.arange(32) % 2, -3, 10) + 0.25
    assert np.allclose(y[:20], ref[:20], rtol=1e-15) and (y[20:] == 0).all()


def test_local_array(good):
    o = np.zeros(64, np.int32)
    clean(good.launch("local_array", 1, 64, (o, 3)))
    for t in range(64):
        a = [0] * 16
        for i in range(16):
            a[(i * 5 + t) & 15] = i
        assert o[t] == a[(3 + t) & 15]


def test_switch(good):
    o = np.zeros(96, np.int32)
    clean(good.launch("switch_case", 1, 96, (o,)))
    for v in range(96):
        k = v % 9
        r = [v * 3, v ^ 77, v - 5, bin(v).count("1") * 11, v << 3, v // 3, -v, v % 7, v % 7][k]
        if k == 2:
            for i in range(v):
                r = (r + i * r + 2**31) % 2**32 - 2**31
        assert o[v] == r


def test_histogram(good):
    x = R.integers(0, 256, 5000).astype(np.uint8)
    h = np.zeros(256, np.uint32)
    clean(good.launch("histogram", 4, 128, (x, h, 5000)))
    assert (h == np.bincount(x, minlength=256)).all()


def test_cas_loop(good):
    x = R.uniform(0, 100, 500).astype(np.float32)
    m = np.zeros(1, np.int32)
    clean(good.launch("cas_max", 4, 128, (x, m, 500)))
    assert m.view(np.float32)[0] == x.max()


def test_last_block(good):
    x = R.integers(-9, 9, 1000).astype(np.float32)
    part, out, ticket = np.zeros(8, np.float32), np.zeros(1, np.float32), np.zeros(1, np.uint32)
    clean(good.launch("last_block", 8, 128, (x, part, ticket, out, 1000)))
    assert out[0] == x.sum()


def test_named_barriers(good):
    o = np.zeros(64, np.int32)
    clean(good.launch("named_barriers", 1, 128, (o,)))
    assert (o == np.arange(63, -1, -1) * 7).all()


def test_reads_before_a_barrier_are_over_whatever_other_blocks_do(good):
    x, y = np.arange(4, dtype=np.float32), np.zeros((4, 64), np.float32)
    clean(good.launch("read_in_turn", 4, 64, (x, y)))
    assert (y[1:] == 2 * x[1:, None] + 1).all()


def test_barrier_votes(good):
    x = R.integers(-5, 5, 128).astype(np.int32)
    o = np.zeros(128, np.int32)
    for _ in range(2):
        o[:] = 0
        clean(good.launch("barrier_votes", 1, 128, (x, o)))
    assert (o == (x > 0).sum() * 100 + 10).all()


def test_warp_exchange(good):
    o = np.zeros(64, np.int32)
    clean(good.launch("warp_exchange", 1, 64, (o,)))
    assert (o == (np.arange(64) ^ 1)).all()


def test_bf16_math(good90):
    a, b = (bf16(R.standard_normal(64).astype(np.float32)) for _ in range(2))
    o = np.zeros(64, np.uint16)
    clean(good90.launch("bf16_math", 1, 32, (a, b, o)))

    def w(u):
        return (u.astype(np.uint32) << 16).view(np.float32).astype(np.float64)

    def rn(x):
        u = x.astype(np.float32).view(np.uint32)
        return ((u + 0x7FFF + (u >> 16 & 1)) >> 16).astype(np.uint16)

    assert (o == rn(w(a) * w(b) + w(rn(w(a) + w(b))))).all()


def test_torch_tensors(good):
    torch = pytest.importorskip("torch")
    x, y = torch.randn(1000), torch.zeros(1000)
    clean(good.launch("reverse", 4, 256, (x, y, 1000), smem=1024))
    assert torch.equal(x, y)


def test_cluster(good90):
    x = R.integers(-9, 9, 2048).astype(np.float32)
    y = np.zeros(4, np.float32)
    clean(good90.launch("cluster_sum", 16, 128, (x, y, 2048)))
    assert (y == x.reshape(4, 512).sum(1)).all()
    z = np.zeros(3, np.int32)
    clean(good90.launch("cluster_atomic", 6, 64, (z,)))
    read = np.zeros(4, np.int32)
    clean(good90.launch("cluster_read_then_write", 16, 32, (read,)))
    assert (read == 1).all()
    assert (z == 2 * 63 * 32).all()


def test_static_report(good):
    s = good.static_report()["row_sum<128,__nv_bfloat16>"]
    assert s.registers > 8 and s.spill_bytes == 0 and s.shared >= 16
    if s.sass:
        assert 16 in s.widths("LDG") and set(s.widths("STG")) == {4}


def test_batches_do_not_change_results(good):
    v = R.integers(-8, 8, (40, 1024)).astype(np.float32)
    y, z = np.zeros(40, np.float32), np.zeros(40, np.float32)
    a = good.launch("row_sum<256,float>", 40, 256, (v, y, 1024))
    b = good.launch("row_sum<256,float>", 40, 256, (v, z, 1024), batch_threads=256)
    assert (y == z).all() and a.load_sectors == b.load_sectors and a.warp_instructions == b.warp_instructions


# ---- seeded faults ----
def f32(n=4096):
    return np.zeros(n, np.float32)


def i32(n=4096):
    return np.zeros(n, np.int32)


CASES = [
    ("no_sync", 1, 128, lambda: (f32(), f32()), {}, "shared_race"),
    ("no_sync_loop", 1, 64, lambda: (R.standard_normal(4096).astype(np.float32), f32(), 3), {}, "shared_race"),
    ("no_syncwarp", 1, 32, lambda: (i32(),), {}, "shared_race"),
    ("off_by_one", 2, 64, lambda: (f32(100), f32(100), 100), {}, "global_oob"),
    ("negative_index", 1, 32, lambda: (f32(), f32()), {}, "global_oob"),
    ("misaligned", 1, 32, lambda: (f32(), f32()), {}, "misaligned"),
    ("shared_oob", 1, 32, lambda: (f32(), 1), dict(smem=128), "shared_oob"),
    ("uninitialised", 1, 64, lambda: (f32(),), {}, "shared_uninit"),
    ("divergent", 1, 32, lambda: (f32(),), {}, "divergent_barrier"),
    ("early_exit", 1, 64, lambda: (f32(), 48), {}, "divergent_barrier"),
    ("dead_lock", 1, 64, lambda: (f32(),), {}, "deadlock"),
    ("endless", 1, 32, lambda: (i32(),), dict(max_steps=20000), "endless"),
    ("block_race", 4, 32, lambda: (f32(),), {}, "global_race"),
    ("block_race_read", 4, 32, lambda: (f32(128), 128), {}, "global_race"),
    ("no_fence", 8, 32, lambda: (f32(8), i32(1), f32(1)), {}, "global_race"),
    ("copy_no_wait", 1, 32, lambda: (f32(), f32()), {}, "copy_not_awaited"),
    ("traps", 1, 32, lambda: (np.arange(32, dtype=np.int32),), {}, "trap"),
    ("half_warp_shuffle", 1, 32, lambda: (i32(),), {}, "shfl_inactive"),
    ("cluster_write_seen_elsewhere", 4, 32, lambda: (i32(),), {}, "global_race"),
    ("cluster_no_sync", 4, 32, lambda: (i32(),), {}, "shared_race"),
    ("cluster_early_exit", 4, 32, lambda: (i32(),), {}, "cluster_exit"),
]


@pytest.mark.parametrize("case", CASES, ids=[c[0] for c in CASES])
def test_fault_is_reported(bugs, case):
    name, grid, block, args, kw, kind = case
    rep = bugs.launch(name, grid, block, args(), **kw)
    assert rep.kinds() == {kind}, rep.findings
    f = next(iter(rep.findings))
    assert f.line > 0 and "bugs.cu" in f.source or kind in ("cluster_exit", "shfl_inactive", "shared_race"), f
    assert kind in str(rep)


def test_misaligned_pointer_argument(good):
    """A view that starts 4 bytes into its array breaks the alignment of 16-byte loads."""
    x, y = f32(40 * 1024 + 4), f32(40)
    rep = good.launch("row_sum<256,float>", 40, 256, (x[1 : 1 + 40 * 1024], y, 1024))
    assert rep.kinds() == {"misaligned"}


def test_races_can_be_switched_off(bugs):
    assert not bugs.launch("block_race", 4, 32, (f32(),), global_races=False).findings
    assert not bugs.launch("no_sync", 1, 128, (f32(), f32()), shared_races=False).findings
