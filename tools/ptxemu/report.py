"""What a launch leaves behind: findings and traffic counts."""

ERRORS = (
    "global_oob",
    "shared_oob",
    "local_oob",
    "param_oob",
    "misaligned",
    "shared_race",
    "global_race",
    "divergent_barrier",
    "deadlock",
    "endless",
    "trap",
    "partial_warp",
    "shfl_inactive",
    "warp_sync",
    "cluster_exit",
    "copy_not_awaited",
)


class Finding:
    """One kind of problem at one instruction."""

    def __init__(self, kind, line, text, source, threads, message):
        self.kind, self.line, self.text, self.source = kind, line, text, source
        self.count = 0
        self.threads = threads
        self.message = message

    @property
    def severity(self):
        return "error" if self.kind in ERRORS else "warning"

    def __str__(self):
        src = f" ({self.source})" if self.source else ""
        return (
            f"{self.severity}: {self.kind} at PTX line {self.line}{src}: {self.text}: {self.message}; "
            f"first {self.threads}, {self.count} thread access(es)"
        )

    __repr__ = __str__


class ArrayTraffic:
    """Traffic of one global array in one launch (bytes)."""

    def __init__(self, region):
        self.name = region.name
        self.nbytes = region.nbytes
        self.load_bytes, self.store_bytes = region.load_bytes, region.store_bytes
        self.load_sectors, self.store_sectors = region.load_sectors, region.store_sectors
        self.first_read_bytes = 32 * int(region.read_sectors.sum())
        self.first_written_bytes = 32 * int(region.written_sectors.sum())
        self.reread_bytes = 32 * region.load_sectors - self.first_read_bytes
        self.rewritten_bytes = 32 * region.store_sectors - self.first_written_bytes
        self.atomics = region.atomic_count

    def __repr__(self):
        return (
            f"{self.name}: loads {self.load_bytes} B in {self.load_sectors} sectors "
            f"(first touch {self.first_read_bytes} B, again {self.reread_bytes} B), stores {self.store_bytes} B "
            f"in {self.store_sectors} sectors (first touch {self.first_written_bytes} B, "
            f"again {self.rewritten_bytes} B), atomics {self.atomics}"
        )


class LaunchReport:
    def __init__(self, kernel, grid, block):
        self.kernel, self.grid, self.block = kernel, tuple(grid), tuple(block)
        self.warp_instructions = 0
        self.opcodes = {}
        self.load_widths, self.store_widths = {}, {}
        self.arrays = {}
        self.shared = {"load": [0, 0], "store": [0, 0]}  # [wavefronts, wavefronts without conflicts]
        self._findings = {}
        self.seconds = 0.0
        self.printed = []
        self.ptx = None
        self.completed = False

    # ---- sums over arrays ----
    def _sum(self, field):
        return sum(getattr(a, field) for a in self.arrays.values())

    load_bytes = property(lambda s: s._sum("load_bytes"))
    store_bytes = property(lambda s: s._sum("store_bytes"))
    load_sectors = property(lambda s: s._sum("load_sectors"))
    store_sectors = property(lambda s: s._sum("store_sectors"))
    first_read_bytes = property(lambda s: s._sum("first_read_bytes"))
    first_written_bytes = property(lambda s: s._sum("first_written_bytes"))
    reread_bytes = property(lambda s: s._sum("reread_bytes"))
    rewritten_bytes = property(lambda s: s._sum("rewritten_bytes"))

    @property
    def compulsory_bytes(self):
        """Bytes that must cross DRAM at least once with cold caches: first touches, read and written."""
        return self.first_read_bytes + self.first_written_bytes

    @property
    def bank_conflicts(self):
        """Extra shared-memory wavefronts beyond the conflict-free number."""
        return sum(a - b for a, b in self.shared.values())

    @property
    def findings(self):
        return list(self._findings.values())

    @property
    def errors(self):
        return [f for f in self.findings if f.severity == "error"]

    @property
    def warnings(self):
        return [f for f in self.findings if f.severity == "warning"]

    def kinds(self):
        return {f.kind for f in self.findings}

    def add(self, kind, ins, source, threads, message, count):
        key = (kind, ins.line if ins is not None else 0)
        f = self._findings.get(key)
        if f is None:
            text = ins.full if ins is not None else ""
            f = self._findings[key] = Finding(kind, key[1], text, source, threads, message)
        f.count += count
        return f

    def summary(self):
        lines = [
            f"{self.kernel} grid={self.grid} block={self.block}: {self.warp_instructions} warp instructions, "
            f"{self.seconds:.2f} s emulated",
            f"  global loads {self.load_bytes} B / {self.load_sectors} sectors, "
            f"stores {self.store_bytes} B / {self.store_sectors} sectors",
            f"  first touch: read {self.first_read_bytes} B, written {self.first_written_bytes} B; "
            f"again: read {self.reread_bytes} B, written {self.rewritten_bytes} B",
            f"  bytes per thread access (loads) {dict(sorted(self.load_widths.items()))} "
            f"(stores) {dict(sorted(self.store_widths.items()))}",
            f"  shared wavefronts: loads {self.shared['load'][0]} (ideal {self.shared['load'][1]}), "
            f"stores {self.shared['store'][0]} (ideal {self.shared['store'][1]})",
        ]
        lines += [f"  {a!r}" for a in self.arrays.values()]
        lines += [f"  {f}" for f in self.findings] or ["  no findings"]
        return "\n".join(lines)

    __str__ = summary
