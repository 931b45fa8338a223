"""From a URL to an obstore client: what may be opened, with which time limits, retries and credentials.

Endpoint, region and credentials come from the usual environment variables (AWS_ENDPOINT_URL, AWS_REGION,
AWS_ACCESS_KEY_ID, GOOGLE_APPLICATION_CREDENTIALS, AZURE_STORAGE_ACCOUNT_NAME, ...), never from a URL, which is printed,
logged and pickled. Texts of errors pass through `short_error`, which takes out query strings and the values of secret
variables.

Retries, measured with obstore 0.12 (`tests/pipeline/test_store_faults.py` holds it to this):

    retried by obstore, with backoff and jitter      5xx, 429, refused and dropped connections; time-outs of reads; a
                                                     body that is cut, from where it was cut
    not retried by obstore                           400, 401, 403, 404, 409, 412; a time-out of a write

A 409 comes back as "already exists", though S3 answers 409 when two writers meet and neither is there yet: the loop of
`Store.create` looks and tries again. That loop and the values below are all the retrying there is.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit

from obstore.exceptions import BaseError
from obstore.store import from_url

from pipeline.types import UserError

MAX_RETRIES = 8
RETRY_TIMEOUT_S = 60.0
FIRST_BACKOFF_S = 0.1
MAX_BACKOFF_S = 10.0
CONNECT_TIMEOUT_S = 5.0
REQUEST_TIMEOUT_S = 120.0

REMOTE_SCHEMES = {
    "s3": "S3", "s3a": "S3", "gs": "GCS", "az": "Azure", "azure": "Azure", "abfs": "Azure", "abfss": "Azure",
    "http": "HTTP", "https": "HTTP",
}  # fmt: skip
_ENDPOINTS = (
    "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT", "AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT",
    "GOOGLE_BASE_URL",
)  # fmt: skip
_SECRET_NAME = re.compile(r"^(AWS|AZURE|GOOGLE|GCS|GCP)_.*(KEY|SECRET|TOKEN|SAS|PASSWORD|CONNECTION_STRING)")
_MIN_SECRET_CHARS = 6
_QUERY = re.compile(r"(\w+://[^\s?]+)\?[^\s)]+")
_USER = re.compile(r"(\w+:/*)[^\s/@]+@")


def open_backend(url: str) -> Any:
    """Return obstore's client of a remote URL.

    Raises:
        UserError: in one line, if the URL is malformed, carries a secret, or lacks what the environment should hold.
    """
    check_url(url)
    options: dict[str, Any] = {"connect_timeout": f"{CONNECT_TIMEOUT_S}s", "timeout": f"{REQUEST_TIMEOUT_S}s"}
    if url.startswith("http://") or any(os.environ.get(name, "").startswith("http://") for name in _ENDPOINTS):
        options["allow_http"] = True
    retry: dict[str, Any] = {
        "max_retries": MAX_RETRIES,
        "retry_timeout": timedelta(seconds=RETRY_TIMEOUT_S),
        "backoff": {
            "init_backoff": timedelta(seconds=FIRST_BACKOFF_S),
            "max_backoff": timedelta(seconds=MAX_BACKOFF_S),
            "base": 2,
        },
    }
    try:
        return from_url(url, client_options=options, retry_config=retry)  # type: ignore[call-overload]
    except (BaseError, OSError, ValueError) as error:
        hint = ""
        if REMOTE_SCHEMES[urlsplit(url).scheme] == "Azure":
            hint = "; set AZURE_STORAGE_ACCOUNT_NAME and a key or token in the environment"
        raise UserError(f"corpus {url}: cannot be opened: {short_error(error)}{hint}") from None


def check_url(url: str) -> None:
    """Raise UserError unless a remote URL is one of a known scheme, with a bucket and without secrets."""
    try:
        parts = urlsplit(url)
        bad = ""
    except ValueError as error:
        bad = str(error)
    if bad:
        raise UserError(f"corpus {shown_url(url)}: it is no URL ({bad}); use a folder, s3://, gs:// or az://")
    web, container = parts.scheme in ("http", "https"), parts.scheme.startswith("abfs")
    if ("@" in parts.netloc and not container) or (":" in parts.netloc and not web) or (web and "@" in url):
        raise UserError(
            f"corpus {parts.scheme}://...: credentials do not belong in a URL, which is printed; "
            "put them into the environment (AWS_ACCESS_KEY_ID, ...)"
        )
    if parts.query or parts.fragment:
        raise UserError(
            f"corpus {shown_url(url)}: a URL with ? or # is not taken; "
            "options and tokens belong into the environment (AZURE_STORAGE_SAS_TOKEN, ...)"
        )
    if parts.scheme not in REMOTE_SCHEMES:
        raise UserError(f"corpus {url}: {parts.scheme}:// is not known; use a folder, s3://, gs://, az:// or memory://")
    if not parts.netloc:
        raise UserError(f"corpus {shown_url(url)}: it names no bucket; write {parts.scheme}://BUCKET/PREFIX")


def shown_url(url: str) -> str:
    """Return a URL that was refused as it may be printed: without options and tokens.

    User and password may hold any character, so of a URL with an @ the scheme alone is left.
    """
    if "@" in url:
        return f"{url.partition(':')[0]}://..."
    return url.partition("?")[0].partition("#")[0]


def s3_endpoint(source: Mapping[str, str] | None = None) -> tuple[str, str]:
    """Return the endpoint without a trailing slash, and the region, of S3 requests."""
    given = os.environ if source is None else source
    region = given.get("AWS_REGION") or given.get("AWS_DEFAULT_REGION") or "us-east-1"
    for name in _ENDPOINTS[:3]:
        if given.get(name):
            return given[name].rstrip("/"), region
    return f"https://s3.{region}.amazonaws.com", region


def short_error(error: BaseException) -> str:
    """Return the first line of an error, bounded and without secrets: obstore's own texts run over pages."""
    text = str(error).strip() or type(error).__name__
    text = text.split("\n", 1)[0].split("Debug source:", 1)[0].strip()
    for name, value in os.environ.items():
        if _SECRET_NAME.match(name) and len(value) >= _MIN_SECRET_CHARS:
            text = text.replace(value, "***")
    return _QUERY.sub(r"\1", without_user(text))[:300]


def without_user(text: str) -> str:
    """Return a text without the names and passwords of the URLs in it."""
    return _USER.sub(r"\1...@", text)
