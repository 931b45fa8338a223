"""Unfinished multipart uploads of an S3 bucket: list them, abort them.

A writer that is killed between the first part of a large blob and the last leaves parts that no listing shows and
every bill does. obstore aborts what it gives up itself, but cannot name what others left; so the two requests that can
(ListMultipartUploads, AbortMultipartUpload) are signed here by AWS Signature Version 4, as its public documentation
states it. The road not taken: boto3, a second S3
client in every worker for two requests. Elsewhere nothing is needed
or possible: Azure drops uncommitted blocks after a week, GCS wants a lifecycle rule.
"""

from __future__ import annotations

import datetime
import hashlib
import hmac
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from urllib.parse import quote, urlsplit
from xml.etree import ElementTree

import urllib3

from pipeline.backends import s3_endpoint

_SAFE = "-_.~"
_MAX_REPLY_BYTES = 16 * 2**20
_TIMEOUT_S = 60.0
_NO_PAYLOAD = hashlib.sha256(b"").hexdigest()


class UploadsError(Exception):
    """Unfinished uploads could not be listed or aborted: says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Upload:
    """One unfinished multipart upload. `key` is that of the bucket, prefix included."""

    key: str
    upload_id: str
    started_s: float


def list_uploads(url: str) -> Iterator[Upload]:
    """Yield the unfinished uploads below an s3:// URL.

    Raises:
        UploadsError: if the environment holds no keys, or the server refuses.
    """
    bucket, prefix = bucket_and_prefix(url)
    marks: dict[str, str] = {}
    while True:
        query = {"uploads": "", "prefix": prefix} | marks
        root = _parse(_request("GET", f"/{bucket}", query))
        for item in root.iter("Upload"):
            key = item.findtext("Key", "")
            if key.startswith(prefix):
                started_s = _seconds(item.findtext("Initiated", ""))
                yield Upload(key=key, upload_id=item.findtext("UploadId", ""), started_s=started_s)
        if root.findtext("IsTruncated") != "true":
            return
        previous, marks = marks, {
            "key-marker": root.findtext("NextKeyMarker", ""),
            "upload-id-marker": root.findtext("NextUploadIdMarker", ""),
        }  # fmt: skip
        if marks == previous:
            raise UploadsError(f"{url}: the server lists the same page of unfinished uploads for ever")


def abort_upload(url: str, upload: Upload) -> None:
    """Abort an upload: its parts are dropped; one that was finished or aborted meanwhile is left as it is."""
    bucket, _ = bucket_and_prefix(url)
    _request("DELETE", f"/{bucket}/{upload.key}", {"uploadId": upload.upload_id}, gone_is_fine=True)


def bucket_and_prefix(url: str) -> tuple[str, str]:
    """Split s3://bucket/some/prefix into "bucket" and "some/prefix/"."""
    parts = urlsplit(url)
    prefix = parts.path.strip("/")
    return parts.netloc, f"{prefix}/" if prefix else ""


def _seconds(text: str) -> float:
    try:
        return datetime.datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp()
    except (ValueError, OverflowError):
        raise UploadsError(f"the list of unfinished uploads holds {text[:40]!r} for a time") from None


def _parse(data: bytes) -> ElementTree.Element:
    try:
        root = ElementTree.fromstring(data)
    except ElementTree.ParseError as error:
        raise UploadsError(f"the list of unfinished uploads is not XML: {error}") from None
    for item in root.iter():
        item.tag = item.tag.rpartition("}")[2]
    return root


def _request(method: str, path: str, query: Mapping[str, str], *, gone_is_fine: bool = False) -> bytes:
    endpoint, region = s3_endpoint()
    target = quote(path, safe=f"/{_SAFE}")
    text = "&".join(f"{quote(k, safe=_SAFE)}={quote(v, safe=_SAFE)}" for k, v in sorted(query.items()))
    headers = signed_headers(
        method, urlsplit(endpoint).netloc, target, text, region, os.environ, datetime.datetime.now(datetime.UTC)
    )
    try:
        reply = urllib3.request(
            method, f"{endpoint}{target}?{text}", headers=headers, timeout=_TIMEOUT_S, retries=urllib3.Retry(3),
            preload_content=False,
        )  # fmt: skip
        data = reply.read(_MAX_REPLY_BYTES)
        reply.release_conn()
    except urllib3.exceptions.HTTPError as error:
        raise UploadsError(f"{endpoint} cannot be asked for unfinished uploads: {type(error).__name__}") from None
    if reply.status >= 300 and not (gone_is_fine and reply.status == 404):
        raise UploadsError(f"{endpoint} answered {reply.status} to {method} {path} about unfinished uploads")
    return data


def signed_headers(
    method: str,
    host: str,
    path: str,
    query: str,
    region: str,
    source: Mapping[str, str],
    now: datetime.datetime,
    payload_sha256: str = _NO_PAYLOAD,
) -> dict[str, str]:
    """Return the headers of a request, signed by AWS Signature Version 4.

    Args:
        path: percent-encoded.
        query: percent-encoded and sorted.
        source: where AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN are taken from.

    Raises:
        UploadsError: if there are no keys: those of a machine's role are known to obstore alone.
    """
    name, secret = source.get("AWS_ACCESS_KEY_ID"), source.get("AWS_SECRET_ACCESS_KEY")
    if not name or not secret:
        raise UploadsError(
            "unfinished uploads can be listed only with AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in the "
            "environment; set them, or give the bucket a lifecycle rule AbortIncompleteMultipartUpload"
        )
    time_text = now.strftime("%Y%m%dT%H%M%SZ")
    headers = {"host": host, "x-amz-content-sha256": payload_sha256, "x-amz-date": time_text}
    if token := source.get("AWS_SESSION_TOKEN"):
        headers["x-amz-security-token"] = token
    names = ";".join(sorted(headers))
    lines = [method, path, query, *(f"{key}:{headers[key]}" for key in sorted(headers)), "", names, payload_sha256]
    request = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    scope = [time_text[:8], region, "s3", "aws4_request"]
    wanted = "\n".join(["AWS4-HMAC-SHA256", time_text, "/".join(scope), request])
    key = f"AWS4{secret}".encode()
    for part in scope:
        key = hmac.new(key, part.encode(), hashlib.sha256).digest()
    signature = hmac.new(key, wanted.encode(), hashlib.sha256).hexdigest()
    credential = f"AWS4-HMAC-SHA256 Credential={name}/{'/'.join(scope)}"
    return headers | {"authorization": f"{credential}, SignedHeaders={names}, Signature={signature}"}
