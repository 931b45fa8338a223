"""A loopback stand-in for the hub that serves Objaverse, with faults on demand.

    with Mirror({uid: glb_bytes}, licenses={uid: "by-nc"}, faults={uid: "cut-once"}) as mirror:
        source = ObjaverseSource(base_url=mirror.url)

Objects answer as the real hub does: a 302 with X-Linked-ETag and X-Linked-Size to a signed CDN path, which gives the
bytes with an ETag and honours Range. Index files come at once, raw, without Content-Encoding. Every request is kept in
`mirror.requests`. A fault is keyed by uid, or by the path of an index file such as "object-paths.json.gz"; faults whose
name ends in "-once" strike the first request only; "ignore-range" and "refuse-range" cut the first body, then answer
the Range that follows with the whole file, or with 416.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

ROOT = "/datasets/allenai/objaverse/resolve/main/"
XL_TABLE = "/datasets/allenai/objaverse-xl/resolve/main/sketchfab/sketchfab.parquet"
NUM_CHUNKS = 160
HTML = b"<!DOCTYPE html>\n<html><head><title>504 Gateway Time-out</title></head><body>busy</body></html>"
LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n"

STATUS_FAULTS = {
    "404": 404,
    "410": 410,
    "401": 401,
    "403": 403,
    "429-once": 429,
    "429": 429,
    "429-patience": 429,
    "500-once": 500,
    "500": 500,
    "503-once": 503,
}
BODY_FAULTS = {
    "html": lambda _: HTML,
    "lfs": lambda _: LFS_POINTER,
    "empty": lambda _: b"",
    "json": lambda _: b'{"error": "Entry not found"}',
    "gzip": gzip.compress,
    "wrong-bytes": lambda data: data[:40] + bytes(byte ^ 0x55 for byte in data[40:]),
    "wrong-bytes-once": lambda data: data[:40] + bytes(byte ^ 0x55 for byte in data[40:]),
    "too-long": lambda data: data + b"more",
}
CUT_FAULTS = ("cut-once", "cut", "cut-no-length", "cut-no-length-once", "reset", "reset-once", "stall", "stall-once")
OTHER_FAULTS = ("drip", "drip-headers", "redirect-loop", "redirect-file", "ignore-range", "refuse-range")
RETRY_AFTER_S = {"429-once": "0", "429": "0", "429-patience": "3600", "503-once": "0"}


@dataclass(frozen=True, slots=True)
class Request:
    """One request as the server saw it."""

    method: str
    path: str
    headers: Mapping[str, str]


@dataclass(slots=True)
class Mirror:
    """A context manager: the server runs while it is open.

    Attributes:
        objects: GLB bytes by uid.
        licenses: Sketchfab slug by uid; "by" where it says nothing, None leaves the annotation without one.
        faults: fault by uid or index path.
        lvis: uids by category.
        digests: serve the Objaverse-XL table: True, False, or sha256 by uid to serve instead of the true ones.
        linked: put X-Linked-ETag and X-Linked-Size on redirects.
        etags: put ETag on bodies.
        extra_paths: further entries of object-paths.json.gz, sound or not.
    """

    objects: Mapping[str, bytes]
    licenses: Mapping[str, str | None] = field(default_factory=dict)
    faults: dict[str, str] = field(default_factory=dict)
    lvis: Mapping[str, list[str]] = field(default_factory=dict)
    digests: bool | Mapping[str, str] = True
    linked: bool = True
    etags: bool = True
    extra_paths: Mapping[str, Any] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)
    closing: threading.Event = field(default_factory=threading.Event)
    hits: Counter[str] = field(default_factory=Counter)
    files: dict[str, bytes] = field(default_factory=dict)
    uid_of_path: dict[str, str] = field(default_factory=dict)
    paths_served: set[str] = field(default_factory=set)
    _server: ThreadingHTTPServer | None = None

    def __enter__(self) -> Mirror:
        self._build()
        handler = type("BoundHandler", (_Handler,), {"mirror": self})
        self._server = _QuietServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self._server.block_on_close = False
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._server is not None
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()

    @property
    def url(self) -> str:
        """Base URL, without a slash at its end."""
        assert self._server is not None
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def object_url(self, uid: str) -> str:
        """URL of one object on the hub."""
        return next(f"{self.url}{path}" for path, owner in self.uid_of_path.items() if owner == uid)

    def paths(self) -> list[str]:
        """Paths of all requests so far, queries cut."""
        return [request.path.partition("?")[0] for request in self.requests]

    def requests_for(self, uid: str) -> list[Request]:
        """Return the requests for one object, to the hub and to the CDN."""
        return [request for request in self.requests if uid in request.path]

    def _build(self) -> None:
        """Lay out the hub's tree in memory."""
        object_paths: dict[str, Any] = {}
        metadata: dict[str, dict[str, Any]] = {f"000-{i:03d}": {} for i in range(NUM_CHUNKS)}
        for i, (uid, data) in enumerate(self.objects.items()):
            chunk = f"000-{(23 + 7 * i) % NUM_CHUNKS:03d}"
            object_paths[uid] = f"glbs/{chunk}/{uid}.glb"
            self.files[f"{ROOT}glbs/{chunk}/{uid}.glb"] = data
            self.uid_of_path[f"{ROOT}glbs/{chunk}/{uid}.glb"] = uid
            metadata[chunk][uid] = annotation(uid, self.licenses.get(uid, "by"))
        object_paths |= self.extra_paths
        self.files[f"{ROOT}object-paths.json.gz"] = gzip.compress(json.dumps(object_paths).encode())
        self.files[f"{ROOT}lvis-annotations.json.gz"] = gzip.compress(json.dumps(dict(self.lvis)).encode())
        for chunk, entries in metadata.items():
            self.files[f"{ROOT}metadata/{chunk}.json.gz"] = gzip.compress(json.dumps(entries).encode())
        if self.digests is not False:
            self.files[XL_TABLE] = xl_table(self.objects, self.digests if isinstance(self.digests, Mapping) else {})


def annotation(uid: str, license: str | None) -> dict[str, Any]:
    """Return a Sketchfab record in the shape that the metadata files hold; license None leaves the key out."""
    record: dict[str, Any] = {
        "uid": uid,
        "name": f"Model {uid[:4]}",
        "viewerUrl": f"https://sketchfab.com/3d-models/{uid}",
        "user": {"uid": "u", "username": "someone", "displayName": "Some One"},
        "faceCount": 1,
        "animationCount": 0,
        "createdAt": "2021-01-01T00:00:00.000000",
    }
    return record if license is None else record | {"license": license}


def xl_table(objects: Mapping[str, bytes], digests: Mapping[str, str]) -> bytes:
    """Return the Objaverse-XL table of Sketchfab objects as Parquet."""
    rows = {uid: digests.get(uid, hashlib.sha256(data).hexdigest()) for uid, data in objects.items()}
    rows["f" * 32] = "0" * 64  # the real table holds many others
    table = pa.table(
        {
            "fileIdentifier": [f"https://sketchfab.com/3d-models/{uid}" for uid in rows],
            "source": ["sketchfab"] * len(rows),
            "license": ["by"] * len(rows),
            "fileType": ["glb"] * len(rows),
            "sha256": list(rows.values()),
            "metadata": ["{}"] * len(rows),
        }
    )
    sink = io.BytesIO()
    pq.write_table(table, sink)
    return sink.getvalue()


class _QuietServer(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: peers that hang up are what is tested."""


class _Handler(BaseHTTPRequestHandler):
    mirror: Mirror
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        """Keep the test output clean."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        mirror = self.mirror
        mirror.requests.append(Request(self.command, self.path, dict(self.headers.items())))
        path = self.path.partition("?")[0]
        try:
            if path.startswith("/cdn/"):
                uid = path.removeprefix("/cdn/")
                data = next(mirror.files[hub] for hub, owner in mirror.uid_of_path.items() if owner == uid)
                self._body(data, self._fault(uid, "cdn"))
            elif path in mirror.uid_of_path:
                self._hub(mirror.uid_of_path[path], mirror.files[path])
            elif path in mirror.files:
                fault = self._fault(path.removeprefix(ROOT), "index")
                if not self._refused(fault):
                    self._body(mirror.files[path], fault)
            else:
                self._status(404)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def _fault(self, name: str, stage: str) -> str:
        """Return the fault that strikes this request; "-once" faults strike the first of each stage."""
        fault = self.mirror.faults.get(name, "")
        self.mirror.hits[f"{stage}:{name}"] += 1
        return "" if fault.endswith("-once") and self.mirror.hits[f"{stage}:{name}"] > 1 else fault

    def _hub(self, uid: str, data: bytes) -> None:
        """Answer for an object as the hub does: a redirect."""
        fault = self._fault(uid, "hub")
        if self._refused(fault):
            return
        target = f"/cdn/{uid}?signature=secret"
        if fault == "redirect-loop":
            target = self.path
        elif fault == "redirect-file":
            target = "file:///etc/passwd"
        headers = {"Location": target, "X-Repo-Commit": "0" * 40}
        if self.mirror.linked:
            headers |= {"X-Linked-ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Linked-Size": str(len(data))}
        self._status(302, headers)

    def _refused(self, fault: str) -> bool:
        """Answer with the status that the fault names, if it names one."""
        if fault not in STATUS_FAULTS:
            return False
        retry = {"Retry-After": RETRY_AFTER_S[fault]} if fault in RETRY_AFTER_S else {}
        self._status(STATUS_FAULTS[fault], retry)
        return True

    def _status(self, status: int, headers: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _body(self, data: bytes, fault: str) -> None:
        """Send a file, whole or from where Range says, or as the fault will have it."""
        data = BODY_FAULTS[fault](data) if fault in BODY_FAULTS else data
        etag = f'"{hashlib.md5(data).hexdigest()}"' if self.mirror.etags else None
        start = self._range_start(len(data), etag)
        if fault == "ignore-range":
            start = 0
        if fault == "refuse-range" and "Range" in self.headers:
            start = None
        if start is None:
            self._status(416, {"Content-Range": f"bytes */{len(data)}"})
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Type", "application/octet-stream")
        if fault not in ("cut-no-length", "cut-no-length-once"):
            self.send_header("Content-Length", str(len(data) - start))
        else:
            self.send_header("Connection", "close")
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        if etag:
            self.send_header("ETag", etag)
        if fault == "gzip":
            self.send_header("Content-Encoding", "gzip")
        self._send(data[start:], fault)

    def _range_start(self, size: int, etag: str | None) -> int | None:
        """Return where to start; None where the range cannot be satisfied."""
        asked = self.headers.get("Range", "")
        if not asked.startswith("bytes=") or self.headers.get("If-Range", etag) != etag:
            return 0
        start = int(asked.removeprefix("bytes=").partition("-")[0])
        return start if start < size else None

    def _send(self, data: bytes, fault: str) -> None:
        if fault == "drip-headers":
            self._flush_headers_slowly()
            return
        self.end_headers()
        if self.command == "HEAD":
            return
        first = self.path not in self.mirror.paths_served
        self.mirror.paths_served.add(self.path)
        if fault in CUT_FAULTS or (fault in ("ignore-range", "refuse-range") and first):
            self._send_half(data, fault)
        elif fault == "drip":
            for i in range(len(data)):
                self.wfile.write(data[i : i + 1])
                if self.mirror.closing.wait(0.05):
                    break
        else:
            self.wfile.write(data)

    def _flush_headers_slowly(self) -> None:
        self.flush_headers()
        while not self.mirror.closing.wait(0.05):
            self.wfile.write(b"X-Slow: 1\r\n")
            self.wfile.flush()

    def _send_half(self, data: bytes, fault: str) -> None:
        self.wfile.write(data[: len(data) // 2])
        self.wfile.flush()
        self.close_connection = True
        if fault.startswith("stall"):
            self.mirror.closing.wait(30)
        if fault.startswith("reset"):
            time.sleep(0.05)  # let the half arrive: a reset throws away what was not yet read
            # Lingering for no time turns the close into a reset.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
