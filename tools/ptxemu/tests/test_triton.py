"""Triton kernels on the emulator against torch."""

import pytest

torch = pytest.importorskip("torch")
triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402
from triton.language.extra import libdevice  # noqa: E402


@triton.jit
def add_kernel(x, y, o, n, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    m = i < n
    tl.store(o + i, tl.load(x + i, mask=m) + tl.load(y + i, mask=m), mask=m)


@pytest.mark.parametrize("gpu", [75, 80, 90], indirect=True)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64", "int32", "int64", "int8"])
@pytest.mark.parametrize("n", [4096, 5003])
def test_add(gpu, dtype, n):
    dt = getattr(torch, dtype)
    x, y = ((torch.randn(n) * 20).to(dt) for _ in range(2))
    o = torch.zeros(n, dtype=dt)
    add_kernel[(triton.cdiv(n, 1024),)](x, y, o, n, B=1024)
    assert torch.equal(o, x + y)
    size = x.element_size()
    assert gpu.last.arrays["x"].load_bytes == n * size
    assert gpu.last.arrays["o"].first_written_bytes == -(-n * size // 32) * 32
    if n == 4096 and size <= 4:
        assert max(gpu.last.load_widths) == min(16, 8 * size)


@triton.jit
def softmax_kernel(x, y, n, B: tl.constexpr):
    r = tl.program_id(0).to(tl.int64)
    m = tl.full((B,), -float("inf"), tl.float32)
    s = tl.zeros((B,), tl.float32)
    for i in range(0, n, B):
        o = i + tl.arange(0, B)
        v = tl.load(x + r * n + o, mask=o < n, other=-float("inf")).to(tl.float32)
        nm = tl.maximum(m, v)
        s = s * tl.where(m == nm, 1.0, tl.exp(m - nm)) + tl.where(o < n, tl.exp(v - nm), 0.0)
        m = nm
    M = tl.max(m, 0)
    S = tl.sum(s * tl.exp(m - M), 0)
    for i in range(0, n, B):
        o = i + tl.arange(0, B)
        v = tl.load(x + r * n + o, mask=o < n, other=-float("inf")).to(tl.float32)
        tl.store(y + r * n + o, tl.exp(v - M) / S, mask=o < n)


@pytest.mark.parametrize("gpu", [75, 80, 90], indirect=True)
@pytest.mark.parametrize("rows,n,dtype", [(64, 8192, "bfloat16"), (7, 3001, "float32"), (3, 257, "float16")])
@pytest.mark.parametrize("warps", [1, 4, 8])
def test_softmax(gpu, rows, n, dtype, warps):
    x = (torch.randn(rows, n) * 3).to(getattr(torch, dtype))
    y = torch.full_like(x, 7)
    softmax_kernel[(rows,)](x, y, n, B=1024, num_warps=warps)
    ref = torch.softmax(x.float(), -1)
    eps = {"bfloat16": 2**-8, "float16": 2**-10, "float32": 2e-6}[dtype]
    assert (y.float() - ref).abs().le(ref * eps + 1e-7).all()
    a = gpu.last.arrays["x"]
    assert a.load_bytes == 2 * x.numel() * x.element_size()
    assert a.first_read_bytes <= -(-x.numel() * x.element_size() // 32) * 32


@triton.jit
def layernorm_kernel(x, w, b, y, mean, rstd, n, eps, B: tl.constexpr):
    r = tl.program_id(0)
    o = tl.arange(0, B)
    m = o < n
    v = tl.load(x + r * n + o, mask=m, other=0.0).to(tl.float32)
    mu = tl.sum(v, 0) / n
    d = tl.where(m, v - mu, 0.0)
    rs = 1 / tl.sqrt(tl.sum(d * d, 0) / n + eps)
    tl.store(mean + r, mu)
    tl.store(rstd + r, rs)
    tl.store(y + r * n + o, d * rs * tl.load(w + o, mask=m) + tl.load(b + o, mask=m), mask=m)


def test_layernorm(gpu):
    x, w, b = torch.randn(33, 1000), torch.randn(1000), torch.randn(1000)
    y, mean, rstd = torch.empty_like(x), torch.empty(33), torch.empty(33)
    layernorm_kernel[(33,)](x, w, b, y, mean, rstd, 1000, 1e-5, B=1024)
    assert torch.allclose(y, torch.nn.functional.layer_norm(x, (1000,), w, b), atol=2e-5)
    assert torch.allclose(mean, x.mean(1), atol=1e-6)


@triton.jit
def matmul_kernel(a, b, c, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    om = tl.program_id(0) * BM + tl.arange(0, BM)
    on = tl.program_id(1) * BN + tl.arange(0, BN)
    ok = tl.arange(0, BK)
    acc = tl.zeros((BM, BN), tl.float32)
    for k in range(0, K, BK):
        av = tl.load(a + om[:, None] * K + (k + ok)[None, :])
        bv = tl.load(b + (k + ok)[:, None] * N + on[None, :])
        acc = tl.dot(av, bv, acc)
    tl.store(c + om[:, None] * N + on[None, :], acc)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("warps", [1, 4])
def test_matmul(gpu, dtype, warps):
    dt = getattr(torch, dtype)
    a, b, c = torch.randn(128, 96).to(dt), torch.randn(96, 64).to(dt), torch.zeros(128, 64)
    matmul_kernel[(4, 2)](a, b, c, 128, 64, 96, BM=32, BN=32, BK=32, num_warps=warps)
    ref = a.float() @ b.float()
    tol = 0.05 if dtype == "float32" else 1e-4  # tf32 operands
    assert (c - ref).abs().max() < tol
    assert any("mma" in o for o in gpu.last.opcodes)


@triton.jit
def atomic_kernel(x, out, cnt, n, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    v = tl.load(x + i, mask=i < n, other=0.0)
    tl.atomic_add(out, tl.sum(v, 0))
    tl.atomic_add(cnt + (i % 8), (i < n).to(tl.int32))
    tl.atomic_max(cnt + 8, tl.program_id(0))


def test_atomics(gpu):
    x = torch.randint(-50, 50, (5000,)).float()
    out, cnt = torch.zeros(1), torch.zeros(9, dtype=torch.int32)
    atomic_kernel[(20,)](x, out, cnt, 5000, B=256)
    assert out.item() == x.sum().item()
    assert cnt.tolist() == [625] * 8 + [19]


@triton.jit
def last_block_kernel(x, part, lock, out, n, G: tl.constexpr, B: tl.constexpr):
    p = tl.program_id(0)
    i = p * B + tl.arange(0, B)
    tl.store(part + p, tl.sum(tl.load(x + i, mask=i < n, other=0.0), 0))
    tl.debug_barrier()
    if tl.atomic_add(lock, 1) == G - 1:
        tl.store(out, tl.sum(tl.load(part + tl.arange(0, G)), 0))


def test_last_block_reduces(gpu):
    """Data published through an atomic are not a race."""
    x = torch.randint(-50, 50, (4000,)).float()
    part, out, lock = torch.zeros(16), torch.zeros(1), torch.zeros(1, dtype=torch.int32)
    last_block_kernel[(16,)](x, part, lock, out, 4000, G=16, B=256)
    assert out.item() == x.sum().item()


@triton.jit
def functions_kernel(x, o, n, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    m = i < n
    v = tl.load(x + i, mask=m, other=1.0)
    tl.store(o + i, tl.exp(v), mask=m)
    tl.store(o + n + i, tl.exp2(v), mask=m)
    tl.store(o + 2 * n + i, tl.log(tl.abs(v) + 0.5), mask=m)
    tl.store(o + 3 * n + i, tl.log2(tl.abs(v) + 0.5), mask=m)
    tl.store(o + 4 * n + i, tl.sqrt(tl.abs(v)), mask=m)
    tl.store(o + 5 * n + i, libdevice.tanh(v), mask=m)
    tl.store(o + 6 * n + i, tl.sigmoid(v), mask=m)
    tl.store(o + 7 * n + i, tl.sin(v), mask=m)
    tl.store(o + 8 * n + i, tl.erf(v), mask=m)
    tl.store(o + 9 * n + i, libdevice.log1p(tl.abs(v)), mask=m)
    tl.store(o + 10 * n + i, libdevice.expm1(v), mask=m)
    tl.store(o + 11 * n + i, libdevice.pow(tl.abs(v), tl.full((B,), 1.75, v.dtype)), mask=m)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_functions(gpu, dtype):
    n = 1000
    x = torch.randn(n, dtype=getattr(torch, dtype)) * 2
    o = torch.zeros(12, n, dtype=x.dtype)
    functions_kernel[(4,)](x, o, n, B=256)
    d = x.double()
    ref = torch.stack(
        [
            d.exp(),
            d.exp2(),
            (d.abs() + 0.5).log(),
            (d.abs() + 0.5).log2(),
            d.abs().sqrt(),
            d.tanh(),
            d.sigmoid(),
            d.sin(),
            torch.erf(d),
            d.abs().log1p(),
            d.expm1(),
            d.abs() ** 1.75,
        ]
    )
    tol = 3e-6 if dtype == "float32" else 1e-12
    err = (o.double() - ref).abs() / ref.abs().clamp_min(0.1)
    assert err.amax(1).max() < tol, err.amax(1)


@triton.jit
def grid3_kernel(o, X: tl.constexpr, Y: tl.constexpr):
    x, y, z = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    tl.store(o + (z * Y + y) * X + x, x + 10 * y + 100 * z + 1000 * tl.num_programs(2))


def test_grid3(gpu):
    o = torch.zeros(3, 5, 7, dtype=torch.int32)
    grid3_kernel[(7, 5, 3)](o, X=7, Y=5)
    z, y, x = torch.meshgrid(torch.arange(3), torch.arange(5), torch.arange(7), indexing="ij")
    assert torch.equal(o, (x + 10 * y + 100 * z + 3000).int())


@triton.jit
def collatz_kernel(x, o, n, B: tl.constexpr):
    i = tl.program_id(0)
    v = tl.load(x + i)
    c = 0
    while v != 1:
        v = v // 2 if v % 2 == 0 else 3 * v + 1
        c += 1
    tl.store(o + i, c)


def test_while_and_branches(gpu):
    x = torch.arange(1, 60)
    o = torch.zeros_like(x)
    collatz_kernel[(59,)](x, o, 59, B=1)

    def steps(v):
        c = 0
        while v != 1:
            v, c = (v // 2 if v % 2 == 0 else 3 * v + 1), c + 1
        return c

    assert o.tolist() == [steps(v) for v in x.tolist()]


@triton.jit
def scan_sort_kernel(x, o, s, am, B: tl.constexpr):
    i = tl.arange(0, B)
    v = tl.load(x + i)
    tl.store(o + i, tl.cumsum(v, 0))
    tl.store(s + i, tl.sort(v))
    tl.store(am, tl.argmax(v, 0))


def test_scan_sort_argmax(gpu):
    x = torch.randperm(512).int()
    o, s, am = torch.zeros_like(x), torch.zeros_like(x), torch.zeros(1, dtype=torch.int32)
    scan_sort_kernel[(1,)](x, o, s, am, B=512)
    assert torch.equal(o, x.cumsum(0).int()) and torch.equal(s, x.sort()[0]) and am.item() == x.argmax()


@triton.jit
def transpose_kernel(x, o, M, N, BM: tl.constexpr, BN: tl.constexpr):
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    v = tl.load(x + m[:, None] * N + n[None, :])
    tl.store(o + n[:, None] * M + m[None, :], tl.trans(v))


@pytest.mark.parametrize("gpu", [80, 90], indirect=True)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_transpose(gpu, dtype):
    x = torch.randn(128, 64).to(getattr(torch, dtype))
    o = torch.zeros(64, 128, dtype=x.dtype)
    transpose_kernel[(2, 2)](x, o, 128, 64, BM=64, BN=32)
    assert torch.equal(o, x.t())


def test_view_with_storage_offset(gpu):
    base = torch.randn(100, 64)
    x, y = base[10], base[11:12, ::1][0]
    o = torch.zeros(64)
    add_kernel[(1,)](x, y, o, 64, B=64)
    assert torch.equal(o, x + y)


def test_static_report(gpu):
    x = torch.randn(4096)
    add_kernel[(4,)](x, x, torch.zeros(4096), 4096, B=1024)
    s = gpu.static()
    assert s.registers > 0 and s.spill_bytes == 0
    if s.sass:
        assert s.widths("LDG") == {16: 4} and s.widths("STG") == {16: 2}


def test_width_is_scalar_without_divisibility(gpu):
    x = torch.randn(4099)
    o = torch.zeros(4099)
    add_kernel[(5,)](x[3:], x[3:], o[3:], 4096, B=1024)
    assert set(gpu.last.load_widths) == {4}


@triton.jit
def lock_kernel(lock, o):
    while tl.atomic_cas(lock, 0, 1) == 1:
        pass
    v = tl.load(o)
    tl.store(o, v + tl.program_id(0))
    tl.debug_barrier()
    tl.atomic_xchg(lock, 0)


def test_spin_lock(gpu):
    lock, o = torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    lock_kernel[(20,)](lock, o)
    assert o.item() == 190


@triton.jit
def attention_kernel(q, k, v, o, S, sc, BM: tl.constexpr, BN: tl.constexpr, DH: tl.constexpr):
    om = tl.program_id(0) * BM + tl.arange(0, BM)
    od = tl.arange(0, DH)
    base = tl.program_id(1) * S * DH
    Q = tl.load(q + base + om[:, None] * DH + od[None, :])
    m = tl.full((BM,), -float("inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BM, DH), tl.float32)
    for j in tl.range(0, S, BN, num_stages=3):
        on = j + tl.arange(0, BN)
        s = tl.dot(Q, tl.load(k + base + on[None, :] * DH + od[:, None])) * sc
        s = tl.where(om[:, None] >= on[None, :], s, -float("inf"))
        nm = tl.maximum(m, tl.max(s, 1))
        p = tl.exp(s - nm[:, None])
        a = tl.exp(m - nm)
        total = total * a + tl.sum(p, 1)
        V = tl.load(v + base + on[:, None] * DH + od[None, :])
        acc = tl.dot(p.to(V.dtype), V, acc * a[:, None])
        m = nm
    tl.store(o + base + om[:, None] * DH + od[None, :], (acc / total[:, None]).to(o.dtype.element_ty))


def test_attention(gpu):
    q, k, v = (torch.randn(2, 128, 64).half() for _ in range(3))
    o = torch.zeros_like(q)
    attention_kernel[(2, 2)](q, k, v, o, 128, 64**-0.5, BM=64, BN=32, DH=64)
    ref = torch.nn.functional.scaled_dot_product_attention(q.float(), k.float(), v.float(), is_causal=True)
    assert (o.float() - ref).abs().max() < 5e-3


def test_unsupported_instruction_is_named(gpu):
    from ptxemu import PTXError

    gpu.driver.activate(cap=90)
    a, b, c = torch.randn(64, 64).half(), torch.randn(64, 64).half(), torch.zeros(64, 64)
    with pytest.raises(PTXError, match="wgmma"):
        matmul_kernel[(1, 1)](a, b, c, 64, 64, 64, BM=64, BN=64, BK=64)


# ---- seeded bugs ----
@triton.jit
def oob_kernel(x, o, n, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    tl.store(o + i, tl.load(x + i))


def test_oob_is_reported(gpu):
    x, o = torch.randn(1000), torch.zeros(1024)
    oob_kernel[(1,)](x, o, 1000, B=1024)
    (f,) = gpu.last.errors
    assert f.kind == "global_oob" and "x (4000 bytes)" in f.message and "test_triton.py" in f.source
    assert gpu.problems()
    gpu.reports.clear()
    assert torch.equal(o[:1000], x)


@triton.jit
def race_kernel(x, o):
    tl.store(o, tl.load(x + tl.program_id(0)))


def test_global_race_is_reported(gpu):
    race_kernel[(8,)](torch.randn(8), torch.zeros(1))
    assert "global_race" in gpu.last.kinds()
    gpu.reports.clear()


@triton.jit
def read_race_kernel(x, n, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    v = tl.load(x + (i + 1) % n)
    tl.store(x + i, v)


def test_read_write_race_is_reported(gpu):
    read_race_kernel[(4,)](torch.randn(1024), 1024, B=256)
    assert "global_race" in gpu.last.kinds()
    gpu.reports.clear()


def test_plugin_fails_the_test(gpu):
    x, o = torch.randn(1000), torch.zeros(1024)
    oob_kernel[(1,)](x, o, 1000, B=1024)
    with pytest.raises(BaseException) as e:
        gpu.check()
    assert "global_oob" in str(e.value)
    gpu.reports.clear()
