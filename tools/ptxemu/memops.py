"""Instructions that touch memory or other threads: ld/st, atomics, cp.async,
ldmatrix, mma, shuffles, votes, fences and calls' parameters."""

import numpy as np

from . import values as V
from .errors import PTXError
from .memory import LOCAL_BASE, LOCAL_ID, SHARED_BASE, SHARED_ID, WINDOW, atomic_apply
from .ops import getter, nothing, op, putter, types_of, unsupported
from .parser import WIDTH
from .values import DTYPE, F16, F32, F64, I32, I64, RAW, U16, U32, U64

SPACES = ("param", "global", "shared", "local", "const")


def space_of(ins):
    for m in ins.mods:
        base = m.split("::")[0]
        if base in SPACES:
            return base
    return None


def address(opnd, prog):
    """Function (m, sel) -> uint64 or uint32 addresses."""
    if opnd[0] != "a":
        raise PTXError("address expected")
    base, off = opnd[1], opnd[2]
    if base[0] == "r":
        width = prog.reg_width[base[1]]
        raw = RAW[width]
        get = getter(base, f"u{width}", prog)
        if off == 0:
            return get
        c = raw(off & ((1 << width) - 1))
        return lambda m, sel: get(m, sel) + c
    value = (prog.symbol(base[1]) if base[0] == "s" else base[1]) + off
    c = np.array([value & (2**64 - 1)], U64)
    return lambda m, sel: c


def split_generic(addr):
    """List of (space, positions or None, address within the space)."""
    ids = addr >> U64(WINDOW)
    lo, hi = int(ids.min()), int(ids.max())
    if lo == hi:
        if lo == SHARED_ID:
            return [("shared", None, addr - U64(SHARED_BASE))]
        if lo == LOCAL_ID:
            return [("local", None, addr - U64(LOCAL_BASE))]
        return [("global", None, addr)]
    out = []
    sh, lc = ids == SHARED_ID, ids == LOCAL_ID
    for name, mask, base in (("shared", sh, SHARED_BASE), ("local", lc, LOCAL_BASE), ("global", ~(sh | lc), 0)):
        if mask.any():
            pos = np.flatnonzero(mask)
            out.append((name, pos, addr[pos] - U64(base)))
    return out


def memory_of(m, space):
    return {"global": m.gmem, "const": m.gmem, "shared": m.smem, "local": m.lmem}[space]


def load(m, sel, addr, space, elem, count, ins, strong=False):
    m.time += 1
    if space is not None:
        return memory_of(m, space).load(m, sel, addr, elem, count, ins, strong)
    if addr.shape[0] == 1:
        addr = np.repeat(addr, m.tids(sel).shape[0])
    parts = split_generic(addr)
    res = None
    for sp, pos, a in parts:
        s = sel if pos is None else m.tids(sel)[pos]
        v = memory_of(m, sp).load(m, s, a, elem, count, ins, strong)
        if pos is None:
            return v
        if res is None:
            res = np.zeros((addr.shape[0], count), v.dtype)
        res[pos] = v
    return res


def store(m, sel, addr, vals, space, elem, count, ins, strong=False):
    m.time += 1
    if space is not None:
        memory_of(m, space).store(m, sel, addr, vals, elem, count, ins, strong)
        return
    if addr.shape[0] == 1:
        addr = np.repeat(addr, m.tids(sel).shape[0])
    for sp, pos, a in split_generic(addr):
        s = sel if pos is None else m.tids(sel)[pos]
        memory_of(m, sp).store(m, s, a, vals if pos is None else vals[pos], elem, count, ins, strong)


def vector_count(ins):
    for m in ins.mods:
        if m in ("v2", "v4", "v8"):
            return int(m[1])
    return 1


STRONG = {"volatile", "relaxed", "acquire", "release", "mmio", "acq_rel"}


@op("ld", "ldu")
def _ld(ins, prog):
    if any(m.startswith("b128") for m in ins.mods):
        raise unsupported(ins)
    t = types_of(ins)[-1]
    space = space_of(ins)
    n = vector_count(ins)
    dests = ins.ops[0][1] if ins.ops[0][0] == "v" else [ins.ops[0]]
    puts = [putter(d, t, prog) for d in dests]
    elem = WIDTH[t] // 8
    dt = DTYPE[t]
    if space == "param":
        return ld_param(ins, prog, puts, elem, dt)
    addr = address(ins.ops[1], prog)
    strong = bool(STRONG & set(ins.mods))

    def run(m, sel):
        v = load(m, sel, addr(m, sel), space, elem, n, ins, strong)
        if n == 1:
            puts[0](m, sel, v.reshape(-1).view(dt))
        else:
            for i in range(n):
                puts[i](m, sel, v[:, i].copy().view(dt))
        if strong and space in (None, "global"):
            m.note_atomic(sel, False)

    return run


def ld_param(ins, prog, puts, elem, dt):
    base, off = ins.ops[1][1], ins.ops[1][2]
    raw = RAW[elem * 8]
    count = len(puts)
    if base[0] == "s":
        where = prog.param(base[1])
        if where[0] == "kernel":
            start = where[1] + off

            def run(m, sel):
                for i, p in enumerate(puts):
                    p(m, sel, m.params[start + i * elem : start + (i + 1) * elem].view(dt))

            return run
        key = where[1]

        def run_call(m, sel):
            data = m.call_param(key)
            for i, p in enumerate(puts):
                a = off + i * elem
                part = np.ascontiguousarray(data[:, a : a + elem] if sel is None else data[sel, a : a + elem])
                p(m, sel, part.view(raw).reshape(-1).view(dt))

        return run_call
    get = getter(base, "u64", prog)

    def run_indexed(m, sel):
        a = get(m, sel).astype(I64) + off
        a = a - np.where(a >= prog.param_base, prog.param_base, 0)
        bad = (a < 0) | (a + elem * count > m.params.shape[0])
        if bad.any():
            m.finding("param_oob", ins, m.tids(sel)[:1], "kernel parameter index out of range")
            a = np.where(bad, 0, a)
        for i, p in enumerate(puts):
            idx = (a + i * elem)[:, None] + np.arange(elem)
            p(m, sel, m.params[idx].view(raw).reshape(-1).view(dt))

    return run_indexed


@op("st")
def _st(ins, prog):
    if "async" in ins.mods or "bulk" in ins.mods or "b128" in ins.mods:
        raise unsupported(ins)
    t = types_of(ins)[-1]
    space = space_of(ins)
    n = vector_count(ins)
    srcs = ins.ops[1][1] if ins.ops[1][0] == "v" else [ins.ops[1]]
    gets = [getter(s, f"b{WIDTH[t]}" if s[0] != "f" and s[0] != "i" else t, prog) for s in srcs]
    elem = WIDTH[t] // 8
    raw = RAW[WIDTH[t]]
    if space == "param":
        key, off = prog.param(ins.ops[0][1][1])[1], ins.ops[0][2]

        def run_param(m, sel):
            data = m.call_param(key)
            for i, g in enumerate(gets):
                v = np.ascontiguousarray(np.broadcast_to(g(m, sel).view(raw), m.tids(sel).shape))
                a = off + i * elem
                data[slice(None) if sel is None else sel, a : a + elem] = v.view(np.uint8).reshape(-1, elem)

        return run_param
    addr = address(ins.ops[0], prog)
    strong = bool(STRONG & set(ins.mods))

    def run(m, sel):
        vals = np.empty((m.count(sel), n), raw)
        for i, g in enumerate(gets):
            vals[:, i] = g(m, sel).view(raw)
        if strong and space in (None, "global"):
            m.note_fence(sel, "release" in ins.mods)
        store(m, sel, addr(m, sel), vals, space, elem, n, ins, strong)

    return run


# ---- atomics ----
def atomic_fn(name, t):
    """(fn(old, value[, compare]), dtype of the view, ufunc.at or None)."""
    dt = DTYPE[t]
    if t == "bf16":

        def lift(f):
            return lambda a, b: V.f32_to_bf16(f(V.bf16_to_f32(a), V.bf16_to_f32(b)))

        fn = {"add": lift(np.add), "min": lift(np.fmin), "max": lift(np.fmax), "exch": lambda a, b: b}.get(name)
        if name == "cas":

            def fn(old, c, v):
                return np.where(old == c, v, old)

        return fn, dt, None
    table = {
        "add": (np.add, np.add.at),
        "min": (np.minimum, np.minimum.at),
        "max": (np.maximum, np.maximum.at),
        "and": (np.bitwise_and, np.bitwise_and.at),
        "or": (np.bitwise_or, np.bitwise_or.at),
        "xor": (np.bitwise_xor, np.bitwise_xor.at),
        "exch": (lambda a, b: b, None),
        "inc": (lambda a, b: np.where(a >= b, a.dtype.type(0), a + a.dtype.type(1)), None),
        "dec": (lambda a, b: np.where((a == 0) | (a > b), b, a - a.dtype.type(1)), None),
        "cas": (lambda old, c, v: np.where(old == c, v, old), None),
    }
    fn, at = table[name]
    if t in ("f16", "f32", "f64") and name in ("min", "max"):
        fn, at = (np.fmin, None) if name == "min" else (np.fmax, None)
    if t == "f16":
        at = None
    return fn, dt, at


ATOMS = ("add", "min", "max", "and", "or", "xor", "exch", "inc", "dec", "cas")


@op("atom", "red")
def _atom(ins, prog):
    if "async" in ins.mods or "b128" in ins.mods:
        raise unsupported(ins)
    t = types_of(ins)[-1]
    space = space_of(ins)
    name = next(m for m in ins.mods if m in ATOMS)
    n = vector_count(ins)
    half = t.endswith("x2")
    base_t = t[:-2] if half else t
    if base_t[0] == "b" and base_t != "bf16":
        base_t = "u" + base_t[1:]
    fn, dt, at = atomic_fn(name, base_t)
    ops = list(ins.ops)
    dest = ops.pop(0) if ins.op == "atom" else ("_",)
    addr = address(ops[0], prog)
    vals = ops[1][1] if ops[1][0] == "v" else [ops[1]]
    gets = [getter(o, t if not half else "b32", prog) for o in vals]
    cmp = None
    if name == "cas":
        cmp = getter(ops[2], t, prog)  # ops: address, compare, new value
    dests = dest[1] if dest[0] == "v" else [dest] * n
    puts = [putter(d, t if not half else "b32", prog) for d in dests]
    need_old = any(d[0] != "_" for d in dests)
    elem = WIDTH[base_t] // 8
    per = n * (2 if half else 1)
    width = elem * per
    raw = RAW[elem * 8]
    order = next((m for m in ins.mods if m in ("relaxed", "acquire", "release", "acq_rel")), "relaxed")

    def run(m, sel):
        m.time += 1
        tids = m.tids(sel)
        k = tids.shape[0]
        a = addr(m, sel)
        a = np.repeat(a, k) if a.shape[0] != k else a
        cols = []
        for g in gets:
            v = np.ascontiguousarray(np.broadcast_to(g(m, sel), (k,)))
            cols.append(v.view(raw).reshape(k, -1))
        v = np.concatenate(cols, axis=1) if len(cols) > 1 else cols[0]
        c = None
        if cmp is not None:
            c = np.ascontiguousarray(np.broadcast_to(cmp(m, sel), (k,))).view(raw).reshape(k, -1)
        old = np.zeros((k, per), raw)
        parts = split_generic(a.astype(U64)) if space is None else [(space, None, a)]
        for sp, pos, aa in parts:
            t0 = tids if pos is None else tids[pos]
            where = np.arange(k) if pos is None else pos
            if sp == "global":
                if order in ("release", "acq_rel"):
                    m.note_fence(t0, True)
                for r, p2, off in m.gmem.resolve(m, t0, aa.astype(U64), width, ins, "atomic"):
                    w2 = where if p2 is None else where[p2]
                    tt = tids[w2]
                    r.atomic_count += w2.size
                    m.gmem.account(m, tt, False, r, off, width, True)
                    if m.gmem.races:
                        m.gmem.race_write(m, tt, r, off, width, ins, True, None, off, None, atomic=True)
                    apply(r.view(elem), off, w2, v, c, old)
                m.note_atomic(t0, True)
            elif sp == "shared":
                p2, off = m.smem.resolve(m, t0, aa, width, ins, "atomic")
                w2 = where if p2 is None else where[p2]
                if w2.size:
                    if m.smem.shadow is not None:
                        m.smem.check_write(m, tids[w2], off, width, ins, True, None, off, None, atomic=True)
                    m.bank_waves(tids[w2], off, width, True)
                    apply(m.smem.view(elem), off, w2, v, c, old)
            else:
                raise PTXError(f"PTX line {ins.line}: atomic on {sp} memory")
        if need_old:
            for i, p in enumerate(puts):
                if dests[i][0] == "_":
                    continue
                o = old[:, 2 * i : 2 * i + 2] if half else old[:, i]
                o = np.ascontiguousarray(o)
                p(m, sel, o.view(U32).reshape(-1) if half else o.view(DTYPE[t]))

    def apply(view, off, rows, v, c, old):
        view = view.view(dt)
        for j in range(per):
            idx = (off >> (elem.bit_length() - 1)) + j
            val = np.ascontiguousarray(v[rows, j]).view(dt)
            if c is not None:
                # compare-and-swap: operand order is compare, value
                got = atomic_apply(view, idx, fn, val, np.ascontiguousarray(c[rows, j]).view(dt))
            else:
                got = atomic_apply(view, idx, fn, val, None, at, need_old)
            if got is not None:
                old[rows, j] = got.view(raw)

    return run


# ---- asynchronous copies (complete at once) ----
@op("cp")
def _cp(ins, prog):
    if "bulk" in ins.mods or "mbarrier" in ins.mods:
        raise unsupported(ins)
    if "commit_group" in ins.mods or "wait_group" in ins.mods or "wait_all" in ins.mods:
        return copy_groups(ins)
    dst, src = address(ins.ops[0], prog), address(ins.ops[1], prog)
    size = ins.ops[2][1]
    rest = list(ins.ops[3:])
    if any(m.endswith("cache_hint") for m in ins.mods) and rest:
        rest = rest[:-1]
    src_size = getter(rest[0], "u32", prog) if rest else None
    elem = 4
    n = size // 4

    def run(m, sel):
        m.time += 1
        a, d = src(m, sel), dst(m, sel)
        k = m.count(sel)
        a = np.repeat(a, k) if a.shape[0] != k else a
        if src_size is None:
            vals = m.gmem.load(m, sel, a, elem, n, ins)
        else:
            ss = np.broadcast_to(src_size(m, sel), (k,))
            vals = np.zeros((k, n), U32)
            tids = m.tids(sel)
            if (ss == size).all():
                vals = m.gmem.load(m, sel, a, elem, n, ins)
            else:
                for s in np.unique(ss):
                    if s == 0:
                        continue
                    pos = np.flatnonzero(ss == s)
                    if s % 4:
                        raise PTXError(f"PTX line {ins.line}: source size {s} of cp.async is not supported")
                    w = int(s) // 4
                    for j in [0] if w & (w - 1) == 0 else range(w):
                        cnt = w if w & (w - 1) == 0 else 1
                        vals[pos, j : j + cnt] = m.gmem.load(m, tids[pos], a[pos] + U64(4 * j), elem, cnt, ins)
        m.smem.store(m, sel, d, vals, elem, n, ins, copying=True)

    return run


def copy_groups(ins):
    """Bookkeeping of cp.async groups, so that reads before the wait are noticed."""
    keep = ins.ops[0][1] if ins.ops else 0

    def run(m, sel):
        tids = m.tids(sel)
        if "wait_group" not in ins.mods:
            m.copy_committed[tids] += 1
        if "commit_group" not in ins.mods:
            m.copy_done[tids] = np.maximum(m.copy_done[tids], m.copy_committed[tids] - keep)

    return run


# ---- matrices ----
def whole_warps(m, sel, ins):
    """Warp numbers of the selection, which must consist of full warps."""
    tids = m.tids(sel)
    if (
        tids.size % 32
        or (tids.reshape(-1, 32)[:, 0] % 32).any()
        or not (np.diff(tids.reshape(-1, 32), axis=1) == 1).all()
    ):
        m.finding("partial_warp", ins, tids[:1], f"{ins.full} executed by part of a warp", fatal=True)
    return tids.reshape(-1, 32)


@op("ldmatrix")
def _ldmatrix(ins, prog):
    if "m8n8" not in ins.mods or "b16" not in ins.mods:
        raise unsupported(ins)
    count = int(next(m for m in ins.mods if m in ("x1", "x2", "x4"))[1])
    trans = "trans" in ins.mods
    d = ins.ops[0]
    puts = [putter(x, "b32", prog) for x in (d[1] if d[0] == "v" else [d])]
    addr = address(ins.ops[1], prog)

    def run(m, sel):
        m.time += 1
        tids = whole_warps(m, sel, ins)
        a = addr(m, sel)
        a = np.repeat(a, tids.size) if a.shape[0] == 1 else a
        rows = a.reshape(-1, 32)[:, : 8 * count]
        t = tids[:, : 8 * count].reshape(-1)
        v = m.smem.load(m, t, np.ascontiguousarray(rows).reshape(-1), 4, 4, ins)
        v = np.ascontiguousarray(v).view(U16).reshape(-1, count, 8, 8)
        for i, p in enumerate(puts):
            mat = v[:, i]
            if trans:
                mat = mat.transpose(0, 2, 1)
            p(m, sel, np.ascontiguousarray(mat).view(U32).reshape(-1))

    return run


@op("stmatrix")
def _stmatrix(ins, prog):
    if "m8n8" not in ins.mods or "b16" not in ins.mods:
        raise unsupported(ins)
    count = int(next(m for m in ins.mods if m in ("x1", "x2", "x4"))[1])
    trans = "trans" in ins.mods
    s = ins.ops[1]
    gets = [getter(x, "b32", prog) for x in (s[1] if s[0] == "v" else [s])]
    addr = address(ins.ops[0], prog)

    def run(m, sel):
        m.time += 1
        tids = whole_warps(m, sel, ins)
        a = addr(m, sel)
        a = np.repeat(a, tids.size) if a.shape[0] == 1 else a
        mats = np.empty((tids.shape[0], count, 8, 8), U16)
        for i, g in enumerate(gets):
            mat = np.ascontiguousarray(np.broadcast_to(g(m, sel), (tids.size,))).view(U16).reshape(-1, 8, 8)
            mats[:, i] = mat.transpose(0, 2, 1) if trans else mat
        rows = np.ascontiguousarray(a.reshape(-1, 32)[:, : 8 * count]).reshape(-1)
        t = tids[:, : 8 * count].reshape(-1)
        m.smem.store(m, t, rows, np.ascontiguousarray(mats).view(U32).reshape(-1, 4), 4, 4, ins)

    return run


@op("movmatrix")
def _movmatrix(ins, prog):
    put, get = putter(ins.ops[0], "b32", prog), getter(ins.ops[1], "b32", prog)

    def run(m, sel):
        tids = whole_warps(m, sel, ins)
        a = np.ascontiguousarray(np.broadcast_to(get(m, sel), (tids.size,)))
        mat = a.view(U16).reshape(-1, 8, 8).transpose(0, 2, 1)
        put(m, sel, np.ascontiguousarray(mat).view(U32).reshape(-1))

    return run


def tf32(x):
    return (x & U32(0xFFFFE000)).view(F32)


@op("mma")
def _mma(ins, prog):
    shape = next(m for m in ins.mods if m.startswith("m") and "n" in m)
    mm, rest = shape[1:].split("n")
    nn, kk = rest.split("k")
    M, N, K = int(mm), int(nn), int(kk)
    ts = [x for x in ins.mods if x in ("f32", "f16", "bf16", "tf32", "f64", "s32", "s8", "u8", "e4m3", "e5m2")]
    td, ta, tb, tc = ts
    if (M, N) != (16, 8) or ta not in ("f16", "bf16", "tf32", "s8", "u8", "e4m3", "e5m2") or "sp" in ins.mods:
        raise unsupported(ins)
    bits = {"f16": 16, "bf16": 16, "tf32": 32}.get(ta, 8)
    per = 32 // bits  # elements in one 32-bit register
    if K not in (4 * per, 8 * per):
        raise unsupported(ins)

    def expand(reg, t):
        """(warps*32,) uint32 -> (warps, 8, 4, per) numbers."""
        if t in ("f16", "bf16"):
            h = reg.view(U16)
            x = h.view(F16).astype(F32) if t == "f16" else V.bf16_to_f32(h)
        elif t == "tf32":
            x = tf32(reg)
        elif t in ("s8", "u8"):
            x = reg.view(DTYPE[t]).astype(F64)
        else:
            x = V.FP8[t][reg.view(np.uint8)]
        return x.reshape(-1, 8, 4, per)

    def list_of(o):
        return o[1] if o[0] == "v" else [o]

    ga = [getter(o, "b32", prog) for o in list_of(ins.ops[1])]
    gb = [getter(o, "b32", prog) for o in list_of(ins.ops[2])]
    pair = td == "f16"
    gc = [getter(o, "b32", prog) for o in list_of(ins.ops[3])]
    pd = [putter(o, "b32", prog) for o in list_of(ins.ops[0])]
    half_k = 4 * per

    def run(m, sel):
        tids = whole_warps(m, sel, ins)
        n = tids.size

        def full(g):
            return np.ascontiguousarray(np.broadcast_to(g(m, sel), (n,)))

        w = n // 32
        A = np.empty((w, 16, K), F64)
        B = np.empty((w, K, 8), F64)
        for i, g in enumerate(ga):  # registers: rows 0-7, rows 8-15, then the next half of k
            r, c = i % 2, i // 2
            A[:, 8 * r : 8 * r + 8, half_k * c : half_k * (c + 1)] = expand(full(g), ta).reshape(w, 8, half_k)
        for i, g in enumerate(gb):
            B[:, half_k * i : half_k * (i + 1), :] = expand(full(g), tb).reshape(w, 8, half_k).transpose(0, 2, 1)
        C = np.empty((w, 16, 8), F64)
        for i, g in enumerate(gc):
            x = full(g)
            if tc == "f16":
                C[:, 8 * i : 8 * i + 8, :] = x.view(F16).reshape(w, 8, 8)
            else:
                x = x.view(F32) if tc == "f32" else x.view(I32)
                C[:, 8 * (i // 2) : 8 * (i // 2) + 8, i % 2 :: 2] = x.reshape(w, 8, 4)
        D = np.matmul(A, B) + C
        if pair:
            D = D.astype(F16)
            for i, p in enumerate(pd):
                p(m, sel, np.ascontiguousarray(D[:, 8 * i : 8 * i + 8, :]).view(U32).reshape(-1))
        else:
            if td == "s32":
                D = np.clip(D, -(2**31), 2**31 - 1) if "satfinite" in ins.mods else D
                D = D.astype(I64).astype(I32)
            else:
                D = D.astype(F32)
            for i, p in enumerate(pd):
                x = D[:, 8 * (i // 2) : 8 * (i // 2) + 8, i % 2 :: 2]
                p(m, sel, np.ascontiguousarray(x).reshape(-1).view(U32))

    return run


# ---- exchange between the lanes of a warp ----
@op("shfl")
def _shfl(ins, prog):
    mode = next(m for m in ins.mods if m in ("up", "down", "bfly", "idx"))
    d = ins.ops[0]
    dst, pred = (d[1], d[2]) if d[0] == "|" else (d, ("_",))
    put, put_p = putter(dst, "b32", prog), putter(pred, "pred", prog)
    a = getter(ins.ops[1], "b32", prog)
    gb, gc = getter(ins.ops[2], "u32", prog), getter(ins.ops[3], "u32", prog)
    lane0 = np.arange(32, dtype=I64)
    memo = {}

    def source(b, c, lane):
        b, c = b.astype(I64) & 31, c.astype(I64)
        seg = (c >> 8) & 31
        clamp = c & 31
        top = (lane & seg) | (clamp & ~seg & 31)
        low = lane & seg
        if mode == "up":
            j = lane - b
            ok = j >= top
        elif mode == "down":
            j = lane + b
            ok = j <= top
        elif mode == "bfly":
            j = lane ^ b
            ok = j <= top
        else:
            j = low | (b & ~seg & 31)
            ok = j <= top
        return np.where(ok, j, lane), ok

    def run(m, sel):
        x = a(m, sel)
        b, c = gb(m, sel), gc(m, sel)
        if sel is None:
            n = m.N
            if b.shape[0] == 1 and c.shape[0] == 1:
                key = (int(b[0]), int(c[0]))
                if key not in memo:
                    memo[key] = source(b, c, lane0)
                j, ok = memo[key]
                x = np.broadcast_to(x, (n,)).reshape(-1, 32)
                put(m, sel, x[:, j].reshape(-1))
                if pred[0] != "_":
                    put_p(m, sel, np.tile(ok, n // 32))
                return
            tids = m.tids(None)
        else:
            tids = sel
        lane = (tids & 31).astype(I64)
        j, ok = source(b, c, lane)
        where = (tids & ~31) + j
        allx = np.zeros(m.N, U32)
        allx[tids] = x
        if sel is not None:
            active = np.zeros(m.N, bool)
            active[tids] = True
            bad = ~active[where]
            if bad.any():
                m.finding("shfl_inactive", ins, tids[bad], "shuffle reads a lane that does not take part")
        put(m, sel, allx[where])
        if pred[0] != "_":
            put_p(m, sel, np.broadcast_to(ok, tids.shape).copy())

    return run


def ballot(m, sel, p):
    """Per thread of sel: bit mask of the warp's active lanes with p."""
    tids = m.tids(sel)
    bits = np.zeros(m.N, np.bool_)
    bits[tids] = p
    words = np.packbits(bits.reshape(-1, 32), axis=1, bitorder="little").view(U32).reshape(-1)
    return words, tids >> 5


@op("vote")
def _vote(ins, prog):
    mode = next(m for m in ins.mods if m in ("all", "any", "uni", "ballot"))
    p = getter(ins.ops[1], "pred", prog)
    mask = getter(ins.ops[2], "u32", prog) if len(ins.ops) > 2 else None
    put = putter(ins.ops[0], "b32" if mode == "ballot" else "pred", prog)

    def run(m, sel):
        n = m.count(sel)
        v = np.broadcast_to(p(m, sel), (n,))
        words, warp = ballot(m, sel, v)
        act, _ = ballot(m, sel, np.ones(n, bool))
        mk = (mask(m, sel) if mask else np.array([2**32 - 1], U32)) & act[warp]
        got = words[warp] & mk
        if mode == "ballot":
            r = got
        elif mode == "all":
            r = got == mk
        elif mode == "any":
            r = got != 0
        else:
            r = (got == mk) | (got == 0)
        put(m, sel, r)

    return run


@op("match")
def _match(ins, prog):
    t = types_of(ins)[-1]
    every = "all" in ins.mods
    d = ins.ops[0]
    dst, pred = (d[1], d[2]) if d[0] == "|" else (d, ("_",))
    put, put_p = putter(dst, "b32", prog), putter(pred, "pred", prog)
    get, mask = getter(ins.ops[1], t, prog), getter(ins.ops[2], "u32", prog)

    def run(m, sel):
        tids = m.tids(sel)
        n = tids.size
        v = np.broadcast_to(get(m, sel), (n,))
        allv = np.zeros(m.N, v.dtype)
        allv[tids] = v
        act = np.zeros(m.N, bool)
        act[tids] = True
        warps = np.unique(tids >> 5)
        av, aa = allv.reshape(-1, 32)[warps], act.reshape(-1, 32)[warps]
        eq = (av[:, :, None] == av[:, None, :]) & aa[:, None, :]
        words = np.packbits(eq, axis=2, bitorder="little").view(U32).reshape(-1, 32)
        out = np.zeros((m.N // 32, 32), U32)
        out[warps] = words
        got = out.reshape(-1)[tids] & mask(m, sel)
        if every:
            full, warp = ballot(m, sel, np.ones(n, bool))
            mk = full[warp] & mask(m, sel)
            ok = got == mk
            # all lanes must agree
            put(m, sel, np.where(ok, mk, U32(0)))
            put_p(m, sel, ok)
        else:
            put(m, sel, got)

    return run


@op("redux")
def _redux(ins, prog):
    t = types_of(ins)[-1]
    name = next(m for m in ins.mods if m in ("add", "min", "max", "and", "or", "xor"))
    put, get = putter(ins.ops[0], t, prog), getter(ins.ops[1], t, prog)
    mask = getter(ins.ops[2], "u32", prog)
    dt = DTYPE[t]
    uf = {
        "add": np.add,
        "min": np.minimum,
        "max": np.maximum,
        "and": np.bitwise_and,
        "or": np.bitwise_or,
        "xor": np.bitwise_xor,
    }[name]
    if t == "f32":
        neutral = F32(np.inf if name == "min" else -np.inf)
        nan = "NaN" in ins.mods
        uf = (np.minimum if nan else np.fmin) if name == "min" else (np.maximum if nan else np.fmax)
    else:
        lo, hi = V.RANGE["u32" if t == "b32" else t]
        neutral = {"add": 0, "or": 0, "xor": 0, "and": -1 if t == "s32" else hi, "min": hi, "max": lo}[name]

    def run(m, sel):
        tids = m.tids(sel)
        a = np.full(m.N, neutral, dt)
        mk = np.broadcast_to(mask(m, sel), tids.shape)
        if (mk == mk[0]).all():
            inside = ((mk >> (tids & 31).astype(U32)) & U32(1)).astype(bool)
            a[tids[inside]] = np.broadcast_to(get(m, sel), tids.shape)[inside]
            red = uf.reduce(a.reshape(-1, 32), axis=1).astype(dt)
            put(m, sel, red[tids >> 5])
            return
        vals = np.broadcast_to(get(m, sel), tids.shape)
        out = np.zeros(tids.shape, dt)
        for k in np.unique(mk):
            grp = mk == k
            a[:] = neutral
            a[tids[grp]] = vals[grp]
            red = uf.reduce(a.reshape(-1, 32), axis=1).astype(dt)
            out[grp] = red[tids[grp] >> 5]
        put(m, sel, out)

    return run


@op("elect")
def _elect(ins, prog):
    d = ins.ops[0]
    dst, pred = (d[1], d[2]) if d[0] == "|" else (("_",), d)
    put, put_p = putter(dst, "b32", prog), putter(pred, "pred", prog)

    def run(m, sel):
        tids = m.tids(sel)
        warp = tids >> 5
        first = np.ones(tids.shape, bool)
        first[1:] = warp[1:] != warp[:-1]
        leader = np.zeros(m.N // 32, np.int32)
        leader[warp[first]] = tids[first] & 31
        put(m, sel, leader[warp].astype(U32))
        put_p(m, sel, first)

    return run


@op("membar", "fence")
def _fence(ins, prog):
    if "proxy" in ins.mods or "mbarrier_init" in ins.mods:
        return nothing(ins, prog)

    def run(m, sel):
        m.time += 1
        m.note_fence(sel, True)

    return run


@op("bar")
def _warp_barrier(ins, prog):
    def run(m, sel):
        m.time += 1
        tids = m.tids(sel)
        m.warp_time[tids >> 5] = m.time
        m.time += 1

    return run
