"""Structured logs: one JSON object a line, a trace id an object, no secret.

    LRM_LOG=json                 lines on stderr (of a Ray worker: in Ray's session folder, where collectors look)
    LRM_LOG=json:/var/log/lrm    lines in that folder, one file a process, `<host>-<pid>.jsonl`
    LRM_LOG=text                 the default: lines for people, no events

    {"ts": "2026-11-26T02:13:05.120+00:00", "level": "info", "event": "object_failed", "node": "n3", "pid": 71,
     "trace": "4f1c...", "uid": "...", "kind": "render_timeout", "elapsed_s": 3600.2, ...}

The trace id is a pure function of fingerprint and uid, so that every try of an object on every node, its rows and
`make why` tell the same; inside a task every line of ours carries it, whoever writes it. Values of variables that hold
secrets, credentials in URLs and signed queries are taken out of every text.
"""

from __future__ import annotations

import contextlib
import contextvars
import datetime
import json
import logging
import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.canonical import digest_json
from pipeline.types import UserError

VARIABLE = "LRM_LOG"
OURS = ("pipeline", "render", "lrm", "jobs")
MAX_TEXT_CHARS = 2000
_MIN_SECRET_CHARS = 6
_SECRET_NAME = re.compile(r"KEY|SECRET|TOKEN|PASSW|CREDENTIAL|CONNECTION_STRING|(^|_)SAS(_|$)", re.IGNORECASE)
_USERINFO = re.compile(r"(\w+://)[^/\s@]+@")
_QUERY = re.compile(r"(\w+://[^\s?]+)\?[^\s)\"']+")

_trace: contextvars.ContextVar[str | None] = contextvars.ContextVar("trace", default=None)
_events = logging.getLogger("jobs.events")
_forms: list[str] = []  # how this process logs, once `setup` has looked


def trace_of(fingerprint: str, uid: str) -> str:
    """Return the trace id of an object: 16 hex digits."""
    return digest_json([fingerprint, uid])[:16]


@contextlib.contextmanager
def tracing(trace: str) -> Iterator[None]:
    """Give every line that is logged in this block, by this thread, a trace id."""
    token = _trace.set(trace)
    try:
        yield
    finally:
        _trace.reset(token)


def event(name: str, **fields: Any) -> None:
    """Log an event with its fields; nothing happens unless `LRM_LOG` asks for JSON."""
    if "json" in _forms:
        _events.info(name, extra={"fields": fields})


def redact(text: str) -> str:
    """Return a text without the values of secret variables, credentials in URLs, and queries of URLs."""
    for name, value in os.environ.items():
        if len(value) >= _MIN_SECRET_CHARS and _SECRET_NAME.search(name) and not value.startswith("/"):
            text = text.replace(value, "***")
    return _QUERY.sub(r"\1", _USERINFO.sub(r"\1***@", text))


class JsonFormatter(logging.Formatter):
    """One JSON object a record."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line of a record."""
        fields = getattr(record, "fields", None)
        when = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
        line: dict[str, Any] = {
            "ts": when.isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "event": record.getMessage() if fields is not None else "log",
            "node": socket.gethostname(),
            "pid": os.getpid(),
        }
        if (trace := _trace.get()) is not None:
            line["trace"] = trace
        if fields is None:
            line |= {"logger": record.name, "message": record.getMessage()}
            if record.exc_info:
                line["error"] = self.formatException(record.exc_info)
        else:
            line |= fields
        return json.dumps({name: _clean(value) for name, value in line.items()}, default=str)


def _clean(value: Any) -> Any:
    """Return a value of a line without secrets, bounded."""
    if isinstance(value, str):
        return redact(value)[:MAX_TEXT_CHARS]
    if isinstance(value, dict):
        return {str(name): _clean(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_clean(one) for one in value]
    return value


def setup() -> None:
    """Give this process's loggers the handler that `LRM_LOG` asks for; once a process, again is harmless.

    Raises:
        UserError: if the variable says something else.
    """
    if _forms:
        return
    asked = os.environ.get(VARIABLE, "text")
    form, _, folder = asked.partition(":")
    if form not in ("text", "json") or (form == "text" and folder):
        raise UserError(f"{VARIABLE}={asked}: use text, json, or json:FOLDER")
    handler = _open(Path(folder)) if folder else logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if form == "json" else logging.Formatter("%(message)s"))
    for name in OURS:  # ours only: libraries keep their own counsel
        logging.getLogger(name).setLevel(logging.INFO)
        logging.getLogger(name).addHandler(handler)
    _forms.append(form)


def _open(folder: Path) -> logging.Handler:
    path = folder / f"{socket.gethostname()}-{os.getpid()}.jsonl"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return logging.FileHandler(path, encoding="utf-8", delay=True)
    except OSError as error:
        raise UserError(f"{VARIABLE}: {folder} cannot be written: {error.strerror}") from None
