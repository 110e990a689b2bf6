"""A kernel made ready for execution: code layout, labels, variables and basic blocks."""

import numpy as np

from .errors import PTXError
from .memory import LOCAL_BASE, MODULE_ID, SHARED_BASE, WINDOW, Region
from .ops import compile_ins, getter
from .parser import WIDTH
from .values import DTYPE, RAW

PARAM_ID = 16
PARAM_BASE = (PARAM_ID << WINDOW) + (1 << (WINDOW - 1))
SYNC = {"shfl", "vote", "match", "redux", "elect", "mma", "ldmatrix", "stmatrix", "movmatrix"}
JUMPS = {"bra", "brx", "ret", "exit", "trap", "call"}


def is_warp_barrier(ins):
    return ins.op == "bar" and "warp" in ins.mods


def is_control(ins):
    return ins.op in JUMPS or (ins.op in ("bar", "barrier") and "warp" not in ins.mods)


def is_sync(ins):
    return ins.op in SYNC and ("sync" in ins.mods) or is_warp_barrier(ins)


class Block:
    """Straight-line code; `control` is the position of the closing control instruction or -1."""

    __slots__ = ("start", "end", "control", "prepared", "ctl", "sync", "mask", "count", "guard", "chain", "opcodes")

    def __init__(self, start):
        self.start = start
        self.end = start
        self.control = -1
        self.prepared = False
        self.ctl = None
        self.sync = False
        self.mask = None
        self.guard = None
        self.count = 0
        self.chain = None
        self.opcodes = None


def symbols(opnd):
    if opnd[0] == "s":
        yield opnd[1]
    elif opnd[0] in ("v", "t"):
        for o in opnd[1]:
            yield from symbols(o)
    elif opnd[0] in ("a", "n", "|"):
        for o in opnd[1:]:
            if isinstance(o, tuple):
                yield from symbols(o)


class Program:
    def __init__(self, mod, entry):
        self.mod, self.entry = mod, entry
        self.reg_width, self.reg_name = mod.reg_width, mod.reg_name
        self.param_base = PARAM_BASE
        self.cur = None
        self.code, self.base = [], {}
        self.layout()
        self.special = dict(mod.special)  # other functions, read later, may add theirs
        self.variables()
        self.form_blocks()

    # ---- code ----
    def layout(self):
        order, active = [], []

        def visit(fn):
            if fn.name in active:
                raise PTXError(f"recursive call of {fn.name} is not supported")
            if fn in order:
                return
            active.append(fn.name)
            for ins in fn.body:
                if ins.op == "call":
                    callee = self.mod.functions.get(self.callee(ins))
                    if callee is not None and callee.body is not None:
                        visit(callee)
            active.pop()
            order.append(fn)

        visit(self.entry)
        for fn in order:
            self.base[fn.name] = len(self.code)
            self.code.extend(fn.body)
            self.code.append(None)  # falling off the end is a return
        self.start = self.base[self.entry.name]

    @staticmethod
    def callee(ins):
        for o in ins.ops:
            if o[0] == "s":
                return o[1]
        raise PTXError(f"PTX line {ins.line}: indirect calls are not supported")

    def label(self, ins, name):
        for sc in reversed(ins.scopes):
            if name in sc.labels:
                return self.base[ins.fn.name] + sc.labels[name]
        raise PTXError(f"PTX line {ins.line}: unknown label {name}")

    def targets(self, ins):
        """Positions that an indexed branch may go to, or None where they are not given."""
        for sc in reversed(ins.scopes):
            if ins.ops[1][1] in sc.names:
                return [self.label(ins, t) for t in sc.names[ins.ops[1][1]][1]]
        return None

    # ---- variables ----
    def variables(self):
        used = set()
        for ins in self.code:
            if ins is not None:
                for o in ins.ops:
                    used.update(symbols(o))
        offset, local = 0, 0
        self.local_vars, self.shared_vars = {}, {}

        def place(pos, v):
            return (pos + v.align - 1) // v.align * v.align

        dynamic = []
        for fname in self.base:
            for key, v in self.mod.functions[fname].vars.items():
                if v.space == "shared":
                    if v.count == 0:
                        dynamic.append((key, v))
                        continue
                    offset = place(offset, v)
                    self.shared_vars[key] = offset
                    offset += v.size
                elif v.space == "local":
                    local = place(local, v)
                    self.local_vars[key] = local
                    local += v.size
        for name, v in self.mod.vars.items():
            if v.space == "shared" and name in used:
                if v.count == 0:
                    dynamic.append((name, v))
                else:
                    offset = place(offset, v)
                    self.shared_vars[name] = offset
                    offset += v.size
        self.static_shared = offset
        for _, v in dynamic:
            offset = max(offset, place(self.static_shared, v))
        for key, _ in dynamic:
            self.shared_vars[key] = offset
        self.dynamic_offset = offset
        self.local_size = local
        self.global_regions()

    def global_regions(self):
        """Module variables live as long as the module, like on a device."""
        if hasattr(self.mod, "regions"):
            return
        self.mod.regions = {}
        for i, (name, v) in enumerate(self.mod.vars.items()):
            if v.space in ("global", "const"):
                data = np.zeros(max(v.size, 1), np.uint8)
                self.mod.regions[name] = Region(MODULE_ID + i, name, data)
        for name, r in self.mod.regions.items():
            v = self.mod.vars[name]
            if not v.init:
                continue
            raw = RAW[WIDTH[v.type]]
            view = r.data[: len(v.init) * v.elem].view(raw)
            for j, x in enumerate(v.init):
                if isinstance(x, tuple) and x[0] == "sym":
                    target = self.mod.regions.get(x[1])
                    x = (target.base if target else 0) + x[2]
                elif isinstance(x, tuple):
                    x = x[1]
                elif v.type in ("f32", "f64"):
                    view[j : j + 1] = np.array([x], DTYPE[v.type]).view(raw)
                    continue
                view[j] = int(x) & ((1 << WIDTH[v.type]) - 1)

    def lookup(self, name):
        """(space, key or Var) of a variable seen from the current instruction."""
        for sc in reversed(self.cur.scopes):
            key = sc.names.get(name)
            if key is not None:
                return key
        return name

    def symbol(self, name):
        key = self.lookup(name)
        if key in self.shared_vars:
            return self.shared_vars[key]
        if key in self.local_vars:
            return self.local_vars[key]
        r = self.mod.regions.get(name)
        if r is not None:
            return r.base
        fn = self.cur.fn
        if fn.entry:
            for p in fn.params:
                if p.name == name:
                    return PARAM_BASE + p.offset
        raise PTXError(f"PTX line {self.cur.line}: unknown symbol {name}")

    def window(self, space):
        return {"shared": SHARED_BASE, "local": LOCAL_BASE}.get(space, 0)

    def param(self, name):
        key = self.lookup(name)
        fn = self.cur.fn
        if key in fn.vars:
            return ("call", f"{fn.name}:{key}", fn.vars[key])
        for p in fn.params + fn.rets:
            if p.name == name:
                return ("kernel", p.offset, p) if fn.entry else ("call", f"{fn.name}:{name}", p)
        raise PTXError(f"PTX line {self.cur.line}: unknown parameter {name}")

    def param_sizes(self):
        out = {}
        for fname in self.base:
            fn = self.mod.functions[fname]
            for key, v in fn.vars.items():
                if v.space == "param":
                    out[f"{fname}:{key}"] = v.size
            if not fn.entry:
                for p in fn.params + fn.rets:
                    out[f"{fname}:{p.name}"] = p.size
        return out

    # ---- basic blocks ----
    def form_blocks(self):
        leaders = {self.start}
        for pc, ins in enumerate(self.code):
            if ins is None:
                leaders.add(pc)
                leaders.add(pc + 1)
                continue
            if is_control(ins):
                leaders.add(pc + 1)
            elif is_sync(ins):
                leaders.add(pc)
                if ins.guard:
                    leaders.add(pc + 1)
        leaders.update(self.base.values())
        for ins in self.code:
            if ins is not None and ins.op == "bra":
                leaders.add(self.label(ins, ins.ops[0][1]))
            elif ins is not None and ins.op == "brx":
                leaders.update(self.targets(ins) or ())
        n = len(self.code)
        self.blocks = [None] * (n + 1)
        marks = sorted(x for x in leaders if x < n)
        for a, b in zip(marks, marks[1:] + [n], strict=False):
            blk = self.blocks[a] = Block(a)
            end = b
            for pc in range(a, b):
                ins = self.code[pc]
                if ins is None or is_control(ins):
                    blk.control = pc
                    end = pc
                    break
            blk.end = end
            first = self.code[a]
            if first is not None and is_sync(first):
                blk.sync = True
        self.all_blocks = [b for b in self.blocks if b is not None]
        self.closures = [None] * n

    def closure(self, pc):
        """The instruction as a function of the machine and the threads (compiled at its first execution)."""
        fn = self.closures[pc]
        if fn is None:
            ins = self.cur = self.code[pc]
            fn = self.closures[pc] = compile_ins(ins, self)
        return fn

    def chain(self, blk, control_factory):
        """The blocks from this one to the next control instruction, which all threads together go through as one."""
        if blk.chain is None:
            found = [blk]
            while found[-1].control < 0:
                b = self.blocks[found[-1].end]
                if b is None:
                    break
                if not b.prepared:
                    self.prepare(b, control_factory)
                if b.guard:
                    break
                found.append(b)
            blk.chain = found
        return blk.chain

    def opcodes(self, blk):
        """{instruction: how often it stands in the block}."""
        if blk.opcodes is None:
            last = blk.control + 1 if blk.control >= 0 else blk.end
            found = {}
            for ins in self.code[blk.start : last]:
                if ins is not None:
                    found[ins.full] = found.get(ins.full, 0) + 1
            blk.opcodes = found
        return blk.opcodes

    def prepare(self, blk, control_factory):
        """Make a block ready (done at its first execution)."""
        if blk.sync:
            ins = self.cur = self.code[blk.start]
            blk.guard = ins.guard
            mop = {"shfl": -1, "vote": 2, "match": 2, "redux": 2, "bar": 0, "elect": 1}.get(ins.op)
            if mop is not None and (mop < len(ins.ops)):
                blk.mask = getter(ins.ops[mop], "u32", self)
        if blk.control >= 0:
            ins = self.cur = self.code[blk.control]
            blk.ctl = control_factory(ins, blk.control)
        blk.prepared = True
