"""Execution of a kernel launch.

Thread blocks are run in batches; every instruction works on all threads of
the batch that stand at the same place.  Among the groups of threads at
different places the one with the lowest position in the code goes first, so
that diverged threads meet again at the earliest common instruction.
"""

import ctypes
import os
import threading
import time as _time

import numpy as np

from . import native
from .control import ControlCompiler
from .errors import KernelAbort, PTXError
from .memory import GlobalMemory, LocalMemory, Region, Shadow, SharedMemory
from .program import PARAM_ID, Program
from .report import ArrayTraffic, LaunchReport
from .values import RAW, U32, U64

BIG = 1 << 30
_running = threading.RLock()
RUN, PARK, BAR, CLUSTER, YIELD, EXIT = range(6)
NAMES = {PARK: "warp synchronisation", BAR: "barrier", CLUSTER: "cluster barrier"}


class Options:
    """Switches of an emulation."""

    def __init__(self, **kw):
        self.batch_threads = int(os.environ.get("PTXEMU_BATCH_THREADS", 8192))
        self.max_steps = int(os.environ.get("PTXEMU_MAX_STEPS", 5_000_000))
        self.max_seconds = float(os.environ.get("PTXEMU_MAX_SECONDS", 120))
        self.stats = True
        self.shared_races = True
        self.global_races = True
        self.quota = 20_000
        for k, v in kw.items():
            if not hasattr(self, k):
                raise TypeError(f"unknown option {k}")
            setattr(self, k, v)


class Machine:
    def __init__(self, prog, grid, block, params, gmem, dyn_shared=0, cluster=(1, 1, 1), options=None):
        self.prog = prog
        self.options = options or Options()
        self.grid = tuple(int(g) for g in grid) + (1,) * (3 - len(grid))
        self.block = tuple(int(b) for b in block) + (1,) * (3 - len(block))
        self.threads = self.block[0] * self.block[1] * self.block[2]
        self.tpad = -(-self.threads // 32) * 32
        self.cluster_dim = cluster
        self.cluster = cluster[0] * cluster[1] * cluster[2]
        self.params = params if params.size else np.zeros(8, np.uint8)
        self.gmem = gmem
        self.gmem.races = self.options.global_races
        self.gmem.stats = self.options.stats
        self.dyn_shared = dyn_shared
        self.shared_size = prog.dynamic_offset + dyn_shared
        self.report = LaunchReport(prog.entry.name, self.grid, self.block)
        self.lib = native.library()
        self.c = native.MachineC()
        self.at = ctypes.addressof(self.c)
        self.time = 0
        self.steps = 0
        if not hasattr(prog, "control"):
            prog.control = ControlCompiler(prog)
        self.ctlc = prog.control

    @property
    def time(self):
        """Counts accesses and barriers; native.c and the numpy code share it."""
        return self.c.time

    @time.setter
    def time(self, value):
        self.c.time = value

    @property
    def last_sync(self):
        """No block has met later than all have by this time."""
        return self.c.last_sync

    @last_sync.setter
    def last_sync(self, value):
        self.c.last_sync = value

    # ---- launch ----
    def block_coordinates(self):
        """Coordinates of all blocks in execution order (blocks of a cluster side by side)."""
        gx, gy, gz = self.grid
        n = gx * gy * gz
        cx, cy, cz = self.cluster_dim
        if self.cluster == 1:
            i = np.arange(n)
            return i % gx, i // gx % gy, i // (gx * gy)
        if gx % cx or gy % cy or gz % cz:
            raise PTXError(f"grid {self.grid} is not a multiple of the cluster {self.cluster_dim}")
        i = np.arange(n)
        c, r = i // self.cluster, i % self.cluster
        nx, ny = gx // cx, gy // cy
        return (c % nx * cx + r % cx, c // nx % ny * cy + r // cx % cy, c // (nx * ny) * cz + r // (cx * cy))

    def launch(self):
        """Runs the kernel. Launches of several threads go one after the other: they share programs and registers."""
        with _running:
            return self.run_all()

    def run_all(self):
        t0 = self.started = _time.perf_counter()
        self.bx, self.by, self.bz = self.block_coordinates()
        total = self.bx.size
        self.fence_time = np.full(total + 1, -1, np.int64)
        self.atom_time = np.full(total + 1, -1, np.int64)
        self.met_time = np.full(total + 1, -1, np.int64)  # when a barrier of the block's cluster was last complete
        for r in self.prog.mod.regions.values():
            r.reset()
            self.gmem.regions[r.id] = r
        pr = Region(PARAM_ID, "kernel parameters", self.params)
        self.gmem.regions[PARAM_ID] = pr
        for b in self.prog.all_blocks:
            b.count = 0
        self.begin_native()
        per = max(1, self.options.batch_threads // self.tpad)
        per = max(self.cluster, per // self.cluster * self.cluster)
        try:
            with np.errstate(all="ignore"):
                for first in range(0, total, per):
                    self.run_batch(first, min(per, total - first))
            self.report.completed = True
        except KernelAbort:
            pass
        self.finish()
        self.report.seconds = _time.perf_counter() - t0
        return self.report

    def finish(self):
        rep = self.report
        ops = rep.opcodes
        for b in self.prog.all_blocks:
            if not b.count:
                continue
            for name, n in self.prog.opcodes(b).items():
                ops[name] = ops.get(name, 0) + n * b.count
                rep.warp_instructions += n * b.count
        self.end_native()
        for r in self.gmem.regions.values():
            if r.id != PARAM_ID and (r.load_bytes or r.store_bytes or r.id < 4096):
                name = r.name
                k = 2
                while name in rep.arrays:
                    name = f"{r.name}#{k}"
                    k += 1
                rep.arrays[name] = ArrayTraffic(r)
            r.shadow = None

    # ---- batch state ----
    def run_batch(self, first, nblocks):
        self.first, self.nblocks = first, nblocks
        N = self.N = nblocks * self.tpad
        if self.lib is None:
            self.R = [np.zeros(1, RAW[w]) for w in self.prog.reg_width]
        else:
            self.R = native.registers(self.prog.native, N)
        self.all = np.arange(N)
        self.slot_of = (self.all // self.tpad).astype(np.int32)
        self.cta_of = self.slot_of + np.int32(first)
        self.pc = np.full(N, self.prog.start, np.int64)
        self.state = np.zeros(N, np.int8)
        self.alive = np.ones(N, np.bool_)
        tid = self.all % self.tpad
        if self.tpad != self.threads:
            dead = tid >= self.threads
            self.state[dead] = EXIT
            self.alive[dead] = False
        self.alive_count = np.bincount(self.slot_of[self.alive], minlength=nblocks)
        self.bar_time = np.zeros(nblocks, np.int64) + self.time
        self.warp_time = np.zeros(N // 32, np.int64) + self.time
        ncl = nblocks // self.cluster
        self.cluster_time = np.zeros(ncl, np.int64) + self.time
        self.cluster_phase = np.zeros(ncl, np.int64)
        self.last_sync = self.time
        self.bar_id = np.zeros(N, np.int16)
        self.bar_want = np.zeros(N, np.int32)
        self.bar_arrived = {}
        self.bar_value = np.zeros(N, np.bool_)
        self.cl_arrived = np.zeros(N, np.bool_)
        self.cl_phase = np.zeros(N, np.int64)
        self.remote_time = np.full(nblocks, -1, np.int64)
        self.remote_by = {}
        self.carry_flag = np.zeros(N, np.bool_)
        self.copy_committed = np.zeros(N, np.int32)
        self.copy_done = np.zeros(N, np.int32)
        self.force = False
        self.ret_pc = {}
        self.call_data = {}
        self.param_sizes = self.prog.param_sizes()
        self.smem = SharedMemory(self, nblocks, self.shared_size, self.options.shared_races)
        if self.smem.shadow is not None:
            # times of earlier batches must not look recent
            self.smem.shadow.w_time[:] = -1
        self.lmem = LocalMemory(N, self.prog.local_size)
        self.time += 1
        self.fill_special(tid)
        self.enter_native()
        self.schedule()

    def special_value(self, name, sel):
        rank = (self.slot_of % self.cluster).astype(U32)
        return rank if sel is None else rank[sel]

    def fill_special(self, tid):
        sp = self.prog.special
        if not sp:
            return
        slot = self.slot_of
        b = self.first + slot
        bx, by, bz = self.block
        gx, gy, gz = self.grid
        cx, cy, cz = self.cluster_dim
        cta = (self.bx[b], self.by[b], self.bz[b])
        lane = (self.all & 31).astype(U32)

        def one(v):
            return np.array([v], U32)

        clus = self.cluster_dim
        for name, k in sp.items():
            axis = {"x": 0, "y": 1, "z": 2}.get(name[-1]) if name[-2] == "." else None
            root = name.split(".")[0]
            if root == "%tid":
                v = (tid % bx, tid // bx % by, tid // (bx * by))[axis]
            elif root == "%ntid":
                v = one(self.block[axis])
            elif root == "%ctaid":
                v = cta[axis]
            elif root == "%nctaid":
                v = one(self.grid[axis])
            elif name == "%laneid":
                v = lane
            elif name == "%warpid":
                v = tid // 32
            elif name == "%nwarpid":
                v = one(self.tpad // 32)
            elif name == "%smid":
                v = b % 108
            elif name == "%nsmid":
                v = one(108)
            elif root == "%clusterid":
                v = cta[axis] // clus[axis]
            elif root == "%nclusterid":
                v = one(self.grid[axis] // clus[axis])
            elif root == "%cluster_ctaid":
                v = cta[axis] % clus[axis]
            elif root == "%cluster_nctaid":
                v = one(clus[axis])
            elif name == "%cluster_ctarank":
                v = slot % self.cluster
            elif name == "%cluster_nctarank":
                v = one(self.cluster)
            elif name == "%is_explicit_cluster":
                v = np.array([self.cluster > 1])
            elif name.startswith("%lanemask_"):
                bit = U32(1) << lane
                v = {
                    "eq": bit,
                    "lt": bit - U32(1),
                    "le": bit | (bit - U32(1)),
                    "gt": ~(bit | (bit - U32(1))),
                    "ge": ~(bit - U32(1)),
                }[name[-2:]]
            elif name == "%dynamic_smem_size":
                v = one(self.dyn_shared)
            elif name in ("%total_smem_size", "%aggr_smem_size"):
                v = one(self.shared_size)
            else:
                v = one(0)
            width = self.prog.reg_width[k]
            self.R[k] = np.ascontiguousarray(v).astype(RAW[width])

    # ---- helpers used by instructions ----
    def tids(self, sel):
        return self.all if sel is None else sel

    def count(self, sel):
        return self.N if sel is None else sel.shape[0]

    def call_param(self, key):
        a = self.call_data.get(key)
        if a is None:
            a = self.call_data[key] = np.zeros((self.N, self.param_sizes[key]), np.uint8)
        return a

    def carry(self, sel):
        return self.carry_flag if sel is None else self.carry_flag[sel]

    def set_carry(self, sel, v):
        new = self.carry_flag.copy()
        new[slice(None) if sel is None else sel] = v
        self.carry_flag = new

    def active_mask(self, sel):
        tids = self.tids(sel)
        words = self.words(tids)
        return words[tids >> 5]

    def words(self, tids):
        bits = np.zeros(self.N, np.bool_)
        bits[tids] = True
        return np.packbits(bits.reshape(-1, 32), axis=1, bitorder="little").view(U32).reshape(-1)

    def in_space(self, addr, space):
        ids = addr >> U64(38)
        if space == "shared":
            return ids == 4
        if space == "local":
            return ids == 8
        if space == "const":
            return np.zeros(ids.shape, bool)
        return ids >= 64

    def note_fence(self, sel, release):
        if release:
            self.time += 1
            self.fence_time[self.cta_of if sel is None else self.cta_of[sel]] = self.time

    def note_atomic(self, sel, write):
        self.time += 1
        self.atom_time[self.cta_of if sel is None else self.cta_of[sel]] = self.time

    def remote_access(self, tids, slot, ins):
        """Shared memory of another block of the cluster is being accessed."""
        other = slot != self.slot_of[tids]
        if not other.any():
            return
        owners = slot[other]
        self.remote_time[owners] = self.time
        self.remote_by[int(owners[0])] = ins
        gone = self.alive_count[owners] == 0
        if gone.any():
            self.finding(
                "cluster_exit",
                ins,
                tids[other][gone],
                "shared memory of a block of the cluster that has already exited",
            )

    def bank_waves(self, tids, off, width, is_store):
        """Count shared-memory wavefronts of a request and the number without conflicts."""
        if not self.options.stats:
            return
        unit = max(width, 4)
        lanes = 128 // unit  # lanes served together
        u = off >> (unit.bit_length() - 1)
        n = u.shape[0]
        rec = self.report.shared["store" if is_store else "load"]
        if n == self.N and n % lanes == 0:
            u2 = u.reshape(-1, lanes)
            rows = u2.shape[0]
            spread = u2.max(1) - u2.min(1)
            easy = spread < lanes
            ideal = rows
            if easy.all():
                rec[0] += rows
                rec[1] += ideal
                return
            u2 = np.sort(u2[~easy], axis=1)
            new = np.ones(u2.shape, bool)
            new[:, 1:] = u2[:, 1:] != u2[:, :-1]
            r = u2.shape[0]
            key = (np.arange(r)[:, None] * lanes + u2 % lanes)[new]
            waves = np.bincount(key, minlength=r * lanes).reshape(r, lanes).max(1)
            rec[0] += int(waves.sum()) + int(easy.sum())
            rec[1] += ideal
            return
        phase = (tids >> 5) * (32 // lanes) + (tids & 31) // lanes
        key = np.unique((phase.astype(np.int64) << 40) + u)
        ph, bank = key >> 40, (key & ((1 << 40) - 1)) % lanes
        pb, cnt = np.unique(ph * lanes + bank, return_counts=True)
        p = pb // lanes
        first = np.flatnonzero(np.r_[True, p[1:] != p[:-1]])
        rec[0] += int(np.maximum.reduceat(cnt, first).sum())
        rec[1] += first.size

    # ---- findings ----
    def thread_name(self, t):
        t = int(t)
        i = t % self.tpad
        bx, by, _ = self.block
        return f"{self.block_name(self.first + t // self.tpad)} thread ({i % bx},{i // bx % by},{i // (bx * by)})"

    def block_name(self, c):
        return f"block ({self.bx[c]},{self.by[c]},{self.bz[c]})"

    def finding(self, kind, ins, tids, message, fatal=False):
        source = ""
        if ins is not None and ins.loc:
            source = f"{os.path.basename(self.prog.mod.files.get(ins.loc[0], '?'))}:{ins.loc[1]}"
        who = self.thread_name(tids[0]) if len(tids) else "-"
        self.report.add(kind, ins, source, who, message, len(tids))
        if fatal:
            raise KernelAbort(kind)

    # ---- the fast path ----
    def begin_native(self):
        """What native.c is told once for a launch: the allocations."""
        self.native_regions = []
        if self.lib is None:
            return
        if getattr(self.prog, "native", None) is None:
            self.prog.native = native.Code(self.prog, self.lib)
        found = list(self.gmem.regions.values())
        table = self.region_table = (native.RegionC * len(found))()
        for r, t in zip(found, table, strict=False):
            if self.options.global_races and r.shadow is None and r.nbytes <= 1 << 20:
                r.shadow = Shadow(
                    r.nbytes, 4 if r.nbytes <= 1 << 14 else 16
                )  # else by the numpy code at the first access
            t.id, t.nbytes, t.base, t.log = r.id, r.nbytes, r.base, 0
            t.data = r.data.ctypes.data
            t.read_sectors, t.written_sectors = r.read_sectors.ctypes.data, r.written_sectors.ctypes.data
            self.native_regions.append((r, t))
        c = self.c
        c.regions, c.nregions = ctypes.addressof(table), len(found)
        c.stats, c.races = self.options.stats, self.options.global_races
        c.fence_time, c.atom_time = self.fence_time.ctypes.data, self.atom_time.ctypes.data
        c.met_time = self.met_time.ctypes.data
        c.params, c.nparams = self.params.ctypes.data, self.params.shape[0]
        c.cluster = self.cluster

    def enter_native(self):
        """What native.c is told of a batch."""
        if self.lib is None:
            return
        c, R, code = self.c, self.R, self.prog.native

        def at(a):
            return a.ctypes.data

        c.N = self.N
        c.uni, c.uval, c.width, c.place, c.arena = at(R.uni), at(R.uval), at(code.width), at(code.place), at(R.arena)
        c.scratch = at(native.scratch(self.N))
        self.index = np.empty(self.N, np.int64)
        c.index = at(self.index)
        c.slot_of, c.cta_of = at(self.slot_of), at(self.cta_of)
        c.bar_time, c.warp_time, c.cluster_time = at(self.bar_time), at(self.warp_time), at(self.cluster_time)
        c.copy_committed, c.copy_done = at(self.copy_committed), at(self.copy_done)
        c.sm, c.sm_size, c.sm_stride = at(self.smem.data), self.smem.size, self.smem.stride
        c.sm_shadowed, c.sm_log = self.smem.shadow is not None, -1
        c.lm, c.lm_size, c.lm_stride = at(self.lmem.data), self.lmem.size, self.lmem.stride
        self.renew_native()

    def renew_native(self):
        """After an instruction of the numpy code: it may have made shadows, or made their granules smaller."""
        c = self.c
        for r, t in self.native_regions:
            sh = r.shadow
            if sh is not None and (not t.shadowed or t.log != sh.log):
                t.shadowed, t.log = 1, sh.log
                for name in ("w_id", "w_time", "w_strong", "r_id", "r_time", "r_many", "r_far"):
                    setattr(t, name, getattr(sh, name).ctypes.data)
        c.sm_copies = self.smem.copies
        sh = self.smem.shadow
        if sh is not None and c.sm_log != sh.log:
            c.sm_log = sh.log
            for name in ("w_id", "w_time", "w_strong", "r_id", "r_time", "r_many", "group"):
                setattr(c, "s_" + name, getattr(sh, name).ctypes.data)

    def end_native(self):
        """Adds what native.c has counted to what the numpy code has."""
        rep, c = self.report, self.c
        for r, t in self.native_regions:
            r.load_bytes += t.bytes[0]
            r.store_bytes += t.bytes[1]
            r.load_sectors += t.sectors[0]
            r.store_sectors += t.sectors[1]
        for store, widths in enumerate((rep.load_widths, rep.store_widths)):
            for log, n in enumerate(c.widths[store]):
                if n:
                    widths[1 << log] = widths.get(1 << log, 0) + n
        for store, kind in enumerate(("load", "store")):
            for i in range(2):
                rep.shared[kind][i] += c.waves[store][i]

    def execute(self, p, end, sel):
        """The instructions from p on, which do not jump, in the threads sel."""
        closure = self.prog.closure
        if self.lib is None:
            for pc in range(p, end):
                closure(pc)(self, sel)
            return
        code = self.prog.native
        if sel is None:
            where, n = None, 0
        else:
            sel = np.ascontiguousarray(sel, np.int64)
            where, n = sel.ctypes.data, sel.shape[0]
        while True:
            p = self.lib.run(self.at, code.code_at, code.list_at, p, end, where, n)
            if p >= end:
                return
            closure(p)(self, sel)
            self.renew_native()
            p += 1

    # ---- scheduler ----
    def warps(self, sel):
        if sel is None:
            return self.N >> 5
        w = sel >> 5
        return 1 + int(np.count_nonzero(w[1:] != w[:-1]))

    def schedule(self):
        turns = 0
        while True:
            key = np.where(self.state == RUN, self.pc, BIG)
            p = int(key.min())
            if p == BIG:
                if not self.unstick():
                    return
                continue
            turns += 1
            if turns > 500 and turns % 8 == 0:
                # let the others go on as well: the lowest group may be waiting for them
                p = int(np.where(key == BIG, -1, key).max())
                sel = np.flatnonzero(key == p)
                self.run_group(p, None if sel.size == self.N else sel, BIG)
                self.check_time(p, sel)
                continue
            here = key == p
            n = int(np.count_nonzero(here))
            if n == self.N:
                self.run_group(p, None, BIG)
            else:
                sel = np.flatnonzero(here)
                key[sel] = BIG
                self.run_group(p, sel, int(key.min()))

    def run_group(self, p, sel, limit):
        """Run the threads sel from p until they split, stop or reach other threads at `limit`."""
        blocks = self.prog.blocks
        nw = self.warps(sel)
        rounds = 0
        max_steps = self.options.max_steps
        while p < limit:
            b = blocks[p]
            if not b.prepared:
                self.prog.prepare(b, self.ctlc.compile)
            if sel is None and not b.guard:  # all threads: on to the next control instruction at once
                chain = self.prog.chain(b, self.ctlc.compile)
                for each in chain:
                    each.count += nw
                b = chain[-1]
                self.execute(p, b.end, None)
                self.steps += len(chain) + b.end - p
                if self.steps > max_steps:
                    self.finding(
                        "endless",
                        self.prog.code[p],
                        self.tids(sel)[:1],
                        f"stopped after {self.steps} steps",
                        fatal=True,
                    )
                if b.ctl is None:
                    p = b.end
                else:
                    p = b.ctl(self, sel)
                    if p is None:
                        return
                rounds += 1
                if rounds & 1023 == 0:
                    self.check_time(p, self.tids(sel))
                continue
            if b.sync and (sel is not None or b.guard):
                if b.guard:
                    sel2, done = self.guarded_sync(b, sel, p)
                    if done:
                        return
                    if sel2 is False:
                        p += 1
                        continue
                if sel is not None:
                    sel = self.gate(b, sel, p)
                    if sel.size == 0:
                        return
                    nw = self.warps(sel)
            b.count += nw
            self.execute(p, b.end, sel)
            self.steps += 1 + b.end - p
            if self.steps > max_steps:
                self.finding(
                    "endless", self.prog.code[p], self.tids(sel)[:1], f"stopped after {self.steps} steps", fatal=True
                )
            if b.ctl is None:
                p = b.end
            else:
                p = b.ctl(self, sel)
                if p is None:
                    return
            rounds += 1
            if rounds & 1023 == 0:
                self.check_time(p, self.tids(sel))
            if rounds > self.options.quota and sel is not None and sel.size < int(self.alive.sum()):
                self.pc[self.tids(sel)] = p
                self.state[self.tids(sel)] = YIELD
                return
        self.pc[slice(None) if sel is None else sel] = p

    def check_time(self, p, tids):
        if _time.perf_counter() - self.started > self.options.max_seconds:
            self.finding(
                "endless",
                self.prog.code[p],
                tids[:1],
                f"stopped after {self.options.max_seconds} s ({self.steps} steps)",
                fatal=True,
            )

    def guarded_sync(self, b, sel, p):
        """Predicated warp-wide instruction: (selection, finished).  False: no thread executes it."""
        k, neg = b.guard
        tids = self.tids(sel)
        q = np.broadcast_to(self.R[k] if sel is None or self.R[k].shape[0] == 1 else self.R[k][sel], tids.shape)
        q = ~q if neg else q
        if q.all():
            return sel, False
        if not q.any():
            return False, False
        on, off = tids[q], tids[~q]
        self.pc[off] = p + 1
        on = self.gate(b, on, p)
        if on.size:
            b.count += self.warps(on)
            self.execute(p, p + 1, on)
            self.pc[on] = p + 1
        return sel, True

    def gate(self, b, sel, p):
        """Let through the threads whose whole member mask is here; park the others."""
        parked = np.flatnonzero((self.state == PARK) & (self.pc == p))
        if parked.size:
            self.state[parked] = RUN
            sel = np.sort(np.concatenate([sel, parked]))
        if self.force:
            return sel
        warp = sel >> 5
        here = self.words(sel)[warp]
        alive = np.packbits(self.alive.reshape(-1, 32), axis=1, bitorder="little").view(U32).reshape(-1)[warp]
        if b.mask is None:
            mask = U32(0xFFFFFFFF)
        else:
            mask = b.mask(self, sel)
            own = (mask >> (sel & 31).astype(U32)) & U32(1)
            if not own.all():
                self.finding(
                    "warp_sync", self.prog.code[p], sel[own == 0], "the executing lane is not in its own member mask"
                )
        bad = (mask & alive & ~here) != 0
        if bad.any():
            out = sel[bad]
            self.state[out] = PARK
            self.pc[out] = p
            sel = sel[~bad]
        return sel

    def unstick(self):
        """No thread can run: wake yielded or parked ones, or report a deadlock.  False: all done."""
        st = self.state
        if (st == YIELD).any():
            st[st == YIELD] = RUN
            return True
        parked = np.flatnonzero(st == PARK)
        if parked.size:
            pcs = self.pc[parked]
            ins = self.prog.code[int(pcs[0])]
            if all(self.prog.code[int(q)].op == "bar" for q in np.unique(pcs)):
                # bar.warp.sync may be met at different places
                self.time += 1
                self.warp_time[parked >> 5] = self.time
                self.pc[parked] += 1
            else:
                self.finding("warp_sync", ins, parked, "lanes of the member mask never arrive (waiting elsewhere)")
                self.force = True
            st[parked] = RUN
            if self.force:
                self.release_forced()
            return True
        waiting = np.flatnonzero((st == BAR) | (st == CLUSTER))
        if waiting.size:
            t = waiting[0]
            ins = self.prog.code[int(self.pc[t])]
            slot = self.slot_of[t]
            places = np.unique(self.pc[waiting[self.slot_of[waiting] == slot]])
            lines = ", ".join(str(self.prog.code[int(q)].line) for q in places)
            self.finding(
                "deadlock",
                ins,
                waiting,
                f"{int((self.slot_of[waiting] == slot).sum())} of {int(self.alive_count[slot])} live threads "
                f"of the block wait for ever (PTX lines {lines})",
                fatal=True,
            )
        return False

    def release_forced(self):
        key = np.where(self.state == RUN, self.pc, BIG)
        p = int(key.min())
        sel = np.flatnonzero(key == p)
        b = self.prog.blocks[p]
        self.execute(p, p + 1, sel)
        self.pc[sel] = p + 1 if self.prog.blocks[p + 1] is not None else p
        if self.prog.blocks[p + 1] is None:
            # finish the rest of the block
            self.execute(p + 1, b.end, sel)
            self.pc[sel] = b.end
            if b.ctl is not None:
                nxt = b.ctl(self, sel)
                if nxt is not None:
                    self.pc[sel] = nxt
        self.force = False

    # ---- barriers and exits ----
    def sync_blocks(self, slots):
        """A barrier of these blocks completed."""
        self.time += 1
        self.bar_time[slots] = self.time
        self.last_sync = int(self.bar_time.min())
        if self.cluster > 1:
            self.last_sync = min(self.last_sync, int(self.cluster_time.min()))
        self.time += 1

    def exit_threads(self, tids):
        self.state[tids] = EXIT
        self.alive[tids] = False
        slots = self.slot_of[tids]
        self.alive_count -= np.bincount(slots, minlength=self.nblocks)
        if self.cluster > 1:
            gone = np.unique(slots)
            gone = gone[self.alive_count[gone] == 0]
            late = gone[self.remote_time[gone] > self.cluster_time[gone // self.cluster]]
            for s in late:
                ins = self.remote_by.get(int(s))
                self.finding(
                    "cluster_exit",
                    ins,
                    np.array([int(s) * self.tpad]),
                    "a block exits without a cluster barrier after another block used its shared memory",
                )
            self.ctlc.cluster_progress(self)
        if (self.state == BAR).any():
            self.ctlc.barrier_progress(self, np.unique(slots))


def program_for(mod, entry):
    """Programs are kept with their module."""
    cache = mod.__dict__.setdefault("programs", {})
    p = cache.get(entry.name)
    if p is None:
        p = cache[entry.name] = Program(mod, entry)
    return p


__all__ = ["Machine", "Options", "GlobalMemory", "program_for"]
