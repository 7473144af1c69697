"""The instructions on one path through a compiled kernel, and what they cost to issue.

A branch skips what a tile does not need, so the instructions between a loop's head and its end are no measure of it.
Here the cheapest and the dearest path from one instruction to another are found, each instruction weighted by the
issue slots it takes (`roofline.SLOTS`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

OPCODE = re.compile(r"^\s+/\*[0-9a-f]{4,5}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)((?:\.\w+)*)", re.MULTILINE)
LABEL = re.compile(r"^(\.L_x_\d+):")
# Before sm_90 a loop may be left by a call that doesn't return (CALL.REL.NOINC). BRA.DIV is for lanes of a warp that go
# different ways before they exchange numbers, which no kernel here makes them do.
BRANCH = re.compile(r"\b(?:BRA(?!\.DIV)|CALL)\b.*`\((\.L_x_\d+)\)")
PREDICATE = re.compile(r"!?\bU?P\d")
LEAVES = ("EXIT", "RET", "BRX")
END = -1


@dataclass(frozen=True)
class Code:
    """Instructions in program order."""

    opcodes: tuple[str, ...]
    """With their modifiers."""
    branches: Mapping[int, tuple[int, bool]]
    """By the place of the branch: where it leads, and whether it may fall through."""
    conditional: frozenset[int]
    """Places of instructions that run under a predicate."""
    loops: tuple[tuple[int, int], ...]
    """First instruction and last branch back to it, by their heads; inner ones included."""

    @cached_property
    def onward(self) -> tuple[tuple[int, ...], ...]:
        """Where it may go on from each instruction; END: nowhere."""
        return tuple(map(self._onward, range(len(self.opcodes))))

    def _onward(self, place: int) -> tuple[int, ...]:
        target, falls = self.branches.get(place, (END, True))
        found = [] if target == END else [target]
        if self.opcodes[place].startswith(LEAVES):
            found.append(END)
            falls = place in self.conditional
        if falls and place + 1 < len(self.opcodes):
            found.append(place + 1)
        return tuple(found)

    @cached_property
    def bodies(self) -> tuple[frozenset[int], ...]:
        """The instructions of each loop, wherever they lie."""
        before: list[list[int]] = [[] for _ in range(len(self.opcodes) + 1)]  # the last one: of END
        for place, targets in enumerate(self.onward):
            for target in targets:
                before[target].append(place)
        return tuple(self._body(head, before) for head, _end in self.loops)

    def _body(self, head: int, before: list[list[int]]) -> frozenset[int]:
        found = {head}
        left = [place for place, (target, _falls) in self.branches.items() if target == head and place > head]
        while left:
            place = left.pop()
            if place not in found:
                found.add(place)
                left += before[place]
        return frozenset(found)

    def path(
        self,
        cost: Callable[[str], float],
        start: int = 0,
        goal: int = END,
        times: Mapping[int, int] | None = None,
        dearest: bool = False,
        within: frozenset[int] | None = None,
    ) -> float:
        """The cost of the cheapest path from `start` until `goal`, which is not counted, or of the dearest.

        times: how often a loop on the way runs, by its number; otherwise once. within: where the path must stay.
        """
        weights = [cost(opcode) for opcode in self.opcodes]
        for number, count in (times or {}).items():
            for place in self.bodies[number]:
                weights[place] *= count
        none, better = (-math.inf, max) if dearest else (math.inf, min)
        rest: dict[int, float] = {}

        def edges(place: int) -> list[int]:
            return [x for x in self.onward[place] if x == goal or (x != END and (within is None or x in within))]

        way = {start: iter(edges(start))}  # from start to here: an edge back to it closes a loop
        while way:
            place = next(reversed(way))
            ahead = next((x for x in way[place] if x != goal and x not in way and x not in rest), None)
            if ahead is not None:
                way[ahead] = iter(edges(ahead))
                continue
            known = (0.0 if x == goal else rest.get(x, none) for x in edges(place))
            rest[place] = weights[place] + better(known, default=none)
            del way[place]
        return rest[start]

    def loop(
        self,
        cost: Callable[[str], float],
        number: int,
        times: Mapping[int, int] | None = None,
        dearest: bool = False,
    ) -> float:
        """The cost of one run of a loop."""
        head, _end = self.loops[number]
        return self.path(cost, head, head, times, dearest, self.bodies[number])

    def after(
        self, cost: Callable[[str], float], number: int, dearest: bool = False, without: frozenset[int] = frozenset()
    ) -> float:
        """The cost of the cheapest path from a loop to the end, or of the dearest; it passes nothing in `without`."""
        body = self.bodies[number]
        exits = {x for place in body for x in self.onward[place]} - body - {END}
        rest = frozenset(range(len(self.opcodes))) - body - without
        found = (self.path(cost, x, dearest=dearest, within=rest) for x in exits)
        return (max if dearest else min)(found, default=0.0)


def parse(sass: str) -> Code:
    """What nvdisasm printed."""
    opcodes: list[str] = []
    labels: dict[str, int] = {}
    branches: dict[int, tuple[str, bool]] = {}
    conditional = set()
    for line in sass.splitlines():
        if label := LABEL.match(line):
            labels[label[1]] = len(opcodes)
        elif found := OPCODE.match(line):
            if PREDICATE.search(line.split(";")[0][: found.start(1)]):
                conditional.add(len(opcodes))
            if branch := BRANCH.search(line):
                branches[len(opcodes)] = branch[1], bool(PREDICATE.search(line.split("`")[0]))
            opcodes.append(found[1] + found[2])
    while opcodes and opcodes[-1] == "NOP":
        opcodes.pop()
    leads = {place: (labels[label], falls) for place, (label, falls) in branches.items() if place < len(opcodes)}
    code = Code(tuple(opcodes), leads, frozenset(conditional), ())
    reached = {0}
    left = [0]
    while left:
        new = set(code.onward[left.pop()]) - reached - {END}
        reached |= new
        left += new
    ends: dict[int, int] = {}
    for place, (target, _falls) in leads.items():
        if target < place and place in reached:  # not the halt at the end
            ends[target] = max(place, ends.get(target, 0))
    return replace(code, loops=tuple(sorted(ends.items())))
