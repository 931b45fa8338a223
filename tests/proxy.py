"""A bad store to order: an HTTP proxy that lies in front of a real S3 server, and a server that ignores preconditions.

The proxy forwards every request unchanged (the signature covers the Host header, which the server then reads) and, by
rule, does harm on the way: it turns a request down with a status, loses the reply of a request that *was* carried out,
waits, cuts a body by reset or by a plain close, or says that a body is shorter than it is.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import http.client
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

from pipeline.uploads import signed_headers

HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length", "date", "server"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What a rule may look at."""

    method: str
    path: str
    query: str
    headers: dict[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One kind of harm. Without any field set a request passes.

    Attributes:
        status: answer with this status and never ask the server.
        lose: let the server do it, then close the connection without a word.
        delay_s: wait before the server is asked.
        reset_after: send so many bytes of the body, then reset the connection.
        close_after: send so many bytes of the body, then close it in order: fewer than the header promised.
        claim: say in the header that the body has so many bytes, and send just these.
        strip: leave this header out and sign the request anew, as a gateway with keys of its own does.
    """

    status: int | None = None
    lose: bool = False
    delay_s: float = 0.0
    reset_after: int | None = None
    close_after: int | None = None
    claim: int | None = None
    strip: str = ""


@dataclass(slots=True, eq=False)
class Rule:
    """Do harm to requests that match, `times` times at most (None: always)."""

    match: Callable[[Request], bool]
    fault: Fault
    times: int | None = 1
    hits: int = 0


@dataclass(slots=True, eq=False)
class Proxy:
    """A running proxy: its URL, its rules, and the requests that came as (method, path, status or "lost")."""

    url: str
    rules: list[Rule] = field(default_factory=list)
    log: list[tuple[str, str, str]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def harm(
        self, fault: Fault, *, method: str = "", part: str = "", times: int | None = 1, query: str | None = None
    ) -> Rule:
        """Add a rule for requests of a method whose path holds `part`."""
        rule = Rule(
            lambda r: method in ("", r.method) and part in r.path and (query is None or query in r.query), fault, times
        )
        self.rules.append(rule)
        return rule

    def take(self, request: Request) -> Fault:
        """Return the harm of the first rule that applies, counting it."""
        with self.lock:
            for rule in self.rules:
                if (rule.times is None or rule.hits < rule.times) and rule.match(request):
                    rule.hits += 1
                    return rule.fault
        return Fault()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    upstream = ("", 0)
    proxy: Proxy

    def log_message(self, *_: Any) -> None:
        pass

    def handle_one_request(self) -> None:
        with contextlib.suppress(ConnectionError):
            super().handle_one_request()

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = urlsplit(self.path)
        request = Request(
            method=self.command, path=unquote(parts.path), query=parts.query, headers=dict(self.headers.items())
        )
        fault = self.proxy.take(request)
        time.sleep(fault.delay_s)
        if fault.status is not None:
            self._note(str(fault.status))
            code = {429: "TooManyRequests", 409: "ConditionalRequestConflict", 503: "SlowDown"}
            text = f"<Error><Code>{code.get(fault.status, 'InternalError')}</Code></Error>".encode()
            self._reply(fault.status, {"Content-Type": "application/xml"}, text, Fault())
            return
        status, headers, answer = self._ask(body, fault.strip)
        if fault.lose:
            self._note("lost")
            self._hang_up()
            return
        self._note(str(status))
        self._reply(status, headers, answer, fault)

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = _serve  # noqa: N815 - names of http.server

    def _note(self, what: str) -> None:
        with self.proxy.lock:
            self.proxy.log.append((self.command, self.path, what))

    def _ask(self, body: bytes, strip: str) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection(*self.upstream, timeout=60)
        connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        headers = dict(self.headers.items())
        if strip:
            headers = {k: v for k, v in headers.items() if k.lower() not in (strip, "authorization")}
            headers = {k: v for k, v in headers.items() if not k.lower().startswith("x-amz-")}
            path, _, query = self.path.partition("?")
            now, digest = datetime.datetime.now(datetime.UTC), hashlib.sha256(body).hexdigest()
            headers |= signed_headers(
                self.command, headers.pop("Host", headers.pop("host", "")), path, query, "us-east-1", os.environ, now,
                digest,
            )  # fmt: skip
        for name, value in headers.items():
            connection.putheader(name, value)
        connection.endheaders(body)
        reply = connection.getresponse()
        data = reply.read()
        headers = dict(reply.getheaders())
        if self.command == "HEAD":
            headers["X-Length"] = headers.get("Content-Length", "0")
        connection.close()
        return reply.status, headers, data

    def _reply(self, status: int, headers: dict[str, str], data: bytes, fault: Fault) -> None:
        if fault.claim is not None:
            data = data[: fault.claim]
        length = headers.pop("X-Length", str(len(data)))
        self.send_response_only(status)
        for name, value in headers.items():
            if name.lower() not in HOP_BY_HOP:
                self.send_header(name, value)
        self.send_header("Date", self.date_time_string())
        self.send_header("Content-Length", length)
        self.end_headers()
        cut = fault.reset_after if fault.reset_after is not None else fault.close_after
        if self.command != "HEAD":
            self.wfile.write(data if cut is None else data[:cut])
        if cut is not None and cut < len(data):
            self.wfile.flush()
            self._hang_up(reset=fault.reset_after is not None)

    def _hang_up(self, *, reset: bool = False) -> None:
        self.close_connection = True
        if reset:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
        else:
            with contextlib.suppress(OSError):
                self.connection.shutdown(socket.SHUT_RDWR)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, *_: Any) -> None:
        """Say nothing: a client that hangs up is what is being tested."""


@contextmanager
def _serving(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    server = _Server(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def fault_proxy(upstream_url: str) -> Iterator[Proxy]:
    """Run a proxy on loopback in front of a server."""
    parts = urlsplit(upstream_url)
    proxy = Proxy(url="")
    handler = type("Handler", (_Handler,), {"upstream": (parts.hostname, parts.port), "proxy": proxy})
    with _serving(handler) as proxy.url:
        yield proxy


class _Small(BaseHTTPRequestHandler):
    """A dictionary behind HTTP that reads the preconditions of S3, GCS and Azure alike, or ignores them."""

    protocol_version = "HTTP/1.1"
    objects: dict[str, bytes]
    seen: list[dict[str, str]]
    heeds = True
    conflict = 412

    def log_message(self, *_: Any) -> None:
        pass

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        name, headers = urlsplit(self.path).path, {k.lower(): v for k, v in self.headers.items()}
        self.seen.append(headers)
        if_absent = headers.get("if-none-match") == "*" or headers.get("x-goog-if-generation-match") == "0"
        if self.heeds and if_absent and name in self.objects:
            self._answer(self.conflict, b"<Error><Code>Taken</Code></Error>")
            return
        self.objects[name] = body
        self._answer(201)

    def do_GET(self) -> None:
        data = self.objects.get(urlsplit(self.path).path)
        self._answer(404 if data is None else 200, data or b"")

    do_HEAD = do_GET  # noqa: N815

    def do_DELETE(self) -> None:
        self.objects.pop(urlsplit(self.path).path, None)
        self._answer(202)

    def do_POST(self) -> None:
        self._answer(403)  # S3 and Azure delete in bulk by POST; this client may not

    def _answer(self, status: int, data: bytes = b"") -> None:
        self.send_response(status)
        self.send_header("ETag", '"1"')
        self.send_header("Last-Modified", self.date_time_string())
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


@contextmanager
def small_server(*, heeds: bool = True, conflict: int = 412) -> Iterator[tuple[str, list[dict[str, str]]]]:
    """Run a tiny object store; yields its URL and the headers of the PUTs that came.

    Args:
        heeds: whether preconditions are looked at.
        conflict: what a precondition that fails is answered: 412, or Azure's 409.
    """
    seen: list[dict[str, str]] = []
    values = {"objects": {}, "seen": seen, "heeds": heeds, "conflict": conflict}
    with _serving(type("Small", (_Small,), values)) as url:
        yield url, seen
