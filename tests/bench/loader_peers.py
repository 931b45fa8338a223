"""The contestants of `make bench-loader`: each a function from a setting to an iterator of batches.

    ours, ours_cached         ranged reads; whole shards from the node's cache; two decoding threads
    ours_workers              ranged reads in two worker processes of a DataLoader, to compare with threads
    webdataset_pil, _cv2      the same shards, streamed; plain `webdataset` cannot skip members, and so reads all views
    litdata_pil, _cv2         chunks of 64 MiB with a sample's JSON and 32 encoded views as a list of bytes
    streaming_pil, _cv2       MosaicML Streaming, shards of 64 MiB, likewise

A batch is 8 objects x 4 random views of uint8 RGBA [512, 512, 4], and their cameras as parsed JSON. Every peer picks
its 4 views before it decodes anything, though none would by default: `decode("pil")` and columns of pictures decode all
32, eight times the work. Pictures are the same lossless WebP bytes everywhere; `_pil` decodes as the peers' own
decoders do, `_cv2` with OpenCV. All have 2 workers. Peers that cache (litdata, streaming) begin with an empty cache
where the store is remote, and read their own folder where it is local.
"""

from __future__ import annotations

import importlib.machinery
import io
import json
import os
import random
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

NUM_VIEWS, PICKED, BATCH, WORKERS = 32, 4, 8, 2


@dataclass(frozen=True, slots=True)
class Setting:
    """Where contestants read from: `root` holds the local copies, `remote` is a URL prefix or empty."""

    root: Path
    remote: str
    scratch: Path
    shard_urls: tuple[str, ...] = ()


Contestant = Callable[[Setting], Iterator[Any]]


def decode_pil(data: bytes) -> np.ndarray:
    """Decode as the peers' own decoders do."""
    from PIL import Image

    return np.array(Image.open(io.BytesIO(data)).convert("RGBA"))


def decode_cv2(data: bytes) -> np.ndarray:
    """Decode with OpenCV to RGBA."""
    return cv2.cvtColor(cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED), cv2.COLOR_BGRA2RGBA)


DECODERS = {"pil": decode_pil, "cv2": decode_cv2}


class Pick:
    """Picks 4 views of a peer's sample, decodes them and parses their cameras: RGBA [4, H, W, 4], [4, 4, 4], [4, 3,
    3]."""

    def __init__(self, decoder: str, suffix: str = "") -> None:
        self._decode, self._suffix = DECODERS[decoder], suffix

    def __call__(self, sample: dict[str, Any]) -> dict[str, torch.Tensor]:
        cv2.setNumThreads(0)
        views = random.sample(range(NUM_VIEWS), PICKED)
        meta = json.loads(bytes(sample["json"]))["views"]
        images = np.stack([self._decode(sample[f"{view:03d}{self._suffix}"]) for view in views])
        poses = np.array([meta[view]["world_from_camera"] for view in views], np.float32)
        intrinsics = np.array([meta[view]["intrinsics"] for view in views], np.float32)
        return {name: torch.from_numpy(value) for name, value in
                (("rgba", images), ("world_from_camera", poses), ("intrinsics", intrinsics))}  # fmt: skip


def _ours(setting: Setting, *, cached: bool) -> Iterator[Any]:
    from lrm.data import view_loader
    from lrm.loader import LoaderOptions
    from pipeline.reader import CacheSettings

    corpus = f"{setting.remote}/corpus" if setting.remote else str(setting.root / "corpus")
    cache = CacheSettings(folder=setting.scratch / "cache", max_bytes=10 * 2**30, open_shards=8) if cached else None
    options = LoaderOptions(num_threads=WORKERS, block_shards=4 if cached else 0)
    loader = view_loader(corpus, 1, background=None, batch_size=BATCH, options=options, cache=cache)
    _Watched.loader = loader
    return loader


class _Watched:
    """The loader of ours that runs in this process, for its own figures."""

    loader: Any = None


def ours_stats() -> dict[str, float]:
    """Return what our loader says of itself, if one runs in this process."""
    if _Watched.loader is None:
        return {}
    stats = _Watched.loader.stats
    return {
        "wire_bytes": stats.reads.num_wire_bytes,
        "num_bytes": stats.num_bytes,
        "requests": stats.reads.num_requests,
    }


def _ours_workers(setting: Setting) -> Iterator[Any]:
    from torch.utils.data import DataLoader

    from lrm.dataset import ViewDataset
    from lrm.loader import LoaderOptions

    corpus = f"{setting.remote}/corpus" if setting.remote else str(setting.root / "corpus")
    dataset = ViewDataset(corpus, 1, batch_size=BATCH, background=None, options=LoaderOptions(num_threads=1))
    return iter(DataLoader(dataset, batch_size=None, num_workers=WORKERS, multiprocessing_context="spawn"))


def _webdataset(setting: Setting, decoder: str) -> Iterator[Any]:
    import webdataset as wds

    urls = list(setting.shard_urls) or sorted(str(path) for path in (setting.root / "corpus" / "shards").glob("*.tar"))
    dataset = wds.WebDataset(urls, shardshuffle=100, nodesplitter=wds.split_by_node, workersplitter=wds.split_by_worker)
    dataset = dataset.shuffle(100, initial=20).map(Pick(decoder, ".rgba.webp")).repeat()
    loader = wds.WebLoader(dataset.batched(BATCH, collation_fn=_collate), batch_size=None, num_workers=WORKERS)
    return iter(loader)


def _collate(samples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return torch.utils.data.default_collate(samples)


class Picked:
    """A mix-in that picks and decodes in the worker, after the peer has read its sample."""

    pick: Pick

    def __getitem__(self, index: Any) -> Any:
        sample = super().__getitem__(index)  # type: ignore[misc]
        if not isinstance(sample, dict):  # litdata's list
            sample = dict(zip(("json", *(f"{view:03d}" for view in range(NUM_VIEWS))), sample))
        return self.pick(sample)


def _litdata(setting: Setting, decoder: str) -> Iterator[Any]:
    from litdata import StreamingDataLoader, StreamingDataset
    from litdata.streaming import downloader

    downloader._OBSTORE_CLIENT_OPTIONS["allow_http"] = True  # its S3 client knows https alone

    class Dataset(Picked, StreamingDataset):
        pick = Pick(decoder)

    where, more = str(setting.root / "litdata"), {}
    if setting.remote:
        where = f"{setting.remote}/litdata"
        options = {"endpoint_url": os.environ["AWS_ENDPOINT_URL"], "region_name": os.environ["AWS_REGION"],
                   "aws_access_key_id": os.environ["AWS_ACCESS_KEY_ID"],
                   "aws_secret_access_key": os.environ["AWS_SECRET_ACCESS_KEY"]}  # fmt: skip
        more = {"cache_dir": str(setting.scratch / "litdata"), "storage_options": options}
    dataset = Dataset(where, shuffle=True, **more)
    while True:
        yield from StreamingDataLoader(dataset, batch_size=BATCH, num_workers=WORKERS)


def import_streaming() -> Any:
    """Import MosaicML Streaming; where torchvision does not load, the two names of it that it looks for are given."""
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError):
        for name in [name for name in sys.modules if name.startswith("torchvision")]:
            del sys.modules[name]
        names = ("torchvision", "torchvision.datasets", "torchvision.transforms", "torchvision.transforms.functional")
        modules = {name: types.ModuleType(name) for name in names}
        for name, module in modules.items():
            module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
        modules["torchvision.datasets"].VisionDataset = object  # type: ignore[attr-defined]
        modules["torchvision.transforms.functional"].to_tensor = None  # type: ignore[attr-defined]
        sys.modules |= modules
    import streaming

    return streaming


def _streaming(setting: Setting, decoder: str) -> Iterator[Any]:
    streaming = import_streaming()

    class Dataset(Picked, streaming.StreamingDataset):  # type: ignore[name-defined]
        pick = Pick(decoder)

    more: dict[str, Any] = {"local": str(setting.root / "streaming")}
    if setting.remote:
        os.environ["S3_ENDPOINT_URL"] = os.environ["AWS_ENDPOINT_URL"]
        more = {"remote": f"{setting.remote}/streaming", "local": str(setting.scratch / "streaming")}
    streaming.base.util.clean_stale_shared_memory()
    dataset = Dataset(shuffle=True, batch_size=BATCH, num_canonical_nodes=1, **more)
    for stream in dataset.streams:
        # Its S3 client holds a connection since it read the index. Forked workers would share it and read each other's
        # answers: wrong bytes, or none until its time-out of 60 s.
        stream._downloader.clean_up()
    while True:
        yield from torch.utils.data.DataLoader(dataset, batch_size=BATCH, num_workers=WORKERS)


CONTESTANTS: dict[str, Contestant] = {
    "ours": lambda setting: _ours(setting, cached=False),
    "ours_cached": lambda setting: _ours(setting, cached=True),
    "ours_workers": _ours_workers,
    "webdataset_pil": lambda setting: _webdataset(setting, "pil"),
    "webdataset_cv2": lambda setting: _webdataset(setting, "cv2"),
    "litdata_pil": lambda setting: _litdata(setting, "pil"),
    "litdata_cv2": lambda setting: _litdata(setting, "cv2"),
    "streaming_pil": lambda setting: _streaming(setting, "pil"),
    "streaming_cv2": lambda setting: _streaming(setting, "cv2"),
}
PEERS = tuple(name for name in CONTESTANTS if not name.startswith("ours"))
