"""PTX text -> Module.

A Module holds functions (entries and device functions), module-level
variables and the table of source files.  Registers of all functions share
one index space; special registers (%tid.x ...) are allocated in it as well.

Operands are small tuples:
    ('r', index)            register
    ('i', value)            integer immediate
    ('f', bits, 32 or 64)   float immediate given as bits
    ('v', [operands])       {a, b, ...}
    ('a', base, offset)     [base + offset]; base is 'r', 's' or 'i'
    ('s', name)             symbol (variable, parameter, function or label)
    ('n', operand)          !predicate
    ('|', a, b)             a|b destination pair
    ('t', [operands])       (a, b, ...) of a call
    ('_',)                  sink
"""

import re
from functools import lru_cache, partial

from .errors import PTXError

TOKEN = re.compile(
    r"""
    (?P<loc>\.loc[ \t][^\n]*)
  | (?P<file>\.file[ \t][^\n]*)
  | (?P<str>"(?:[^"\\]|\\.)*")
  | (?P<flt>0[fF][0-9a-fA-F]{8}\b|0[dD][0-9a-fA-F]{16}\b)
  | (?P<num>0[xX][0-9a-fA-F]+U?|\d+\.\d+(?:[eE][-+]?\d+)?|\d+U?)
  | (?P<id>[A-Za-z_$%.][\w$.]*(?:::[\w$.]+)*)
  | (?P<p>[{}()\[\],;:=|@!+\-<>*/&~^])
""",
    re.X,
)
COMMENT = re.compile(r"/\*.*?\*/|//[^\n]*", re.S)
SECTION = re.compile(r"^[ \t]*\.section\b[^{]*\{[^}]*\}", re.M)  # debugging information
BODY = re.compile(r"^([{}])[ \t]*$", re.M)  # where a function's begins and ends
PLAIN = re.compile(r"\s*(?:@(!?)\s*([\w$%.]+)\s+)?([a-z][\w.:]*)(?:\s+([^;]*?))?\s*;\s*$")  # a line of one instruction
LABEL = re.compile(r"\s*([A-Za-z_$%.][\w$.]*)\s*:\s*$")
OPERAND = re.compile(r"\{[^}]*\}|\[[^\]]*\]|\([^)]*\)|[^,\s][^,]*")
SIMPLE = re.compile(r"(?:(-?(?:0|[1-9]\d*))|0[fF]([0-9a-fA-F]{8})|%\w+(?:\.[xyz])?|\$\w+)$")
AT = re.compile(r"\[\s*(%[\w$.]+)\s*(?:\+\s*(-?\d+)\s*)?\]$")

WIDTH = {
    "pred": 1,
    "b8": 8,
    "u8": 8,
    "s8": 8,
    "b16": 16,
    "u16": 16,
    "s16": 16,
    "f16": 16,
    "bf16": 16,
    "b32": 32,
    "u32": 32,
    "s32": 32,
    "f32": 32,
    "f16x2": 32,
    "bf16x2": 32,
    "s16x2": 32,
    "u16x2": 32,
    "b64": 64,
    "u64": 64,
    "s64": 64,
    "f64": 64,
    "b128": 128,
}


class Var:
    """A variable or parameter in some state space."""

    def __init__(self, space, name, type_, align, count, init=None, extern=False):
        self.space, self.name, self.type = space, name, type_
        self.elem = max(1, WIDTH[type_] // 8)
        self.align = align or self.elem
        self.count = count  # None: scalar, 0: unsized array
        self.size = self.elem * (1 if count is None else count)
        self.init = init
        self.extern = extern
        self.offset = 0


class Ins:
    """One instruction."""

    __slots__ = ("op", "mods", "full", "guard", "ops", "line", "loc", "pc", "scopes", "fn")

    def __init__(self, full, guard, ops, line, loc, scopes):
        parts = full.split(".")
        self.full, self.op, self.mods = full, parts[0], parts[1:]
        self.guard, self.ops, self.line, self.loc, self.scopes = guard, ops, line, loc, scopes
        self.pc = -1
        self.fn = None


class Function:
    def __init__(self, name, entry):
        self.name, self.entry = name, entry
        self.params, self.rets = [], []
        self._body = None
        self.unread = None  # what makes the body when it is first wanted
        self.labels = {}  # unique label key -> index into body
        self.vars = {}  # unique name -> Var (shared, local, param of calls)
        self.directives = {}

    @property
    def body(self):
        """List of Ins, or None where the function is only declared."""
        if self.unread is not None:
            read, self.unread = self.unread, None
            read(self)
        return self._body

    @body.setter
    def body(self, value):
        self._body = value


class Scope:
    def __init__(self, number):
        self.number = number
        self.regs = {}
        self.families = {}
        self.names = {}
        self.labels = {}
        self.known = {}  # operands by their text


class Module:
    def __init__(self):
        self.functions = {}
        self.vars = {}
        self.files = {}
        self.reg_width = []  # index -> bits (1 for predicates)
        self.reg_name = []
        self.special = {}  # '%tid.x' -> index
        self.target = ""

    def entries(self):
        return [f for f in self.functions.values() if f.entry]

    def find_entry(self, name):
        """Entry by exact name, by unmangled name or by unique prefix of either."""
        names = [f.name for f in self.entries()]
        if name in names:
            return self.functions[name]
        plain = {n: demangle(n) for n in names}
        want = name.replace(" ", "")
        for test in (
            lambda d: d == want,
            lambda d: d.split("<")[0] == want,
            lambda d: d.startswith(want),
            lambda d: d.split("<")[0].split("::")[-1] == want,
        ):
            hit = [n for n, d in plain.items() if test(d)]
            if len(hit) == 1:
                return self.functions[hit[0]]
            if len(hit) > 1:
                raise PTXError(f"kernel name {name!r} is ambiguous: {sorted(plain[h] for h in hit)}")
        hit = [n for n in names if n.startswith(name)]
        if len(hit) == 1:
            return self.functions[hit[0]]
        raise PTXError(f"no kernel {name!r}; present: {sorted(plain.values())}")


_SIMPLE = {
    "f": "float",
    "d": "double",
    "i": "int",
    "j": "unsigned",
    "l": "long",
    "m": "unsignedlong",
    "x": "longlong",
    "y": "unsignedlonglong",
    "s": "short",
    "t": "unsignedshort",
    "c": "char",
    "h": "unsignedchar",
    "a": "signedchar",
    "b": "bool",
    "v": "void",
}


def demangle(name):
    """Qualified name with template arguments of an Itanium-mangled function, without blanks.

    Covers nested names and simple template arguments (types, integers, bools);
    for anything else the mangled name itself is returned.
    """
    if not name.startswith("_Z"):
        return name
    s = name
    pos = 2

    def ident():
        nonlocal pos
        m = re.match(r"\d+", s[pos:])
        if not m:
            raise ValueError
        n = int(m.group())
        pos += m.end()
        word = s[pos : pos + n]
        pos += n
        return "(anonymous)" if word.startswith("_GLOBAL__N_") or word.startswith("_INTERNAL") else word

    def qualified():
        nonlocal pos
        if s[pos] == "N":
            pos += 1
            while s[pos] in "KVr":
                pos += 1
            out = []
            while s[pos] != "E":
                if s[pos] == "I":
                    out[-1] += args()
                else:
                    out.append(ident())
            pos += 1
            return "::".join(o for o in out if o != "(anonymous)")
        if s[pos] == "L":
            pos += 1
        out = ident()
        if pos < len(s) and s[pos] == "I":
            out += args()
        return out

    def type_():
        nonlocal pos
        c = s[pos]
        if c in "PRK":
            pos += 1
            inner = type_()
            return {"P": inner + "*", "R": inner + "&", "K": "const" + inner}[c]
        if c in _SIMPLE:
            pos += 1
            return _SIMPLE[c]
        if s.startswith("DF16b", pos):
            pos += 5
            return "__bf16"
        return qualified()

    def args():
        nonlocal pos
        pos += 1
        out = []
        while s[pos] != "E":
            if s[pos] == "L":
                pos += 1
                kind = s[pos]
                pos += 1 if kind in _SIMPLE else 0
                if kind not in _SIMPLE:
                    type_()
                end = s.index("E", pos)
                val = s[pos:end].replace("n", "-")
                pos = end + 1
                out.append({"0": "false", "1": "true"}[val] if kind == "b" else val)
            elif s[pos] == "J":
                out.append(args()[1:-1])
            else:
                out.append(type_())
        pos += 1
        return "<" + ",".join(out) + ">"

    try:
        return qualified()
    except (ValueError, IndexError, KeyError):
        return name


class Parser:
    def __init__(self, text):
        self.mod = Module()

        def blank(m):
            return re.sub(r"[^\n]", " ", m.group())

        # .file lines hold quoted paths that may contain '//'
        text = COMMENT.sub(blank, text) if ".file" not in text else self._strip(text, blank)

        def lines(m):
            return "\n" * m.group().count("\n")

        text = SECTION.sub(lines, text)
        self.bodies_left = iter(())
        self.loc = None
        self.scope_count = 0
        self.tokenize(self.outside(text), 1)

    def outside(self, text):
        """The text without the functions' bodies: each becomes a pair of braces and is read when it is wanted."""
        out, bodies, at, line = [], [], 0, 1
        begin = None
        for m in BODY.finditer(text):
            if begin is None and m.group(1) == "{":
                begin = m
            elif begin is not None and m.group(1) == "}":
                inside = text[begin.end() : m.start()]
                if inside.count("{") != inside.count("}"):  # a brace of its own
                    continue
                line += text.count("\n", at, begin.end())
                out += [text[at : begin.end()], "\n" * inside.count("\n")]
                bodies.append((inside, line))
                line += inside.count("\n")
                at, begin = m.start(), None
        self.bodies_left = iter(bodies)
        self.bodies = bodies
        return "".join(out) + text[at:]

    def tokenize(self, text, line):
        """Makes the tokens of a text that begins in a line the present ones."""
        self.tok, self.kind, self.lines = [], [], []
        for number, part in enumerate(text.split("\n"), line):
            for m in TOKEN.finditer(part):
                self.tok.append(m.group())
                self.kind.append(m.lastgroup)
                self.lines.append(number)
        self.i = 0

    @staticmethod
    def _strip(text, blank):
        out = []
        text = re.sub(r"/\*.*?\*/", blank, text, flags=re.S)
        for line in text.split("\n"):
            if line.lstrip().startswith(".file"):
                out.append(line)
            else:
                k = line.find("//")
                out.append(line if k < 0 else line[:k])
        return "\n".join(out)

    # ---- token helpers ----
    def peek(self, k=0):
        j = self.i + k
        return self.tok[j] if j < len(self.tok) else None

    def next(self):
        t = self.tok[self.i]
        self.i += 1
        return t

    def accept(self, t):
        if self.peek() == t:
            self.i += 1
            return True
        return False

    def expect(self, t):
        got = self.next() if self.i < len(self.tok) else "end of text"
        if got != t:
            raise PTXError(f"PTX line {self.lines[min(self.i, len(self.lines)) - 1]}: expected {t!r}, got {got!r}")

    def skip_to(self, t):
        while self.next() != t:
            pass

    # ---- module level ----
    def parse(self):
        while self.i < len(self.tok):
            t = self.peek()
            if self.kind[self.i] == "file":
                m = re.match(r'\.file\s+(\d+)\s+"([^"]*)"', t)
                if m:
                    self.mod.files[int(m.group(1))] = m.group(2)
                self.i += 1
            elif self.kind[self.i] == "loc":
                self.i += 1
            elif t == ".version" or t == ".address_size":
                self.i += 2
            elif t == ".target":
                self.i += 1
                self.mod.target = self.next()
                while self.accept(","):
                    self.next()
            elif t == ".section":
                self.i += 1
                self.skip_to("{")
                self.skip_to("}")
            elif t == ".pragma":
                self.skip_to(";")
            elif t in (".visible", ".extern", ".weak", ".common"):
                self.i += 1
                self.declaration(t == ".extern")
            else:
                self.declaration(False)
        return self.mod

    def declaration(self, extern):
        t = self.next()
        if t == ".entry":
            self.function(True)
        elif t == ".func":
            self.function(False)
        elif t in (".global", ".const", ".shared"):
            for v in self.variable(t[1:], extern):
                self.mod.vars[v.name] = v
        elif t == ".alias":
            self.skip_to(";")
        else:
            raise PTXError(f"PTX line {self.lines[self.i - 1]}: unexpected {t!r}")

    def number(self):
        neg = self.accept("-")
        t = self.next()
        if re.match(r"0[fFdD]", t):
            v = ("bits", int(t[2:], 16), len(t) == 18)
            return v
        v = float(t) if "." in t else int(t.rstrip("U"), 0)
        return -v if neg else v

    def variable(self, space, extern=False):
        align, type_ = None, None
        out = []
        while True:
            t = self.next()
            if t == ".align":
                align = int(self.next())
            elif t in (".attribute", ".ptr"):
                if self.accept("("):
                    self.skip_to(")")
            elif t in (".v2", ".v4"):
                raise PTXError("vector variables are not supported")
            elif t[1:] in WIDTH:
                type_ = t[1:]
            elif t.startswith("."):
                continue
            else:
                break
        while True:
            name = t
            count = None
            while self.accept("["):
                if self.accept("]"):
                    count = 0
                    continue
                n = int(self.next().rstrip("U"), 0)
                count = n if count is None else count * n
                self.expect("]")
            init = self.initializer() if self.accept("=") else None
            if init is not None and count == 0:
                count = len(init)
            out.append(Var(space, name, type_, align, count, init, extern))
            if self.accept(","):
                t = self.next()
                continue
            break
        self.accept(";")
        return out

    def initializer(self):
        if self.accept("{"):
            out = []
            while not self.accept("}"):
                item = self.initializer()
                out.extend(item if isinstance(item, list) else [item])
                self.accept(",")
            return out
        if self.kind[self.i] == "id":
            name = self.next()
            if self.peek() == "(":
                self.next()
                name = self.next()
                self.expect(")")
            off = 0
            if self.accept("+"):
                off = self.number()
            return [("sym", name, off)]
        return [self.number()]

    def function(self, entry):
        rets = []
        if self.peek() == "(":
            rets = self.param_list()
        name = self.next()
        fn = Function(name, entry)
        fn.rets = rets
        if self.peek() == "(":
            fn.params = self.param_list()
        while self.peek() not in ("{", ";"):
            t = self.next()
            vals = []
            while self.peek() not in ("{", ";") and self.kind[self.i] == "num":
                vals.append(int(self.next()))
                self.accept(",")
            fn.directives[t] = vals
        if self.accept(";"):
            self.mod.functions.setdefault(name, fn)
            return
        if self.peek(1) == "}" and self.bodies:
            self.i += 2
            fn.unread = partial(self.read, *next(self.bodies_left))
        else:
            self.body(fn)
        self.mod.functions[name] = fn

    def param_list(self):
        out = []
        self.expect("(")
        while not self.accept(")"):
            self.accept(".param")
            if self.peek() == ".reg":
                raise PTXError("register parameters are not supported")
            out.append(self.param())
            self.accept(",")
        off = 0
        for v in out:
            off = (off + v.align - 1) // v.align * v.align
            v.offset = off
            off += v.size
        return out

    def param(self):
        align, type_, pointer = None, None, False
        while True:
            t = self.next()
            if t == ".align":
                n = int(self.next())
                if not pointer:
                    align = n
            elif t == ".ptr":
                pointer = True
            elif t[1:] in WIDTH:
                type_ = t[1:]
            elif not t.startswith("."):
                break
        count = None
        if self.accept("["):
            if self.accept("]"):
                count = 0
            else:
                count = int(self.next().rstrip("U"), 0)
                self.expect("]")
        return Var("param", t, type_, align, count)

    # ---- function body ----
    def read(self, text, line, fn):
        """The body of a function from its text: line by line where a line is an instruction, a label or a place in the
        source, by tokens where it is anything else."""
        self.scopes = [self.scope()]
        fn.body = []
        self.loc = None
        left = iter(enumerate(text.split("\n"), line))
        for number, part in left:
            m = PLAIN.match(part)
            if m:
                negated, guard, op, rest = m.groups()
                if guard:
                    guard = (self.predicate(guard, number), bool(negated))
                ops = [self.known(o.rstrip(), number) for o in OPERAND.findall(rest)] if rest else []
                fn.body.append(Ins(op, guard, ops, number, self.loc, self.scopes))
                continue
            p = part.split()
            if not p:
                continue
            if p[0] == ".loc":
                self.loc = (int(p[1]), int(p[2].rstrip(",")))
                continue
            m = LABEL.match(part)
            if m:
                self.scopes[-1].labels[m.group(1)] = len(fn.body)
                continue
            first = number
            while part.rstrip()[-1:] not in (";", "{", "}", ":"):  # a statement of several lines
                number, more = next(left)
                part += "\n" + more
            self.tokenize(part, first)
            self.statements(fn)
        for v in fn.body:
            v.fn = fn

    def known(self, text, line):
        """The operand that a text means in the present scope."""
        memo = self.scopes[-1].known
        op = memo.get(text)
        if op is None:
            m = SIMPLE.match(text)
            if m and m.group(1):
                op = ("i", int(text))
            elif m and m.group(2):
                op = ("f", int(m.group(2), 16), 32)
            elif m:
                self.lines, self.i = [line], 1  # for what it may have to say
                op = self.name_operand(text)
            elif m := AT.match(text):
                op = ("a", self.known(m.group(1), line), int(m.group(2) or 0))
            elif text[0] == "{":
                op = ("v", [self.known(o.strip(), line) for o in text[1:-1].split(",")])
            else:
                self.tokenize(text, line)
                op = self.operand()
                if self.i != len(self.tok):
                    raise PTXError(f"PTX line {line}: operand {text!r} not understood")
            memo[text] = op
        return op

    def predicate(self, name, line):
        reg = self.lookup_reg(name)
        if reg is None:
            raise PTXError(f"PTX line {line}: unknown predicate {name}")
        return reg

    def body(self, fn):
        self.expect("{")
        self.scopes = [self.scope()]
        fn.body = []
        self.loc = None
        while self.scopes:
            self.statements(fn)
        for v in fn.body:
            v.fn = fn

    def statements(self, fn):
        """Statements up to the end of the tokens, or of the function."""
        while self.i < len(self.tok):
            t = self.peek()
            kind = self.kind[self.i]
            if kind == "loc":
                p = t.split()
                self.loc = (int(p[1]), int(p[2].rstrip(",")))
                self.i += 1
            elif t == "{":
                self.i += 1
                self.scopes = self.scopes + [self.scope()]
            elif t == "}":
                self.i += 1
                self.scopes = self.scopes[:-1]
                if not self.scopes:
                    return
            elif t == ".reg":
                self.i += 1
                self.reg_decl()
            elif t in (".shared", ".local", ".param", ".global", ".const"):
                self.i += 1
                for v in self.variable(t[1:]):
                    key = f"{v.name}@{self.scopes[-1].number}"
                    self.scopes[-1].names[v.name] = key
                    fn.vars[key] = v
            elif t == ".pragma":
                self.skip_to(";")
            elif t == ".branchtargets" or t == ".callprototype" or t == ".calltargets":
                raise PTXError(f"{t} is not supported")
            elif t == ";":
                self.i += 1
            elif kind == "id" and self.peek(1) == ":":
                if self.peek(2) == ".branchtargets":
                    name = self.next()
                    self.i += 2
                    targets = []
                    while not self.accept(";"):
                        targets.append(self.next())
                        self.accept(",")
                    self.scopes[-1].names[name] = ("targets", targets)
                    continue
                self.scopes[-1].labels[t] = len(fn.body)
                self.i += 2
            else:
                self.instruction(fn)

    def scope(self):
        self.scope_count += 1
        return Scope(self.scope_count)

    def new_reg(self, name, width):
        self.mod.reg_width.append(width)
        self.mod.reg_name.append(name)
        return len(self.mod.reg_width) - 1

    def reg_decl(self):
        while True:
            t = self.next()
            if t[1:] in WIDTH:
                width = WIDTH[t[1:]]
                break
        sc = self.scopes[-1]
        sc.known.clear()
        while True:
            name = self.next()
            if self.accept("<"):
                self.next()
                self.expect(">")
                sc.families[name] = width
            else:
                sc.regs[name] = self.new_reg(name, width)
            if self.accept(";"):
                return
            self.expect(",")

    def lookup_reg(self, name):
        for sc in reversed(self.scopes):
            if name in sc.regs:
                return sc.regs[name]
            m = re.match(r"(.*?)(\d+)$", name)
            if m and m.group(1) in sc.families:
                idx = sc.regs[name] = self.new_reg(name, sc.families[m.group(1)])
                return idx
        return None

    def instruction(self, fn):
        line = self.lines[self.i]
        guard = None
        if self.accept("@"):
            neg = self.accept("!")
            guard = (self.predicate(self.next(), line), neg)
        op = self.next()
        ops = []
        while not self.accept(";"):
            ops.append(self.operand())
            if self.peek() == ",":
                self.i += 1
        fn.body.append(Ins(op, guard, ops, line, self.loc, self.scopes))

    def operand(self):
        a = self.primary()
        if self.accept("|"):
            return ("|", a, self.primary())
        return a

    def name_operand(self, t):
        if t == "_":
            return ("_",)
        reg = self.lookup_reg(t)
        if reg is not None:
            return ("r", reg)
        if t.startswith("%"):
            if t == "%laneid" or t in SPECIAL32 or t.startswith("%envreg"):
                width = 32
            elif t in SPECIAL64:
                width = 64
            elif t in ("%is_explicit_cluster",):
                width = 1
            else:
                raise PTXError(f"PTX line {self.lines[self.i - 1]}: unknown register {t}")
            if t not in self.mod.special:
                self.mod.special[t] = self.new_reg(t, width)
            return ("r", self.mod.special[t])
        return ("s", t)

    def primary(self):
        t = self.peek()
        kind = self.kind[self.i]
        if t == "{":
            self.i += 1
            out = []
            while not self.accept("}"):
                out.append(self.operand())
                self.accept(",")
            return ("v", out)
        if t == "(":
            self.i += 1
            out = []
            while not self.accept(")"):
                out.append(self.operand())
                self.accept(",")
            return ("t", out)
        if t == "[":
            self.i += 1
            base = self.primary()
            off = 0
            extra = []
            while not self.accept("]"):
                if self.accept("+"):
                    sign = 1
                elif self.accept("-"):
                    sign = -1
                elif self.accept(","):
                    extra.append(self.primary())
                    continue
                else:
                    sign = 1
                nxt = self.primary()
                if nxt[0] != "i":
                    raise PTXError(f"PTX line {self.lines[self.i - 1]}: unsupported address")
                off += sign * nxt[1]
            if base[0] == "o":
                base, off = base[1], off + base[2]
            if extra:
                return ("tensor", base, off, extra)
            return ("a", base, off)
        if t == "!":
            self.i += 1
            return ("n", self.primary())
        if t == "-":
            self.i += 1
            a = self.primary()
            if a[0] == "i":
                return ("i", -a[1])
            return ("f", a[1] ^ (1 << (a[2] - 1)), a[2])
        if kind == "flt":
            self.i += 1
            return ("f", int(t[2:], 16), 32 if t[1] in "fF" else 64)
        if kind == "num":
            self.i += 1
            if "." in t:
                import struct

                return ("f", struct.unpack("<Q", struct.pack("<d", float(t)))[0], 64)
            return ("i", int(t.rstrip("U"), 0))
        if kind == "id":
            self.i += 1
            return self.name_operand(t)
        raise PTXError(f"PTX line {self.lines[self.i]}: unexpected {t!r}")


_XYZ = [
    f"{b}.{c}"
    for b in ("%tid", "%ntid", "%ctaid", "%nctaid", "%clusterid", "%nclusterid", "%cluster_ctaid", "%cluster_nctaid")
    for c in "xyz"
]
SPECIAL32 = set(_XYZ) | {
    "%laneid",
    "%warpid",
    "%nwarpid",
    "%smid",
    "%nsmid",
    "%clock",
    "%clock_hi",
    "%cluster_ctarank",
    "%cluster_nctarank",
    "%lanemask_eq",
    "%lanemask_le",
    "%lanemask_lt",
    "%lanemask_ge",
    "%lanemask_gt",
    "%dynamic_smem_size",
    "%total_smem_size",
    "%aggr_smem_size",
    "%globaltimer_lo",
    "%globaltimer_hi",
    "%reserved_smem_offset_begin",
}
SPECIAL64 = {"%clock64", "%globaltimer", "%gridid", "%current_graph_exec"}


@lru_cache(maxsize=64)  # a module with its programs takes some megabytes
def parse(text):
    """Parse PTX text; the latest results are kept."""
    return Parser(text).parse()
