"""The fast path of an emulation: straight-line code by native.c, which the machine's C compiler makes once.

A program's instructions become an array of structures. Those that native.c does not know are STOPs: it returns at them,
and at accesses that are not clean, and the numpy code executes that instruction. Without a compiler, or with
PTXEMU_NATIVE=0, the numpy code executes everything.
"""

import ctypes
import fcntl
import hashlib
import os
import shutil
import subprocess
import tempfile

import numpy as np

from .errors import PTXError
from .memory import LOCAL_BASE, SHARED_BASE
from .parser import WIDTH
from .values import RAW

SOURCE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "native.c")
FLAGS = [
    "-O3",
    "-march=native",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fno-strict-aliasing",
    "-fwrapv",
    "-shared",
    "-fPIC",
]
P, I64, I32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
GLOBAL, SHARED, LOCAL, GENERIC = range(4)
STOP, LD, ST, LD_PARAM, SHFL, VOTE, SETP2, UNPACK, PACK, WARP_BARRIER, COPY, COPY_GROUP, NOTHING, LOP3 = range(14)
ELEMENTWISE = 32


def _fields(text, kind):
    return [(name, kind) for name in text.split()]


class RegionC(ctypes.Structure):
    _fields_ = [
        *_fields("id nbytes log base", I64),
        *_fields("data read_sectors written_sectors", P),
        ("bytes", I64 * 2),
        ("sectors", I64 * 2),
        *_fields("w_id w_time w_strong r_id r_time r_many r_far", P),
        ("shadowed", I64),
    ]


class MachineC(ctypes.Structure):
    _fields_ = [
        *_fields("N time last_sync cluster stats races nregions", I64),
        *_fields(
            "uni uval width place arena scratch index regions slot_of cta_of fence_time atom_time met_time bar_time "
            "warp_time cluster_time sm",
            P,
        ),
        *_fields("sm_size sm_stride sm_shadowed sm_log sm_copies", I64),
        *_fields("s_w_id s_w_time s_w_strong s_r_id s_r_time s_r_many s_group copy_committed copy_done lm", P),
        *_fields("lm_size lm_stride", I64),
        ("params", P),
        ("nparams", I64),
        ("widths", I64 * 8 * 2),
        ("waves", I64 * 2 * 2),
    ]


INS = np.dtype(
    [(n, np.int32) for n in ["op", "guard", "d", "a", "b", "c", "aux", "count", "elem", "space", "strong", "sign"]]
    + [("imm", np.int64)]
)


class _Entry(ctypes.Structure):
    _fields_ = [("name", ctypes.c_char_p), ("run", P), ("sources", ctypes.c_int8), ("widths", ctypes.c_int8 * 4)]


class Library:
    def __init__(self, path):
        lib = ctypes.CDLL(path)

        def size(name):
            return I64.in_dll(lib, name).value

        assert (size("machine_size"), size("region_size"), size("ins_size")) == (
            ctypes.sizeof(MachineC),
            ctypes.sizeof(RegionC),
            INS.itemsize,
        )
        self.run = lib.run
        self.run.restype, self.run.argtypes = I64, [P, P, P, I64, I64, P, I64]
        table = (_Entry * size("entry_count")).in_dll(lib, "entries")
        self.entries = {
            e.name.decode(): (i, e.sources, tuple(8 * w if w > 1 else 1 for w in e.widths)) for i, e in enumerate(table)
        }
        self.functions = {e.name.decode(): e.run for e in table}

    def apply(self, name, x):
        """An entry of one source to an array."""
        x = np.ascontiguousarray(x)
        out = np.empty_like(x)
        ctypes.CFUNCTYPE(None, P, P, P, P, I64)(self.functions[name])(
            out.ctypes.data, x.ctypes.data, None, None, x.size
        )
        return out


def _cache_dir():
    return os.environ.get("PTXEMU_CACHE") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "ptxemu"
    )


def _build():
    compiler = shutil.which(os.environ.get("CC") or "gcc") or shutil.which("g++") or shutil.which("cc")
    if compiler is None:
        return None
    with open(SOURCE, "rb") as f:
        text = f.read()
    try:
        with open("/proc/cpuinfo") as f:
            cpu = next((line for line in f if line.startswith(("flags", "Features"))), "")
    except OSError:
        cpu = ""
    key = hashlib.sha256(b"\0".join([text, " ".join(FLAGS).encode(), compiler.encode(), cpu.encode()])).hexdigest()[:20]
    for folder in (_cache_dir(), os.path.join(tempfile.gettempdir(), f"ptxemu-{os.getuid()}")):
        path = os.path.join(folder, f"native-{key}.so")
        if os.path.exists(path):
            return path
        try:
            os.makedirs(folder, mode=0o700, exist_ok=True)
            return path if _compile(compiler, path) else None
        except OSError:
            continue
    return None


def _compile(compiler, path):
    """Whether the library is there now. Others wait meanwhile, and what is not whole has another name."""
    with open(f"{path}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if os.path.exists(path):
            return True
        made = f"{path}.{os.getpid()}"
        command = [compiler, "-x", "c", SOURCE, *FLAGS, "-o", made, "-lm"]
        if subprocess.run(command, capture_output=True).returncode:
            return False
        os.replace(made, path)
        return True


_library = None


def library():
    """The compiled fast path, or None where there is none."""
    global _library
    if _library is None:
        path = None if os.environ.get("PTXEMU_NATIVE") == "0" else _build()
        _library = Library(path) if path else False
    return _library or None


class Unfit(Exception):
    """An instruction that is left to the numpy code."""


INT = {
    "b16": "u16",
    "u16": "u16",
    "s16": "s16",
    "b32": "u32",
    "u32": "u32",
    "s32": "s32",
    "b64": "u64",
    "u64": "u64",
    "s64": "s64",
}
DIRECTED = {"rz", "rm", "rp"}


class Code:
    """A program's instructions as native.c takes them."""

    def __init__(self, prog, lib):
        self.prog, self.lib = prog, lib
        self.reg_width = list(prog.reg_width)
        self.constants = {}
        self.initial = {}  # register of a constant -> its value
        self.lists = {}
        self.list = []
        self.kinds = {}  # (instruction, kinds of operands) -> recipe
        n = len(prog.code)
        rows = []
        stop = (STOP, -1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0)
        from .program import is_control

        for ins in prog.code:
            row = stop
            if ins is not None and not is_control(ins):
                prog.cur = ins
                try:
                    row = self.encode(ins)
                except (Unfit, KeyError, PTXError):
                    row = stop
                if ins.guard is not None:
                    row = (row[0], 2 * ins.guard[0] + ins.guard[1], *row[2:])
            rows.append(row)
        self.code = np.array(rows, INS) if n else np.zeros(1, INS)
        self.list = np.array(self.list or [0], np.int32)
        self.width = np.array([max(w // 8, 1) for w in self.reg_width], np.uint8)
        here = np.where(self.used(), self.width, 0)  # a module's other functions have registers too
        ends = np.cumsum(here, dtype=np.int64)
        self.place = ends - here  # aligned, for batches are of 32 threads and more
        self.total = int(ends[-1]) if len(ends) else 0
        self.uval = np.zeros(len(self.width), np.uint64)
        for k, v in self.initial.items():
            self.uval[k] = v
        self.code_at = self.code.ctypes.data
        self.list_at = self.list.ctypes.data

    def used(self):
        """Which registers occur in the program."""
        found = np.ones(len(self.reg_width), np.bool_)
        found[: len(self.prog.reg_width)] = False

        def visit(op):
            if op[0] == "r":
                found[op[1]] = True
            elif op[0] in ("v", "t"):
                for o in op[1]:
                    visit(o)
            elif op[0] in ("a", "n", "|", "tensor"):
                for o in op[1:]:
                    if isinstance(o, tuple):
                        visit(o)

        for ins in self.prog.code:
            if ins is not None:
                if ins.guard is not None:
                    found[ins.guard[0]] = True
                for o in ins.ops:
                    visit(o)
        for k in self.prog.special.values():
            found[k] = True
        return found

    # ---- operands ----
    def constant(self, op, type_):
        from .ops import constant

        key = (op[:2] if op[0] != "f" else op, type_) if op[0] != "s" else (self.prog.symbol(op[1]), type_)
        k = self.constants.get(key)
        if k is None:
            bits = WIDTH[type_]
            if op[0] == "i" and type_ in INT:
                v = op[1] & ((1 << bits) - 1)
            elif op[0] == "f" and op[2] == bits:
                v = op[1]
            else:
                v = int(constant(op, type_, self.prog).view(RAW[bits])[0])
            k = self.constants[key] = len(self.reg_width)
            self.reg_width.append(bits)
            self.initial[k] = v
        return k

    def value(self, bits, value):
        key = ("raw", bits, value)
        k = self.constants.get(key)
        if k is None:
            k = self.constants[key] = len(self.reg_width)
            self.reg_width.append(bits)
            self.initial[k] = value
        return k

    def source(self, op, type_):
        if op[0] == "r":
            if self.reg_width[op[1]] != WIDTH[type_]:
                raise Unfit
            return op[1]
        if op[0] in ("i", "f", "s"):
            return self.constant(op, type_)
        raise Unfit

    def dest(self, op, bits):
        if op[0] == "_":
            return -1
        if op[0] != "r" or self.reg_width[op[1]] != bits:
            raise Unfit
        return op[1]

    def further(self, *regs):
        at = self.lists.get(regs)
        if at is None:
            at = self.lists[regs] = len(self.list)
            self.list.extend(regs)
        return at

    def address(self, op):
        """(register or -1, offset)."""
        if op[0] != "a":
            raise Unfit
        base, off = op[1], op[2]
        if base[0] == "r":
            if self.reg_width[base[1]] not in (32, 64):
                raise Unfit
            return base[1], off
        value = (self.prog.symbol(base[1]) if base[0] == "s" else base[1]) + off
        value &= 2**64 - 1
        return -1, value - 2**64 if value >= 2**63 else value

    def row(self, op, d=-1, a=-1, b=-1, c=-1, aux=0, count=0, elem=0, space=0, strong=0, sign=0, imm=0):
        return (op, -1, d, a, b, c, aux, count, elem, space, int(strong), int(sign), imm)

    # ---- instructions ----
    def encode(self, ins):
        f = getattr(self, "_" + ins.op, None)
        if f is not None:
            return f(ins, ins.mods)
        return self.plain(ins, *self.recipe(ins))

    def recipe(self, ins):
        """(entry, types of the sources), by the instruction's name alone."""
        found = self.kinds.get(ins.full)
        if found is None:
            try:
                found = _recipe(ins)
            except Unfit:
                found = ()
            self.kinds[ins.full] = found
        if not found:
            raise Unfit
        return found

    def plain(self, ins, name, types):
        index, sources, widths = self.lib.entries[name]
        ops = ins.ops
        if len(ops) != sources + 1 or len(types) != sources:
            raise Unfit
        k = [self.source(o, t) for o, t in zip(ops[1:], types, strict=False)]
        d = self.dest(ops[0], widths[0])
        for reg, w in zip(k, widths[1:], strict=False):
            if self.reg_width[reg] != w:
                raise Unfit
        if d < 0:
            return self.row(NOTHING)
        k += [-1] * (3 - sources)
        return (ELEMENTWISE + index, -1, d, k[0], k[1], k[2], 0, 0, 0, 0, 0, 0, 0)

    def _setp(self, ins, mods):
        t = _type(ins)
        if t not in INT and t not in ("f32", "f64") or "ftz" in mods:
            raise Unfit
        cmp = mods[0]
        if t in INT:
            cmp = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}.get(cmp, cmp)
        name = f"{cmp}_{INT.get(t, t)}"
        boolean = next((i for i, m in enumerate(("and", "or", "xor")) if m in mods), None)
        d = ins.ops[0]
        if boolean is None and d[0] != "|":
            return self.plain(ins, name, (t, t))
        p, q = (d[1], d[2]) if d[0] == "|" else (d, ("_",))
        a, b = self.source(ins.ops[1], t), self.source(ins.ops[2], t)
        c, negated = -1, 0
        if boolean is not None:
            o = ins.ops[3]
            if o[0] == "n":
                o, negated = o[1], 1
            c = self.source(o, "pred")
        aux = self.further(self.lib.entries[name][0], self.dest(q, 1))
        return self.row(SETP2, self.dest(p, 1), a, b, c, aux, space=boolean or 0, sign=negated)

    def _mov(self, ins, mods):
        t = _type(ins)
        d, s = ins.ops
        if t in ("f16x2", "bf16x2"):
            t = "b32"
        if d[0] == "v":
            bits = WIDTH[t] // len(d[1])
            regs = [self.dest(x, bits) for x in d[1]]
            a = self.source(s, t)
            return self.row(UNPACK, a=a, aux=self.further(*regs), count=len(regs), elem=bits // 8)
        if s[0] == "v":
            bits = WIDTH[t] // len(s[1])
            regs = [self.source(x, f"b{bits}") for x in s[1]]
            return self.row(PACK, self.dest(d, WIDTH[t]), aux=self.further(*regs), count=len(regs), elem=bits // 8)
        if s[0] == "r" and self.prog.reg_name[s[1]].startswith(("%clock", "%globaltimer")):
            raise Unfit
        if t == "pred":
            return self.plain(ins, "mov_pred", ("pred",))
        kind = t if s[0] in ("f", "i") else f"b{WIDTH[t]}"
        return self.plain(ins, f"mov_u{WIDTH[t]}", (kind,))

    def _cvta(self, ins, mods):
        t = _type(ins)
        space = next(
            m.split("::")[0] for m in mods if m.split("::")[0] in ("global", "shared", "local", "const", "param")
        )
        base = {"shared": SHARED_BASE, "local": LOCAL_BASE}.get(space, 0)
        if WIDTH[t] != 64:
            raise Unfit
        a, d = self.source(ins.ops[1], t), self.dest(ins.ops[0], 64)
        entry = self.lib.entries["sub_u64" if "to" in mods else "add_u64"][0]
        return self.row(ELEMENTWISE + entry, d, a, self.value(64, base))

    def _createpolicy(self, ins, mods):
        entry = self.lib.entries["mov_u64"][0]
        return self.row(ELEMENTWISE + entry, self.dest(ins.ops[0], 64), self.value(64, 0))

    def _lop3(self, ins, mods):
        if "BOOL" in mods or ins.ops[0][0] == "|" or ins.ops[4][0] != "i":
            raise Unfit
        a, b, c = (self.source(o, "b32") for o in ins.ops[1:4])
        return self.row(LOP3, self.dest(ins.ops[0], 32), a, b, c, imm=ins.ops[4][1])

    def _ld(self, ins, mods):
        from .memops import STRONG, space_of, vector_count

        if any(m.startswith("b128") for m in mods):
            raise Unfit
        t = _type(ins)
        elem, space, count = WIDTH[t] // 8, space_of(ins), vector_count(ins)
        d = ins.ops[0]
        regs = []
        for o in d[1] if d[0] == "v" else [d]:
            if o[0] == "r" and self.reg_width[o[1]] >= 8 * elem and self.reg_width[o[1]] > 1:
                regs.append(o[1])
            elif o[0] == "_":
                regs.append(-1)
            else:
                raise Unfit
        signed = t[0] == "s"
        if space == "param":
            base, off = ins.ops[1][1], ins.ops[1][2]
            a = -1
            if base[0] == "s":
                where = self.prog.param(base[1])
                if where[0] != "kernel":
                    raise Unfit
                off += where[1]
            else:
                a = self.source(base, "u64")
            return self.row(LD_PARAM, a=a, aux=self.further(*regs), count=len(regs), elem=elem, sign=signed, imm=off)
        strong = bool(STRONG & set(mods))
        kind = {"global": GLOBAL, "const": GLOBAL, "shared": SHARED, "local": LOCAL, None: GENERIC}[space]
        if strong and kind == GENERIC or strong and space == "const":
            raise Unfit
        a, imm = self.address(ins.ops[1])
        return self.row(
            LD, a=a, aux=self.further(*regs), count=count, elem=elem, space=kind, strong=strong, sign=signed, imm=imm
        )

    _ldu = _ld

    def _st(self, ins, mods):
        from .memops import STRONG, space_of, vector_count

        if "async" in mods or "bulk" in mods or "b128" in mods:
            raise Unfit
        t = _type(ins)
        elem, space, count = WIDTH[t] // 8, space_of(ins), vector_count(ins)
        strong = bool(STRONG & set(mods))
        kind = {"global": GLOBAL, "shared": SHARED, "local": LOCAL, None: GENERIC}[space]
        if strong and kind in (GENERIC, GLOBAL):
            raise Unfit
        s = ins.ops[1]
        regs = []
        for o in s[1] if s[0] == "v" else [s]:
            if o[0] == "r":
                if self.reg_width[o[1]] < 8 * elem or self.reg_width[o[1]] == 1:
                    raise Unfit
                regs.append(o[1])
            elif o[0] in ("i", "f", "s"):
                regs.append(self.constant(o, t if o[0] in ("i", "f") else f"b{WIDTH[t]}"))
            else:
                raise Unfit
        a, imm = self.address(ins.ops[0])
        return self.row(ST, a=a, aux=self.further(*regs), count=count, elem=elem, space=kind, strong=strong, imm=imm)

    def _cp(self, ins, mods):
        if "bulk" in mods or "mbarrier" in mods:
            raise Unfit
        if "commit_group" in mods or "wait_group" in mods or "wait_all" in mods:
            keep = ins.ops[0][1] if ins.ops else 0
            return self.row(COPY_GROUP, elem="wait_group" not in mods, sign="commit_group" not in mods, imm=keep)
        rest = list(ins.ops[3:])
        if any(m.endswith("cache_hint") for m in mods) and rest:
            rest = rest[:-1]
        size = ins.ops[2][1]
        if rest and not (rest[0][0] == "i" and rest[0][1] == size) or size not in (4, 8, 16):
            raise Unfit
        (d, to), (a, imm) = self.address(ins.ops[0]), self.address(ins.ops[1])
        if not -(2**31) <= to < 2**31:
            raise Unfit
        return self.row(COPY, d, a, aux=to, elem=size, imm=imm)

    def _shfl(self, ins, mods):
        mode = next(i for i, m in enumerate(("up", "down", "bfly", "idx")) if m in mods)
        d = ins.ops[0]
        to, pred = (d[1], d[2]) if d[0] == "|" else (d, ("_",))
        a, b, c = self.source(ins.ops[1], "b32"), self.source(ins.ops[2], "u32"), self.source(ins.ops[3], "u32")
        return self.row(SHFL, self.dest(to, 32), a, b, c, aux=self.dest(pred, 1), space=mode)

    def _vote(self, ins, mods):
        mode = next(i for i, m in enumerate(("all", "any", "uni", "ballot")) if m in mods)
        o, negated = ins.ops[1], 0
        if o[0] == "n":
            o, negated = o[1], 1
        b = self.source(ins.ops[2], "u32") if len(ins.ops) > 2 else -1
        return self.row(
            VOTE, self.dest(ins.ops[0], 32 if mode == 3 else 1), self.source(o, "pred"), b, space=mode, sign=negated
        )

    def _bar(self, ins, mods):
        if "warp" not in mods:
            raise Unfit
        return self.row(WARP_BARRIER)


for _name in (
    "nanosleep",
    "griddepcontrol",
    "prefetch",
    "prefetchu",
    "applypriority",
    "discard",
    "pmevent",
    "setmaxnreg",
    "brkpt",
):
    setattr(Code, "_" + _name, lambda self, ins, mods: self.row(NOTHING))


def _type(ins):
    for m in reversed(ins.mods):
        if m in WIDTH:
            return m
    raise Unfit


def _flagged(name, mods, *known):
    flags = [m for m in ("ftz", "sat") if m in mods]
    if len(flags) > 1 or any(f not in known for f in flags):
        raise Unfit
    return name + (f"_{flags[0]}" if flags else "")


def _recipe(ins):
    op, mods = ins.op, ins.mods
    if op == "cvt":
        return _conversion(mods)
    t = _type(ins)
    if t in ("s16x2", "u16x2"):
        raise Unfit
    if DIRECTED & set(mods) or "cc" in mods or "relu" in mods or "xorsign" in mods:
        raise Unfit
    if op in ("add", "sub", "mul", "fma", "mad", "div") and t in ("f32", "f64"):
        name = "fma" if op == "mad" else op
        types = (t,) * (3 if name == "fma" else 2)
        if t == "f64":
            if "sat" in mods:
                raise Unfit
            return f"{name}_f64", types
        return _flagged(f"{name}_f32", mods, "ftz", *(["sat"] if name in ("add", "mul", "fma") else [])), types
    if op in ("ex2", "lg2", "rcp", "sqrt", "rsqrt", "tanh"):
        if t == "f64" and op in ("rcp", "sqrt"):
            return f"{op}_f64", (t,)
        if t != "f32":
            raise Unfit
        return _flagged(f"{op}_f32", mods, *(["ftz"] if op != "tanh" else [])), (t,)
    if op in ("neg", "abs"):
        if t in ("bf16", "bf16x2"):
            return f"{op}_{t}", ("b16" if t == "bf16" else "b32",)
        if "ftz" in mods or op == "abs" and t not in ("f32", "f64", "s32", "s64"):
            raise Unfit
        return f"{op}_{INT.get(t, t)}", (t,)
    if op in ("min", "max"):
        if t in ("f32", "f64"):
            if "ftz" in mods or t == "f64" and "NaN" in mods:
                raise Unfit
            return f"{op}_{t}" + ("_NaN" if "NaN" in mods else ""), (t, t)
        if t in ("bf16x2", "f16x2"):
            if "NaN" in mods or "ftz" in mods:
                raise Unfit
            return f"{op}_{t}", ("b32", "b32")
        return f"{op}_{INT[t]}", (t, t)
    if "sat" in mods or "ftz" in mods:
        raise Unfit
    if op in ("add", "sub"):
        return f"{op}_{INT[t]}", (t, t)
    if op in ("mul", "mad"):
        n = INT[t]
        wide = {"16": "32", "32": "64"}.get(n[1:])
        if "wide" in mods:
            w = t[0] + wide
            return (f"wide_{n}", (t, t)) if op == "mul" else (f"madwide_{n}", (t, t, w))
        if "hi" in mods:
            if op == "mad":
                raise Unfit
            return f"mulhi_{n}", (t, t)
        return (f"mul_{n}", (t, t)) if op == "mul" else (f"mad_{n}", (t, t, t))
    if op in ("div", "rem"):
        return f"{op}_{INT[t]}", (t, t)
    if op in ("and", "or", "xor"):
        return (f"{op}_pred" if t == "pred" else f"{op}_u{WIDTH[t]}"), (t, t)
    if op == "not":
        return ("not_pred" if t == "pred" else f"not_u{WIDTH[t]}"), (t,)
    if op in ("shl", "shr"):
        return (f"shl_u{WIDTH[t]}" if op == "shl" else f"shr_{INT[t]}"), (t, "u32")
    if op == "selp":
        return f"sel_u{WIDTH[t]}", (t, t, "pred")
    if op == "prmt":
        if any(m in ("f4e", "b4e", "rc8", "ecl", "ecr", "rc16") for m in mods):
            raise Unfit
        return "prmt", ("b32", "b32", "b32")
    if op == "shf":
        return f"shf_{'l' if 'l' in mods else 'r'}_{'wrap' if 'wrap' in mods else 'clamp'}", ("u32", "u32", "u32")
    if op == "bfe" and t == "u32":
        return "bfe_u32", ("u32", "u32", "u32")
    if op in ("popc", "clz") and t in ("b32", "b64"):
        return f"{op}_u{WIDTH[t]}", (t,)
    raise Unfit


def _conversion(mods):
    if {"relu", "ftz"} & set(mods) or any(m in ("tf32", "rna") for m in mods):
        raise Unfit
    ts = [m for m in mods if m in WIDTH]
    if len(ts) != 2 or any(m.startswith(("e4m3", "e5m2", "e2m1", "e2m3", "e3m2", "ue8m0")) for m in mods):
        raise Unfit
    d, s = ts
    mode = next((m for m in mods if m in ("rn", "rz", "rm", "rp")), None)
    whole = next((m for m in mods if m in ("rni", "rzi", "rmi", "rpi")), None)
    sat = "sat" in mods
    ints = INT
    if (d, s) == ("f32", "f32"):
        if sat and not whole:
            return "cvt_f32_f32_sat", (s,)
        if sat:
            raise Unfit
        return (f"cvt_f32_f32_{whole}" if whole else "mov_u32"), ("b32",) if not whole else (s,)
    if sat:
        raise Unfit
    if d in ("bf16x2", "f16x2") and s == "f32" and mode == "rn":
        return f"cvt_{d}_f32", (s, s)
    if (d, s) in (("bf16", "f32"), ("f16", "f32")) and not whole:
        if mode == "rn" or d == "bf16" and mode == "rz":
            return f"cvt_{d}_f32" + ("_rz" if mode == "rz" else ""), (s,)
        raise Unfit
    if d == "f32" and s in ("bf16", "f16") and not whole:
        return f"cvt_f32_{s}", ("b16",)
    if (d, s) == ("f64", "f32"):
        return "cvt_f64_f32", (s,)
    if (d, s) == ("f32", "f64") and mode == "rn":
        return "cvt_f32_f64", (s,)
    if (d, s) == ("f64", "f64") and whole in ("rni", "rzi", "rmi"):
        return f"cvt_f64_f64_{whole}", (s,)
    if d in ("f32", "f64") and s in ints and mode in (None, "rn"):
        return f"to_{d}_{ints[s]}", (s,)
    if d in ints and s in ("f32", "f64"):
        if s == "f64" and (whole or "rzi") not in ("rzi", "rni"):
            raise Unfit
        return f"cvt_{ints[d]}_{s}_{whole or 'rzi'}", (s,)
    if d[0] in "bus" and s[0] in "bus" and d != "bf16" and s != "bf16":
        return "int", (d, s)
    raise Unfit


def _int_conversion(self, ins, d, s):
    """Between integers, whose registers may be wider than they are."""
    to, a = ins.ops
    if to[0] != "r":
        raise Unfit
    a = self.constant(a, s) if a[0] != "r" else a[1]
    D, S, wd, ws = self.reg_width[to[1]], self.reg_width[a], WIDTH[d], WIDTH[s]
    if wd > D or ws > S or D == 1 or S == 1 or S == 8 or D == 8:
        raise Unfit
    if wd < D:
        if wd > ws:
            raise Unfit
        through = d
    else:
        through = d if wd <= ws else s
    through = ("s" if through[0] == "s" else "u") + through[1:]
    if through == "s64":
        through = "u64"
    return self.row(ELEMENTWISE + self.lib.entries[f"int_{D}_{S}_{through}"][0], to[1], a)


def _cvt(self, ins, mods):
    name, types = self.recipe(ins)
    if name == "int":
        return _int_conversion(self, ins, *types)
    return self.plain(ins, name, types)


Code._cvt = _cvt


class Registers:
    """The registers of a batch as the numpy code sees them: arrays of one element per thread, or of one alone."""

    def __init__(self, code, N, arena):
        self.N = N
        self.uni = np.ones(len(code.width), np.uint8)
        self.uval = code.uval.copy()
        self.arena = arena
        self.place, self.width = code.place, code.reg_width

    def __getitem__(self, k):
        raw = RAW[self.width[k]]
        if self.uni[k]:
            return self.uval[k : k + 1].view(raw)[:1].copy()
        return self._array(k, raw).copy()

    def _array(self, k, raw):
        at = int(self.place[k]) * self.N
        return self.arena[at : at + self.N * np.dtype(raw).itemsize].view(raw)

    def __setitem__(self, k, v):
        raw = RAW[self.width[k]]
        if v.shape[0] == 1:
            self.uval[k] = int(v.view(raw)[0])
            self.uni[k] = 1
        else:
            self._array(k, raw)[:] = v
            self.uni[k] = 0


_arena = np.empty(0, np.uint8)
_scratch = np.empty(0, np.uint8)


def registers(code, N):
    """Registers for a batch, in memory that the next batch takes over."""
    global _arena
    need = code.total * N + 64
    if _arena.size < need:
        _arena = np.empty(need, np.uint8)
    return Registers(code, N, _arena)


def scratch(N):
    global _scratch
    if _scratch.size < 17 * 8 * N:
        _scratch = np.empty(17 * 8 * N, np.uint8)
    return _scratch
