"""Known answers of single instructions against numpy or Python integers."""

import math
import struct
from fractions import Fraction

import numpy as np
import pytest
from ptxtool import run

R = np.random.default_rng(7)
N = 256


def ints(dt, n=N):
    info = np.iinfo(dt)
    a = R.integers(info.min, info.max, n, dtype=dt, endpoint=True)
    a[:6] = [0, 1, info.max, info.min, info.max - 1, 2]
    return a


def floats(n=N, scale=8):
    a = (R.standard_normal(n) * np.exp2(R.uniform(-scale, scale, n))).astype(np.float32)
    a[:8] = [0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, np.nan, 1e-40]
    return a


def same(a, b):
    a, b = np.asarray(a), np.asarray(b)
    nan = np.isnan(a) & np.isnan(b)
    return (nan | ((a == b) & (np.signbit(a) == np.signbit(b)))).all()


def f32_of(fr):
    """Correctly rounded float32 of a Fraction (normal range)."""
    if fr == 0:
        return np.float32(0)
    c = np.float32(float(fr))
    cands = [np.nextafter(c, np.float32(-np.inf)), c, np.nextafter(c, np.float32(np.inf))]
    best = min(cands, key=lambda v: (abs(Fraction(float(v)) - fr), int(v.view(np.uint32)) & 1))
    return best


# ---- floating point ----
@pytest.mark.parametrize("op,fn", [("add", np.add), ("sub", np.subtract), ("mul", np.multiply)])
def test_f32_arith(op, fn):
    a, b = floats(), floats()[::-1].copy()
    with np.errstate(all="ignore"):
        assert same(run(f"{op}.f32 %d0, %a0, %a1;", [("f32", a), ("f32", b)], [("f32", np.float32)]), fn(a, b))


@pytest.mark.parametrize("op", ["add", "mul", "fma"])
@pytest.mark.parametrize("mode", ["rz", "rm", "rp"])
def test_f32_directed(op, mode):
    a, b, c = (R.standard_normal(N).astype(np.float32) for _ in range(3))
    ins = [("f32", a), ("f32", b)] + ([("f32", c)] if op == "fma" else [])
    extra = ", %a2" if op == "fma" else ""
    d = run(f"{op}.{mode}.f32 %d0, %a0, %a1{extra};", ins, [("f32", np.float32)])
    for i in range(N):
        x, y, z = (Fraction(float(v[i])) for v in (a, b, c))
        ex = {"add": x + y, "mul": x * y, "fma": x * y + z}[op]
        got = Fraction(float(d[i]))
        lo = Fraction(float(np.nextafter(d[i], np.float32(-np.inf))))
        hi = Fraction(float(np.nextafter(d[i], np.float32(np.inf))))
        if mode == "rm" or (mode == "rz" and ex > 0):
            assert got <= ex < hi
        else:
            assert lo < ex <= got


def test_fma_single_rounding():
    a = R.standard_normal(N).astype(np.float32)
    b = R.standard_normal(N).astype(np.float32)
    c = (-(a.astype(np.float64) * b)).astype(np.float32)  # heavy cancellation
    c[::2] = R.standard_normal(N // 2).astype(np.float32)
    # a sum that float64 puts exactly on a float32 midpoint
    a[0], b[0], c[0] = 1 + 2**-12, 1 + 2**-12, 2.0**-60
    a[1], b[1], c[1] = 1 + 2**-23, 1 - 2**-23, 2.0**23
    d = run("fma.rn.f32 %d0, %a0, %a1, %a2;", [("f32", a), ("f32", b), ("f32", c)], [("f32", np.float32)])
    for i in range(N):
        ex = Fraction(float(a[i])) * Fraction(float(b[i])) + Fraction(float(c[i]))
        assert d[i] == f32_of(ex), i


def test_fma_f64():
    a, b = R.standard_normal(N), R.standard_normal(N)
    c = -(a * b)
    d = run("fma.rn.f64 %d0, %a0, %a1, %a2;", [("f64", a), ("f64", b), ("f64", c)], [("f64", np.float64)])
    for i in range(N):
        assert d[i] == float(Fraction(a[i]) * Fraction(b[i]) + Fraction(c[i]))


def test_ftz():
    a = np.array([1e-40, -1e-40, 1e-38, 2e-38], np.float32)
    b = np.array([1.0, 1.0, 0.5, 0.25], np.float32)
    d = run("mul.ftz.f32 %d0, %a0, %a1;", [("f32", a), ("f32", b)], [("f32", np.float32)])
    assert same(d, np.array([0.0, -0.0, 0.0, 0.0], np.float32))
    assert (run("mul.f32 %d0, %a0, %a1;", [("f32", a), ("f32", b)], [("f32", np.float32)]) != 0).all()


def test_sat():
    a = np.array([-1, 0.5, 2, np.nan], np.float32)
    assert list(run("add.sat.f32 %d0, %a0, 0f00000000;", [("f32", a)], [("f32", np.float32)])) == [0, 0.5, 1, 0]


@pytest.mark.parametrize("op", ["min", "max"])
def test_minmax(op):
    a = np.array([1, np.nan, 0.0, -0.0, np.nan, 3], np.float32)
    b = np.array([2, 5, -0.0, 0.0, np.nan, -4], np.float32)
    d = run(f"{op}.f32 %d0, %a0, %a1;", [("f32", a), ("f32", b)], [("f32", np.float32)])
    want = [1, 5, -0.0, -0.0, np.nan, -4] if op == "min" else [2, 5, 0.0, 0.0, np.nan, 3]
    assert same(d, np.array(want, np.float32))
    d = run(f"{op}.NaN.f32 %d0, %a0, %a1;", [("f32", a), ("f32", b)], [("f32", np.float32)])
    assert np.isnan(d[1]) and np.isnan(d[4]) and d.view(np.uint32)[1] == 0x7FFFFFFF


@pytest.mark.parametrize("op", ["min", "max"])
@pytest.mark.parametrize(
    ("kind", "one", "three", "nan", "infinity"),
    [("f16", 0x3C00, 0x4200, 0x7E01, 0x7C00), ("bf16", 0x3F80, 0x4040, 0x7FC1, 0x7F80)],
)
def test_minmax_of_pairs(op, kind, one, three, nan, infinity):
    """As of single numbers: one NaN is left out, two are the canonical one, and -0 < +0."""
    a = [one, three, nan, 0x8000, nan, infinity | 0x8000, 0x0000]
    b = [three, one | 0x8000, one, 0x0000, nan, one, 0x8000]
    want = [three, three, one, 0, 0x7FFF, one, 0]
    if op == "min":
        want = [one, one | 0x8000, one, 0x8000, 0x7FFF, infinity | 0x8000, 0x8000]
    a, b, want = (np.array(x, np.uint32) | np.roll(x, -1).astype(np.uint32) << 16 for x in (a, b, want))
    code = f"{op}.{kind}x2 %d0, %a0, %a1;"
    d = run(code, [("b32", a), ("b32", b)], [("b32", np.uint32)])
    assert (d == want).all()


@pytest.mark.parametrize(
    "op,fn,tol",
    [
        ("ex2.approx.f32", np.exp2, 2e-7),
        ("lg2.approx.f32", np.log2, 2e-7),
        ("rcp.approx.f32", lambda x: 1 / x, 1e-7),
        ("sqrt.approx.f32", np.sqrt, 1e-7),
        ("rsqrt.approx.f32", lambda x: 1 / np.sqrt(x), 1e-7),
        ("tanh.approx.f32", np.tanh, 2e-7),
        ("sin.approx.f32", np.sin, 2e-7),
        ("cos.approx.f32", np.cos, 2e-7),
        ("sqrt.rn.f32", np.sqrt, 0),
        ("rcp.rn.f32", lambda x: np.float32(1) / x, 0),
    ],
)
def test_functions(op, fn, tol):
    a = R.uniform(0.1, 5, N).astype(np.float32)
    d = run(f"{op} %d0, %a0;", [("f32", a)], [("f32", np.float32)])
    ref = fn(a.astype(np.float64)) if tol else fn(a)
    assert np.max(np.abs(d - ref) / np.maximum(np.abs(ref), 1e-3)) <= tol + (1e-6 if "lg2" in op else 0)


def test_division():
    a, b = floats(), floats()[::-1].copy()
    with np.errstate(all="ignore"):
        for m in ("rn", "full", "approx"):
            assert same(run(f"div.{m}.f32 %d0, %a0, %a1;", [("f32", a), ("f32", b)], [("f32", np.float32)]), a / b)


# ---- half precision ----
def bf16(x):
    """Round to nearest even through integers, independent of the emulator."""
    out = []
    for v in np.asarray(x, np.float32):
        u = struct.unpack("<I", struct.pack("<f", v))[0]
        if (u & 0x7FFFFFFF) > 0x7F800000:
            out.append(0x7FFF)
            continue
        lo, hi = u & 0xFFFF, u >> 16
        out.append((hi + (1 if lo > 0x8000 or (lo == 0x8000 and hi & 1) else 0)) & 0xFFFF)
    return np.array(out, np.uint16)


def widen(u):
    return (u.astype(np.uint32) << 16).view(np.float32)


def test_cvt_bf16x2():
    a, b = floats(), floats()[::-1].copy()
    d = run("cvt.rn.bf16x2.f32 %d0, %a0, %a1;", [("f32", a), ("f32", b)], [("b32", np.uint32)])
    assert ((d >> 16).astype(np.uint16) == bf16(a)).all() and ((d & 0xFFFF).astype(np.uint16) == bf16(b)).all()
    d = run("cvt.rn.relu.bf16x2.f32 %d0, %a0, %a1;", [("f32", a), ("f32", b)], [("b32", np.uint32)])
    assert (widen((d >> 16).astype(np.uint16))[~np.isnan(a)] >= 0).all()


def test_cvt_bf16():
    a = floats()
    assert (run("cvt.rn.bf16.f32 %d0, %a0;", [("f32", a)], [("b16", np.uint16)]) == bf16(a)).all()
    z = run("cvt.rz.bf16.f32 %d0, %a0;", [("f32", a)], [("b16", np.uint16)])
    ok = ~np.isnan(a)
    assert (z[ok] == (a.view(np.uint32)[ok] >> 16)).all()
    assert same(run("cvt.f32.bf16 %d0, %a0;", [("b16", bf16(a))], [("f32", np.float32)]), widen(bf16(a)))


@pytest.mark.parametrize("op,fn", [("add", np.add), ("sub", np.subtract), ("min", np.minimum), ("max", np.maximum)])
@pytest.mark.parametrize("kind", ["s16", "u16"])
def test_packed_integers(op, fn, kind):
    a, b = ints(np.uint32), ints(np.uint32)[::-1].copy()
    d = run(f"{op}.{kind}x2 %d0, %a0, %a1;", [("b32", a), ("b32", b)], [("b32", np.uint32)])
    dt = np.int16 if kind == "s16" else np.uint16
    assert (d.view(dt) == fn(a.view(dt), b.view(dt))).all()


@pytest.mark.parametrize("op", ["add", "sub", "mul", "fma", "max", "min"])
@pytest.mark.parametrize("t", ["f16", "bf16"])
def test_packed_half(op, t):
    x = [R.standard_normal(2 * N).astype(np.float32) for _ in range(3)]
    to = (lambda v: v.astype(np.float16).view(np.uint16)) if t == "f16" else bf16
    back = (lambda u: u.view(np.float16).astype(np.float64)) if t == "f16" else (lambda u: widen(u).astype(np.float64))
    u = [to(v) for v in x]
    a, b, c = (back(v) for v in u)
    ex = {"add": a + b, "sub": a - b, "mul": a * b, "fma": a * b + c, "max": np.maximum(a, b), "min": np.minimum(a, b)}[
        op
    ]
    ref = ex.astype(np.float16).view(np.uint16) if t == "f16" else bf16(ex.astype(np.float32))
    k = 3 if op == "fma" else 2
    rn = ".rn" if op == "fma" else ""
    d = run(
        f"{op}{rn}.{t}x2 %d0, " + ", ".join(f"%a{i}" for i in range(k)) + ";",
        [("b32", v.view(np.uint32)) for v in u[:k]],
        [("b32", np.uint32)],
    )
    assert (d.view(np.uint16) == ref).all()
    d1 = run(
        f"{op}{rn}.{t} %d0, " + ", ".join(f"%a{i}" for i in range(k)) + ";",
        [("b16", v[:N]) for v in u[:k]],
        [("b16", np.uint16)],
    )
    assert (d1 == ref[:N]).all()


def test_cvt_f16():
    a = floats(scale=20)
    with np.errstate(all="ignore"):
        ref = a.astype(np.float16)
    assert same(run("cvt.rn.f16.f32 %d0, %a0;", [("f32", a)], [("b16", np.float16)]), ref)
    z = run("cvt.rz.f16.f32 %d0, %a0;", [("f32", a)], [("b16", np.float16)])
    ok = np.isfinite(a)
    assert (np.abs(z[ok].astype(np.float64)) <= np.abs(a[ok].astype(np.float64))).all()
    assert np.abs(z[8:].astype(float)).max() <= 65504
    assert same(
        run("cvt.f32.f16 %d0, %a0;", [("b16", ref.view(np.uint16))], [("f32", np.float32)]), ref.astype(np.float32)
    )


def test_cvt_fp8():
    codes = np.arange(256, dtype=np.uint16)
    d = run("cvt.rn.f16x2.e4m3x2 %d0, %a0;", [("b16", codes)], [("b32", np.uint32)], block=256)
    lo = (d & 0xFFFF).astype(np.uint16).view(np.float16)
    assert lo[0x38] == 1.0 and lo[0x7E] == 448 and np.isnan(lo[0x7F]) and lo[1] == 2.0**-9 and lo[0xB8] == -1
    vals = lo[:0x7F].astype(np.float32)
    back = run("cvt.rn.satfinite.e4m3x2.f32 %d0, %a0, %a0;", [("f32", vals)], [("b16", np.uint16)])
    assert ((back & 255) == np.arange(0x7F)).all() and ((back >> 8) == np.arange(0x7F)).all()
    big = run(
        "cvt.rn.satfinite.e5m2x2.f32 %d0, %a0, %a0;",
        [("f32", np.array([1e9, -1e9, 1.0], np.float32))],
        [("b16", np.uint16)],
    )
    assert list(big & 255) == [0x7B, 0xFB, 0x3C]


# ---- conversions ----
@pytest.mark.parametrize("mode,fn", [("rni", np.rint), ("rzi", np.trunc), ("rmi", np.floor), ("rpi", np.ceil)])
def test_float_to_int(mode, fn):
    a = np.concatenate([floats(), np.array([2.5, 3.5, -2.5, 3e9, -3e9, 5e9], np.float32)])
    for t, dt, lo, hi in (("s32", np.int32, -(2**31), 2**31 - 1), ("u32", np.uint32, 0, 2**32 - 1)):
        d = run(f"cvt.{mode}.{t}.f32 %d0, %a0;", [("f32", a)], [(t, dt)])
        for x, y in zip(a, d, strict=False):
            want = (
                0
                if np.isnan(x)
                else lo
                if x == -np.inf
                else hi
                if x == np.inf
                else min(max(int(fn(np.float64(x))), lo), hi)
            )
            assert int(y) == want


def test_int_to_float():
    a = ints(np.int32)
    assert (run("cvt.rn.f32.s32 %d0, %a0;", [("s32", a)], [("f32", np.float32)]) == a.astype(np.float32)).all()
    z = run("cvt.rz.f32.s32 %d0, %a0;", [("s32", a)], [("f32", np.float32)])
    assert (np.abs(z.astype(np.float64)) <= np.abs(a.astype(np.float64))).all()
    b = ints(np.uint64)
    d = run("cvt.rn.f32.u64 %d0, %a0;", [("u64", b)], [("f32", np.float32)])
    assert all(d[i] == f32_of(Fraction(int(b[i]))) for i in range(N))


def test_int_width():
    a = ints(np.int32)
    assert (run("cvt.s32.s8 %d0, %a0;", [("s32", a)], [("s32", np.int32)]) == a.astype(np.int8)).all()
    assert (run("cvt.s64.s32 %d0, %a0;", [("s32", a)], [("s64", np.int64)]) == a).all()
    assert (run("cvt.u64.u32 %d0, %a0;", [("u32", a)], [("u64", np.uint64)]) == a.view(np.uint32)).all()
    assert (run("cvt.sat.s8.s32 %d0, %a0;", [("s32", a)], [("s32", np.int32)]) == np.clip(a, -128, 127)).all()
    assert (run("cvt.sat.u8.s32 %d0, %a0;", [("s32", a)], [("s32", np.int32)]) == np.clip(a, 0, 255)).all()


def test_round_float():
    a = floats()
    with np.errstate(all="ignore"):
        assert same(run("cvt.rni.f32.f32 %d0, %a0;", [("f32", a)], [("f32", np.float32)]), np.rint(a))
        assert same(run("cvt.rmi.f32.f32 %d0, %a0;", [("f32", a)], [("f32", np.float32)]), np.floor(a))


def test_tf32():
    a = R.standard_normal(N).astype(np.float32)
    d = run("cvt.rna.tf32.f32 %d0, %a0;", [("f32", a)], [("f32", np.float32)])
    assert (d.view(np.uint32) & 0x1FFF == 0).all() and (np.abs(d - a) <= np.abs(a) * 2.0**-11).all()


# ---- integers ----
def signed(v, n):
    v &= (1 << n) - 1
    return v - (1 << n) if v >> (n - 1) else v


@pytest.mark.parametrize(
    "t,dt",
    [
        ("s32", np.int32),
        ("u32", np.uint32),
        ("s64", np.int64),
        ("u64", np.uint64),
        ("s16", np.int16),
        ("u16", np.uint16),
    ],
)
def test_int_mul(t, dt):
    a, b = ints(dt), ints(dt)[::-1].copy()
    n = np.dtype(dt).itemsize * 8
    ins = [(t, a), (t, b)]
    lo = run(f"mul.lo.{t} %d0, %a0, %a1;", ins, [(t, dt)])
    hi = run(f"mul.hi.{t} %d0, %a0, %a1;", ins, [(t, dt)])
    for i in range(N):
        p = int(a[i]) * int(b[i])
        assert int(lo[i]) & (2**n - 1) == p & (2**n - 1)
        assert int(hi[i]) & (2**n - 1) == (p >> n) & (2**n - 1)
    if n < 64:
        w = f"{t[0]}{2 * n}"
        wide = run(f"mul.wide.{t} %d0, %a0, %a1;", ins, [(w, np.dtype(f"{'i' if t[0] == 's' else 'u'}{n // 4}"))])
        assert all(int(wide[i]) == int(a[i]) * int(b[i]) for i in range(N))


def test_mad():
    a, b = ints(np.int32), ints(np.int32)[::-1].copy()
    c = ints(np.int64)
    d = run("mad.wide.s32 %d0, %a0, %a1, %a2;", [("s32", a), ("s32", b), ("s64", c)], [("s64", np.int64)])
    assert all(int(d[i]) == signed(int(a[i]) * int(b[i]) + int(c[i]), 64) for i in range(N))
    d = run("mad.lo.s32 %d0, %a0, %a1, %a0;", [("s32", a), ("s32", b)], [("s32", np.int32)])
    assert all(int(d[i]) == signed(int(a[i]) * int(b[i]) + int(a[i]), 32) for i in range(N))


def test_int_div():
    a, b = ints(np.int32), ints(np.int32)[::-1].copy() >> 16
    b[b == 0] = 3
    q = run("div.s32 %d0, %a0, %a1;", [("s32", a), ("s32", b)], [("s32", np.int32)])
    r = run("rem.s32 %d0, %a0, %a1;", [("s32", a), ("s32", b)], [("s32", np.int32)])
    for i in range(N):
        want = abs(int(a[i])) // abs(int(b[i])) * (1 if (a[i] < 0) == (b[i] < 0) else -1)
        assert int(q[i]) == signed(want, 32) and int(r[i]) == int(a[i]) - want * int(b[i])
    u, v = ints(np.uint32), np.maximum(ints(np.uint32)[::-1] >> 8, 1)
    assert (run("div.u32 %d0, %a0, %a1;", [("u32", u), ("u32", v)], [("u32", np.uint32)]) == u // v).all()


def test_carry():
    a, b = ints(np.uint64), ints(np.uint64)[::-1].copy()
    text = """{ .reg .b32 %x0,%x1,%y0,%y1,%z0,%z1;
    mov.b64 {%x0,%x1}, %a0; mov.b64 {%y0,%y1}, %a1;
    add.cc.u32 %z0, %x0, %y0; addc.u32 %z1, %x1, %y1; mov.b64 %d0, {%z0,%z1};
    sub.cc.u32 %z0, %x0, %y0; subc.u32 %z1, %x1, %y1; mov.b64 %d1, {%z0,%z1}; }"""
    s, d = run(text, [("u64", a), ("u64", b)], [("u64", np.uint64), ("u64", np.uint64)])
    assert (s == a + b).all() and (d == a - b).all()


def test_shifts():
    a = ints(np.int32)
    n = R.integers(0, 40, N).astype(np.uint32)
    u = a.view(np.uint32)
    left = run("shl.b32 %d0, %a0, %a1;", [("b32", u), ("u32", n)], [("b32", np.uint32)])
    r = run("shr.s32 %d0, %a0, %a1;", [("s32", a), ("u32", n)], [("s32", np.int32)])
    q = run("shr.u32 %d0, %a0, %a1;", [("u32", u), ("u32", n)], [("u32", np.uint32)])
    for i in range(N):
        assert int(left[i]) == (int(u[i]) << int(n[i])) & 0xFFFFFFFF
        assert int(r[i]) == int(a[i]) >> int(n[i]) and int(q[i]) == int(u[i]) >> int(n[i])


@pytest.mark.parametrize("d", ["l", "r"])
@pytest.mark.parametrize("m", ["wrap", "clamp"])
def test_shf(d, m):
    a, b = ints(np.uint32), ints(np.uint32)[::-1].copy()
    n = R.integers(0, 50, N).astype(np.uint32)
    r = run(f"shf.{d}.{m}.b32 %d0, %a0, %a1, %a2;", [("b32", a), ("b32", b), ("u32", n)], [("b32", np.uint32)])
    for i in range(N):
        k = int(n[i]) & 31 if m == "wrap" else min(int(n[i]), 32)
        v = int(b[i]) << 32 | int(a[i])
        want = (v << k) >> 32 if d == "l" else v >> k
        assert int(r[i]) == want & 0xFFFFFFFF


def test_prmt():
    a, b = ints(np.uint32), ints(np.uint32)[::-1].copy()
    c = R.integers(0, 65536, N).astype(np.uint32)
    d = run("prmt.b32 %d0, %a0, %a1, %a2;", [("b32", a), ("b32", b), ("b32", c)], [("b32", np.uint32)])
    for i in range(N):
        by = struct.pack("<II", int(a[i]), int(b[i]))
        out = 0
        for j in range(4):
            s = int(c[i]) >> 4 * j & 15
            v = by[s & 7]
            v = (255 if v & 128 else 0) if s & 8 else v
            out |= v << 8 * j
        assert int(d[i]) == out


def test_bitfields():
    a, b = ints(np.uint32), ints(np.uint32)[::-1].copy()
    pos = R.integers(0, 36, N).astype(np.uint32)
    ln = R.integers(0, 36, N).astype(np.uint32)
    u = run("bfe.u32 %d0, %a0, %a1, %a2;", [("u32", a), ("u32", pos), ("u32", ln)], [("u32", np.uint32)])
    s = run("bfe.s32 %d0, %a0, %a1, %a2;", [("s32", a), ("u32", pos), ("u32", ln)], [("s32", np.int32)])
    f = run(
        "bfi.b32 %d0, %a0, %a1, %a2, %a3;", [("b32", a), ("b32", b), ("u32", pos), ("u32", ln)], [("b32", np.uint32)]
    )
    for i in range(N):
        x, p, n = int(a[i]), int(pos[i]), int(ln[i])
        mask = (1 << min(n, 32)) - 1
        assert int(u[i]) == (x >> p) & mask
        sign = 0 if n == 0 else x >> min(p + n - 1, 31) & 1
        want = sum(((x >> p + j & 1) if j < n and p + j <= 31 else sign) << j for j in range(32))
        assert int(s[i]) == signed(want, 32)
        m2 = (mask << p) & 0xFFFFFFFF
        assert int(f[i]) == (int(b[i]) & ~m2) | ((x << p) & m2)


def test_bit_counts():
    a = ints(np.uint32)
    t = [("b32", a)]
    o = [("u32", np.uint32)]
    assert all(int(v) == int(x).bit_count() for v, x in zip(run("popc.b32 %d0, %a0;", t, o), a, strict=False))
    assert all(int(v) == 32 - int(x).bit_length() for v, x in zip(run("clz.b32 %d0, %a0;", t, o), a, strict=False))
    assert all(int(v) == int(f"{x:032b}"[::-1], 2) for v, x in zip(run("brev.b32 %d0, %a0;", t, o), a, strict=False))
    assert all(
        int(v) == (int(x).bit_length() - 1) & 0xFFFFFFFF
        for v, x in zip(run("bfind.u32 %d0, %a0;", t, o), a, strict=False)
    )
    b = ints(np.uint64)
    assert all(
        int(v) == 64 - int(x).bit_length() for v, x in zip(run("clz.b64 %d0, %a0;", [("b64", b)], o), b, strict=False)
    )


@pytest.mark.parametrize("lut", [0x96, 0xE8, 0xCA, 0x1B])
def test_lop3(lut):
    a, b, c = ints(np.uint32), ints(np.uint32)[::-1].copy(), ints(np.uint32)
    d = run(f"lop3.b32 %d0, %a0, %a1, %a2, {lut};", [("b32", a), ("b32", b), ("b32", c)], [("b32", np.uint32)])
    for i in range(0, N, 5):
        want = 0
        for bit in range(32):
            k = (int(a[i]) >> bit & 1) << 2 | (int(b[i]) >> bit & 1) << 1 | (int(c[i]) >> bit & 1)
            want |= (lut >> k & 1) << bit
        assert int(d[i]) == want


def test_misc_int():
    a, b = ints(np.int32), ints(np.int32)[::-1].copy()
    i32 = [("s32", np.int32)]
    two = [("s32", a), ("s32", b)]
    assert (run("min.s32 %d0, %a0, %a1;", two, i32) == np.minimum(a, b)).all()
    assert (run("max.s32 %d0, %a0, %a1;", two, i32) == np.maximum(a, b)).all()
    assert (run("abs.s32 %d0, %a0;", two[:1], i32) == np.abs(a)).all()
    assert (run("neg.s32 %d0, %a0;", two[:1], i32) == -a).all()
    assert (run("not.b32 %d0, %a0;", two[:1], i32) == ~a).all()
    assert (run("add.sat.s32 %d0, %a0, %a1;", two, i32) == np.clip(a.astype(np.int64) + b, -(2**31), 2**31 - 1)).all()


def test_setp_selp():
    a, b = floats(), floats()[::-1].copy()
    b[:100] = a[:100]
    for name, fn in (
        ("lt", a < b),
        ("ge", a >= b),
        ("ne", (a < b) | (a > b)),
        ("neu", a != b),
        ("equ", ~((a < b) | (a > b))),
        ("ltu", ~(a >= b)),
        ("nan", np.isnan(a) | np.isnan(b)),
        ("num", ~(np.isnan(a) | np.isnan(b))),
    ):
        p = run(f"setp.{name}.f32 %d0, %a0, %a1;", [("f32", a), ("f32", b)], [("pred", np.uint32)])
        assert (p == fn).all(), name
    x, y = ints(np.int32), ints(np.int32)[::-1].copy()
    text = "{ .reg .pred %c; setp.gt.s32 %c, %a0, 0; setp.lt.and.s32 %d0|%d1, %a0, %a1, %c; }"
    p, q = run(text, [("s32", x), ("s32", y)], [("pred", np.uint32), ("pred", np.uint32)])
    assert (p == ((x < y) & (x > 0))).all() and (q == (~(x < y) & (x > 0))).all()
    text = "{ .reg .pred %c; setp.hi.u32 %c, %a0, %a1; @!%c mov.u32 %d0, 7; @%c mov.u32 %d0, 9; }"
    d = run(text, [("u32", x), ("u32", y)], [("u32", np.uint32)])
    assert (d == np.where(x.view(np.uint32) > y.view(np.uint32), 9, 7)).all()


# ---- warp operations ----
def lanes(n=64):
    return np.arange(n, dtype=np.uint32) * 3 + 1


@pytest.mark.parametrize(
    "mode,b,c",
    [
        ("bfly", 5, 31),
        ("down", 3, 31),
        ("up", 3, 0),
        ("idx", 7, 31),
        ("down", 2, 31 | (24 << 8)),
        ("up", 1, 24 << 8),
        ("idx", 2, 31 | (28 << 8)),
        ("bfly", 4, 31 | (24 << 8)),
    ],
)
def test_shfl(mode, b, c):
    x = lanes()
    d, p = run(
        f"shfl.sync.{mode}.b32 %d0|%d1, %a0, {b}, {c}, -1;", [("b32", x)], [("b32", np.uint32), ("pred", np.uint32)]
    )
    seg, clamp = c >> 8 & 31, c & 31
    for t in range(64):
        lane = t & 31
        top = (lane & seg) | (clamp & ~seg & 31)
        low = lane & seg
        j, ok = {
            "up": (lane - b, lane - b >= top),
            "down": (lane + b, lane + b <= top),
            "bfly": (lane ^ b, (lane ^ b) <= top),
            "idx": (low | (b & ~seg & 31), (low | (b & ~seg & 31)) <= top),
        }[mode]
        assert int(p[t]) == ok and int(d[t]) == x[(t & ~31) + (j if ok else lane)]


def test_vote_redux_match():
    x = R.integers(0, 4, 64).astype(np.uint32)
    text = """{ .reg .pred %c; setp.gt.u32 %c, %a0, 1;
    vote.sync.ballot.b32 %d0, %c, -1; vote.sync.any.pred %d1, %c, -1; vote.sync.all.pred %d2, %c, -1;
    redux.sync.add.u32 %d3, %a0, -1; redux.sync.max.u32 %d4, %a0, -1; match.any.sync.b32 %d5, %a0, -1; }"""
    u = ("u32", np.uint32)
    p = ("pred", np.uint32)
    bal, any_, all_, add, mx, ma = run(text, [("u32", x)], [u, p, p, u, u, u])
    for w in range(2):
        v = x[32 * w : 32 * w + 32]
        s = slice(32 * w, 32 * w + 32)
        word = sum(1 << i for i in range(32) if v[i] > 1)
        assert (bal[s] == word).all() and (any_[s] == (v > 1).any()).all() and (all_[s] == (v > 1).all()).all()
        assert (add[s] == v.sum()).all() and (mx[s] == v.max()).all()
        for i in range(32):
            assert ma[32 * w + i] == sum(1 << j for j in range(32) if v[j] == v[i])


def test_divergent_lanes_meet_at_shuffle():
    x = lanes(32)
    text = """{ .reg .pred %c; .reg .b32 %v; setp.lt.u32 %c, %t, 16; mov.u32 %v, %a0; @%c bra L1;
    add.u32 %v, %v, 1000; bra L2;
    L1: add.u32 %v, %v, 2000;
    L2: shfl.sync.bfly.b32 %d0, %v, 16, 31, -1; }"""
    d = run(text, [("u32", x)], [("u32", np.uint32)])
    v = x + np.where(np.arange(32) < 16, 2000, 1000)
    assert (d == v[np.arange(32) ^ 16]).all()


def test_special_registers():
    d = run(
        "mov.u32 %d0, %laneid; mov.u32 %d1, %warpid; mov.u32 %d2, %lanemask_lt; mov.u32 %d3, %ntid.x;",
        [("u32", lanes())],
        [("u32", np.uint32)] * 4,
    )
    t = np.arange(64)
    assert (
        (d[0] == t % 32).all()
        and (d[1] == t // 32).all()
        and (d[2] == (1 << (t % 32)) - 1).all()
        and (d[3] == 64).all()
    )


def test_local_memory():
    x = lanes()
    text = """{ .local .align 16 .b8 buf[64]; .reg .b64 %q, %s; .reg .b32 %i;
    mov.u64 %q, buf; st.local.v4.b32 [%q+16], {%a0, %t, %a0, %t}; cvta.local.u64 %q, %q;
    and.b32 %i, %t, 3; mul.wide.u32 %s, %i, 4; add.u64 %q, %q, %s; ld.b32 %d0, [%q+16]; }"""
    d = run(text, [("u32", x)], [("u32", np.uint32)])
    t = np.arange(64)
    assert (d == np.where(t % 2 == 0, x, t)).all()


@pytest.mark.parametrize("space", ["global", "shared"])
def test_atomics(space):
    x = R.integers(0, 1000, 96).astype(np.uint32)
    pre = ".shared .align 4 .b32 acc[4]; .reg .b64 %q; .reg .pred %z; mov.u64 %q, acc;" if space == "shared" else ""
    if space == "global":
        return
    text = (
        "{"
        + pre
        + """
    setp.eq.u32 %z, %t, 0;
    @%z st.shared.v4.b32 [%q], {0, 0, 0, 5}; bar.sync 0;
    atom.shared.add.u32 %d0, [%q], %a0; atom.shared.max.u32 %d1, [%q+4], %a0;
    atom.shared.inc.u32 %d2, [%q+8], 1000000; atom.shared.cas.b32 %d3, [%q+12], 5, %t; bar.sync 0;
    ld.shared.u32 %d4, [%q]; ld.shared.u32 %d5, [%q+4]; }"""
    )
    u = ("u32", np.uint32)
    add, mx, inc, cas, tot, top = run(text, [("u32", x)], [u] * 6)
    assert (tot == x.sum()).all() and (top == x.max()).all()
    assert sorted(inc) == list(range(96)) and (add == np.cumsum(x) - x).all()
    assert (cas == np.where(np.arange(96) == 0, 5, 0)).all()


def test_mma_shapes():
    """Fragments are distributed as the PTX manual's tables say."""
    for t, K in (("f16", 16), ("bf16", 16), ("f16", 8), ("bf16", 8), ("tf32", 8), ("tf32", 4), ("s8", 32)):
        nb = {"f16": 2, "bf16": 2, "tf32": 4, "s8": 1}[t]
        per = 4 // nb
        A, B = R.integers(-4, 5, (16, K)), R.integers(-4, 5, (K, 8))
        C = R.integers(-4, 5, (16, 8))
        enc = {
            "f16": lambda v: np.float16(v).view(np.uint16),
            "bf16": lambda v: bf16([np.float32(v)])[0],
            "tf32": lambda v: np.float32(v).view(np.uint32),
            "s8": lambda v: np.int8(v).view(np.uint8),
        }[t]
        na, nbr = 16 * K // 32 // per, K * 8 // 32 // per
        ra, rb = np.zeros((na, 32), np.uint32), np.zeros((nbr, 32), np.uint32)
        rc = np.zeros((4, 32), np.uint32)
        acc = np.int32 if t == "s8" else np.float32
        for lane in range(32):
            g, q = lane >> 2, lane & 3
            for r in range(na):
                for e in range(per):
                    row = g + 8 * (r % 2)
                    col = q * per + e + 4 * per * (r // 2)
                    ra[r, lane] |= int(enc(A[row, col])) << (8 * nb * e)
            for r in range(nbr):
                for e in range(per):
                    k = q * per + e + 4 * per * r
                    rb[r, lane] |= int(enc(B[k, g])) << (8 * nb * e)
            for i in range(4):
                rc[i, lane] = acc(C[g + 8 * (i // 2), 2 * q + i % 2]).view(np.uint32)
        ct = "s32" if t == "s8" else "f32"
        names = [f"%a{i}" for i in range(na + nbr + 4)]
        text = (
            f"mma.sync.aligned.m16n8k{K}.row.col.{ct}.{t}.{t}.{ct} {{%d0,%d1,%d2,%d3}}, "
            f"{{{','.join(names[:na])}}}, {{{','.join(names[na : na + nbr])}}}, {{{','.join(names[na + nbr :])}}};"
        )
        d = run(text, [("b32", x) for x in list(ra) + list(rb) + list(rc)], [("b32", np.uint32)] * 4)
        D = A @ B + C
        for lane in range(32):
            g, q = lane >> 2, lane & 3
            for i in range(4):
                assert d[i][lane].view(acc) == D[g + 8 * (i // 2), 2 * q + i % 2], (t, K)


def test_ldmatrix():
    x = np.arange(32, dtype=np.uint32)
    text = """{ .shared .align 16 .b8 s[512]; .reg .b32 %b, %c, %u;
    mov.u32 %b, s; shl.b32 %c, %t, 4; add.u32 %c, %c, %b; shl.b32 %u, %t, 8;
    st.shared.v4.b32 [%c], {%t, %u, %t, %u}; bar.warp.sync -1;
    ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%d0,%d1,%d2,%d3}, [%c];
    ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%d4}, [%c]; }"""
    d = run(text, [("u32", x)], [("b32", np.uint32)] * 5)
    mem = np.zeros((32, 4), np.uint32)
    mem[:, 0] = mem[:, 2] = x
    mem[:, 1] = mem[:, 3] = x << 8
    for i in range(4):
        assert (d[i] == mem[8 * i : 8 * i + 8].reshape(-1)).all()
    tr = mem[:8].view(np.uint16).reshape(8, 8).T
    assert (d[4] == np.ascontiguousarray(tr).view(np.uint32).reshape(-1)).all()


def test_cp_async():
    x = np.arange(64, dtype=np.uint32)
    text = """{ .shared .align 16 .b8 s[1024]; .reg .b32 %b, %c; .reg .b64 %g; .reg .pred %z; .reg .b32 %n;
    mov.u32 %b, s; shl.b32 %c, %t, 4; add.u32 %c, %c, %b; and.b32 %n, %t, 15; mad.wide.u32 %g, %n, 16, %p0_;
    setp.lt.u32 %z, %t, 8; selp.u32 %n, 16, 0, %z;
    cp.async.cg.shared.global [%c], [%g], 16, %n; cp.async.commit_group; cp.async.wait_group 0; bar.sync 0;
    ld.shared.v2.b32 {%d0, %d1}, [%c+8]; }"""
    d, e = run(text, [("u32", x)], [("b32", np.uint32)] * 2)
    t = np.arange(64)
    assert (d == np.where(t < 8, 4 * t + 2, 0)).all() and (e == np.where(t < 8, 4 * t + 3, 0)).all()


def test_unsupported_is_named():
    from ptxemu import PTXError

    with pytest.raises(PTXError, match="wgmma"):
        run("wgmma.fence.sync.aligned; mov.u32 %d0, %a0;", [("u32", lanes())], [("u32", np.uint32)])


def test_math_module_agrees():
    a = R.standard_normal(N)
    assert np.allclose(
        run("sqrt.rn.f64 %d0, %a0;", [("f64", np.abs(a))], [("f64", np.float64)]),
        [math.sqrt(abs(v)) for v in a],
        rtol=0,
        atol=0,
    )
