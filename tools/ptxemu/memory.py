"""Global, shared and local memory with bounds, alignment and race checks.

Global addresses are virtual: every allocation lies in a window of 2**38
bytes of its own, 512-byte aligned like a device allocation, so that an
access outside an allocation never falls into another one by accident.
"""

import ctypes

import numpy as np

WINDOW = 38
SHARED_ID, LOCAL_ID = 4, 8
SHARED_BASE, LOCAL_BASE = SHARED_ID << WINDOW, LOCAL_ID << WINDOW
FIRST_ID = 64
MODULE_ID = 4096
RAW = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


def bytes_at(ptr, nbytes):
    """uint8 array over existing memory."""
    if nbytes == 0:
        return np.zeros(0, np.uint8)
    return np.frombuffer((ctypes.c_uint8 * nbytes).from_address(ptr), np.uint8)


class Shadow:
    """Last writer and readers of every granule; the granule shrinks when a narrower access comes."""

    def __init__(self, nbytes, granule=16):
        self.nbytes = nbytes
        self.log = granule.bit_length() - 1
        n = -(-nbytes // granule)
        self.w_id = np.full(n, -1, np.int32)
        self.w_time = np.full(n, -1, np.int32)
        self.w_strong = np.zeros(n, np.bool_)
        self.r_id = np.full(n, -1, np.int32)
        self.r_time = np.full(n, -1, np.int32)
        self.r_many = np.full(n, -1, np.int32)
        self.r_far = np.full(n, -1, np.int32)
        self.group = np.zeros(n, np.int32)  # cp.async group that wrote it, 0 for other writes

    def granules(self, off, width):
        """(flat granule index, number per access)."""
        log = width.bit_length() - 1
        while self.log > log:
            self.log -= 1
            for name in ("w_id", "w_time", "w_strong", "r_id", "r_time", "r_many", "r_far", "group"):
                setattr(self, name, np.repeat(getattr(self, name), 2))
        g = off >> self.log
        k = width >> self.log
        if k > 1:
            g = (g[:, None] + np.arange(k)).reshape(-1)
        return g, k


class Region:
    """One global allocation."""

    def __init__(self, ident, name, data):
        self.id, self.name, self.data = ident, name, data
        self.nbytes = data.shape[0]
        self.base = (ident << WINDOW) + (1 << (WINDOW - 1))
        self.views = {}
        self.shadow = None
        self.reset()

    def reset(self):
        n = self.nbytes // 32 + 1
        self.read_sectors = np.zeros(n, np.bool_)
        self.written_sectors = np.zeros(n, np.bool_)
        self.load_bytes = self.store_bytes = 0
        self.load_sectors = self.store_sectors = 0
        self.atomic_count = 0
        self.shadow = None

    def view(self, elem, count=1):
        v = self.views.get((elem, count))
        if v is None:
            w = elem * count
            v = self.data[: self.nbytes // w * w].view(RAW[elem])
            if count > 1:
                v = v.reshape(-1, count)
            self.views[(elem, count)] = v
        return v


def sectors(m, tids, full, off, width):
    """32-byte sectors touched per warp request, summed; and their indices."""
    s = off >> 5
    if full and s.shape[0] == m.N:
        s2 = s.reshape(-1, 32)
        d = s2[:, 1:] - s2[:, :-1]
        if d.min(initial=0) < 0:
            s2 = np.sort(s2, axis=1)
            d = s2[:, 1:] - s2[:, :-1]
        return s2.shape[0] + int(np.count_nonzero(d)), s
    key = (tids.astype(np.int64) >> 5 << 36) + s
    d = key[1:] - key[:-1]
    if d.min(initial=0) < 0:
        key = np.sort(key)
        d = key[1:] - key[:-1]
    return 1 + int(np.count_nonzero(d)), s


class GlobalMemory:
    def __init__(self):
        self.regions = {}
        self.next_id = FIRST_ID
        self.races = True
        self.stats = True

    def add(self, name, data, ident=None):
        if ident is None:
            ident = self.next_id
            self.next_id += 1
        r = Region(ident, name, data)
        self.regions[ident] = r
        return r

    def describe(self, addr):
        r = self.regions.get(int(addr) >> WINDOW)
        if r is None:
            return f"address 0x{int(addr):x} is in no known allocation"
        off = int(addr) - r.base
        return f"byte {off} of {r.name} ({r.nbytes} bytes)"

    def resolve(self, m, tids, addr, width, ins, what):
        """List of (region, positions or None, byte offsets); bad accesses are reported and left out."""
        r = self.regions.get(int(addr[0]) >> WINDOW)
        if r is not None:
            off = (addr - np.uint64(r.base)).view(np.int64)
            if off.min() >= 0 and off.max() + width <= r.nbytes and not int(np.bitwise_or.reduce(off)) & (width - 1):
                return [(r, None, off)]
        out = []
        ids = (addr >> np.uint64(WINDOW)).astype(np.int64)
        for i in np.unique(ids):
            pos = np.flatnonzero(ids == i)
            r = self.regions.get(int(i))
            if r is None:
                m.finding("global_oob", ins, tids[pos], f"{what} of {width} bytes: {self.describe(addr[pos[0]])}")
                continue
            off = (addr[pos] - np.uint64(r.base)).view(np.int64)
            bad = (off < 0) | (off + width > r.nbytes)
            mis = (off & (width - 1)) != 0
            if bad.any():
                b = pos[bad]
                m.finding("global_oob", ins, tids[b], f"{what} of {width} bytes at {self.describe(addr[b[0]])}")
            if (mis & ~bad).any():
                b = pos[mis & ~bad]
                m.finding("misaligned", ins, tids[b], f"{what} of {width} bytes at {self.describe(addr[b[0]])}")
            ok = ~bad & ~mis
            if ok.any():
                out.append((r, pos[ok], off[ok]))
        return out

    def load(self, m, sel, addr, elem, count, ins, strong=False):
        """Raw values, shape (n, count)."""
        tids = m.tids(sel)
        n = tids.shape[0]
        if addr.shape[0] != n:
            addr = np.repeat(addr, n)
        width = elem * count
        parts = self.resolve(m, tids, addr, width, ins, "load")
        shift = width.bit_length() - 1
        res = None
        for r, pos, off in parts:
            t = tids if pos is None else tids[pos]
            self.account(m, t, sel is None and pos is None, r, off, width, False)
            if self.races:
                self.race_read(m, t, r, off, width, ins, strong)
            v = r.view(elem, count).take(off >> shift, axis=0)
            if pos is None:
                return v.reshape(-1, count)
            if res is None:
                res = np.zeros((n, count), RAW[elem])
            res[pos] = v.reshape(-1, count)
        return res if res is not None else np.zeros((n, count), RAW[elem])

    def store(self, m, sel, addr, vals, elem, count, ins, strong=False):
        tids = m.tids(sel)
        n = tids.shape[0]
        if addr.shape[0] != n:
            addr = np.repeat(addr, n)
        width = elem * count
        shift = width.bit_length() - 1
        for r, pos, off in self.resolve(m, tids, addr, width, ins, "store"):
            t = tids if pos is None else tids[pos]
            v = vals if pos is None else vals[pos]
            self.account(m, t, sel is None and pos is None, r, off, width, True)
            view = r.view(elem, count)
            idx = off >> shift
            if count == 1:
                v = v[:, 0]
            if self.races:
                self.race_write(m, t, r, off, width, ins, strong, view, idx, v)
            else:
                view[idx] = v

    def account(self, m, tids, full, r, off, width, is_store):
        n = off.shape[0]
        if not self.stats:
            return
        ns, s = sectors(m, tids, full, off, width)
        rep = m.report
        if is_store:
            r.store_bytes += n * width
            r.store_sectors += ns
            r.written_sectors[s] = True
            rep.store_widths[width] = rep.store_widths.get(width, 0) + n
        else:
            r.load_bytes += n * width
            r.load_sectors += ns
            r.read_sectors[s] = True
            rep.load_widths[width] = rep.load_widths.get(width, 0) + n

    # ---- races between thread blocks ----
    def unordered(self, m, other, when, cta):
        """Accesses of block `other` at time `when` not ordered before the present ones of `cta`
        through a fence (or releasing atomic) on one side and an atomic on the other, or through a
        barrier of the cluster that both are in."""
        met = (other // m.cluster == cta // m.cluster) & (m.met_time[cta] > when)
        return (other != cta) & ~((m.fence_time[other] >= when) & (m.atom_time[cta] > when)) & ~met

    def race_read(self, m, tids, r, off, width, ins, strong):
        sh = r.shadow
        if sh is None:
            sh = r.shadow = Shadow(r.nbytes)
        g, k = sh.granules(off, width)
        cta = m.cta_of[tids]
        if k > 1:
            cta = np.repeat(cta, k)
        w = sh.w_id[g]
        bad = (w >= 0) & (w != cta)
        if bad.any():
            bad &= self.unordered(m, w, sh.w_time[g], cta)
            if strong:
                bad &= ~sh.w_strong[g]
            if bad.any():
                self.report_race(m, ins, tids, bad, k, r, off, w, "read of bytes written by")
        if strong:
            return
        # r_many: time of the last read by another block than the latest reader; r_far: by one of another cluster
        old, when = sh.r_id[g], sh.r_time[g]
        other = (old >= 0) & (old != cta)
        if other.any():
            sh.r_many[g[other]] = when[other]
            far = other & (old // m.cluster != cta // m.cluster)
            sh.r_far[g[far]] = when[far]
        sh.r_id[g] = cta
        sh.r_time[g] = m.time
        other = sh.r_id[g] != cta
        if other.any():
            sh.r_many[g[other]] = m.time
            far = other & (sh.r_id[g] // m.cluster != cta // m.cluster)
            sh.r_far[g[far]] = m.time

    def race_write(self, m, tids, r, off, width, ins, strong, view, idx, v, atomic=False):
        sh = r.shadow
        if sh is None:
            sh = r.shadow = Shadow(r.nbytes)
        g, k = sh.granules(off, width)
        cta = m.cta_of[tids]
        c = np.repeat(cta, k) if k > 1 else cta
        w = sh.w_id[g]
        bad = (w >= 0) & (w != c)
        if bad.any():
            bad &= self.unordered(m, w, sh.w_time[g], c)
            if strong:
                bad &= ~sh.w_strong[g]
            if bad.any():
                same = view[idx] == v if v is not None else np.zeros(idx.shape, bool)
                if same.ndim > 1:
                    same = same.all(1)
                self.report_race(m, ins, tids, bad, k, r, off, w, "write over bytes written by", same)
        rd = sh.r_id[g]
        bad = (rd >= 0) & (rd != c)
        many = sh.r_many[g] >= 0
        if bad.any() or many.any():
            bad &= self.unordered(m, rd, sh.r_time[g], c)
            # earlier readers: the writer must at least have executed an atomic since, or, where all are of its
            # cluster, have met them
            met = (sh.r_far[g] < 0) & (rd // m.cluster == c // m.cluster) & (m.met_time[c] > sh.r_many[g])
            bad |= many & (m.atom_time[c] <= sh.r_many[g]) & ~met
            if bad.any():
                self.report_race(m, ins, tids, bad, k, r, off, rd, "write over bytes read by")
        if not atomic:
            view[idx] = v
        sh.w_id[g] = c
        sh.w_time[g] = m.time
        sh.w_strong[g] = strong
        if not strong:
            bad = sh.w_id[g] != c
            if bad.any():
                same = view[idx] == v
                if same.ndim > 1:
                    same = same.all(1)
                self.report_race(m, ins, tids, bad, k, r, off, sh.w_id[g], "write together with", same)

    def report_race(self, m, ins, tids, bad, k, r, off, other, what, same=None):
        acc = bad.reshape(-1, k).any(1) if k > 1 else bad
        first = int(np.flatnonzero(bad)[0])
        if same is not None:
            real = acc & ~same
            kind = "global_race" if real.any() else "global_race_same_value"
            acc = real if real.any() else acc
        else:
            kind = "global_race"
        i = int(np.flatnonzero(acc)[0])
        m.finding(
            kind,
            ins,
            tids[acc],
            f"{what} {m.block_name(int(other[first]))}: byte {int(off[i])} of {r.name}, no atomic or fence orders them",
        )


class SharedMemory:
    """Shared memory of all thread blocks of a batch."""

    def __init__(self, m, nblocks, size, races):
        self.size = size
        self.stride = max(128, -(-size // 128) * 128)
        self.data = np.zeros(nblocks * self.stride, np.uint8)
        self.views = {}
        self.shadow = Shadow(self.data.shape[0]) if races else None
        self.copies = False

    def view(self, elem, count=1):
        v = self.views.get((elem, count))
        if v is None:
            v = self.data.view(RAW[elem])
            if count > 1:
                v = v.reshape(-1, count)
            self.views[(elem, count)] = v
        return v

    def resolve(self, m, tids, addr, width, ins, what):
        """(positions or None, offsets into the batch's shared memory)."""
        a = addr.astype(np.int64)
        slot = m.slot_of[tids]
        top = a >> 24  # block of the cluster plus 1 (mapa); a launch without a cluster is a cluster of 1
        if top.any():
            rank = np.where(top == 0, slot % m.cluster, top - 1)
            slot = slot - slot % m.cluster + rank
            a = a & 0xFFFFFF
            bad = (rank < 0) | (rank >= m.cluster)
            if bad.any():
                m.finding("shared_oob", ins, tids[bad], f"{what}: no such block in the cluster")
                slot = np.where(bad, 0, slot)
                a = np.where(bad, -1, a)
            m.remote_access(tids, slot, ins)
        bad = (a < 0) | (a + width > self.size)
        mis = (a & (width - 1)) != 0
        off = a + slot.astype(np.int64) * self.stride
        if not bad.any() and not mis.any():
            return None, off
        if bad.any():
            b = np.flatnonzero(bad)
            m.finding(
                "shared_oob",
                ins,
                tids[b],
                f"{what} of {width} bytes at shared byte {int(a[b[0]])}, {self.size} allocated",
            )
        if (mis & ~bad).any():
            b = np.flatnonzero(mis & ~bad)
            m.finding("misaligned", ins, tids[b], f"{what} of {width} bytes at shared byte {int(a[b[0]])}")
        pos = np.flatnonzero(~bad & ~mis)
        return pos, off[pos]

    def load(self, m, sel, addr, elem, count, ins, strong=False):
        tids = m.tids(sel)
        n = tids.shape[0]
        if addr.shape[0] != n:
            addr = np.repeat(addr, n)
        width = elem * count
        pos, off = self.resolve(m, tids, addr, width, ins, "load")
        t = tids if pos is None else tids[pos]
        if t.size:
            m.bank_waves(t, off, width, False)
            if self.shadow is not None:
                self.check_read(m, t, off, width, ins, strong)
        v = self.view(elem, count).take(off >> (width.bit_length() - 1), axis=0).reshape(-1, count)
        if pos is None:
            return v
        res = np.zeros((n, count), RAW[elem])
        res[pos] = v
        return res

    def store(self, m, sel, addr, vals, elem, count, ins, strong=False, copying=False):
        tids = m.tids(sel)
        n = tids.shape[0]
        if addr.shape[0] != n:
            addr = np.repeat(addr, n)
        width = elem * count
        pos, off = self.resolve(m, tids, addr, width, ins, "store")
        t = tids if pos is None else tids[pos]
        if not t.size:
            return
        v = vals if pos is None else vals[pos]
        m.bank_waves(t, off, width, True)
        view = self.view(elem, count)
        idx = off >> (width.bit_length() - 1)
        if count == 1:
            v = v[:, 0]
        if self.shadow is not None:
            self.check_write(m, t, off, width, ins, strong, view, idx, v)
            if copying or self.copies:
                self.copies = True
                g, k = self.shadow.granules(off, width)
                self.shadow.group[g] = np.repeat(m.copy_committed[t] + 1, k) if copying else 0
        else:
            view[idx] = v

    # ---- races between barriers ----
    def conflicting(self, m, other, when, tid):
        """Accesses by thread `other` at `when` that no barrier separates from thread `tid` now."""
        oc, tc = m.slot_of[other], m.slot_of[tid]
        bar = m.bar_time[tc]
        if m.cluster > 1:
            bar = np.where(oc == tc, bar, m.cluster_time[tc // m.cluster])
        same_warp = (other >> 5) == (tid >> 5)
        limit = np.where(same_warp, np.maximum(bar, m.warp_time[tid >> 5]), bar)
        return (when > limit) & (other != tid)

    def check_read(self, m, tids, off, width, ins, strong):
        sh = self.shadow
        g, k = sh.granules(off, width)
        t = np.repeat(tids, k) if k > 1 else tids
        wt = sh.w_time[g]
        if (wt < 0).any():
            bad = (wt < 0).reshape(-1, k).any(1)
            i = int(np.flatnonzero(bad)[0])
            m.finding(
                "shared_uninit",
                ins,
                tids[bad],
                f"read of {width} bytes never written at shared byte {int(off[i]) % self.stride}",
            )
        w = sh.w_id[g]
        if self.copies:
            bad = (sh.group[g] > 0) & (m.copy_done[w] < sh.group[g])
            if bad.any():
                acc = bad.reshape(-1, k).any(1)
                i = int(np.flatnonzero(acc)[0])
                m.finding(
                    "copy_not_awaited",
                    ins,
                    tids[acc],
                    f"read of bytes still being copied by cp.async: shared byte {int(off[i]) % self.stride}",
                )
        recent = wt > m.last_sync
        if recent.any():
            bad = recent & self.conflicting(m, w, wt, t)
            if strong:
                bad &= ~sh.w_strong[g]
            if bad.any():
                self.report(m, ins, tids, bad, k, off, w, "read of bytes written by")
        if strong:
            return
        # reads before the block met are over, though another block of the batch may not have come so far
        when = sh.r_time[g]
        over = when <= m.bar_time[m.slot_of[t]]
        if over.any():
            sh.r_time[g[over]] = -1
        prev, when = sh.r_id[g], sh.r_time[g]
        many = (when > m.last_sync) & (prev >> 5 != t >> 5)
        sh.r_id[g] = t
        sh.r_time[g] = m.time
        many |= sh.r_id[g] >> 5 != t >> 5
        if many.any():
            sh.r_many[g[many]] = m.time

    def check_write(self, m, tids, off, width, ins, strong, view, idx, v, atomic=False):
        sh = self.shadow
        g, k = sh.granules(off, width)
        t = np.repeat(tids, k) if k > 1 else tids
        wt = sh.w_time[g]
        recent = wt > m.last_sync
        if recent.any():
            w = sh.w_id[g]
            bad = recent & self.conflicting(m, w, wt, t)
            if strong:
                bad &= ~sh.w_strong[g]
            if bad.any() and v is not None:
                same = view[idx] == v
                if same.ndim > 1:
                    same = same.all(1)
                bad &= ~np.repeat(same, k)
            if bad.any():
                self.report(m, ins, tids, bad, k, off, w, "write over bytes written by")
        rt = sh.r_time[g]
        recent = rt > m.last_sync
        if recent.any():
            r = sh.r_id[g]
            bad = recent & self.conflicting(m, r, rt, t)
            many = sh.r_many[g]
            bad |= many > m.bar_time[m.slot_of[t]]
            if bad.any() and v is not None:
                same = view[idx] == v
                if same.ndim > 1:
                    same = same.all(1)
                bad &= ~np.repeat(same, k)
            if bad.any():
                self.report(m, ins, tids, bad, k, off, r, "write over bytes read by")
        if not atomic:
            view[idx] = v
        sh.w_id[g] = t
        sh.w_time[g] = m.time
        sh.w_strong[g] = strong
        if not strong:
            clash = sh.w_id[g] != t
            if clash.any():
                same = view[idx] == v
                if same.ndim > 1:
                    same = same.all(1)
                clash &= ~np.repeat(same, k)
                if clash.any():
                    self.report(m, ins, tids, clash, k, off, sh.w_id[g], "write together with")

    def report(self, m, ins, tids, bad, k, off, other, what):
        acc = bad.reshape(-1, k).any(1) if k > 1 else bad
        i = int(np.flatnonzero(acc)[0])
        first = int(np.flatnonzero(bad)[0])
        o = int(other[first])
        warp = " (same warp, no bar.warp.sync)" if o >> 5 == int(tids[i]) >> 5 else ""
        m.finding(
            "shared_race",
            ins,
            tids[acc],
            f"{what} {m.thread_name(o)} with no barrier in between{warp}: shared byte {int(off[i]) % self.stride}",
        )


class LocalMemory:
    def __init__(self, nthreads, size):
        self.size = size
        self.stride = max(16, -(-size // 16) * 16)
        self.data = np.zeros(nthreads * self.stride, np.uint8)

    def offsets(self, m, tids, addr, width, ins, what):
        a = addr.astype(np.int64)
        bad = (a < 0) | (a + width > self.size)
        mis = (a & (width - 1)) != 0
        if bad.any():
            m.finding(
                "local_oob",
                ins,
                tids[bad],
                f"{what} of {width} bytes at local byte {int(a[bad][0])}, {self.size} allocated",
            )
        if (mis & ~bad).any():
            m.finding("misaligned", ins, tids[mis & ~bad], f"{what} of {width} bytes in local memory")
        off = a + tids.astype(np.int64) * self.stride
        ok = ~(bad | mis)
        return (None, off) if ok.all() else (np.flatnonzero(ok), off[ok])

    def load(self, m, sel, addr, elem, count, ins, strong=False):
        tids = m.tids(sel)
        n = tids.shape[0]
        if addr.shape[0] != n:
            addr = np.repeat(addr, n)
        width = elem * count
        pos, off = self.offsets(m, tids, addr, width, ins, "load")
        view = self.data.view(RAW[elem]).reshape(-1, count)
        v = view.take(off >> (width.bit_length() - 1), axis=0)
        if pos is None:
            return v
        res = np.zeros((n, count), RAW[elem])
        res[pos] = v
        return res

    def store(self, m, sel, addr, vals, elem, count, ins, strong=False):
        tids = m.tids(sel)
        if addr.shape[0] != tids.shape[0]:
            addr = np.repeat(addr, tids.shape[0])
        width = elem * count
        pos, off = self.offsets(m, tids, addr, width, ins, "store")
        view = self.data.view(RAW[elem]).reshape(-1, count)
        view[off >> (width.bit_length() - 1)] = vals if pos is None else vals[pos]


# ---- atomics ----
def atomic_rounds(idx):
    """Lists of positions such that no address occurs twice in one list; program order kept."""
    order = np.argsort(idx, kind="stable")
    s = idx[order]
    new = np.empty(s.shape, bool)
    new[0] = True
    new[1:] = s[1:] != s[:-1]
    if new.all():
        return [slice(None)]
    start = np.maximum.accumulate(np.where(new, np.arange(s.size), 0))
    rank = np.arange(s.size) - start
    by_rank = order[np.argsort(rank, kind="stable")]
    cuts = np.cumsum(np.bincount(rank))[:-1]
    return np.split(by_rank, cuts)


def atomic_apply(view, idx, fn, val, cmp=None, at=None, need_old=True):
    """Apply fn(old, val[, cmp]) one thread after another; returns the old values."""
    if at is not None and not need_old:
        at(view, idx, val)
        return None
    old = np.empty(idx.shape, view.dtype)
    for pos in atomic_rounds(idx):
        i = idx[pos]
        cur = view[i]
        old[pos] = cur
        view[i] = fn(cur, val[pos]) if cmp is None else fn(cur, val[pos], cmp[pos])
    return old
