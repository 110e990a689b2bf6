"""Register-to-register instructions.

`compile_ins(ins, prog)` turns an instruction into a closure f(m, sel) that
works on the machine m for the threads `sel` (an index array, or None for all
threads).  Register values are arrays of one element per thread, or of a
single element when the value is the same in all threads; they are never
modified in place.
"""

import numpy as np

from . import values as V
from .errors import PTXError
from .parser import WIDTH
from .values import DTYPE, F16, F32, F64, I32, I64, RAW, U16, U32, U64

TYPES = set(WIDTH)
FLOATS = {"f16", "bf16", "f32", "f64"}
SIGNED = {"s8", "s16", "s32", "s64"}
ROUND = {"rn", "rz", "rm", "rp", "rna"}
IROUND = {"rni", "rzi", "rmi", "rpi"}


def types_of(ins):
    return [m for m in ins.mods if m in TYPES]


# ---- operand access ----
def getter(op, type_, prog):
    """Function (m, sel) -> array of the numpy type of `type_`."""
    dt = DTYPE[type_]
    width = WIDTH[type_]
    kind = op[0]
    if kind == "r":
        k = op[1]
        have = prog.reg_width[k]
        if have == 1 and width != 1 or have != 1 and width == 1:
            raise PTXError("predicate and data registers mixed")
        if have == width:
            if RAW.get(width) is dt:

                def get(m, sel):
                    a = m.R[k]
                    return a if sel is None or a.shape[0] == 1 else a[sel]
            else:

                def get(m, sel):
                    a = m.R[k]
                    return a.view(dt) if sel is None or a.shape[0] == 1 else a[sel].view(dt)

            return get
        if have > width:
            raw = RAW[width]

            def get(m, sel):
                a = m.R[k]
                return (a if sel is None or a.shape[0] == 1 else a[sel]).astype(raw).view(dt)

            return get
        if type_ in ("u64", "b64", "s64", "u32", "b32", "s32", "u16", "s16", "b16"):
            raw = RAW[width]

            def get(m, sel):
                a = m.R[k]
                return (a if sel is None or a.shape[0] == 1 else a[sel]).astype(raw).view(dt)

            return get
        raise PTXError(f"register of {have} bits used as .{type_}")
    if kind == "n":
        inner = getter(op[1], "pred", prog)
        return lambda m, sel: ~inner(m, sel)
    c = constant(op, type_, prog)
    return lambda m, sel: c


def constant(op, type_, prog):
    dt = DTYPE[type_]
    kind = op[0]
    if kind == "i":
        if type_ == "pred":
            return np.array([bool(op[1])])
        width = WIDTH[type_]
        if type_ in ("f32", "f64", "f16"):
            return np.array([op[1]], dt)
        return np.array([op[1] & ((1 << width) - 1)], RAW[width]).view(dt)
    if kind == "f":
        raw = np.array([op[1]], U32 if op[2] == 32 else U64)
        val = raw.view(F32 if op[2] == 32 else F64)
        if type_ in ("f32", "f64", "f16"):
            return val.astype(dt) if val.dtype != dt else val
        if WIDTH[type_] == op[2]:
            return raw.view(dt)
        return raw.astype(dt)
    if kind == "s":
        return np.array([prog.symbol(op[1])], U64).astype(RAW[WIDTH[type_]]).view(dt)
    raise PTXError(f"operand {op} not supported here")


def putter(op, type_, prog):
    """Function (m, sel, array) storing a value of `type_` into a register."""
    if op[0] == "_":
        return lambda m, sel, v: None
    if op[0] != "r":
        raise PTXError("destination is not a register")
    k = op[1]
    have = prog.reg_width[k]
    raw = RAW[have]
    width = WIDTH[type_]
    if have == width:
        conv = None
    elif have > width and have != 1 and width != 1:
        wide = {16: np.int16, 32: I32, 64: I64}[have]
        if type_ in SIGNED:

            def conv(v):
                return v.astype(wide).view(raw)
        else:
            narrow = RAW[width]

            def conv(v):
                return v.view(narrow).astype(raw)
    elif have != 1 and width != 1:
        narrow = RAW[width]

        def conv(v):
            return v.view(narrow).astype(raw)
    else:
        raise PTXError("predicate and data registers mixed")

    def put(m, sel, v):
        v = v.view(raw) if conv is None else conv(v)
        if sel is None:
            m.R[k] = v
        else:
            old = m.R[k]
            new = old.copy() if old.shape[0] == m.N else np.full(m.N, old[0], raw)
            new[sel] = v
            m.R[k] = new

    return put


# ---- instruction table ----
TABLE = {}


def op(*names):
    def deco(f):
        for n in names:
            TABLE[n] = f
        return f

    return deco


def unsupported(ins, why=""):
    return PTXError(f"PTX line {ins.line}: instruction {ins.full} is not supported{': ' + why if why else ''}")


def compile_ins(ins, prog):
    f = TABLE.get(ins.op)
    if f is None:
        raise unsupported(ins)
    try:
        fn = f(ins, prog)
    except PTXError as e:
        if str(e).startswith("PTX line"):
            raise
        raise PTXError(f"PTX line {ins.line}: {ins.full}: {e}") from None
    if ins.guard is None:
        return fn
    k, neg = ins.guard

    def guarded(m, sel):
        p = m.R[k]
        if p.shape[0] == 1:
            if bool(p[0]) != neg:
                fn(m, sel)
            return
        if sel is None:
            q = ~p if neg else p
            idx = np.flatnonzero(q)
            if idx.size == m.N:
                fn(m, None)
            elif idx.size:
                fn(m, idx)
        else:
            q = p[sel]
            idx = sel[~q if neg else q]
            if idx.size:
                fn(m, idx)

    return guarded


def elementwise(ins, prog, types, fn, out=None):
    """Closure for d = fn(sources) with the given source types."""
    put = putter(ins.ops[0], out or types[0], prog)
    gets = [getter(o, t, prog) for o, t in zip(ins.ops[1:], types, strict=False)]
    if len(gets) != len(ins.ops) - 1:
        raise PTXError("wrong number of operands")
    if len(gets) == 1:
        (a,) = gets
        return lambda m, sel: put(m, sel, fn(a(m, sel)))
    if len(gets) == 2:
        a, b = gets
        return lambda m, sel: put(m, sel, fn(a(m, sel), b(m, sel)))
    if len(gets) == 3:
        a, b, c = gets
        return lambda m, sel: put(m, sel, fn(a(m, sel), b(m, sel), c(m, sel)))
    return lambda m, sel: put(m, sel, fn(*[g(m, sel) for g in gets]))


def packed(fn):
    """Lift fn on 16-bit arrays to pairs packed in 32-bit registers."""

    def lifted(*args):
        halves = [a.view(U16).reshape(-1, 2) for a in args]
        return np.ascontiguousarray(fn(*halves)).view(U32).reshape(-1)

    return lifted


def float_fn(ins, type_, fn32, fn64=None, exact=None):
    """Version of a real function for the instruction's float type.

    fn32 works on float32, fn64 on float64.  For f16 and bf16 the value is
    computed in float32 (exact(a, ...) in float64 when given) and rounded once.
    """
    ftz, sat = "ftz" in ins.mods, "sat" in ins.mods
    relu = "relu" in ins.mods
    if type_ == "f64":
        return fn64 or fn32
    if type_ == "f32":
        f = fn32
        if ftz:

            def f(*a):
                return V.ftz32(fn32(*[V.ftz32(x) for x in a]))

        if sat:
            g = f

            def f(*a):
                return saturate(g(*a))

        return f
    if type_ in ("f16", "f16x2"):

        def f(*a):
            a = [x.view(F16) for x in a]
            if exact:
                r = exact(*[x.astype(F64) for x in a]).astype(F16)
            else:
                r = fn32(*[x.astype(F32) for x in a]).astype(F16)
            if sat:
                r = np.clip(np.where(np.isnan(r), F16(0), r), F16(0), F16(1))
            if relu:
                r = np.where(np.isnan(r), r, np.maximum(r, F16(0)))
            return r.view(U16) if type_ == "f16x2" else r
    else:

        def f(*a):
            a = [V.bf16_to_f32(x) for x in a]
            r = V.f64_to_odd32(exact(*[x.astype(F64) for x in a])) if exact else fn32(*a)
            if relu:
                r = np.where(np.isnan(r), r, np.maximum(r, F32(0)))
            return V.f32_to_bf16(r)

    return packed(f) if type_.endswith("x2") else f


def saturate(x):
    return np.where(np.isnan(x), x.dtype.type(0), np.clip(x, x.dtype.type(0), x.dtype.type(1)))


def directed(ins):
    for r in ("rz", "rm", "rp"):
        if r in ins.mods:
            return r
    return None


def mixed_types(ins):
    t = types_of(ins)
    return t[-1], (t[0] if len(t) > 1 else None)


@op("add", "sub")
def _add(ins, prog):
    t = types_of(ins)[-1]
    sub = ins.op == "sub"
    if "cc" in ins.mods:
        return carry(ins, prog, t)
    if t in FLOATS or t.endswith("x2") and t[0] != "s" and t[0] != "u":
        mode = directed(ins)
        plain = np.subtract if sub else np.add
        if mode and t == "f32":

            def fn(a, b):
                s, e = V.two_sum(a.astype(F64), (-b if sub else b).astype(F64))
                return V.round_f32(s, np.where(np.isfinite(e), e, 0.0), mode)

            return elementwise(ins, prog, (t, t), float_fn(ins, t, fn))
        if mode and t == "f64":

            def fn64(a, b):
                s, e = V.two_sum(a, -b if sub else b)
                return directed64(s, np.where(np.isfinite(e), e, 0.0), mode)

            return elementwise(ins, prog, (t, t), fn64)
        return elementwise(ins, prog, (t, t), float_fn(ins, t, plain))
    if "sat" in ins.mods and t == "s32":
        f = np.subtract if sub else np.add
        return elementwise(
            ins, prog, (t, t), lambda a, b: np.clip(f(a.astype(I64), b), -(2**31), 2**31 - 1).astype(I32)
        )
    if t.endswith("x2"):
        f = np.subtract if sub else np.add
        return elementwise(ins, prog, ("b32", "b32"), packed(f))
    return elementwise(ins, prog, (t, t), np.subtract if sub else np.add)


def directed64(s, e, mode):
    dn = {"rz": (e < 0) & (s > 0), "rm": e < 0, "rp": np.zeros(s.shape, bool)}[mode]
    up = {"rz": (e > 0) & (s < 0), "rp": e > 0, "rm": np.zeros(s.shape, bool)}[mode]
    s = np.where(dn, np.nextafter(s, -np.inf), s)
    return np.where(up, np.nextafter(s, np.inf), s)


def carry(ins, prog, t):
    """add.cc/addc/sub.cc/subc with the carry flag."""
    put = putter(ins.ops[0], t, prog)
    a, b = getter(ins.ops[1], t, prog), getter(ins.ops[2], t, prog)
    u = RAW[WIDTH[t]]
    use_c = ins.op in ("addc", "subc")
    set_c = "cc" in ins.mods
    sub = ins.op.startswith("sub")

    def f(m, sel):
        x, y = a(m, sel).view(u), b(m, sel).view(u)
        c = m.carry(sel).astype(u) if use_c else u(0)
        if sub:
            r = x - y - c
            out = (x < y) | ((x == y) & (c != 0))
        else:
            r = x + y + c
            out = (r < x) | ((r == x) & (c != 0))
        if set_c:
            m.set_carry(sel, out)
        put(m, sel, r)

    return f


@op("addc", "subc")
def _addc(ins, prog):
    return carry(ins, prog, types_of(ins)[-1])


def mul_hi(a, b, t):
    if WIDTH[t] <= 32:
        wide = I64 if t in SIGNED else U64
        return ((a.astype(wide) * b.astype(wide)) >> wide(WIDTH[t])).astype(DTYPE[t])
    ua, ub = a.view(U64), b.view(U64)
    mask, s = U64(0xFFFFFFFF), U64(32)
    al, ah, bl, bh = ua & mask, ua >> s, ub & mask, ub >> s
    mid = ah * bl + ((al * bl) >> s)
    mid2 = al * bh + (mid & mask)
    hi = ah * bh + (mid >> s) + (mid2 >> s)
    if t in SIGNED:
        hi = hi - np.where(a.view(I64) < 0, ub, U64(0)) - np.where(b.view(I64) < 0, ua, U64(0))
    return hi.view(DTYPE[t])


def wide_type(t):
    return t[0] + str(2 * WIDTH[t])


@op("mul")
def _mul(ins, prog):
    t = types_of(ins)[-1]
    if t in FLOATS or t.endswith("x2"):
        mode = directed(ins)
        if mode and t == "f32":

            def fn(a, b):
                return V.round_f32(a.astype(F64) * b.astype(F64), np.zeros(1), mode)

            return elementwise(ins, prog, (t, t), float_fn(ins, t, fn))
        if mode and t == "f64":
            return elementwise(ins, prog, (t, t), lambda a, b: directed64(*V.two_prod(a, b), mode))
        return elementwise(ins, prog, (t, t), float_fn(ins, t, np.multiply))
    if "wide" in ins.mods:
        w = wide_type(t)
        dt = DTYPE[w]
        return elementwise(ins, prog, (t, t), lambda a, b: a.astype(dt) * b.astype(dt), w)
    if "hi" in ins.mods:
        return elementwise(ins, prog, (t, t), lambda a, b: mul_hi(a, b, t))
    return elementwise(ins, prog, (t, t), np.multiply)


@op("mul24")
def _mul24(ins, prog):
    t = types_of(ins)[-1]
    fn = mad24_low(t)
    return elementwise(ins, prog, (t, t), fn)


def mad24_low(t):
    cut = (lambda a: a << I32(8) >> I32(8)) if t == "s32" else lambda a: a & U32(16777215)
    return lambda a, b: cut(a) * cut(b)


@op("mad", "fma")
def _mad(ins, prog):
    t = types_of(ins)[-1]
    if t in FLOATS or t.endswith("x2"):
        mode = directed(ins) or "rn"
        return elementwise(
            ins, prog, (t, t, t), float_fn(ins, t, lambda a, b, c: V.fma_f32(a, b, c, mode), V.fma_f64, V.fma_wide)
        )
    if "cc" in ins.mods:
        raise unsupported(ins)
    if "wide" in ins.mods:
        w = wide_type(t)
        dt = DTYPE[w]
        return elementwise(ins, prog, (t, t, w), lambda a, b, c: a.astype(dt) * b.astype(dt) + c, w)
    if "hi" in ins.mods:
        return elementwise(ins, prog, (t, t, t), lambda a, b, c: mul_hi(a, b, t) + c)
    return elementwise(ins, prog, (t, t, t), lambda a, b, c: a * b + c)


@op("mad24")
def _mad24(ins, prog):
    t = types_of(ins)[-1]
    f = mad24_low(t)
    return elementwise(ins, prog, (t, t, t), lambda a, b, c: f(a, b) + c)


@op("sad")
def _sad(ins, prog):
    t = types_of(ins)[-1]
    return elementwise(ins, prog, (t, t, t), lambda a, b, c: np.where(a < b, b - a, a - b) + c)


@op("div")
def _div(ins, prog):
    t = types_of(ins)[-1]
    if t in FLOATS:
        mode = directed(ins)
        if mode and t == "f32":

            def fn(a, b):
                q = a.astype(F64) / b
                r = V.fma_f64(-q, b.astype(F64) + 0 * q, a.astype(F64) + 0 * q)
                e = np.where(np.isfinite(q) & (b != 0), np.sign(r) * np.sign(b) * 1e-300, 0.0)
                return V.round_f32(q, e, mode)

            return elementwise(ins, prog, (t, t), float_fn(ins, t, fn))
        return elementwise(ins, prog, (t, t), float_fn(ins, t, np.divide))
    if t in SIGNED:

        def fn(a, b):
            rem = np.fmod(a, b)
            return np.where(b == -1, -a, np.floor_divide(a - rem, np.where(b == 0, 1, b)).astype(a.dtype))

        return elementwise(ins, prog, (t, t), fn)
    ones = DTYPE[t](RANGE_MAX[t])
    return elementwise(
        ins, prog, (t, t), lambda a, b: np.where(b == 0, ones, a // np.where(b == 0, b.dtype.type(1), b))
    )


RANGE_MAX = {k: v[1] for k, v in V.RANGE.items()}


@op("rem")
def _rem(ins, prog):
    t = types_of(ins)[-1]
    return elementwise(
        ins, prog, (t, t), lambda a, b: np.where(b == 0, a, np.fmod(a, np.where(b == 0, b.dtype.type(1), b)))
    )


@op("neg")
def _neg(ins, prog):
    t = types_of(ins)[-1]
    if t in FLOATS or t.endswith("x2"):
        if t == "bf16":
            return elementwise(ins, prog, (t,), lambda a: a ^ U16(0x8000))
        if t.endswith("x2"):
            return elementwise(ins, prog, (t,), lambda a: a ^ U32(0x80008000))
        return elementwise(ins, prog, (t,), float_fn(ins, t, np.negative))
    return elementwise(ins, prog, (t,), np.negative)


@op("abs")
def _abs(ins, prog):
    t = types_of(ins)[-1]
    if t == "bf16":
        return elementwise(ins, prog, (t,), lambda a: a & U16(0x7FFF))
    if t.endswith("x2"):
        return elementwise(ins, prog, (t,), lambda a: a & U32(0x7FFF7FFF))
    if t in FLOATS:
        return elementwise(ins, prog, (t,), float_fn(ins, t, np.abs))
    return elementwise(ins, prog, (t,), np.abs)


def fmax(a, b, nan):
    r = np.fmax(a, b)
    return minmax_fix(a, b, r, nan, True)


def fmin(a, b, nan):
    r = np.fmin(a, b)
    return minmax_fix(a, b, r, nan, False)


def minmax_fix(a, b, r, nan, is_max):
    """-0 < +0; canonical NaN when both (or, with .NaN, one) are NaN."""
    u = {4: U32, 8: U64}[r.itemsize]
    zero = (a == 0) & (b == 0)
    if zero.any():
        both = a.view(u) & b.view(u) if is_max else a.view(u) | b.view(u)
        r = np.where(zero, both.view(r.dtype), r)
    bad = (np.isnan(a) | np.isnan(b)) if nan else np.isnan(r)
    if bad.any():
        canon = np.array([0x7FFFFFFF], U32).view(F32) if u is U32 else np.array([np.nan])
        r = np.where(bad, canon, r)
    return r


@op("min", "max")
def _minmax(ins, prog):
    t = types_of(ins)[-1]
    big = ins.op == "max"
    if t in FLOATS or t in ("f16x2", "bf16x2"):
        if "xorsign" in ins.mods:
            raise unsupported(ins)
        nan = "NaN" in ins.mods
        f2 = (lambda a, b: fmax(a, b, nan)) if big else (lambda a, b: fmin(a, b, nan))
        if len(ins.ops) == 4:
            return elementwise(ins, prog, (t, t, t), float_fn(ins, t, lambda a, b, c: f2(f2(a, b), c)))
        f = float_fn(ins, t, f2)
        if t in ("f16", "f16x2"):

            def f(a, b):
                r = f2(a.view(F16).astype(F32), b.view(F16).astype(F32))
                if "relu" in ins.mods:
                    r = np.where(np.isnan(r), r, np.maximum(r, F32(0)))
                h = np.where(np.isnan(r), U16(0x7FFF), r.astype(F16).view(U16))
                return h if t == "f16x2" else h.view(F16)

            f = packed(f) if t.endswith("x2") else f
        return elementwise(ins, prog, (t, t), f)
    if t in ("s16x2", "u16x2"):
        dt = np.int16 if t[0] == "s" else U16
        g = np.maximum if big else np.minimum
        return elementwise(ins, prog, ("b32", "b32"), packed(lambda a, b: g(a.view(dt), b.view(dt))))
    g = np.maximum if big else np.minimum
    if "relu" in ins.mods:
        return elementwise(ins, prog, (t, t), lambda a, b: np.maximum(g(a, b), a.dtype.type(0)))
    return elementwise(ins, prog, (t, t), g)


def real_function(name):
    def deco(ins, prog):
        t = types_of(ins)[-1]
        fn = REAL[name]
        return elementwise(ins, prog, (t,), float_fn(ins, t, fn))

    return deco


def _sin(x):
    return np.sin(x.astype(F64)).astype(x.dtype)


def _cos(x):
    return np.cos(x.astype(F64)).astype(x.dtype)


def _of_library(name, plain):
    """A function of float32 as native.c has it, so that both ways of execution give the same bits."""

    def fn(x):
        from . import native

        lib = native.library()
        return plain(x) if lib is None or x.dtype != F32 else lib.apply(name, x)

    return fn


REAL = {
    "ex2": _of_library("ex2_f32", np.exp2),
    "lg2": _of_library("lg2_f32", np.log2),
    "sin": _sin,
    "cos": _cos,
    "tanh": _of_library("tanh_f32", np.tanh),
    "sqrt": np.sqrt,
    "rcp": lambda x: np.divide(x.dtype.type(1), x),
    "rsqrt": lambda x: (1.0 / np.sqrt(x.astype(F64))).astype(x.dtype),
}
for _name in ("ex2", "lg2", "sin", "cos", "tanh", "rsqrt"):
    TABLE[_name] = real_function(_name)


@op("sqrt", "rcp")
def _sqrt_rcp(ins, prog):
    t = types_of(ins)[-1]
    mode = directed(ins)
    if mode and t == "f32":
        if ins.op == "sqrt":

            def fn(a):
                q = np.sqrt(a.astype(F64))
                r = V.fma_f64(-q, q, a.astype(F64))
                return V.round_f32(q, np.where(np.isfinite(r), np.sign(r) * 1e-300, 0.0), mode)
        else:

            def fn(a):
                q = 1.0 / a.astype(F64)
                r = V.fma_f64(-q, a.astype(F64), np.ones_like(q))
                return V.round_f32(q, np.where(np.isfinite(r), np.sign(r) * np.sign(a) * 1e-300, 0.0), mode)

        return elementwise(ins, prog, (t,), float_fn(ins, t, fn))
    return elementwise(ins, prog, (t,), float_fn(ins, t, REAL[ins.op]))


@op("copysign")
def _copysign(ins, prog):
    t = types_of(ins)[-1]
    return elementwise(ins, prog, (t, t), lambda a, b: np.copysign(b, a))


@op("testp")
def _testp(ins, prog):
    t = types_of(ins)[-1]
    tiny = np.finfo(DTYPE[t]).tiny
    fn = {
        "finite": np.isfinite,
        "infinite": np.isinf,
        "number": lambda a: ~np.isnan(a),
        "notanumber": np.isnan,
        "normal": lambda a: np.isfinite(a) & (np.abs(a) >= tiny),
        "subnormal": lambda a: (a != 0) & (np.abs(a) < tiny),
    }[ins.mods[0]]
    return elementwise(ins, prog, (t,), fn, "pred")


# ---- bits ----
def logic(fn, pfn):
    def comp(ins, prog):
        t = types_of(ins)[-1]
        return elementwise(ins, prog, (t, t), pfn if t == "pred" else fn)

    return comp


TABLE["and"] = logic(np.bitwise_and, np.logical_and)
TABLE["or"] = logic(np.bitwise_or, np.logical_or)
TABLE["xor"] = logic(np.bitwise_xor, np.logical_xor)


@op("not")
def _not(ins, prog):
    t = types_of(ins)[-1]
    return elementwise(ins, prog, (t,), np.logical_not if t == "pred" else np.invert)


@op("cnot")
def _cnot(ins, prog):
    t = types_of(ins)[-1]
    return elementwise(ins, prog, (t,), lambda a: (a == 0).astype(a.dtype))


@op("shl", "shr")
def _shift(ins, prog):
    t = types_of(ins)[-1]
    n = WIDTH[t]
    dt = DTYPE[t]
    if ins.op == "shl":
        u = RAW[n]

        def fn(a, b):
            return np.where(b < n, a.view(u) << np.minimum(b, n - 1).astype(u), u(0)).view(dt)
    elif t in SIGNED:

        def fn(a, b):
            return a >> np.minimum(b, n - 1).astype(dt)
    else:

        def fn(a, b):
            return np.where(b < n, a >> np.minimum(b, n - 1).astype(dt), dt(0))

    b_op = ins.ops[2]
    if b_op[0] == "i":
        # constant amount: the common case without clamping
        c = b_op[1]
        if c < n:
            k = dt(c)
            one = (lambda a: a << k) if ins.op == "shl" else (lambda a: a >> k)
            put, a = putter(ins.ops[0], t, prog), getter(ins.ops[1], t, prog)
            return lambda m, sel: put(m, sel, one(a(m, sel)))
    return elementwise(ins, prog, (t, "u32"), fn, t)


@op("shf")
def _shf(ins, prog):
    left, wrap = "l" in ins.mods, "wrap" in ins.mods

    def fn(a, b, c):
        n = (c & U32(31)) if wrap else np.minimum(c, U32(32))
        v = (b.astype(U64) << U64(32)) | a
        n = n.astype(U64)
        return ((v << n) >> U64(32)).astype(U32) if left else (v >> n).astype(U32)

    return elementwise(ins, prog, ("u32", "u32", "u32"), fn, "b32")


@op("prmt")
def _prmt(ins, prog):
    mode = next((m for m in ins.mods if m in ("f4e", "b4e", "rc8", "ecl", "ecr", "rc16")), None)
    if mode:
        raise unsupported(ins)

    def fn(a, b, c):
        v = (b.astype(U64) << U64(32)) | a
        out = U32(0)
        for i in range(4):
            s = (c >> U32(4 * i)) & U32(15)
            byte = ((v >> ((s & U32(7)).astype(U64) << U64(3))) & U64(255)).astype(U32)
            sign = (s & U32(8)) != 0
            byte = np.where(sign, np.where(byte & U32(128), U32(255), U32(0)), byte)
            out = out | (byte << U32(8 * i))
        return out

    return elementwise(ins, prog, ("b32", "b32", "b32"), fn)


@op("bfe")
def _bfe(ins, prog):
    t = types_of(ins)[-1]
    n = WIDTH[t]
    dt = DTYPE[t]
    u = RAW[n]

    def fn(a, pos, length):
        pos = (pos & U32(255)).astype(I64)
        length = (length & U32(255)).astype(I64)
        x = a.view(u)
        sh = np.where(pos < n, x >> np.minimum(pos, n - 1).astype(u), u(0))
        full = length >= n
        ln = np.minimum(length, n - 1).astype(u)
        mask = np.where(full, ~u(0), (u(1) << ln) - u(1))
        mask = mask & np.where(pos < n, ~u(0) >> np.minimum(pos, n - 1).astype(u), u(0))
        r = sh & mask
        if t in SIGNED:
            sp = np.minimum(pos + length - 1, n - 1)
            sp = np.maximum(sp, 0).astype(u)
            sign = ((x >> sp) & u(1)).astype(bool) & (length > 0)
            r = np.where(sign, r | ~mask, r)
        return r.astype(u).view(dt)

    return elementwise(ins, prog, (t, "u32", "u32"), fn, t)


@op("bfi")
def _bfi(ins, prog):
    t = types_of(ins)[-1]
    n = WIDTH[t]
    u = RAW[n]

    def fn(a, b, pos, length):
        pos = (pos & U32(255)).astype(I64)
        length = (length & U32(255)).astype(I64)
        ln = np.minimum(length, n)
        mask = np.where(ln >= n, ~u(0), (u(1) << np.minimum(ln, n - 1).astype(u)) - u(1))
        p = np.minimum(pos, n - 1).astype(u)
        inside = pos < n
        mask = np.where(inside, mask << p, u(0))
        return ((b & ~mask) | (np.where(inside, a << p, u(0)) & mask)).astype(u)

    return elementwise(ins, prog, (t, t, "u32", "u32"), fn, t)


@op("bfind")
def _bfind(ins, prog):
    t = types_of(ins)[-1]
    n = WIDTH[t]

    def fn(a):
        x = np.where(a < 0, ~a, a) if t in SIGNED else a
        r = top_bit(x.astype(U64) & U64((1 << n) - 1))
        if "shiftamt" in ins.mods:
            r = np.where(r < 0, r, n - 1 - r)
        return r.astype(I32).view(U32)

    return elementwise(ins, prog, (t,), fn, "u32")


def top_bit(x):
    """Index of the highest set bit of uint64 values, -1 for zero."""
    r = np.full(x.shape, -1, I64)
    for s in (32, 16, 8, 4, 2, 1):
        big = x >= (U64(1) << U64(s))
        r = r + np.where(big, s, 0)
        x = np.where(big, x >> U64(s), x)
    return r + (x > 0)


@op("clz")
def _clz(ins, prog):
    t = types_of(ins)[-1]
    n = WIDTH[t]
    return elementwise(ins, prog, (t,), lambda a: (n - 1 - top_bit(a.astype(U64))).astype(U32), "u32")


@op("popc")
def _popc(ins, prog):
    t = types_of(ins)[-1]
    return elementwise(ins, prog, (t,), lambda a: np.bitwise_count(a).astype(U32), "u32")


def reverse_bits(x, n):
    x = x.astype(U64)
    for s, mask in (
        (1, 0x5555555555555555),
        (2, 0x3333333333333333),
        (4, 0x0F0F0F0F0F0F0F0F),
        (8, 0x00FF00FF00FF00FF),
        (16, 0x0000FFFF0000FFFF),
        (32, 0x00000000FFFFFFFF),
    ):
        if s < n:
            k = U64(s)
            x = ((x >> k) & U64(mask)) | ((x & U64(mask)) << k)
    return x.astype(RAW[n])


@op("brev")
def _brev(ins, prog):
    t = types_of(ins)[-1]
    return elementwise(ins, prog, (t,), lambda a: reverse_bits(a, WIDTH[t]))


@op("lop3")
def _lop3(ins, prog):
    if "BOOL" in ins.mods or ins.ops[0][0] == "|":
        raise unsupported(ins)
    table = ins.ops[4][1]

    def fn(a, b, c):
        out = U32(0)
        for i in range(8):
            if table >> i & 1:
                out = out | ((a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c))
        return out | np.zeros_like(a)

    put = putter(ins.ops[0], "b32", prog)
    g = [getter(o, "b32", prog) for o in ins.ops[1:4]]
    return lambda m, sel: put(m, sel, fn(g[0](m, sel), g[1](m, sel), g[2](m, sel)))


@op("dp4a")
def _dp4a(ins, prog):
    ta, tb = types_of(ins)

    def fn(a, b, c):
        x = a.view(np.int8 if ta == "s32" else np.uint8).reshape(-1, 4).astype(I64)
        y = b.view(np.int8 if tb == "s32" else np.uint8).reshape(-1, 4).astype(I64)
        return ((x * y).sum(1) + c.astype(I64)).astype(I32)

    return elementwise(ins, prog, (ta, tb, ta), fn, ta)


# ---- comparison and selection ----
CMP = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: (a < b) | (a > b),
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
    "equ": lambda a, b: ~((a < b) | (a > b)),
    "neu": lambda a, b: a != b,
    "ltu": lambda a, b: ~(a >= b),
    "leu": lambda a, b: ~(a > b),
    "gtu": lambda a, b: ~(a <= b),
    "geu": lambda a, b: ~(a < b),
    "num": lambda a, b: ~(np.isnan(a) | np.isnan(b)),
    "nan": lambda a, b: np.isnan(a) | np.isnan(b),
}
ICMP = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "lo": np.less,
    "ls": np.less_equal,
    "hi": np.greater,
    "hs": np.greater_equal,
}
BOOL = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


def compare(ins, t):
    name = ins.mods[0]
    if t in FLOATS:
        f = CMP[name]
        if t == "bf16":
            g = f

            def f(a, b):
                return g(V.bf16_to_f32(a), V.bf16_to_f32(b))
        elif t == "f32" and "ftz" in ins.mods:
            g = f

            def f(a, b):
                return g(V.ftz32(a), V.ftz32(b))

        return f
    return ICMP[name]


@op("setp")
def _setp(ins, prog):
    t = types_of(ins)[-1]
    d = ins.ops[0]
    if t in ("f16x2", "bf16x2"):
        return setp_x2(ins, prog, t)
    p, q = (d[1], d[2]) if d[0] == "|" else (d, ("_",))
    put_p, put_q = putter(p, "pred", prog), putter(q, "pred", prog)
    a, b = getter(ins.ops[1], t, prog), getter(ins.ops[2], t, prog)
    f = compare(ins, t)
    boolean = next((BOOL[m] for m in ins.mods if m in BOOL), None)
    if boolean is None and q == ("_",):
        return lambda m, sel: put_p(m, sel, f(a(m, sel), b(m, sel)))
    c = getter(ins.ops[3], "pred", prog) if boolean else None

    def run(m, sel):
        r = f(a(m, sel), b(m, sel))
        if boolean:
            x = c(m, sel)
            put_p(m, sel, boolean(r, x))
            put_q(m, sel, boolean(~r, x))
        else:
            put_p(m, sel, r)
            put_q(m, sel, ~r)

    return run


def setp_x2(ins, prog, t):
    d = ins.ops[0]
    p, q = (d[1], d[2]) if d[0] == "|" else (d, ("_",))
    put_p, put_q = putter(p, "pred", prog), putter(q, "pred", prog)
    a, b = getter(ins.ops[1], "b32", prog), getter(ins.ops[2], "b32", prog)
    f = CMP[ins.mods[0]]
    conv = (lambda x: x.view(F16)) if t == "f16x2" else V.bf16_to_f32
    boolean = next((BOOL[m] for m in ins.mods if m in BOOL), None)
    c = getter(ins.ops[3], "pred", prog) if boolean else None

    def run(m, sel):
        r = f(conv(a(m, sel).view(U16)).reshape(-1, 2), conv(b(m, sel).view(U16)).reshape(-1, 2))
        lo, hi = np.ascontiguousarray(r[:, 0]), np.ascontiguousarray(r[:, 1])
        if boolean:
            x = c(m, sel)
            lo, hi = boolean(lo, x), boolean(hi, x)
        put_p(m, sel, lo)
        put_q(m, sel, hi)

    return run


@op("set")
def _set(ins, prog):
    dt, st = types_of(ins)
    if st.endswith("x2"):
        f = CMP[ins.mods[0]]
        conv = (lambda x: x.view(F16)) if st == "f16x2" else V.bf16_to_f32
        one = {"f16x2": 0x3C00, "bf16x2": 0x3F80}.get(dt, 0xFFFF)
        fn = packed(lambda a, b: np.where(f(conv(a), conv(b)), U16(one), U16(0)))
        return elementwise(ins, prog, (st, st), fn, dt)
    f = compare(ins, st)
    boolean = next((BOOL[m] for m in ins.mods if m in BOOL), None)
    true = {"f32": F32(1), "f16": F16(1), "bf16": U16(0x3F80)}.get(dt)
    if true is None:
        true = DTYPE[dt](-1) if dt in SIGNED else DTYPE[dt](RANGE_MAX.get(dt, 2 ** WIDTH[dt] - 1))
    zero = DTYPE[dt](0)
    if boolean:
        return elementwise(ins, prog, (st, st, "pred"), lambda a, b, c: np.where(boolean(f(a, b), c), true, zero), dt)
    return elementwise(ins, prog, (st, st), lambda a, b: np.where(f(a, b), true, zero), dt)


@op("selp")
def _selp(ins, prog):
    t = types_of(ins)[-1]
    raw = "b" + str(WIDTH[t])
    return elementwise(ins, prog, (t, t, "pred"), lambda a, b, c: np.where(c, a, b), t if WIDTH[t] > 1 else raw)


@op("slct")
def _slct(ins, prog):
    t, ct = types_of(ins)
    return elementwise(ins, prog, (t, t, ct), lambda a, b, c: np.where(c >= 0, a, b), t)


# ---- moves and conversions ----
@op("mov")
def _mov(ins, prog):
    t = types_of(ins)[-1]
    d, s = ins.ops
    if d[0] == "v":
        parts = len(d[1])
        w = WIDTH[t] // parts
        raw = RAW[w]
        puts = [putter(x, f"b{w}", prog) for x in d[1]]
        get = getter(s, t, prog)

        def unpack(m, sel):
            a = get(m, sel)
            v = np.ascontiguousarray(a).view(raw).reshape(-1, parts)
            for i, p in enumerate(puts):
                p(m, sel, v[:, i].copy())

        return unpack
    if s[0] == "v":
        parts = len(s[1])
        w = WIDTH[t] // parts
        raw, full = RAW[w], RAW[WIDTH[t]]
        gets = [getter(x, f"b{w}", prog) for x in s[1]]
        put = putter(d, t, prog)

        def pack(m, sel):
            vals = [g(m, sel) for g in gets]
            n = max(v.shape[0] for v in vals)
            out = np.empty((n, parts), raw)
            for i, v in enumerate(vals):
                out[:, i] = v
            put(m, sel, out.view(full).reshape(-1))

        return pack
    if s[0] == "r" and prog.reg_name[s[1]] in (
        "%clock",
        "%clock64",
        "%globaltimer",
        "%globaltimer_lo",
        "%clock_hi",
        "%globaltimer_hi",
    ):
        put = putter(d, t, prog)
        dt = DTYPE[t]
        high = prog.reg_name[s[1]].endswith("_hi")
        return lambda m, sel: put(m, sel, np.array([0 if high else m.steps & (2**31 - 1)], dt))
    if t == "pred":
        return elementwise(ins, prog, ("pred",), lambda a: a)
    return elementwise(ins, prog, (f"b{WIDTH[t]}",), lambda a: a, t)


@op("cvta")
def _cvta(ins, prog):
    t = types_of(ins)[-1]
    space = next(m for m in ins.mods if m.split("::")[0] in ("global", "shared", "local", "const", "param"))
    base = prog.window(space.split("::")[0])
    dt = DTYPE[t]
    if "to" in ins.mods:
        return elementwise(ins, prog, (t,), lambda a: a - dt(base))
    return elementwise(ins, prog, (t,), lambda a: a + dt(base))


@op("isspacep")
def _isspacep(ins, prog):
    space = ins.mods[0].split("::")[0]
    put, a = putter(ins.ops[0], "pred", prog), getter(ins.ops[1], "u64", prog)
    return lambda m, sel: put(m, sel, m.in_space(a(m, sel), space))


@op("mapa")
def _mapa(ins, prog):
    t = types_of(ins)[-1]
    put = putter(ins.ops[0], t, prog)
    a, b = getter(ins.ops[1], t, prog), getter(ins.ops[2], "u32", prog)
    base = 0 if any("shared" in m for m in ins.mods) else prog.window("shared")
    dt = DTYPE[t]

    def run(m, sel):
        addr = a(m, sel) - dt(base)
        rank = (b(m, sel).astype(dt) + dt(1)) << dt(24)
        put(m, sel, ((addr & dt(0xFFFFFF)) | rank) + dt(base))

    return run


@op("getctarank")
def _getctarank(ins, prog):
    t = types_of(ins)[-1]
    put, a = putter(ins.ops[0], "u32", prog), getter(ins.ops[1], t, prog)
    base = 0 if any("shared" in m for m in ins.mods) else prog.window("shared")

    def run(m, sel):
        top = ((a(m, sel).astype(U64) - U64(base)) >> U64(24)).astype(U32)
        own = m.special_value("%cluster_ctarank", sel)
        put(m, sel, np.where(top == 0, own, top - U32(1)))

    return run


def cvt_source(t):
    """Source array -> array of a numpy type that holds the value exactly."""
    return V.bf16_to_f32 if t == "bf16" else (lambda a: a)


def cvt_float(d, s, mode, sat, relu, ftz):
    """Conversion towards a float type."""
    src = cvt_source(s)
    mode = mode or "rn"

    def post(x):
        if relu:
            x = np.where(np.isnan(x), x, np.maximum(x, x.dtype.type(0)))
        return saturate(x) if sat else x

    if d == "f64":
        return lambda a: post(src(a).astype(F64))
    if d == "f32":
        if s in ("f16", "bf16"):
            return lambda a: post(src(a).astype(F32))
        if s == "f32":
            return (lambda a: V.ftz32(post(V.ftz32(a)))) if ftz else post
        if mode == "rn":

            def f(a):
                return post(a.astype(F32))
        else:

            def f(a):
                return post(V.round_f32(a.astype(F64), np.zeros(1), mode))

        return (lambda a: V.ftz32(f(a))) if ftz else f
    pre = V.ftz32 if ftz and s == "f32" else (lambda a: a)
    if d == "f16":
        if mode == "rn" and s in ("f32", "f64"):
            return lambda a: post(pre(a).astype(F16))
        return lambda a: post(V.f64_to_f16(src(pre(a)).astype(F64), mode))
    if d == "bf16":

        def f(a):
            x = src(pre(a))
            if x.dtype != F32:
                x = V.f64_to_odd32(x.astype(F64)) if mode == "rn" else x.astype(F32)
            return V.f32_to_bf16(post(x), mode)

        return f
    raise PTXError(f"cvt to {d}")


@op("cvt")
def _cvt(ins, prog):
    mods = ins.mods
    if "tf32" in mods:
        half = U32(0x1000)
        mode = "rna" if "rna" in mods else "rz" if "rz" in mods else "rn"

        def tf(a):
            b = a.view(U32)
            if mode == "rna":
                r = b + half
            elif mode == "rn":
                r = b + U32(0xFFF) + ((b >> U32(13)) & U32(1))
            else:
                r = b
            special = (b & U32(0x7F800000)) == U32(0x7F800000)
            return np.where(special, b, r & U32(0xFFFFE000))

        return elementwise(ins, prog, ("f32",), tf, "b32")
    if any(m.startswith(("e4m3", "e5m2", "e2m1", "e2m3", "e3m2", "ue8m0")) for m in mods):
        return cvt_fp8(ins, prog)
    ts = types_of(ins)
    if len(ts) != 2:
        raise unsupported(ins)
    d, s = ts
    mode = next((m for m in mods if m in ROUND), None)
    imode = next((m for m in mods if m in IROUND), None)
    sat, relu, ftz = "sat" in mods, "relu" in mods, "ftz" in mods
    if d in ("f16x2", "bf16x2"):
        half = d[:-2]
        f = cvt_float(half, s, mode, sat, relu, ftz)

        def pair(a, b):
            hi, lo = f(a).view(U16), f(b).view(U16)
            return (hi.astype(U32) << U32(16)) | lo

        return elementwise(ins, prog, (s, s), pair, "b32")
    if d in FLOATS:
        f = cvt_float(d, s, mode, sat, relu, ftz)
        if imode and s in FLOATS:
            rnd = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}[imode]
            g = f
            if s == "bf16":

                def f(a):
                    return (
                        V.f32_to_bf16(rnd(V.bf16_to_f32(a))) if d == "bf16" else rnd(V.bf16_to_f32(a)).astype(DTYPE[d])
                    )
            elif s == "f16" and d == "f16":

                def f(a):
                    return rnd(a)
            else:

                def f(a):
                    return g(rnd(V.ftz32(a) if ftz and s == "f32" else a))

        return elementwise(ins, prog, (s,), f, d)
    if s in FLOATS:
        src = cvt_source(s)
        pre = V.ftz32 if ftz and s == "f32" else (lambda a: a)
        return elementwise(ins, prog, (s,), lambda a: V.float_to_int(pre(src(a)), d, imode or "rzi"), d)
    dt = DTYPE[d]
    if sat:
        lo, hi = V.RANGE[d]
        slo, shi = V.RANGE[s]
        lo, hi = max(lo, slo), min(hi, shi)
        sd = DTYPE[s]
        return elementwise(ins, prog, (s,), lambda a: np.clip(a, sd(lo), sd(hi)).astype(dt), d)
    return elementwise(ins, prog, (s,), lambda a: a.astype(dt), d)


def cvt_fp8(ins, prog):
    mods = ins.mods
    kinds = [m for m in mods if m in ("e4m3x2", "e5m2x2")]
    rest = types_of(ins)
    if len(kinds) != 1 or len(rest) != 1:
        raise unsupported(ins)
    table = V.FP8[kinds[0][:4]]
    other = rest[0]
    fp8_first = mods.index(kinds[0]) < mods.index(other)
    if fp8_first:
        kind = kinds[0][:4]
        relu = "relu" in mods
        fix = (lambda x: np.maximum(x, F32(0))) if relu else (lambda x: x)
        if other == "f32":

            def fn(a, b):
                return (V.to_fp8(fix(a), kind).astype(U16) << U16(8)) | V.to_fp8(fix(b), kind)

            return elementwise(ins, prog, ("f32", "f32"), fn, "b16")

        def fn(a):
            h = a.view(U16).reshape(-1, 2)
            x = h.view(F16).astype(F32) if other == "f16x2" else V.bf16_to_f32(h)
            c = V.to_fp8(fix(x), kind).astype(U16)
            return c[:, 0] | (c[:, 1] << U16(8))

        return elementwise(ins, prog, ("b32",), fn, "b16")

    def fn(a):
        v = table[np.ascontiguousarray(a).view(np.uint8).reshape(-1, 2)]
        h = v.astype(F16).view(U16) if other == "f16x2" else V.f32_to_bf16(v)
        return np.ascontiguousarray(h).view(U32).reshape(-1)

    return elementwise(ins, prog, ("b16",), fn, "b32")


def nothing(ins, prog):
    return lambda m, sel: None


for _name in (
    "nanosleep",
    "griddepcontrol",
    "createpolicy",
    "prefetch",
    "prefetchu",
    "applypriority",
    "discard",
    "pmevent",
    "setmaxnreg",
    "brkpt",
):
    TABLE[_name] = nothing


@op("createpolicy")
def _createpolicy(ins, prog):
    put = putter(ins.ops[0], "b64", prog)
    return lambda m, sel: put(m, sel, np.zeros(1, U64))


@op("activemask")
def _activemask(ins, prog):
    put = putter(ins.ops[0], "b32", prog)
    return lambda m, sel: put(m, sel, m.active_mask(sel))
