"""One HTTP GET, bounded in time: redirects, statuses and network faults become typed errors.

Every socket read has its own time limit, but a server that sends a byte just within it could stretch one reply for
ever, in the headers or in the TLS handshake as well as in the body. A watchdog therefore shuts down the connections of
a fetch when its deadline passes; it holds duplicates of the raw sockets, so that TLS state is never touched from
another thread. Name resolution is not covered: the system resolver's own limits hold there.

Road not taken: asynchronous I/O. A worker fetches one file at a time and then renders for seconds.
"""

from __future__ import annotations

import email.utils
import http.client
import math
import os
import re
import socket
import threading
import time
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urljoin, urlsplit

import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool

from pipeline.spec import FetchSpec
from pipeline.types import AssetError, FailureKind

MAX_REDIRECTS = 5
PIECE_BYTES = 1 << 18
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_NETWORK_FAULTS = (urllib3.exceptions.HTTPError, http.client.HTTPException, OSError, ValueError)
_LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})


class TransferError(Exception):
    """A fault that another try may mend.

    Attributes:
        kind: what the fault is when no try is left.
        retry_after_s: pause that the server asked for, in seconds.
    """

    def __init__(
        self, message: str, kind: FailureKind = FailureKind.NETWORK, retry_after_s: float | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.kind = kind
        self.retry_after_s = retry_after_s


@dataclass(slots=True, kw_only=True)
class Reply:
    """The final reply to a GET, body unread.

    Attributes:
        status: 200, 206 or 416; everything else is raised.
        headers: of the final reply.
        linked_sha256: digest that the hub gave on its redirect (X-Linked-ETag), if plausible.
        linked_num_bytes: size that the hub gave on its redirect (X-Linked-Size), if plausible.
    """

    status: int
    headers: Mapping[str, str]
    linked_sha256: str | None
    linked_num_bytes: int | None
    response: urllib3.BaseHTTPResponse

    def pieces(self) -> Iterator[bytes]:
        """Yield the body as it arrives, undecoded.

        Raises:
            TransferError: TRUNCATED where the peer closed before the declared end, else NETWORK.
        """
        try:
            # read1 returns what one receive gave: read(n) would wait for n bytes, at any drip.
            while piece := self.response.read1(PIECE_BYTES, decode_content=False):
                yield piece
        except _NETWORK_FAULTS as error:
            if _is_cut(error):
                message = "the connection closed before the end of the body"
                raise TransferError(message, FailureKind.TRUNCATED) from error
            raise TransferError(f"{_fault(error)} in the body") from error


class Link:
    """The connections of one fetch: a context manager that closes them, and cuts them at the deadline."""

    def __init__(self, spec: FetchSpec, *, deadline: float, token: str | None, token_host: str | None) -> None:
        """Prepare a link.

        Args:
            spec: timeouts.
            deadline: on the clock of time.monotonic, in seconds.
            token: bearer token, or None.
            token_host: the one host name that the token is sent to, over https only.
        """
        self.deadline = deadline
        self._timeout = urllib3.Timeout(connect=spec.connect_timeout_s, read=spec.read_timeout_s)
        self._token = token
        self._token_host = token_host
        self._twins: list[socket.socket] = []
        self._lock = threading.Lock()
        self._cut_off = False
        self._managers: dict[str, urllib3.PoolManager] = {}
        self._watchdog = threading.Timer(max(0.0, self.left_s()), self._cut)
        self._watchdog.daemon = True

    def __enter__(self) -> Link:
        self._watchdog.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._watchdog.cancel()
        for manager in self._managers.values():
            manager.clear()
        with self._lock:
            for twin in self._twins:
                twin.close()
            self._twins.clear()

    def left_s(self) -> float:
        """Return the seconds left until the deadline, 0 once connections were cut for it."""
        return 0.0 if self._cut_off else max(0.0, self.deadline - time.monotonic())

    def get(self, url: str, headers: Mapping[str, str]) -> Reply:
        """GET a URL through at most MAX_REDIRECTS redirects.

        Raises:
            AssetError: NOT_FOUND, ACCESS_DENIED, EMPTY_FILE, or NETWORK where another try is of no use.
            TransferError: a fault that another try may mend.
        """
        linked: dict[str, str] = {}
        host = urlsplit(url).hostname
        for _ in range(MAX_REDIRECTS + 1):
            check_url(url)
            response = self._request(url, headers)
            status = response.status
            # Only the hub that was asked speaks of the file; what a CDN says of a digest is about its own storage.
            if urlsplit(url).hostname == host and not linked:
                linked = {
                    name: response.headers[name] for name in response.headers if name.lower().startswith("x-linked")
                }
                linked = {name.lower(): value for name, value in linked.items()}
            if status not in _REDIRECTS:
                break
            target = response.headers.get("Location")
            if _small(response.headers):
                response.drain_conn()
            else:
                response.close()
            url = _redirected(url, target, status)
        else:
            raise AssetError(
                FailureKind.NETWORK, f"more than {MAX_REDIRECTS} redirects, the last to {without_query(url)}"
            )
        if status not in (200, 206, 416):
            response.close()
            raise _refusal(status, response.headers, without_query(url))
        return Reply(
            status=status,
            headers=response.headers,
            linked_sha256=_linked_sha256(linked.get("x-linked-etag")),
            linked_num_bytes=_number(linked.get("x-linked-size")),
            response=response,
        )

    def _request(self, url: str, headers: Mapping[str, str]) -> urllib3.BaseHTTPResponse:
        if self.left_s() <= 0:
            raise TransferError("the deadline passed")
        parts = urlsplit(url)
        sent = dict(headers)
        if self._token and parts.scheme == "https" and parts.hostname == self._token_host:
            sent["Authorization"] = f"Bearer {self._token}"
        try:
            manager = self._manager(parts.scheme, parts.hostname or "")
            return manager.request(
                "GET", url, headers=sent, timeout=self._timeout, retries=False, redirect=False, preload_content=False
            )
        except _NETWORK_FAULTS as error:
            raise TransferError(f"{_fault(error)} at {parts.scheme}://{parts.netloc}") from error

    def _manager(self, scheme: str, host: str) -> urllib3.PoolManager:
        """Return the pool for a host: through the environment's proxy, where one is named for it."""
        proxy = urllib.request.getproxies().get(scheme) or ""
        if host in _LOOPBACK or urllib.request.proxy_bypass(host):
            proxy = ""
        if proxy not in self._managers:
            manager = urllib3.ProxyManager(proxy) if proxy else urllib3.PoolManager()
            manager.pool_classes_by_scheme = _watched_pools(self)
            self._managers[proxy] = manager
        return self._managers[proxy]

    def watch(self, sock: socket.socket) -> None:
        """Let the watchdog cut this connection too."""
        with self._lock:
            self._twins.append(sock.dup())

    def _cut(self) -> None:
        with self._lock:
            self._cut_off = True  # first: to the reader, a connection that was shut down looks like the body's end
            for twin in self._twins:
                try:
                    twin.shutdown(socket.SHUT_RDWR)
                except OSError:
                    continue  # the peer was faster


def _watched_pools(link: Link) -> dict[str, Any]:
    """Return pool classes whose connections are known to the watchdog of `link`."""

    class WatchedHTTP(HTTPConnection):
        def _new_conn(self) -> socket.socket:
            sock = super()._new_conn()
            link.watch(sock)
            return sock

    class WatchedHTTPS(HTTPSConnection):
        def _new_conn(self) -> socket.socket:
            sock = super()._new_conn()
            link.watch(sock)
            return sock

    class PlainPool(HTTPConnectionPool):
        ConnectionCls = WatchedHTTP

    class SecurePool(HTTPSConnectionPool):
        ConnectionCls = WatchedHTTPS

    return {"http": PlainPool, "https": SecurePool}


def check_url(url: str) -> None:
    """Refuse what is not a plain http(s) URL.

    Raises:
        AssetError: ACCESS_DENIED.
    """
    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and parts.hostname and (parts.port is None or parts.port > 0)
    except ValueError:
        valid = False
    if not valid:
        raise AssetError(FailureKind.ACCESS_DENIED, f"{url[:100]!r}: not an http or https URL; refused")
    if parts.username is not None or parts.password is not None:
        raise AssetError(FailureKind.ACCESS_DENIED, f"URL on {parts.hostname} holds a user name or password; refused")


def without_query(url: str) -> str:
    """Return a URL fit for messages: signed links carry their secret in the query."""
    return url.partition("?")[0].partition("#")[0][:300]


def _redirected(url: str, target: str | None, status: int) -> str:
    if not target:
        raise TransferError(f"status {status} without a Location from {without_query(url)}")
    try:
        new = urljoin(url, target)
    except ValueError:
        raise AssetError(FailureKind.ACCESS_DENIED, f"{without_query(url)} redirects to a malformed URL") from None
    if url.startswith("https:") and not new.startswith("https:"):
        raise AssetError(
            FailureKind.ACCESS_DENIED, f"{without_query(url)} redirects from https to {without_query(new)!r}; refused"
        )
    return new


def _refusal(status: int, headers: Mapping[str, str], where: str) -> Exception:
    """Return the error for a status that carries no file."""
    if status in (404, 410):
        return AssetError(FailureKind.NOT_FOUND, f"status {status} from {where}")
    if status in (401, 402, 403, 407, 451):
        return AssetError(FailureKind.ACCESS_DENIED, f"status {status} from {where}; a token may be needed (HF_TOKEN)")
    if status == 204:
        return AssetError(FailureKind.EMPTY_FILE, f"status 204, no content, from {where}")
    message = f"status {status} from {where}"
    if status in (408, 425, 429) or status >= 500:
        return TransferError(message, retry_after_s=_retry_after_s(headers.get("Retry-After")))
    return AssetError(FailureKind.NETWORK, f"{message}, which no other try will mend")


def _retry_after_s(value: str | None) -> float | None:
    """Return the pause that a Retry-After header asks for: seconds, or a date."""
    if not value:
        return None
    if (seconds := _number(value)) is not None:
        return float(seconds)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return None


def _number(value: str | None) -> int | None:
    value = (value or "").strip()
    return int(value) if re.fullmatch(r"[0-9]{1,15}", value) else None


def _linked_sha256(value: str | None) -> str | None:
    value = (value or "").strip().removeprefix("W/").strip('"').lower()
    return value if re.fullmatch(r"[0-9a-f]{64}", value) else None


def _small(headers: Mapping[str, str]) -> bool:
    """Whether reading the body to keep the connection is cheaper than a new connection."""
    return (_number(headers.get("Content-Length")) or math.inf) <= 4096 or headers.get("Content-Length") == "0"


def _is_cut(error: BaseException) -> bool:
    """Whether the peer closed in good order, but before the length that it had declared."""
    incomplete = (urllib3.exceptions.IncompleteRead, http.client.IncompleteRead)
    return any(isinstance(part, incomplete) for part in (error, error.__cause__, error.__context__, *error.args))


def _fault(error: BaseException) -> str:
    """Return a few words on a network fault, without the URL and its secrets."""
    if isinstance(error, urllib3.exceptions.ReadTimeoutError | TimeoutError):
        return "no answer in time"
    if isinstance(error, urllib3.exceptions.ConnectTimeoutError):
        return "no connection in time"
    if isinstance(error, urllib3.exceptions.NameResolutionError):
        return "unknown host"
    if isinstance(error, urllib3.exceptions.NewConnectionError):
        return "no connection (refused or unreachable)"
    if isinstance(error, urllib3.exceptions.SSLError):
        return "TLS failed"
    cause = error.__cause__ or error.__context__
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno)
    if isinstance(cause, OSError) and cause.errno:
        return os.strerror(cause.errno)
    return type(error).__name__
