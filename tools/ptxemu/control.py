"""Control instructions: branches, calls, returns and barriers.

A compiled control instruction is a function (m, sel) that gives the next
position when the group stays together, or None when the threads went
different ways (their positions and states are then stored in the machine).
"""

import numpy as np

from .ops import getter, putter, unsupported
from .values import U32

RUN, PARK, BAR, CLUSTER, YIELD, EXIT = range(6)


class ControlCompiler:
    def __init__(self, prog):
        self.prog = prog
        self.reds = {}

    def compile(self, ins, pc):
        if ins is None:
            return self.leave(None, pc)
        name = ins.op
        if name == "bra":
            return self.branch(ins, pc)
        if name == "brx":
            return self.guarded(ins, pc, self.indexed(ins, pc))
        if name in ("ret", "exit"):
            return self.guarded(ins, pc, self.leave(ins, pc))
        if name == "trap":
            return self.guarded(ins, pc, self.trap(ins))
        if name == "call":
            return self.guarded(ins, pc, self.call(ins, pc))
        if "cluster" in ins.mods:
            return self.guarded(ins, pc, self.cluster(ins, pc))
        return self.guarded(ins, pc, self.barrier(ins, pc))

    def guarded(self, ins, pc, body):
        if ins.guard is None:
            return body
        k, neg = ins.guard

        def run(m, sel):
            p = m.R[k]
            if p.shape[0] == 1:
                return body(m, sel) if bool(p[0]) != neg else pc + 1
            q = p if sel is None else p[sel]
            q = ~q if neg else q
            n = int(np.count_nonzero(q))
            if n == 0:
                return pc + 1
            if n == q.shape[0]:
                return body(m, sel)
            tids = m.tids(sel)
            m.pc[tids[~q]] = pc + 1
            on = tids[q]
            nxt = body(m, on)
            if nxt is not None:
                m.pc[on] = nxt
            return None

        return run

    def branch(self, ins, pc):
        target = self.prog.label(ins, ins.ops[0][1])
        if ins.guard is None:
            return lambda m, sel: target
        k, neg = ins.guard

        def run(m, sel):
            p = m.R[k]
            if p.shape[0] == 1:
                return target if bool(p[0]) != neg else pc + 1
            q = p if sel is None else p[sel]
            n = int(np.count_nonzero(q))
            if neg:
                n = q.shape[0] - n
            if n == 0:
                return pc + 1
            if n == q.shape[0]:
                return target
            if neg:
                q = ~q
            if sel is None:
                m.pc[:] = np.where(q, target, pc + 1)
            else:
                m.pc[sel] = np.where(q, target, pc + 1)
            return None

        return run

    def indexed(self, ins, pc):
        targets = self.prog.targets(ins)
        if targets is None:
            raise unsupported(ins)
        table = np.array(targets, np.int64)
        get = getter(ins.ops[0], "u32", self.prog)

        def run(m, sel):
            i = np.broadcast_to(get(m, sel), (m.count(sel),)).astype(np.int64)
            if (i >= table.size).any():
                m.finding("trap", ins, m.tids(sel)[i >= table.size], "branch index out of range", fatal=True)
            m.pc[m.tids(sel)] = table[i]
            return None

        return run

    def trap(self, ins):
        def run(m, sel):
            m.finding("trap", ins, m.tids(sel), "trap executed", fatal=True)

        return run

    # ---- calls ----
    def call(self, ins, pc):
        ops = ins.ops
        rets = []
        if ops and ops[0][0] == "t":
            rets = [o[1] for o in ops[0][1]]
            ops = ops[1:]
        name = ops[0][1]
        args = [o for o in ops[1][1]] if len(ops) > 1 and ops[1][0] == "t" else []
        fn = self.prog.mod.functions.get(name)
        if fn is None:
            raise unsupported(ins, f"unknown function {name}")
        if fn.body is None:
            return self.builtin(ins, pc, name, args, rets)
        if any(a[0] != "s" for a in args):
            raise unsupported(ins, "register arguments")
        moves = []
        for a, p in zip(args, fn.params, strict=False):
            moves.append((self.prog.param(a[1])[1], f"{name}:{p.name}"))
        back = [(f"{name}:{p.name}", self.prog.param(r)[1]) for r, p in zip(rets, fn.rets, strict=False)]
        entry = self.prog.base[name]

        def run(m, sel):
            rows = slice(None) if sel is None else sel
            for src, dst in moves:
                m.call_param(dst)[rows] = m.call_param(src)[rows]
            table = m.ret_pc.get(name)
            if table is None:
                table = m.ret_pc[name] = (np.full(m.N, -1, np.int64), {})
            table[0][rows] = pc
            table[1][pc] = back
            return entry

        return run

    def builtin(self, ins, pc, name, args, rets):
        if name == "vprintf":
            fmt = self.prog.param(args[0][1])[1]
            ret = self.prog.param(rets[0])[1] if rets else None

            def run(m, sel):
                t = int(m.tids(sel)[0])
                ptr = int(m.call_param(fmt)[t].view(np.uint64)[0])
                m.report.printed.append((m.thread_name(t), c_string(m, ptr)))
                if ret:
                    m.call_param(ret)[m.tids(sel)] = 0
                return pc + 1

            return run
        if name == "__assertfail":
            text = self.prog.param(args[0][1])[1]

            def run_assert(m, sel):
                t = int(m.tids(sel)[0])
                ptr = int(m.call_param(text)[t].view(np.uint64)[0])
                m.finding("trap", ins, m.tids(sel), f"assertion failed: {c_string(m, ptr)}", fatal=True)

            return run_assert
        raise unsupported(ins, f"function {name} has no body")

    def leave(self, ins, pc):
        """ret (or exit, or the end of the code)."""
        fn_name = None
        for name, base in self.prog.base.items():
            if base <= pc < base + len(self.prog.mod.functions[name].body) + 1:
                fn_name = name
        fn = self.prog.mod.functions[fn_name]

        def leave_kernel(m, sel):
            m.exit_threads(m.tids(sel))
            return None

        if fn.entry or (ins is not None and ins.op == "exit"):
            return leave_kernel

        def leave_function(m, sel):
            table, back = m.ret_pc[fn_name]
            tids = m.tids(sel)
            where = table[tids]
            sites = np.unique(where)
            for site in sites:
                t = tids[where == site]
                for src, dst in back[int(site)]:
                    m.call_param(dst)[t] = m.call_param(src)[t]
                m.pc[t] = int(site) + 1
            return int(sites[0]) + 1 if sites.size == 1 else None

        return leave_function

    # ---- block barriers ----
    def barrier(self, ins, pc):
        """bar.sync / bar.arrive / bar.red (also spelled barrier...)."""
        ops = list(ins.ops)
        arrive = "arrive" in ins.mods
        red = next((r for r in ("popc", "and", "or") if r in ins.mods), None) if "red" in ins.mods else None
        put = value = None
        if red:
            put = putter(ops.pop(0), "u32" if red == "popc" else "pred", self.prog)
            value = getter(ops.pop(), "pred", self.prog)
        ident = getter(ops[0], "u32", self.prog) if ops else None
        count = getter(ops[1], "u32", self.prog) if len(ops) > 1 else None
        simple = not arrive and not red and count is None and (not ops or ops[0][0] == "i")

        def run(m, sel):
            if simple and sel is None:
                m.sync_blocks(slice(None))
                return pc + 1
            tids = m.tids(sel)
            n = tids.size
            bid = np.broadcast_to(ident(m, sel), (n,)) if ident else np.zeros(n, np.int16)
            want = np.broadcast_to(count(m, sel), (n,)) if count else np.zeros(n, np.int32)
            if arrive:
                for i in np.unique(bid):
                    a = m.bar_arrived.setdefault(int(i), np.zeros(m.nblocks, np.int64))
                    a += np.bincount(m.slot_of[tids[bid == i]], minlength=m.nblocks)
                m.time += 1
                m.pc[tids] = pc + 1
            else:
                m.state[tids] = BAR
                m.pc[tids] = pc
                m.bar_id[tids] = bid
                m.bar_want[tids] = want
                if red:
                    m.bar_value[tids] = value(m, sel)
            self.barrier_progress(m, np.unique(m.slot_of[tids]))
            return None

        if red:
            self.reds[pc] = (red, put)
        return run

    def barrier_progress(self, m, slots):
        """Release the blocks among `slots` whose barrier is complete."""
        waiting = np.flatnonzero(m.state == BAR)
        if waiting.size == 0:
            return
        ids = m.bar_id[waiting]
        for i in np.unique(ids):
            w = waiting[ids == i]
            slot = m.slot_of[w]
            have = np.bincount(slot, minlength=m.nblocks)
            arrived = m.bar_arrived.get(int(i))
            if arrived is not None:
                have = have + arrived
            want = np.zeros(m.nblocks, np.int64)
            np.maximum.at(want, slot, m.bar_want[w])
            whole = want == 0
            want = np.where(whole, m.alive_count, want)
            waits = np.bincount(slot, minlength=m.nblocks) > 0
            done = waits & (have >= want)
            if not done.any():
                continue
            free = w[done[slot]]
            self.check_convergence(m, free, whole)
            m.sync_blocks(np.flatnonzero(done))
            if arrived is not None:
                arrived[done] = 0
            self.finish_red(m, free)
            m.pc[free] += 1
            m.state[free] = RUN

    def check_convergence(self, m, free, whole):
        pcs = m.pc[free]
        slot = m.slot_of[free]
        lo = np.full(m.nblocks, 1 << 30, np.int64)
        hi = np.full(m.nblocks, -1, np.int64)
        np.minimum.at(lo, slot, pcs)
        np.maximum.at(hi, slot, pcs)
        mixed = (lo < hi) & whole
        if mixed.any():
            s = int(np.flatnonzero(mixed)[0])
            bad = free[mixed[slot]]
            t = bad[m.slot_of[bad] == s]
            code = self.prog.code
            lines = sorted({code[int(q)].line for q in np.unique(m.pc[t])})
            m.finding(
                "divergent_barrier",
                code[int(lo[s])],
                bad,
                f"threads of one block met at different barriers (PTX lines {lines})",
            )
        short = np.zeros(m.nblocks, bool)
        present = np.unique(slot)
        short[present] = (m.alive_count[present] < m.threads) & whole[present]
        if short.any():
            s = int(np.flatnonzero(short)[0])
            bad = free[short[slot]]
            m.finding(
                "divergent_barrier",
                self.prog.code[int(lo[s])],
                bad,
                f"{m.threads - int(m.alive_count[s])} thread(s) of the block exited without reaching the barrier",
            )

    def finish_red(self, m, free):
        reds = self.reds
        if not reds:
            return
        pcs = m.pc[free]
        for pc in np.unique(pcs):
            if int(pc) not in reds:
                continue
            red, put = reds[int(pc)]
            t = free[pcs == pc]
            total = np.bincount(m.slot_of[t], weights=m.bar_value[t], minlength=m.nblocks).astype(np.int64)
            n = np.bincount(m.slot_of[t], minlength=m.nblocks)
            r = {"popc": total, "and": total == n, "or": total > 0}[red][m.slot_of[t]]
            put(m, t, r.astype(U32) if red == "popc" else r)

    # ---- cluster barriers ----
    def cluster(self, ins, pc):
        if "arrive" in ins.mods:

            def arrive(m, sel):
                tids = m.tids(sel)
                c = m.slot_of[tids] // m.cluster
                if m.cl_arrived[tids].any():
                    m.finding(
                        "divergent_barrier",
                        ins,
                        tids[m.cl_arrived[tids]],
                        "barrier.cluster.arrive twice without a wait",
                    )
                m.cl_arrived[tids] = True
                m.cl_phase[tids] = m.cluster_phase[c] + 1
                self.cluster_progress(m)
                return pc + 1

            return arrive
        if "wait" not in ins.mods:
            raise unsupported(ins)

        def wait(m, sel):
            tids = m.tids(sel)
            c = m.slot_of[tids] // m.cluster
            ready = m.cluster_phase[c] >= m.cl_phase[tids]
            if ready.all():
                return pc + 1
            t = tids[~ready]
            m.state[t] = CLUSTER
            m.pc[t] = pc
            m.pc[tids[ready]] = pc + 1
            return None

        return wait

    def cluster_progress(self, m):
        """Complete the cluster barriers at which all live threads have arrived."""
        c_of = m.slot_of // m.cluster
        ncl = m.nblocks // m.cluster
        waiting = np.bincount(c_of[m.alive & ~m.cl_arrived], minlength=ncl)
        some = np.bincount(c_of[m.cl_arrived], minlength=ncl) > 0
        done = (waiting == 0) & some
        if not done.any():
            return
        m.cluster_phase[done] += 1
        m.cl_arrived[done[c_of]] = False
        m.time += 1
        m.cluster_time[done] = m.time
        slots = np.flatnonzero(np.repeat(done, m.cluster))
        m.sync_blocks(slots)
        m.cluster_time[done] = m.time
        m.met_time[m.first + slots] = m.time
        m.time += 1
        woken = np.flatnonzero((m.state == CLUSTER) & done[c_of])
        m.state[woken] = RUN
        m.pc[woken] += 1


def c_string(m, ptr):
    r = m.gmem.regions.get(ptr >> 38)
    if r is None:
        return "?"
    raw = bytes(r.data[ptr - r.base :])
    return raw.split(b"\0")[0].decode(errors="replace")
