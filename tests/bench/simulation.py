"""A render farm in discrete events: what nodes and drivers that die cost, and where more nodes stop helping.

    slots   each takes the next queued object, or idles; an object takes a drawn time
    driver  one server: every result costs it `driver_s`, then it queues another object, keeping two a slot in flight
    shards  open in order; a whole one is assembled by one node, then it counts
    nodes   die and return; what ran there and what results lay there is noticed `detect_s` later and made again
    driver  dies, too: whatever is not committed is lost, and `restart_s` later another one goes on

This is `jobs.build`'s way of working, less what does not cost: bytes move for nothing, and the store answers at once.
Times of nodes and drivers are drawn from exponential laws, of objects from a log-normal one.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Farm:
    """What is simulated; times in seconds, of one slot."""

    nodes: int = 200
    slots: int = 16
    objects: int = 100_000
    per_shard: int = 64
    object_s: float = 29.0
    object_sigma: float = 0.6
    driver_s: float = 0.001
    assemble_s: float = 0.02
    node_mtbf_s: float = 24 * 3600.0
    node_return_s: float = 300.0
    detect_s: float = 60.0
    driver_mtbf_s: float = 7 * 24 * 3600.0
    restart_s: float = 60.0
    requests_per_shard: float = 4.0


@dataclass(slots=True, eq=False)
class _Shard:
    waiting: int
    size: int
    at: list[tuple[int, int, float]] = field(default_factory=list)  # (node, its life, seconds) of each result
    is_assembling: bool = False


class Simulation:
    """One run of a farm."""

    def __init__(self, farm: Farm, seed: int = 0) -> None:
        self.farm, self.rng = farm, random.Random(seed)
        self.now, self.events, self._order = 0.0, list[tuple[float, int, str, Any]](), itertools.count()
        self.idle = deque((node, slot) for slot in range(farm.slots) for node in range(farm.nodes))
        self.life = [0] * farm.nodes  # how often a node died; what was begun in another life is lost
        self.is_up = [True] * farm.nodes
        self.queued: deque[_Shard] = deque()
        self.open: list[_Shard] = []
        self.running: dict[int, tuple[int, int, _Shard, float]] = {}  # task -> node, life, shard, since
        self.left, self.in_flight, self.assembling, self.era = farm.objects, 0, 0, 0
        self.driver_free_s, self.is_driven = 0.0, True
        self.useful_s = self.capacity_s = self.driver_busy_s = 0.0
        self.waste: Counter[str] = Counter()
        self.deaths: Counter[str] = Counter()
        self.committed = self.shards = 0
        self._since = 0.0

    def at(self, when: float, what: str, value: Any = None) -> None:
        """Plan an event."""
        heapq.heappush(self.events, (when, next(self._order), what, value))

    def run(self) -> dict[str, float]:
        """Run to the end; returns what came of it."""
        farm = self.farm
        for node in range(farm.nodes):
            self.at(self.rng.expovariate(1 / farm.node_mtbf_s), "die", node)
        self.at(self.rng.expovariate(1 / farm.driver_mtbf_s), "driver_dies")
        self._fill()
        while self.committed < farm.objects:
            when, _, what, value = heapq.heappop(self.events)
            self.capacity_s += (when - self._since) * sum(self.is_up) * farm.slots
            self.now = self._since = when
            getattr(self, f"_{what}")(value)
        return {
            "efficiency": self.useful_s / self.capacity_s,
            "hours": self.now / 3600,
            "objects_per_s": farm.objects / self.now,
            "driver_busy": self.driver_busy_s / self.now,
            "store_requests_per_s": self.shards * farm.requests_per_shard / self.now,
            **{f"waste_{name}": share / self.capacity_s for name, share in sorted(self.waste.items())},
            **{name: float(count) for name, count in sorted(self.deaths.items())},
        }

    def _fill(self) -> None:
        """Queue objects, lowest shard first, until two a living slot are in flight; idle slots take them."""
        if not self.is_driven:
            return
        window = 2 * sum(self.is_up) * self.farm.slots
        place = 0
        while self.in_flight < window:
            while place < len(self.open) and not self.open[place].waiting:
                place += 1
            if place == len(self.open):
                if not self.left:
                    break
                size = min(self.farm.per_shard, self.left)
                self.left -= size
                self.open.append(_Shard(size, size))
            self.open[place].waiting -= 1
            self.in_flight += 1
            self.queued.append(self.open[place])
        while self.queued and self.idle:
            node, slot = self.idle.popleft()
            if self.is_up[node]:
                self._start(node, slot)

    def _start(self, node: int, slot: int) -> None:
        sigma = self.farm.object_sigma
        seconds = self.farm.object_s * math.exp(self.rng.gauss(-sigma * sigma / 2, sigma))
        task = next(self._order)
        self.running[task] = (node, self.life[node], self.queued.popleft(), self.now)
        self.at(self.now + seconds, "made", (task, slot))

    def _made(self, value: tuple[int, int]) -> None:
        task, slot = value
        if task not in self.running:
            return
        node, life, shard, since = self.running.pop(task)
        if self.queued:
            self._start(node, slot)
        else:
            self.idle.append((node, slot))
        begun = max(self.now, self.driver_free_s)
        self.driver_free_s = begun + self.farm.driver_s
        self.driver_busy_s += self.farm.driver_s
        self.at(self.driver_free_s, "told", (self.era, shard, (node, life, self.now - since)))

    def _told(self, value: tuple[int, _Shard, tuple[int, int, float]]) -> None:
        """The driver has heard of a result."""
        era, shard, result = value
        if era != self.era:
            self.waste["driver"] += result[2]
            return
        self.in_flight -= 1
        shard.at.append(result)
        self._assemble()
        self._fill()

    def _assemble(self) -> None:
        for shard in self.open:
            if self.assembling >= max(1, sum(self.is_up)):
                return
            if not shard.is_assembling and len(shard.at) == shard.size:
                shard.is_assembling = True
                self.assembling += 1
                self.at(self.now + self.farm.assemble_s * shard.size, "stored", (self.era, shard))

    def _stored(self, value: tuple[int, _Shard]) -> None:
        era, shard = value
        if era != self.era:
            return
        self.assembling -= 1
        shard.is_assembling = False
        if len(shard.at) < shard.size:  # a node took results with it meanwhile
            return
        self.useful_s += sum(seconds for _, _, seconds in shard.at)
        self.committed += shard.size
        self.shards += 1
        self.open.remove(shard)
        self._assemble()
        self._fill()

    def _die(self, node: int) -> None:
        self.deaths["node_deaths"] += 1
        self.is_up[node] = False
        self.life[node] += 1
        lost = [task for task, (where, *_) in self.running.items() if where == node]
        for task in lost:
            *_, since = self.running[task]
            self.waste["running"] += self.now - since
        gone = [self.running.pop(task)[2] for task in lost]
        self.at(self.now + self.farm.detect_s, "noticed", (self.era, node, gone))
        self.at(self.now + self.farm.node_return_s, "return", node)

    def _noticed(self, value: tuple[int, int, list[_Shard]]) -> None:
        era, node, gone = value
        if era != self.era:
            return
        for shard in gone:
            self.in_flight -= 1
            shard.waiting += 1
        for shard in self.open:
            lost = [result for result in shard.at if result[0] == node and result[1] != self.life[node]]
            shard.at = [result for result in shard.at if result not in lost]
            shard.waiting += len(lost)
            self.waste["results"] += sum(seconds for _, _, seconds in lost)
        self._fill()

    def _return(self, node: int) -> None:
        self.is_up[node] = True
        self.idle = deque(place for place in self.idle if place[0] != node)
        self.idle.extend((node, slot) for slot in range(self.farm.slots))
        self.at(self.now + self.rng.expovariate(1 / self.farm.node_mtbf_s), "die", node)
        self._fill()

    def _driver_dies(self, _: None) -> None:
        self.deaths["driver_deaths"] += 1
        self.waste["driver"] += sum(self.now - since for *_, since in self.running.values())
        self.waste["driver"] += sum(seconds for shard in self.open for _, _, seconds in shard.at)
        self.left += sum(shard.size for shard in self.open)
        self.era += 1
        self.is_driven = False
        self.open, self.queued, self.running = [], deque(), {}
        self.in_flight = self.assembling = 0
        self.idle.clear()
        self.driver_free_s = self.now + self.farm.restart_s
        self.at(self.driver_free_s, "driver_returns")

    def _driver_returns(self, _: None) -> None:
        self.is_driven = True
        self.idle = deque((n, s) for s in range(self.farm.slots) for n in range(self.farm.nodes) if self.is_up[n])
        self.at(self.now + self.rng.expovariate(1 / self.farm.driver_mtbf_s), "driver_dies")
        self._fill()


def simulate(farm: Farm, seed: int = 0) -> dict[str, float]:
    """Return what a farm comes to: the share of its slots' time that went into committed objects, and where it lost."""
    return Simulation(farm, seed).run()
