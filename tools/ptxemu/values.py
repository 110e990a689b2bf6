"""Number formats and exact arithmetic helpers on numpy arrays.

bf16 values travel as uint16 bit patterns; all other formats as their numpy
types.  Rounding helpers take the PTX modifiers rn, rna, rz, rm and rp.
"""

import numpy as np

F32, F64, F16 = np.float32, np.float64, np.float16
U8, U16, U32, U64 = np.uint8, np.uint16, np.uint32, np.uint64
I8, I16, I32, I64 = np.int8, np.int16, np.int32, np.int64

DTYPE = {
    "pred": np.bool_,
    "b8": U8,
    "u8": U8,
    "s8": I8,
    "b16": U16,
    "u16": U16,
    "s16": I16,
    "f16": F16,
    "bf16": U16,
    "b32": U32,
    "u32": U32,
    "s32": I32,
    "f32": F32,
    "b64": U64,
    "u64": U64,
    "s64": I64,
    "f64": F64,
    "f16x2": U32,
    "bf16x2": U32,
    "s16x2": U32,
    "u16x2": U32,
}
RAW = {1: np.bool_, 8: U8, 16: U16, 32: U32, 64: U64}
RANGE = {
    "s8": (-(2**7), 2**7 - 1),
    "u8": (0, 2**8 - 1),
    "s16": (-(2**15), 2**15 - 1),
    "u16": (0, 2**16 - 1),
    "s32": (-(2**31), 2**31 - 1),
    "u32": (0, 2**32 - 1),
    "s64": (-(2**63), 2**63 - 1),
    "u64": (0, 2**64 - 1),
}


def bf16_to_f32(h):
    return (h.astype(U32) << U32(16)).view(F32)


def f32_to_bf16(x, mode="rn"):
    """float32 array -> bf16 bits."""
    b = np.ascontiguousarray(x).view(U32)
    if mode == "rn":
        r = (b + U32(0x7FFF) + ((b >> U32(16)) & U32(1))) >> U32(16)
    elif mode == "rz":
        r = b >> U32(16)
    elif mode == "rna":
        r = (b + U32(0x8000)) >> U32(16)
    else:
        up = (b >> U32(31)) == (1 if mode == "rm" else 0)
        r = (b + np.where(up, U32(0xFFFF), U32(0))) >> U32(16)
    nan = (b & U32(0x7FFFFFFF)) > U32(0x7F800000)
    if nan.any():
        r = np.where(nan, U32(0x7FFF), r)
    return r.astype(U16)


def ftz32(x):
    """Denormals become zeros of the same sign."""
    b = x.view(U32)
    den = (b & U32(0x7F800000)) == 0
    if not (den & ((b & U32(0x7FFFFF)) != 0)).any():
        return x
    return np.where(den, b & U32(0x80000000), b).view(F32)


def two_sum(a, b):
    s = a + b
    bb = s - a
    return s, (a - (s - bb)) + (b - bb)


def two_prod(a, b):
    """Dekker's product: p + e == a * b exactly (barring overflow and underflow)."""
    p = a * b
    c = F64(134217729.0)
    t = c * a
    ah = t - (t - a)
    al = a - ah
    t = c * b
    bh = t - (t - b)
    bl = b - bh
    e = ((ah * bh - p) + ah * bl + al * bh) + al * bl
    return p, np.where(np.isfinite(e), e, 0.0)


def to_odd(s, e):
    """s + e rounded to odd: s moved by at most one ulp so that a later rounding is exact."""
    bits = s.view(I64)
    fix = (e != 0) & ((bits & 1) == 0) & np.isfinite(s) & np.isfinite(e)
    if not fix.any():
        return s
    away = (e > 0) == (s > 0)
    moved = np.where(s == 0, bits, bits + np.where(away, 1, -1))
    return np.where(fix, moved, bits).view(F64)


def round_f32(s, e, mode):
    """The exact value s + e (float64 pair, |e| <= ulp(s)/2) to float32."""
    if mode == "rn":
        return to_odd(s, e).astype(F32)
    r = s.astype(F32)
    rd = r.astype(F64)
    err = (s - rd) + e  # exact value minus r (sign is what matters)
    below, above = err < 0, err > 0
    if mode == "rz":
        dn, up = below & (r > 0), above & (r < 0)
    elif mode == "rm":
        dn, up = below, np.zeros_like(below)
    else:
        dn, up = np.zeros_like(below), above
    # overflow of a finite value
    inf = np.isinf(r) & np.isfinite(s)
    if inf.any():
        big = np.finfo(F32).max
        pos = r > 0
        keep = {"rz": np.zeros_like(inf), "rm": ~pos, "rp": pos}[mode]
        r = np.where(inf & ~keep, np.where(pos, big, -big), r).astype(F32)
        dn, up = dn & ~inf, up & ~inf
    r = np.where(dn, np.nextafter(r, F32(-np.inf)), r)
    return np.where(up, np.nextafter(r, F32(np.inf)), r)


def fma_f32(a, b, c, mode="rn"):
    """Fused multiply-add with a single rounding."""
    p = a.astype(F64) * b  # exact: 24 + 24 bits
    cd = c.astype(F64)
    s = p + cd
    if mode == "rn":
        r = s.astype(F32)
        # only a sum that sits on a float32 rounding midpoint (or is denormal in
        # float32) can be rounded wrongly by the second rounding
        bits = s.view(U64)
        risky = (bits & U64(0x1FFFFFFF)) == U64(0x10000000)
        risky |= np.abs(s) < 1.2e-38
        risky &= s != 0
        if risky.any():
            idx = np.flatnonzero(np.broadcast_to(risky, s.shape))
            pp, cc = np.broadcast_to(p, s.shape)[idx], np.broadcast_to(cd, s.shape)[idx]
            r = r.copy()
            r[idx] = round_f32(*two_sum(pp, cc), "rn")
        return r
    s, e = two_sum(p, cd)
    return round_f32(s, np.where(np.isfinite(e), e, 0.0), mode)


def fma_f64(a, b, c):
    """Double fma through error-free transformations (correct but for rare double roundings)."""
    p, e = two_prod(a, b)
    s, t = two_sum(p, c)
    r = s + (t + e)
    plain = a * b + c
    return np.where(np.isfinite(r), r, plain)


def fma_wide(a, b, c):
    """a*b + c in float64 rounded to odd, for operands of at most 24 bits."""
    s, e = two_sum(a.astype(F64) * b, c.astype(F64))
    return to_odd(s, np.where(np.isfinite(e), e, 0.0))


def f64_to_odd32(x):
    """float64 -> float32 rounded to odd (safe intermediate towards narrower formats)."""
    r = x.astype(F32)
    diff = x - r
    fix = (diff != 0) & np.isfinite(x) & np.isfinite(r) & ((r.view(U32) & 1) == 0)
    if not fix.any():
        return r
    up = diff > 0
    return np.where(fix, np.where(up, np.nextafter(r, F32(np.inf)), np.nextafter(r, F32(-np.inf))), r)


def f64_to_f16(x, mode="rn"):
    r = x.astype(F16)
    if mode == "rn":
        return r
    rd = r.astype(F64)
    lo, hi = F16(-np.inf), F16(np.inf)
    below, above = x < rd, x > rd
    if mode == "rz":
        dn, up = below & (r > 0), above & (r < 0)
    elif mode == "rm":
        dn, up = below, np.zeros_like(below)
    else:
        dn, up = np.zeros_like(below), above
    r = np.where(dn, np.nextafter(r, lo), r)
    return np.where(up, np.nextafter(r, hi), r)


def float_to_int(x, type_, mode):
    """float array -> integer array with saturation; NaN gives 0."""
    f = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}[mode]
    r = f(x.astype(F64))
    lo, hi = RANGE[type_]
    dt = DTYPE[type_]
    out = np.zeros(r.shape, dt)
    ok = ~np.isnan(r)
    small, large = r <= float(lo), r >= float(hi)
    mid = ok & ~small & ~large
    out[mid] = r[mid].astype(dt)
    out[small & ok] = lo
    out[large & ok] = hi
    return out


# ---- 8-bit floats ----
def _fp8_table(exp_bits):
    man_bits = 7 - exp_bits
    bias = (1 << (exp_bits - 1)) - 1
    out = np.zeros(256, F32)
    for code in range(256):
        e, m = (code >> man_bits) & ((1 << exp_bits) - 1), code & ((1 << man_bits) - 1)
        if exp_bits == 5 and e == 31:
            v = np.inf if m == 0 else np.nan
        elif exp_bits == 4 and e == 15 and m == 7:
            v = np.nan
        elif e == 0:
            v = m * 2.0 ** (1 - bias - man_bits)
        else:
            v = (1 + m / 2.0**man_bits) * 2.0 ** (e - bias)
        out[code] = -v if code & 128 else v
    return out


FP8 = {"e4m3": _fp8_table(4), "e5m2": _fp8_table(5)}
_FP8_MAX = {"e4m3": 0x7E, "e5m2": 0x7B}


def to_fp8(x, kind):
    """float array -> fp8 codes (round to nearest even, saturating to the largest finite value)."""
    top = _FP8_MAX[kind]
    vals = FP8[kind][: top + 1].astype(F64)
    a = np.abs(x.astype(F64))
    hi = np.searchsorted(vals, np.where(np.isnan(a), 0, a), side="left").clip(0, top)
    lo = (hi - 1).clip(0, top)
    dh, dl = np.abs(vals[hi] - a), np.abs(a - vals[lo])
    code = np.where((dl < dh) | ((dl == dh) & (lo % 2 == 0)), lo, hi)
    code = np.where(np.isnan(x), 0x7F, np.where(a > vals[top], top, code))
    return (code | np.where(np.signbit(x), 128, 0)).astype(U8)
