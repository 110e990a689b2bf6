"""Static figures of compiled kernels: registers, spills, shared memory, stack, widths of global accesses in SASS."""

import os
import re
import shutil
import subprocess
import tempfile


def tools(*names):
    """Paths of CUDA binary tools: from PATH, CUDA_HOME and Triton's package."""
    home = os.environ.get("CUDA_HOME")
    dirs = [os.path.join(home, "bin")] if home else []
    try:
        import triton

        dirs.append(os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin"))
    except ImportError:
        pass
    found = [shutil.which(n) for n in names] + [os.path.join(d, n) for n in names for d in dirs]
    return list(dict.fromkeys(p for p in found if p and os.path.exists(p)))


def tool(name):
    """Path of a CUDA binary tool, or None."""
    return next(iter(tools(name)), None)


class KernelStatic:
    """Figures of one kernel; `sass` maps e.g. 'LDG.E.128' to its number of occurrences."""

    def __init__(self, name):
        self.name = name
        self.registers = self.spill_stores = self.spill_loads = 0
        self.stack = self.shared = self.constant = self.barriers = 0
        self.sass = {}
        self.sass_instructions = 0

    @property
    def spill_bytes(self):
        return self.spill_stores + self.spill_loads

    def widths(self, op="LDG"):
        """{bytes per thread: count} of the global loads (LDG) or stores (STG)."""
        out = {}
        for k, n in self.sass.items():
            if k.startswith(op):
                w = 4
                for part in k.split(".")[1:]:
                    w = {"128": 16, "64": 8, "U8": 1, "S8": 1, "U16": 2, "S16": 2, "256": 32}.get(part, w)
                out[w] = out.get(w, 0) + n
        return out

    def __repr__(self):
        return (
            f"{self.name}: {self.registers} registers, spills {self.spill_stores}+{self.spill_loads} B, "
            f"stack {self.stack} B, static shared {self.shared} B, {self.sass_instructions} SASS instructions, "
            f"{self.sass}"
        )


def parse_ptxas(text):
    out = {}
    cur = None
    for line in text.splitlines():
        m = re.search(r"Compiling entry function '([^']+)'", line)
        if m:
            cur = out.setdefault(m.group(1), KernelStatic(m.group(1)))
            continue
        m = re.search(r"Function properties for (\S+)", line)
        if m and m.group(1) in out:
            cur = out[m.group(1)]
        if cur is None:
            continue
        m = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line)
        if m:
            cur.stack, cur.spill_stores, cur.spill_loads = map(int, m.groups())
        m = re.search(r"Used (\d+) registers", line)
        if m:
            cur.registers = int(m.group(1))
            m = re.search(r"(\d+) bytes smem", line)
            cur.shared = int(m.group(1)) if m else 0
            m = re.search(r"used (\d+) barriers", line)
            cur.barriers = int(m.group(1)) if m else 0
    return out


def sass_counts(cubin, kernels):
    dis = tool("cuobjdump")
    cmd = [dis, "-sass", cubin] if dis else [tool("nvdisasm"), "-c", cubin]
    if cmd[0] is None:
        return
    env = dict(os.environ)
    nv = tool("nvdisasm")
    if nv:
        env["PATH"] = os.path.dirname(nv) + os.pathsep + env.get("PATH", "")
    r = subprocess.run(cmd, capture_output=True, text=True, env=env)
    cur = None
    for line in r.stdout.splitlines():
        m = re.search(r"Function : (\S+)", line) or re.match(r"\s*\.text\.(\S+):", line)
        if m:
            cur = kernels.get(m.group(1))
            continue
        m = re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)", line)
        if m and cur is not None:
            op = m.group(1)
            cur.sass_instructions += 1
            root = op.split(".")[0]
            if root in (
                "LDG",
                "STG",
                "LDS",
                "STS",
                "LDGSTS",
                "LDL",
                "STL",
                "RED",
                "ATOMG",
                "ATOMS",
                "HMMA",
                "BAR",
                "SHFL",
                "MUFU",
                "REDG",
            ):
                keep = [
                    p
                    for p in op.split(".")
                    if p
                    not in (
                        "CONSTANT",
                        "STRONG",
                        "GPU",
                        "SYS",
                        "CTA",
                        "EL",
                        "EF",
                        "LU",
                        "NA",
                        "LTC128B",
                        "LTC64B",
                        "WEAK",
                        "SM",
                    )
                ]
                key = ".".join(keep) if root in ("LDG", "STG", "LDS", "STS", "LDGSTS", "LDL", "STL") else root
                cur.sass[key] = cur.sass.get(key, 0) + 1


def static_report_ptx(ptx, cap):
    """Assemble PTX text and report on its kernels: {name: KernelStatic}."""
    suffix = "a" if cap == 90 and ".target sm_90a" in ptx else ""
    with tempfile.TemporaryDirectory() as d:
        src, out = os.path.join(d, "k.ptx"), os.path.join(d, "k.cubin")
        with open(src, "w") as f:
            f.write(ptx)
        for ptxas in tools("ptxas", "ptxas-blackwell"):  # the newest may be the only one to know the PTX version
            r = subprocess.run([ptxas, "-v", f"-arch=sm_{cap}{suffix}", src, "-o", out], capture_output=True, text=True)
            if "Unsupported .version" not in r.stderr:
                break
        if r.returncode:
            raise RuntimeError(f"ptxas failed:\n{r.stderr}")
        kernels = parse_ptxas(r.stderr + r.stdout)
        sass_counts(out, kernels)
        return kernels
