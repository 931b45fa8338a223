"""Verified, resumable, bounded downloads into a content-addressed cache.

    <cache_dir>/sha256/ab/<digest>    the bytes, read-only
    <cache_dir>/urls/cd/<digest of the URL>.json
                                      {"sha256": ..., "num_bytes": ...}: what the URL gave last time
    <cache_dir>/tmp/                  downloads in progress, one name a process and fetch

A file enters the cache under the digest of what was received, by an atomic rename after its checks and an fsync. So
processes that fetch one URL at one time may do the work twice, but never see each other's half. A cached file is
digested again each time it is asked for (about 1 GB/s, small beside rendering it); one that does not match is fetched
anew and replaced in one step, never unlinked under another process.

What a body is checked against, strongest first: the digest that the caller knows; the digest and size that a Hugging
Face hub puts on its redirect; Content-Length; the caller's `check`, such as the length in a GLB header, which alone
catches a body that was cut without a Content-Length.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
import random
import re
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO
from urllib.parse import urlsplit

from pipeline import sniff
from pipeline.spec import FetchSpec
from pipeline.transport import Link, Reply, TransferError, check_url, without_query
from pipeline.types import AssetError, FailureKind

logger = logging.getLogger(__name__)

DEFAULT_HUB = "https://huggingface.co"
Check = Callable[[Path], None]
_MAX_PAUSE_S = 60.0
_TMP_AGE_S = 2 * 24 * 3600.0
_CONTENT_RANGE = re.compile(r"bytes (\d{1,15})-(\d{1,15})/(\d{1,15}|\*)")
_counter = itertools.count()


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchedFile:
    """A file in the cache, verified. The path is read-only and stays valid while the cache is kept."""

    path: Path
    sha256: str
    num_bytes: int


@dataclass(slots=True, kw_only=True)
class _Want:
    """What is known of a file before its bytes."""

    label: str
    url: str
    sha256: str | None
    num_bytes: int | None
    max_bytes: int
    check: Check | None
    mismatches: int = 0


def default_cache_dir() -> Path:
    """Return the cache folder where the spec names none."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "lrm-corpus"


def default_hub() -> str:
    """Return the hub where the spec names none: HF_ENDPOINT, else the public one."""
    return (os.environ.get("HF_ENDPOINT") or DEFAULT_HUB).rstrip("/")


class Fetcher:
    """Fetches URLs into one cache. Holds no connections between calls, so it may be forked, pickled and shared."""

    def __init__(self, spec: FetchSpec, *, token_host: str | None = None) -> None:
        """Prepare a fetcher; nothing is created on disk yet.

        Args:
            spec: cache folder, time limits, tries.
            token_host: the only host that HF_TOKEN, where set, is sent to, and only over https; default the hub's.
        """
        self._spec = spec
        self._token_host = token_host or urlsplit(default_hub()).hostname
        self.cache_dir = Path(spec.cache_dir).expanduser().absolute() if spec.cache_dir else default_cache_dir()

    def fetch(
        self,
        url: str,
        *,
        sha256: str | None = None,
        num_bytes: int | None = None,
        max_bytes: int,
        label: str,
        check: Check | None = None,
    ) -> FetchedFile:
        """Return the file of a URL from the cache, or download, verify and cache it.

        Args:
            url: http or https, without user name or password.
            sha256: digest the bytes must have, in lower-case hex, if known.
            num_bytes: size the file must have, if known.
            max_bytes: largest size that is accepted.
            label: what the file is, for messages.
            check: raises AssetError for a file that is not what it should be; not called for a file that an earlier
                fetch of this URL has let through.

        Raises:
            AssetError: NOT_FOUND, ACCESS_DENIED, NETWORK, CHECKSUM_MISMATCH, EMPTY_FILE, TRUNCATED, NOT_AN_ASSET,
                TOO_LARGE, INTERNAL (the cache cannot be written), or what `check` raises. Nothing is cached then.
        """
        want = _Want(label=label, url=url, sha256=sha256, num_bytes=num_bytes, max_bytes=max_bytes, check=check)
        try:
            check_url(url)
            file = self._cached(want) or self._download(want)
            if file.num_bytes > max_bytes:
                raise AssetError(FailureKind.TOO_LARGE, f"{file.num_bytes} bytes; at most {max_bytes} are allowed")
            return file
        except AssetError as error:
            raise AssetError(error.kind, f"{label}: {error.message}", error.log_tail) from error
        except OSError as error:
            message = f"{label}: cache {self.cache_dir} cannot be used: {error.strerror or error}"
            raise AssetError(FailureKind.INTERNAL, message) from error

    def _cached(self, want: _Want) -> FetchedFile | None:
        """Return the cached file if it still is what it was; a damaged one counts as absent."""
        digest = want.sha256
        if digest is None:
            try:
                entry = json.loads(self._index_path(want.url).read_bytes())
                digest = entry["sha256"]
            except FileNotFoundError:
                return None
            except (ValueError, KeyError, TypeError):
                digest = ""
            if not isinstance(digest, str) or not re.fullmatch(r"[0-9a-f]{64}", digest):
                logger.warning("%s: damaged cache index entry; fetching again", want.label)
                return None
        path = self._blob_path(digest)
        try:
            num_bytes = path.stat().st_size
            if want.num_bytes is not None and num_bytes != want.num_bytes:
                return None
            with path.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
        except FileNotFoundError:
            return None
        if found != digest:
            logger.warning("%s: cached file %s is damaged (sha256 %s); fetching again", want.label, path, found)
            return None
        return FetchedFile(path=path, sha256=digest, num_bytes=num_bytes)

    def _download(self, want: _Want) -> FetchedFile:
        """Try up to max_tries times, resuming where that is safe."""
        spec = self._spec
        deadline = time.monotonic() + spec.deadline_s
        token = os.environ.get("HF_TOKEN")
        with (
            Link(spec, deadline=deadline, token=token, token_host=self._token_host) as link,
            _Partial(self._tmp_path()) as partial,
        ):
            for tries in range(1, spec.max_tries + 1):
                try:
                    _receive(link, partial, want)
                    _verify(partial, want)
                    return self._keep(partial, want)
                except TransferError as error:
                    logger.info("%s: try %d of %d: %s", want.label, tries, spec.max_tries, error.message)
                    self._pause(link, error, tries)
        raise AssertionError("unreachable: the last pause raises")

    def _pause(self, link: Link, error: TransferError, tries: int) -> None:
        """Sleep before the next try, or raise where there is none."""
        spec = self._spec
        left_s = link.left_s()
        if left_s <= 0:
            message = f"not done within {spec.deadline_s:g} s (deadline_s), tries: {tries}, last: {error.message}"
            raise AssetError(FailureKind.NETWORK, message) from error
        if tries >= spec.max_tries:
            raise AssetError(error.kind, f"{error.message}; gave up after {tries} tries") from error
        # A generator of its own: the module's global one belongs to nobody here. Jitter keeps a fleet of workers
        # from coming back in step.
        pause_s = min(_MAX_PAUSE_S, spec.backoff_s * 2 ** (tries - 1)) * random.SystemRandom().uniform(0.5, 1.0)
        if error.retry_after_s is not None:
            pause_s = max(pause_s, error.retry_after_s)
        if pause_s >= left_s:
            message = f"{error.message}; the next try is due in {pause_s:.1f} s, the deadline in {left_s:.1f} s"
            raise AssetError(error.kind, message) from error
        time.sleep(pause_s)

    def _keep(self, partial: _Partial, want: _Want) -> FetchedFile:
        """Move a verified download to its place, then note what its URL gave."""
        digest, num_bytes = partial.digest, partial.num_bytes
        path = self._blob_path(digest)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.publish(path)
        index = self._index_path(want.url)
        index.parent.mkdir(parents=True, exist_ok=True)
        temporary = self._tmp_path()
        temporary.write_text(json.dumps({"sha256": digest, "num_bytes": num_bytes, "url": without_query(want.url)}))
        temporary.replace(index)
        return FetchedFile(path=path, sha256=digest, num_bytes=num_bytes)

    def _blob_path(self, digest: str) -> Path:
        return self.cache_dir / "sha256" / digest[:2] / digest

    def _index_path(self, url: str) -> Path:
        name = hashlib.sha256(url.encode("utf-8", "surrogatepass")).hexdigest()
        return self.cache_dir / "urls" / name[:2] / f"{name}.json"

    def _tmp_path(self) -> Path:
        """Return a name that no other process, thread or host uses, after sweeping what dead ones left."""
        folder = self.cache_dir / "tmp"
        folder.mkdir(parents=True, exist_ok=True)
        oldest = time.time() - max(_TMP_AGE_S, 2 * self._spec.deadline_s)
        for stale in folder.iterdir():
            try:
                if stale.stat().st_mtime < oldest:
                    stale.unlink()
            except OSError:
                continue  # its owner or another sweeper was faster, or it is another user's
        host = re.sub(r"[^A-Za-z0-9]+", "-", socket.gethostname())
        name = f"{host}-{os.getpid()}-{threading.get_ident()}-{next(_counter)}-{os.urandom(4).hex()}"
        return folder / name


class _Partial:
    """A download in progress: a file, and the digest of what it holds so far."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: BinaryIO = path.open("xb")
        self.etag: str | None = None
        self.restart()

    def __enter__(self) -> _Partial:
        return self

    def __exit__(self, *exc_info: object) -> None:
        try:
            self._file.close()
        finally:
            self._path.unlink(missing_ok=True)

    def restart(self) -> None:
        """Drop what was received."""
        self._file.seek(0)
        self._file.truncate()
        self._hash = hashlib.sha256()
        self.num_bytes = 0
        self.etag = None

    def write(self, piece: bytes) -> None:
        """Append a piece of the body."""
        self._file.write(piece)
        self._hash.update(piece)
        self.num_bytes += len(piece)

    @property
    def digest(self) -> str:
        """sha256 of what was received, in hex."""
        return self._hash.hexdigest()

    def flushed(self) -> Path:
        """Return the path, with all that was written readable there."""
        self._file.flush()
        return self._path

    def publish(self, path: Path) -> None:
        """Make the file durable and move it to its place."""
        self._file.flush()
        os.fsync(self._file.fileno())
        os.fchmod(self._file.fileno(), 0o444)
        self._path.replace(path)


def _receive(link: Link, partial: _Partial, want: _Want) -> None:
    """Ask for what is missing, and append it."""
    headers = {"Accept-Encoding": "identity", "User-Agent": "lrm-corpus"}
    # Without a validator or a digest there is no telling whether the rest belongs to the same file.
    if partial.num_bytes and (partial.etag or want.sha256):
        headers["Range"] = f"bytes={partial.num_bytes}-"
        if partial.etag:
            headers["If-Range"] = partial.etag
    reply = link.get(want.url, headers)
    total: int | None = None
    try:
        want.sha256 = want.sha256 or reply.linked_sha256
        want.num_bytes = want.num_bytes if want.num_bytes is not None else reply.linked_num_bytes
        total = _place(reply, partial, asked="Range" in headers)
        largest = max(total or 0, want.num_bytes or 0)
        if largest > want.max_bytes:
            raise AssetError(FailureKind.TOO_LARGE, f"{largest} bytes announced; at most {want.max_bytes} are allowed")
        for piece in reply.pieces():
            if partial.num_bytes + len(piece) > want.max_bytes:
                raise AssetError(FailureKind.TOO_LARGE, f"the body is longer than the {want.max_bytes} bytes allowed")
            partial.write(piece)
            if link.left_s() <= 0:
                break
        if link.left_s() <= 0:
            raise TransferError("the deadline passed in the body")
        if total is not None and partial.num_bytes < total:
            raise TransferError("the body ended early", FailureKind.TRUNCATED)
    except TransferError as error:
        error.message = f"{error.message} ({partial.num_bytes} of {total or 'an unknown number of'} bytes received)"
        raise
    finally:
        reply.response.close()


def _place(reply: Reply, partial: _Partial, *, asked: bool) -> int | None:
    """Set the partial file to where the reply's body starts; return the size of the whole file, if told."""
    length = reply.headers.get("Content-Length", "").strip()
    num_bytes = int(length) if re.fullmatch(r"[0-9]{1,15}", length) else None
    etag = reply.headers.get("ETag")
    if reply.status == 206:
        match = _CONTENT_RANGE.fullmatch(reply.headers.get("Content-Range", "").strip())
        start = int(match[1]) if match else -1
        if not asked or start != partial.num_bytes or (partial.etag and etag and etag != partial.etag):
            partial.restart()
            raise TransferError("a partial reply that does not continue what was received")
        return int(match[3]) if match and match[3] != "*" else None
    had = partial.num_bytes
    partial.restart()
    if reply.status == 416:
        raise TransferError(f"the server refused to resume at byte {had}; starting over")
    # Only a strong tag vouches for equal bytes.
    partial.etag = etag if etag and etag.startswith('"') else None
    return num_bytes


def _verify(partial: _Partial, want: _Want) -> None:
    """Refuse a body that is not the file.

    Raises:
        AssetError: another try will not help.
        TransferError: the body may have been cut or damaged on its way.
    """
    if partial.num_bytes == 0:
        raise AssetError(FailureKind.EMPTY_FILE, f"an empty body from {without_query(want.url)}")
    path = partial.flushed()
    intact = partial.digest == want.sha256
    if not intact and (page := _stand_in(path, partial.num_bytes, want.url)):
        message = f"{page} of {partial.num_bytes} bytes instead of the file from {without_query(want.url)}"
        raise AssetError(FailureKind.NOT_AN_ASSET, message)
    if want.num_bytes is not None and partial.num_bytes < want.num_bytes:
        raise TransferError(f"{partial.num_bytes} of {want.num_bytes} bytes received", FailureKind.TRUNCATED)
    found = ""
    if want.num_bytes is not None and partial.num_bytes > want.num_bytes:
        found = f"{partial.num_bytes} bytes; {want.num_bytes} were expected"
    elif want.sha256 is not None and not intact:
        found = f"{partial.num_bytes} bytes of sha256 {partial.digest}; {want.sha256} was expected"
    try:
        if want.check is not None:
            want.check(path)
    except AssetError as error:
        if error.kind == FailureKind.TRUNCATED and not intact:
            # Another try, but from the start: the server took this body's end for the file's end too.
            partial.restart()
            raise TransferError(error.message, FailureKind.TRUNCATED) from error
        if not found:
            raise
    if found:
        partial.restart()
        want.mismatches += 1
        if want.mismatches > 1:
            raise AssetError(FailureKind.CHECKSUM_MISMATCH, f"{found}, twice")
        raise TransferError(found, FailureKind.CHECKSUM_MISMATCH)


def _stand_in(path: Path, num_bytes: int, url: str) -> str | None:
    """Return what a server sent in place of the file, or None."""
    with path.open("rb") as file:
        head = file.read(sniff.HEAD_BYTES)
    name = without_query(url).lower()
    # We ask for no encoding; a body that is gzip all the same was stored that way by mistake.
    if head.startswith(b"\x1f\x8b") and not name.endswith((".gz", ".blend")):
        return "a gzip stream"
    return sniff.error_page(head, num_bytes)
