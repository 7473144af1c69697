"""Every address that a kernel touches in the interpreter, and who touched it when.

    with watching(read_only=(logits, target)) as watch: ...

raises `Fault` inside the launch where a program

- reads or writes what is not an element of a tensor it was given (a view is its elements, not what lies between them);
- writes an element of a tensor that is `read_only`;
- reads or writes what another program of the launch has touched, one of the two writing, and no chain of atomics orders
  the two: a program publishes by an atomic that releases and learns by one that acquires, of the same word. Writing the
  same value from several programs is let pass;
- releases without a barrier between what its threads wrote and the atomic, of which one thread does all; or reads after
  acquiring, or what its own threads wrote to global memory, without one.

So the order that programs run in does not matter: what is not ordered is a fault, however it came out this time.
"""

import contextlib

import numpy as np
from triton.runtime import interpreter
from triton.runtime.interpreter import interpreter_builder


class Fault(Exception):
    """A kernel did what it must not do; the message says which program did what to which tensor."""


ACQUIRES, RELEASES = ("ACQUIRE", "ACQUIRE_RELEASE"), ("RELEASE", "ACQUIRE_RELEASE")


class Region:
    """The elements of one tensor during a launch."""

    def __init__(self, tensor, number, programs, read_only):
        self.name = f"tensor {number} ({tuple(tensor.shape)}, {str(tensor.dtype).removeprefix('torch.')})"
        self.size, self.start, self.read_only = tensor.element_size(), tensor.data_ptr(), read_only
        reach = sum((n - 1) * abs(stride) for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
        length = reach + 1 if tensor.numel() else 0
        self.inside = np.zeros(length, bool)
        offsets = np.zeros(1, np.int64)
        for n, stride in zip(tensor.shape, tensor.stride(), strict=True):
            offsets = (offsets[:, None] + np.arange(n) * stride).reshape(-1)
        self.inside[offsets] = tensor.numel() > 0
        # When each program last read, stored to, and by an atomic changed an element, by its own clock; 0: never.
        self.read, self.stored, self.changed = (np.zeros((programs, length), np.int32) for _ in range(3))
        # By how many barriers its program had passed when an element was last stored.
        self.barriers = np.zeros((programs, length), np.int32)
        self.clocks = {}  # of words that release: what whoever acquires them learns

    def places(self, addresses):
        """Which elements are meant; −1 where none is."""
        offsets = addresses.astype(np.int64) - self.start
        place = offsets // self.size
        good = (offsets % self.size == 0) & (place >= 0) & (place < len(self.inside))
        good[good] = self.inside[place[good]]
        return np.where(good, place, -1)


class Watch:
    """What is known of the launch that runs."""

    def __init__(self, read_only=(), races=True):
        self.read_only = {tensor.data_ptr() for tensor in read_only}
        self.races = races
        self.launches = self.accesses = 0

    def start(self, count, tensors):
        """A launch begins."""
        self.launches += 1
        regions = {}
        for number, tensor in enumerate(tensors):
            regions.setdefault(
                (tensor.data_ptr(), tuple(tensor.shape), tensor.stride()),
                Region(tensor, number, count, tensor.data_ptr() in self.read_only),
            )
        self.regions = list(regions.values())
        self.clock = np.zeros((count, count), np.int32)  # what each program knows of each
        np.fill_diagonal(self.clock, 1)
        self.passed = np.zeros(count, np.int32)  # barriers
        self.unpublished, self.unread = np.zeros(count, bool), np.zeros(count, bool)

    @property
    def program(self):
        """Which one it is in."""
        return interpreter_builder.grid_idx[0]

    def fault(self, what, region=None):
        """Stop here."""
        raise Fault(f"program {self.program} {what}" + (f" {region.name}" if region else ""))

    def touch(self, addresses, mask, what):
        """A program is about to touch what `addresses` point to where `mask` holds; returns the tensors it touches."""
        mask = mask.astype(bool)  # of numbers it would be an index
        addresses = np.broadcast_to(addresses, mask.shape)[mask].reshape(-1)
        if not len(addresses):
            return []
        self.accesses += len(addresses)
        found, left = [], addresses
        for region in self.regions:
            place = region.places(left)
            if (place >= 0).any():
                if what != "reads" and region.read_only:
                    self.fault(f"{what}, but may only read,", region)
                found.append((region, place[place >= 0]))
                left = left[place < 0]
            if not len(left):
                return found
        address = int(left[0])
        near = min(self.regions, key=lambda r: abs(address - r.start - r.size * len(r.inside) / 2))
        return self.fault(f"{what} element {(address - near.start) / near.size:g}, which is none, next to", near)

    def unordered(self, history, places):
        """Whether another program touched one of these and this one has not heard of it."""
        me = self.program
        return (history[:, places] > self.clock[me][:, None]).any()

    def reads(self, addresses, mask):
        """A plain load."""
        me = self.program
        for region, places in self.touch(addresses, mask, "reads"):
            if self.races:
                if self.unread[me]:
                    self.fault("reads without a barrier after an acquire,", region)
                if self.unordered(region.stored, places) or self.unordered(region.changed, places):
                    self.fault("reads, unordered, what another one writes in", region)
                mine = region.stored[me, places] > 0
                if (region.barriers[me, places][mine] == self.passed[me]).any():
                    self.fault("reads without a barrier what its own threads stored to", region)
            region.read[me, places] = self.clock[me, me]

    def writes(self, addresses, values, mask):
        """A plain store."""
        me = self.program
        for region, places in self.touch(addresses, mask, "writes"):
            if self.races and (self.unordered(region.read, places) or self.unordered(region.changed, places)):
                self.fault("writes, unordered, what another one reads or adds to in", region)
            if self.races and self.unordered(region.stored, places) and not self.same(addresses, values, mask):
                self.fault("writes, unordered, what another one writes in", region)
            region.stored[me, places] = self.clock[me, me]
            region.barriers[me, places] = self.passed[me]
            self.unpublished[me] = True

    @staticmethod
    def same(addresses, values, mask):
        """Whether what is written is there already."""
        width = values.dtype.itemsize
        addresses, values = (np.broadcast_to(x, mask.shape)[mask].reshape(-1) for x in (addresses, values))
        other = np.zeros_like(values)
        there = interpreter._interpreter.load(addresses, np.ones(addresses.shape, bool), other, values.dtype)
        return there.view(f"u{width}").tolist() == values.view(f"u{width}").tolist()

    def changes(self, addresses, mask, sem):
        """An atomic."""
        me = self.program
        sem = str(sem).rsplit(".", 1)[-1]
        if sem in RELEASES and self.races and self.unpublished[me]:
            self.fault("releases without a barrier after what its threads wrote")
        for region, places in self.touch(addresses, mask, "changes"):
            if self.races and (self.unordered(region.stored, places) or self.unordered(region.read, places)):
                self.fault("changes, unordered, what another one stores to or reads in", region)
            region.changed[me, places] = self.clock[me, me]
            for place in places if sem in (*ACQUIRES, *RELEASES) else ():
                known = region.clocks.setdefault(int(place), np.zeros_like(self.clock[me]))
                if sem in RELEASES:
                    np.maximum(known, self.clock[me], out=known)
                if sem in ACQUIRES:
                    np.maximum(self.clock[me], known, out=self.clock[me])
                    self.unread[me] = True
        if sem in RELEASES:
            self.clock[me, me] += 1
        else:
            self.unpublished[me] |= sem not in ACQUIRES and bool(np.any(mask))

    def barrier(self):
        """All threads of the program are here."""
        self.passed[self.program] += 1
        self.unpublished[self.program] = self.unread[self.program] = False


@contextlib.contextmanager
def watching(read_only=(), races=True):
    """Watch every launch; `races`: their order too, not the addresses alone."""
    import interpreter as ours

    watch, builder = Watch(read_only, races), interpreter_builder
    load, store, rmw, cas = (
        getattr(builder, f"create_{name}") for name in ("masked_load", "masked_store", "atomic_rmw", "atomic_cas")
    )

    def masked_load(ptrs, mask, *rest):
        watch.reads(ptrs.data, mask.data)
        return load(ptrs, mask, *rest)

    def masked_store(ptrs, value, mask, *rest):
        watch.writes(ptrs.data, value.data, mask.data)
        return store(ptrs, value, mask, *rest)

    def atomic_rmw(op, ptr, val, mask, sem, scope):
        watch.changes(ptr.data, mask.data, sem)
        return rmw(op, ptr, val, mask, sem, scope)

    def atomic_cas(ptr, *rest):
        watch.changes(ptr.data, np.ones_like(ptr.data, bool), rest[-2])
        return cas(ptr, *rest)

    ours.on_launch.append(watch.start)
    try:
        with ours.replaced(
            create_masked_load=masked_load,
            create_masked_store=masked_store,
            create_atomic_rmw=atomic_rmw,
            create_atomic_cas=atomic_cas,
            create_barrier=watch.barrier,
        ):
            yield watch
    finally:
        ours.on_launch.remove(watch.start)
