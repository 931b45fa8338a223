"""What is being made now: a small object in the corpus that a run renews every minute, and `make status` reads.

    runs/<run>/<number>.json     a beat: who runs where, its open shards, what was made so far, whether it is paused

Nothing rests on beats: no run reads another's, no result depends on one, and a store that takes none costs a line in
the log. What is never overwritten is not overwritten here either: every beat is a new object, and the one before last
is removed where the store lets us. A run that ends well removes its beats, so a corpus that nobody works on holds none.
One that is stopped leaves the last, which says why, until the next run of the same plan removes it; one that dies
without a word leaves a stale one: no beat for three times its period. That is what "stale" means in `make status`.

Beats are written by a thread of their own, so that a slow store holds up no work.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import logging
import os
import re
import secrets
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import obstore
from obstore.exceptions import BaseError

from pipeline.canonical import canonical_json
from pipeline.store import ObjectInfo, Store, StoreError

BEAT_S = 60.0
MIN_BEAT_S = 5.0
"""Changes of open shards or of state bring the next beat forward, up to so many seconds after the last."""
LATE = 3.0
"""A run whose newest beat is older than so many periods is stale."""
END_S = 5.0
"""How long the end of a run may wait for a store that does not answer."""
SWEPT = 64
"""Runs that a new run looks at for what it may remove, oldest first: a thousand jobs of an array start at once."""
FORGET_S = 7 * 24 * 3600.0
MAX_BEAT_BYTES = 2**20
_THREADS = 16
_KEY = re.compile(r"runs/([A-Za-z0-9._-]{1,200})/(\d{6,12})\.json")
_ENDED = ("ended", "stopped", "interrupted", "failed")

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenShard:
    """A shard that a run has open: `made` of its `objects` are finished, but not committed yet."""

    plan_id: str
    index: int
    objects: int
    made: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What the newest beat of a run says.

    Attributes:
        state: running, paused, or how it came to an end.
        reason: why it is paused or was stopped.
        age_s: since the beat, by the clocks of the store and of who asks.
        shards: that it had open.
        making: objects in its workers' hands.
    """

    id: str
    host: str
    pid: int
    begun: str
    beat_s: float
    age_s: float
    state: str
    reason: str
    plan_sets: Sequence[str] = ()
    shards: Sequence[OpenShard] = ()
    making: int = 0
    samples: int = 0
    failures: Mapping[str, int] = field(default_factory=dict)
    nodes: Sequence[str] = ()

    @property
    def is_alive(self) -> bool:
        """Whether it is at work, as far as can be told."""
        return self.state not in _ENDED and self.age_s <= LATE * self.beat_s

    @property
    def is_stale(self) -> bool:
        """Whether it went without a word."""
        return self.state not in _ENDED and not self.is_alive


class Heart:
    """Writes the beats of one run; a thread of its own between `start` and `end`.

    Args:
        about: what does not change: plan sets, nodes.
        beat_s: period.
    """

    def __init__(self, store: Store, about: Mapping[str, Any], beat_s: float = BEAT_S) -> None:
        host = socket.gethostname()
        now = datetime.datetime.now(datetime.UTC)
        slug = re.sub(r"[^A-Za-z0-9-]+", "-", host)[:60]
        self.id = f"{now:%Y%m%dT%H%M%S}-{slug}-{os.getpid()}-{secrets.token_hex(3)}"
        self._store, self._beat_s, self._number = store, beat_s, 0
        self._about = dict(about) | {
            "host": host, "pid": os.getpid(), "begun": now.isoformat(timespec="seconds"), "beat_s": beat_s,
        }  # fmt: skip
        self._now: Mapping[str, Any] = {"state": "running", "reason": ""}
        self._stop = threading.Event()
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._run, name="beats", daemon=True)

    def start(self) -> None:
        """Begin to beat."""
        self._thread.start()

    def tell(self, now: Mapping[str, Any], *, at_once: bool = False) -> None:
        """Say how it stands; the next beat carries it, and `at_once` brings that forward."""
        self._now = now
        if at_once:
            self._wake.set()

    def end(self, state: str, reason: str = "") -> None:
        """Stop beating. A run that ended well leaves nothing, another one its last word; END_S is all it may take."""
        self._now = dict(self._now) | {"state": state, "reason": reason[:500]}
        self._stop.set()
        self._wake.set()
        self._thread.join(timeout=END_S)

    def _run(self) -> None:
        self._sweep()
        self._wake.wait(MIN_BEAT_S)  # the first beat tells what is open
        while not self._stop.is_set():
            self._wake.clear()
            self._beat()
            if not self._stop.wait(min(MIN_BEAT_S, self._beat_s)):
                self._wake.wait(max(0.0, self._beat_s - MIN_BEAT_S))
        left = range(max(0, self._number - 2), self._number)  # those before are gone, or cannot be removed
        if self._now["state"] != "ended" or not all(_forget(self._store, self._key(number)) for number in left):
            self._beat()

    def _key(self, number: int) -> str:
        return f"runs/{self.id}/{number:06d}.json"

    def _beat(self) -> None:
        try:
            self._store.create(self._key(self._number), canonical_json(self._about | dict(self._now)))
        except (StoreError, ValueError) as error:
            _log.info("a sign of life could not be stored, `make status` will not see this run: %s", error)
            return
        self._number += 1
        if self._number > 1:
            _forget(self._store, self._key(self._number - 2))

    def _sweep(self) -> None:
        """Remove what ended runs of the same plans left, and what is too old to mean anything."""
        with contextlib.suppress(StoreError):
            mine = set(self._about.get("plan_sets", ()))
            for run, keys in _read(self._store, most=SWEPT):
                if (run.state in _ENDED and mine & set(run.plan_sets)) or run.age_s > FORGET_S:
                    for key in keys:
                        _forget(self._store, key)


def look(store: Store) -> list[Run]:
    """Return the runs whose beats are in a corpus, oldest first. For tools: it lists."""
    return sorted((run for run, _ in _read(store)), key=lambda run: (run.begun, run.id))


def _read(store: Store, most: int | None = None) -> list[tuple[Run, list[str]]]:
    """Return each run, or the oldest ones, by its newest beat, with the keys of all its beats."""
    beats: dict[str, list[ObjectInfo]] = {}
    for item in store.list("runs/"):
        if match := _KEY.fullmatch(item.key):
            beats.setdefault(match[1], []).append(item)
    now = time.time()

    def one(name: str) -> tuple[Run, list[str]] | None:
        items = sorted(beats[name], key=lambda item: item.key)
        for item in reversed(items[-3:]):  # the newest may be gone since it was listed
            with contextlib.suppress(FileNotFoundError):
                data = store.get(item.key, MAX_BEAT_BYTES)
                run = _parse(name, data, now - item.modified_s)
                return None if run is None else (run, [item.key for item in items])
        return None

    with ThreadPoolExecutor(_THREADS) as pool:
        return [found for found in pool.map(one, sorted(beats)[:most]) if found is not None]


def _parse(name: str, data: bytes, age_s: float) -> Run | None:
    """Return a run as its beat tells it; None for what is no beat."""
    try:
        told = json.loads(data)
        return Run(
            id=name,
            host=str(told["host"])[:100],
            pid=int(told["pid"]),
            begun=str(told["begun"])[:40],
            beat_s=float(told["beat_s"]),
            age_s=age_s,
            state=str(told["state"])[:20],
            reason=str(told["reason"])[:500],
            plan_sets=tuple(map(str, told.get("plan_sets", ()))),
            shards=tuple(
                OpenShard(plan_id=str(s[0]), index=int(s[1]), objects=int(s[2]), made=int(s[3]))
                for s in told.get("shards", ())
            ),
            making=int(told.get("making", 0)),
            samples=int(told.get("samples", 0)),
            failures={str(kind): int(count) for kind, count in dict(told.get("failures", {})).items()},
            nodes=tuple(map(str, told.get("nodes", ()))),
        )
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        _log.warning("runs/%s holds something that is no sign of life: %r", name, error)
        return None


def _forget(store: Store, key: str) -> bool:
    """Remove one beat; return whether it is gone."""
    try:
        obstore.delete(store.backend, key)
    except FileNotFoundError:
        return True
    except (BaseError, OSError):
        return False
    return True
