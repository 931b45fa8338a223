"""The index of a version and ranged reads: from a plain web server, slow, cut, and of a million objects."""

from __future__ import annotations

import contextlib
import itertools
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import backends, shard_reads
from pipeline.reader import DamagedDataError, VersionReader
from pipeline.receipt import member_index
from pipeline.shard_reads import FIRST_REQUESTS, GAP_SHARE, MAX_REQUESTS, MIN_GAP_BYTES, RemoteReads, join_spans
from pipeline.store import StoreError, open_store
from pipeline.types import UserError
from tests.lrm.conftest import build_corpus, damage_sample


class WebServer(ThreadingHTTPServer):
    """A static file server with ranges, as nginx or a CDN is one, that can answer slowly or cut a body."""

    daemon_threads = True
    request_queue_size = 256

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.root = root
        self.log: list[tuple[str, str, str]] = []
        self.slow: dict[str, float] = {}  # seconds the first request of a range of a shard takes
        self.wrong: list[str] = []  # how the next ranges of a shard are answered, see _Handler
        self.gate = threading.Event()  # ranges of a shard are answered while it is set
        self.gate.set()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def handle_error(self, *_: object) -> None:
        """Say nothing: clients hang up."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/data"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: WebServer

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        asked = self.headers.get("Range", "")
        self.server.log.append((self.command, self.path, asked))
        path = self.server.root / self.path.removeprefix("/data/")
        if not path.is_file():
            self.send_response(404)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        data, status = path.read_bytes(), 200
        total = len(data)
        if found := re.fullmatch(r"bytes=(\d+)-(\d+)", asked):
            start, end = int(found[1]), min(int(found[2]), total - 1)
            status, data = (206, data[start : end + 1]) if start < total else (416, b"")
        if asked:
            self.server.gate.wait(30)
        if asked and self.server.slow:
            time.sleep(self.server.slow.pop(asked, 0.0) or self.server.slow.pop("any", 0.0))
        wrong = self.server.wrong.pop() if self.server.wrong and "/shards/" in self.path and asked else ""
        if wrong == "whole":
            status, data = 200, path.read_bytes()
        if wrong == "refused":
            status, data = 416, b""
        if wrong == "shifted":
            start, end = start + 1, end + 1
        self.send_response(status)
        if status == 206 and wrong != "unnamed":
            self.send_header("Content-Range", f"bytes {start}-{end}/{total}")
        self.send_header("Content-Length", str(len(data) // (2 if wrong == "short" else 1)))
        if wrong in ("cut", "short"):
            data, self.close_connection = data[: len(data) // 2], True
        self.send_header("Last-Modified", "Wed, 01 Jan 2025 00:00:00 GMT")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(build_corpus(tmp_path_factory.mktemp("web"), num_objects=9, num_views=6, size_px=64))


@pytest.fixture
def server(corpus: Path) -> Iterator[WebServer]:
    web = WebServer(corpus)
    yield web
    web.shutdown()
    web.server_close()


def test_a_version_is_read_from_a_plain_web_server_without_listing(server: WebServer, corpus: Path) -> None:
    web, local = VersionReader.open(server.url), VersionReader.open(str(corpus))
    assert web.digest == local.digest
    for row in range(len(local)):
        a, b = web.read_views(row, [5, 0, 2]), local.read_views(row, [5, 0, 2])
        assert (a.key, a.planes, a.json_bytes) == (b.key, b.planes, b.json_bytes)
        assert (a.cameras[1].world_from_camera == b.header.cameras[0].world_from_camera).all()
    files = {str(path.relative_to(corpus)) for path in corpus.rglob("*") if path.is_file()}
    asked = {path.removeprefix("/data/") for method, path, _ in server.log if method == "GET"}
    assert asked <= files, "only files by their names"
    ranged = [header for _, path, header in server.log if "shards/" in path]
    assert ranged
    assert all(ranged), "no shard was read whole"
    assert web.stats.num_wire_bytes <= 1.15 * sum(web.request(r, [5, 0, 2]).num_bytes for r in range(len(web)))
    web.close()
    local.close()


def test_a_web_server_is_never_written(server: WebServer) -> None:
    with pytest.raises(UserError, match="cannot be reached or written"):
        open_store(server.url).probe()


def test_a_slow_answer_is_asked_for_again(server: WebServer) -> None:
    reader = VersionReader.open(server.url)
    len(reader)
    server.slow["any"] = 20.0
    begun = time.perf_counter()
    reader.read_views(0, [1])
    assert time.perf_counter() - begun < 10
    assert reader.stats.num_hedged == 1
    reader.close()


def test_a_cut_shard_on_a_server_is_damage_and_an_unreachable_server_is_not(tmp_path: Path) -> None:
    corpus = Path(build_corpus(tmp_path, num_objects=4, num_views=6, size_px=64))
    web = WebServer(corpus)
    reader = VersionReader.open(web.url)
    path = next((corpus / "shards").iterdir())
    size = path.stat().st_size
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.truncate(size // 2)
    message = rf"sample ball-\d: shard shards/{path.name} is cut: it has {size // 2} of {size} bytes"
    with pytest.raises(DamagedDataError, match=message):
        reader.read_views(3, [5])
    path.unlink()
    with pytest.raises(FileNotFoundError, match=f"there is no shards/{path.name}"):
        reader.read_views(3, [5])
    with pytest.raises(StoreError, match="there is no"):
        reader.read_views(3, [5])
    reader.close()
    web.shutdown()
    web.server_close()


def test_a_sample_is_asked_for_by_its_joined_spans_and_nothing_else(server: WebServer) -> None:
    """The store's client would bridge gaps of up to a MiB by itself: the whole sample, for two views of six."""
    reader = VersionReader.open(server.url)
    for row in range(len(reader)):
        request = reader.request(row, [4, 1])
        starts, lengths = [p.start for p in request.parts], [p.length for p in request.parts]
        spans = join_spans(starts, lengths, max(MIN_GAP_BYTES, int(GAP_SHARE * sum(lengths))))
        del server.log[:]
        before = reader.stats.num_wire_bytes
        reader.read_views(row, [4, 1])
        asked = sorted(header for _, path, header in server.log if "shards/" in path)
        assert asked == sorted(f"bytes={start}-{end - 1}" for start, end in spans)
        assert len(spans) > 1
        assert reader.stats.num_wire_bytes - before == sum(end - start for start, end in spans)
    reader.close()


def test_few_requests_are_sent_before_the_first_answer_and_all_that_are_allowed_after(
    server: WebServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_reads, "MIN_HEDGE_S", 60.0)
    reader = VersionReader.open(server.url)
    requests = [reader.request(row % len(reader), [4, 1]) for row in range(90)]
    for most in (FIRST_REQUESTS, MAX_REQUESTS):
        server.gate.clear()
        del server.log[:]
        futures = [reader.fetch(request) for request in requests]
        deadline = time.monotonic() + 20
        while len(server.log) < most - 2 and time.monotonic() < deadline:  # a sample has up to three spans
            time.sleep(0.01)
        time.sleep(0.2)
        assert most - 2 <= len(server.log) <= most
        server.gate.set()
        for request, future in zip(requests, futures):
            assert len(reader.collect(request, future).planes) == 2
    reader.close()


def test_a_read_of_more_spans_than_requests_are_allowed_is_sent_all_the_same(server: WebServer) -> None:
    reads = RemoteReads(open_store(server.url), max_requests=1)
    reader = VersionReader.open(server.url)
    request = reader.request(2, [0, 2, 4])
    shard = reader.shard(int(reader.index.shard[2]))
    futures = [reads.submit(shard, [p.start for p in request.parts], [p.length for p in request.parts]) for _ in "ab"]
    for future in futures:
        assert [len(part) for part in future.result(20)] == [part.length for part in request.parts]
    reads.close()


def test_what_the_client_refuses_to_ask_for_is_an_error_and_no_wait(server: WebServer) -> None:
    reader = VersionReader.open(server.url)
    with pytest.raises(ValueError, match="Invalid range"):
        reader.reads.submit(reader.shard(0), [10], [0]).result(10)
    assert len(reader.read_views(0, [1]).planes) == 1, "the loop goes on"
    reader.close()


@pytest.mark.parametrize("wrong", ["cut", "short", "shifted", "unnamed", "whole", "refused"])
def test_a_wrong_answer_about_a_whole_shard_is_asked_for_once_more(server: WebServer, wrong: str) -> None:
    """The server sends no ETag: the client resumes no body that was cut, and takes no other answer for a fault."""
    reader = VersionReader.open(server.url)
    views = reader.read_views(0, [1]).planes
    requests = reader.stats.num_requests
    server.wrong = [wrong]
    assert reader.read_views(0, [1]).planes == views
    assert reader.stats.num_requests == 3 * requests, "what was asked for twice counts twice"
    server.wrong = [wrong] * 8
    with pytest.raises(StoreError, match="shards/"):
        reader.read_views(0, [1])
    reader.close()


def test_connections_that_say_nothing_are_given_up_and_asked_for_again(
    server: WebServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More of them than are hedged, each silent for longer than the client tries again; at a hundredth of its times."""
    for name in ("REQUEST_TIMEOUT_S", "RETRY_TIMEOUT_S"):
        monkeypatch.setattr(backends, name, getattr(backends, name) / 100)
    reader = VersionReader.open(server.url)
    requests = [reader.request(row, [1]) for row in range(len(reader))]
    server.slow = {f"bytes={p.start}-{p.start + p.length - 1}": 3.0 for request in requests for p in request.parts}
    futures = [reader.fetch(request) for request in requests]
    for request, future in zip(requests, futures):
        assert len(reader.collect(request, future).planes) == 1
    reader.close()


def test_threads_that_begin_to_read_at_once_share_one_client(server: WebServer) -> None:
    reader = VersionReader.open(server.url)
    started = threading.Barrier(8)
    found = set[int]()

    def begin() -> None:
        started.wait()
        found.add(id(reader.reads))

    with quick_switches():
        threads = [threading.Thread(target=begin) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(found) == 1
    reader.close()


def test_what_two_threads_read_at_once_is_counted_whole(corpus: Path) -> None:
    """They go in step: whatever one does to the lengths it asked for, the other is at the same place."""
    reader = VersionReader.open(str(corpus))
    part = reader.request(0, [1]).parts[1]
    step = threading.Barrier(2, timeout=10)

    class InStep(list[int]):
        def __iter__(self) -> Iterator[int]:
            step.wait()
            return super().__iter__()

    def read() -> None:
        reader.reads.submit(reader.shard(int(reader.index.shard[0])), [part.start], InStep([part.length])).result()

    threads = [threading.Thread(target=read) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (reader.stats.num_wire_bytes, reader.stats.num_requests) == (2 * part.length, 2)


@contextlib.contextmanager
def quick_switches() -> Iterator[None]:
    """Let threads take turns as often as can be."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def test_what_was_damaged_is_not_read_again_once_the_reader_is_closed(tmp_path: Path) -> None:
    """It would begin threads, and connections, that nobody ends."""
    corpus = build_corpus(tmp_path, num_objects=1, num_views=2, size_px=16)
    damage_sample(corpus, 0)
    reader = VersionReader.open(corpus)
    request = reader.request(0, (0,))
    future = reader.fetch(request)
    reader.close()
    with pytest.raises(CancelledError):
        reader.collect(request, future)
    assert reader._reads is None
    with pytest.raises(DamagedDataError):
        reader.read_views(0, (0,))


def test_closing_ends_the_wait_for_what_was_sent_and_what_was_not(server: WebServer) -> None:
    reader = VersionReader.open(server.url)
    len(reader)
    server.gate.clear()
    futures = [reader.fetch(reader.request(row % len(reader), [4, 1])) for row in range(60)]
    time.sleep(0.2)
    reader.close()
    server.gate.set()
    for future in futures:
        with pytest.raises(CancelledError):
            future.result(5)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 500), st.integers(1, 40)), min_size=1, max_size=8), st.integers(0, 30))
def test_joined_spans_cover_the_ranges_and_bridge_small_gaps_alone(ranges: list[tuple[int, int]], gap: int) -> None:
    spans = join_spans([start for start, _ in ranges], [length for _, length in ranges], gap)
    assert all(any(b <= start and start + length <= e for b, e in spans) for start, length in ranges)
    assert all(second[0] - first[1] > gap for first, second in itertools.pairwise(spans))
    needed = {place for start, length in ranges for place in range(start, start + length)}
    for begin, end in spans:
        idle = 0
        for place in range(begin, end):
            idle = 0 if place in needed else idle + 1
            assert idle <= gap


def test_the_index_says_what_the_manifest_says(corpus: Path) -> None:
    reader = VersionReader.open(str(corpus))
    for row, record in enumerate(reader.rows.to_pylist()):
        assert reader.index.key(row) == record["key"]
        assert reader.index.member_index(row) == member_index(record)
        assert reader.index.shard_key(row) == f"shards/{record['shard_sha256']}.tar"
        assert reader.index.sources[reader.index.source[row]] == record["source"]
    with pytest.raises(UserError, match=r"views \[6\] .* it has views 0 to 5 with planes \['rgba'\]"):
        reader.read_views(0, [6])
    with pytest.raises(UserError, match=r"planes \['depth'\]"):
        reader.read_views(0, [0], ["depth"])


MILLION = """
import sys
from pathlib import Path
import numpy as np, pyarrow as pa
from pipeline.index_making import _NEEDED, write_index
NUM, STEP = 1_000_000, 50_000

def batches():
    rng, ends = np.random.default_rng(0), np.arange(STEP + 1, dtype=np.int32) * 33
    for first in range(0, NUM, STEP):
        names = pa.array([f"{i:032x}" for i in range(first, first + STEP)])
        lists = [pa.ListArray.from_arrays(pa.array(ends), pa.array(rng.integers(1, 10**5, 33 * STEP).astype(kind)))
                 for kind in (np.int32, np.uint32)]
        same = lambda value, kind=None: pa.array([value] * STEP, kind)
        columns = {"uid": names, "key": names, "source": same("s"), "status": same("sample"), "heldout": same(False),
                   "num_views": same(32, pa.int32()), "planes": same(["rgba"]), "codecs": same(["webp"]),
                   "shard_sha256": pa.array([f"{i // 64:064x}" for i in range(first, first + STEP)]),
                   "shard_bytes": same(10**8), "offset": same(512), "lengths": lists[0], "crc32s": lists[1]}
        yield pa.RecordBatch.from_arrays([columns[name] for name in _NEEDED], names=list(_NEEDED))

write_index(batches(), frozenset(), Path(sys.argv[1]))
"""

READ = """
import sys
from pathlib import Path
import psutil
from lrm.order import SampleOrder
from pipeline.index import SampleIndex
before = psutil.Process().memory_full_info()
index = SampleIndex(Path(sys.argv[1]))
order = SampleOrder.build(sources=index.sources, source=index.source, shard=index.shard, heldout=index.heldout,
                          num_views=index.num_views, views_per_sample=4, seed=0, block_shards=int(sys.argv[2]))
rows = set()
for position in range(5000):
    draw = order.draw(position * 199)
    rows.add(draw.row)
    index.parts(draw.row, draw.views)
after = psutil.Process().memory_full_info()
print(len(order), len(rows), after.uss - before.uss, after.rss - before.rss)
"""


def test_a_million_objects_cost_a_process_little_memory(tmp_path: Path) -> None:
    """Two processes read one index: all that they keep resident, shared pages too, is small."""
    path = tmp_path / "million.arrow"
    subprocess.run([sys.executable, "-c", MILLION, str(path)], check=True)
    assert path.stat().st_size < 350e6
    running = [
        subprocess.Popen([sys.executable, "-c", READ, str(path), blocks], stdout=subprocess.PIPE, text=True)
        for blocks in ("0", "8")
    ]
    for process in running:
        num, different, _, resident = map(int, process.communicate(timeout=120)[0].split())
        assert (num, different) == (1_000_000, 5000)
        assert resident < 150e6


OPEN = """
import sys
from lrm.data import view_loader
with view_loader(sys.argv[1], num_views=2, image_px=64, batch_size=2) as loader:
    next(loader)
heavy = {"pyarrow.compute", "pyarrow.parquet", "pydantic", "urllib3", "pipeline.manifest", "pipeline.spec"}
print(*sorted(heavy & set(sys.modules)))
"""


def test_reading_loads_no_code_that_makes_versions(corpus: Path) -> None:
    len(VersionReader.open(str(corpus)))  # the node's index is made
    done = subprocess.run([sys.executable, "-c", OPEN, str(corpus)], check=True, capture_output=True, text=True)
    assert done.stdout.split() == []
