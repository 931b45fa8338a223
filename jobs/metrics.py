"""Prometheus metrics of a run, through Ray's own exporter: every node's Ray agent serves them at its metrics port.

The driver alone reports: it hears of every object anyway (a few numbers come back with each), counts then survive the
death of a worker, and a run has one process' worth of series. Ray puts `ray_` in front of a name and `_total` behind a
counter, and adds labels of its own.

    ray_lrm_objects_total{outcome,kind,node}      objects that ended: sample, or failure of a kind
    ray_lrm_views_total{node}                     views in samples
    ray_lrm_sample_bytes_total{node}              encoded bytes of samples
    ray_lrm_stage_seconds_total{stage,node}       seconds by stage, as workers measured them; `task` is the whole task
    ray_lrm_child_starts_total{node}              children started; all after a worker's first are restarts
    ray_lrm_worker_deaths_total                   tasks whose process died
    ray_lrm_shards_committed_total, ray_lrm_shard_bytes_total, ray_lrm_shard_retries_total
    ray_lrm_queue_length{queue}                   objects waiting and making; shards open, assembling and to come
    ray_lrm_objects_planned, ray_lrm_objects_done by receipts: done includes what earlier runs committed
    ray_lrm_failure_share                         share of failures among the last workers.failure_window objects
    ray_lrm_paused                                1 while the run waits for room on the disk of its corpus
    ray_lrm_nodes_waiting                         nodes that make nothing for want of room on a disk of theirs

Ray without its `[default]` extra has no exporter: the calls then go nowhere, at a few microseconds each.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ray.util import metrics as ray_metrics

COUNTERS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "lrm_objects": ("objects that ended, by outcome", ("outcome", "kind", "node")),
    "lrm_views": ("views in samples", ("node",)),
    "lrm_sample_bytes": ("encoded bytes of samples", ("node",)),
    "lrm_stage_seconds": ("seconds by stage", ("stage", "node")),
    "lrm_child_starts": ("supervised child processes started", ("node",)),
    "lrm_worker_deaths": ("tasks whose process died", ()),
    "lrm_shards_committed": ("shards committed", ()),
    "lrm_shard_bytes": ("bytes of committed shards", ()),
    "lrm_shard_retries": ("shards that were not stored at the first try", ()),
}
GAUGES: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "lrm_queue_length": ("objects or shards in a queue of the driver", ("queue",)),
    "lrm_objects_planned": ("objects that were asked for", ()),
    "lrm_objects_done": ("objects of committed shards", ()),
    "lrm_failure_share": ("share of failures among the last objects", ()),
    "lrm_paused": ("1 while the run waits for room on the disk of its corpus", ()),
    "lrm_nodes_waiting": ("nodes that wait for room on a disk of theirs", ()),
}
MAX_STAGES = 20


class RunMetrics:
    """The metrics of one run: a name, a value, and the labels of its row in the table above."""

    def __init__(self) -> None:
        self._counters = {n: ray_metrics.Counter(n, text, tag_keys=keys) for n, (text, keys) in COUNTERS.items()}
        self._gauges = {n: ray_metrics.Gauge(n, text, tag_keys=keys) for n, (text, keys) in GAUGES.items()}

    def add(self, name: str, value: float = 1.0, **labels: str) -> None:
        """Add to a counter."""
        if value > 0:  # Ray refuses to add nothing
            self._counters[name].inc(value, tags=labels)

    def set(self, name: str, value: float, **labels: str) -> None:
        """Set a gauge."""
        self._gauges[name].set(value, tags=labels)

    def ended(self, told: Mapping[str, Any]) -> None:
        """Count an object, by what its task told of it (`jobs.watch.watched`)."""
        node, kind = str(told.get("node", "")), told["kind"]
        self.add("lrm_objects", outcome="failure" if kind else "sample", kind=kind or "", node=node)
        self.add("lrm_views", float(told["views"]), node=node)
        self.add("lrm_sample_bytes", float(told.get("bytes", 0)), node=node)
        self.add("lrm_child_starts", float(told.get("children", 0)), node=node)
        for stage, seconds in list(told.get("seconds", {}).items())[:MAX_STAGES]:
            self.add("lrm_stage_seconds", float(seconds), stage=stage, node=node)
