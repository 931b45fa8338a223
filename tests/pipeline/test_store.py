"""The contract of a store, on a folder, in memory and on a real S3 server; GCS's and Azure's dialect of it."""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import os
import pickle
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import folder, garbage, store, uploads
from pipeline.backends import short_error
from pipeline.store import MissingObjectError, Outcome, Store, StoreError, join_ranges, open_store
from pipeline.types import UserError
from tests.proxy import Fault, fault_proxy, small_server

ROOT = Path(__file__).resolve().parents[2]


def blob(path: Path, num_bytes: int, seed: int = 0) -> tuple[str, Path]:
    """Write a file of noise; returns the key that its digest gives, and its path."""
    data = hashlib.shake_256(str(seed).encode()).digest(num_bytes)
    path.write_bytes(data)
    return f"shards/{hashlib.sha256(data).hexdigest()}.tar", path


def test_create_never_overwrites(any_store: Store) -> None:
    assert any_store.create("a/k", b"one") is Outcome.CREATED
    assert any_store.create("a/k", b"one") is Outcome.SAME
    assert any_store.create("a/k", b"two") is Outcome.CONFLICT
    assert any_store.create("a/empty", b"") is Outcome.CREATED
    assert (any_store.get("a/k"), any_store.get("a/empty")) == (b"one", b"")


def test_what_is_absent_is_a_typed_error_everywhere(any_store: Store) -> None:
    assert any_store.size("no/such") is None
    assert list(any_store.list("no/")) == []
    for read in (any_store.get, any_store.sha256, lambda key: any_store.get_ranges(key, [0], [1])):
        with pytest.raises(MissingObjectError, match="there is no no/such"):
            read("no/such")


def test_ranges_are_joined_checked_and_given_in_the_order_asked_for(any_store: Store) -> None:
    data = bytes(range(256)) * 40
    any_store.create("k", data)
    starts, lengths = [9000, 0, 10, 4, 5000, 10240], [100, 4, 10, 6, 0, 0]
    found = any_store.get_ranges("k", starts, lengths, max_gap_bytes=16)
    assert found == [data[s : s + n] for s, n in zip(starts, lengths)]
    assert any_store.get_ranges("k", [], []) == []
    for start, length in ((10239, 2), (10240, 1), (20000, 5)):
        with pytest.raises(StoreError):
            any_store.get_ranges("k", [0, start], [4, length])


@given(st.lists(st.tuples(st.integers(0, 500), st.integers(0, 60)), max_size=12), st.integers(0, 50))
def test_joined_spans_cover_every_range_and_nothing_farther_than_the_gap(
    ranges: list[tuple[int, int]], gap: int
) -> None:
    spans = join_ranges([s for s, _ in ranges], [n for _, n in ranges], gap)
    assert all(any(a <= s and s + n <= b for a, b in spans) for s, n in ranges)
    assert all(b + gap < a for (_, b), (a, _) in itertools.pairwise(spans))
    asked = {byte for s, n in ranges for byte in range(s, s + n)}
    fetched = {byte for a, b in spans for byte in range(a, b)}
    assert all(any(abs(byte - other) <= gap for other in asked) for byte in fetched - asked) or not asked


def test_a_read_of_too_much_is_refused_before_it_is_made(any_store: Store) -> None:
    any_store.create("k", b"x" * 100)
    assert any_store.get("k", 100) == b"x" * 100
    with pytest.raises(StoreError, match="has 100 bytes; at most 99 are allowed"):
        any_store.get("k", 99)


@pytest.mark.parametrize("num_bytes", [0, 1000, 40 * 2**20])
def test_blobs_small_and_in_parts_are_stored_once_and_verified(
    any_store: Store, tmp_path: Path, num_bytes: int
) -> None:
    key, path = blob(tmp_path / "blob", num_bytes)
    assert any_store.create_blob(key, path, num_bytes) is Outcome.CREATED
    assert any_store.sha256(key) == (hashlib.sha256(path.read_bytes()).hexdigest(), num_bytes)
    _, again = blob(tmp_path / "again", num_bytes)
    assert any_store.create_blob(key, again, num_bytes) is Outcome.SAME
    assert [item.key for item in any_store.list("")] == [key]
    assert any_store.sweep_uploads(0) == []


@pytest.mark.parametrize("found", [b"y" * 1000, b"short", b""])
def test_a_blob_that_is_there_damaged_is_not_adopted_and_not_touched(
    any_store: Store, tmp_path: Path, found: bytes
) -> None:
    key, path = blob(tmp_path / "blob", 1000)
    any_store.create(key, found)
    with pytest.raises(StoreError, match=f"is there with {len(found)} bytes that are not the 1000 of its name"):
        any_store.create_blob(key, path, 1000)
    assert any_store.get(key) == found


def test_threads_that_race_on_one_key_leave_one_winner(any_store: Store) -> None:
    values = [str(i).encode() * 1000 for i in range(8)]
    with ThreadPoolExecutor(8) as pool:
        outcomes = list(pool.map(lambda value: any_store.create("k", value), values))
    assert sorted(o.value for o in outcomes) == ["conflict"] * 7 + ["created"]
    assert any_store.get("k") == values[outcomes.index(Outcome.CREATED)]


def test_a_store_pickles_as_its_url(any_store: Store) -> None:
    any_store.create("k", b"1")
    data = pickle.dumps(any_store)
    assert pickle.loads(data).get("k") == b"1"
    assert os.environ.get("AWS_SECRET_ACCESS_KEY", "no secret").encode() not in data


def test_the_probe_passes_and_leaves_nothing(any_store: Store) -> None:
    any_store.probe()
    assert list(any_store.list("")) == []


def test_what_a_killed_writer_left_is_swept_once_it_is_old(any_store: Store, tmp_path: Path) -> None:
    any_store.create("shards/kept.tar", b"1")
    any_store.create(".probe/left", b"first")
    assert any_store.sweep_uploads(3600) == []
    time.sleep(1.1)  # S3 tells whole seconds
    assert [item.key for item in any_store.sweep_uploads(1)] == [".probe/left"]
    assert len(list(any_store.list(""))) == 2, "a dry run removes nothing"
    assert [item.key for item in any_store.sweep_uploads(1, delete=True)] == [".probe/left"]
    assert [item.key for item in any_store.list("")] == ["shards/kept.tar"]


def test_a_folder_hides_and_sweeps_temporary_files(tmp_path: Path) -> None:
    corpus = open_store(str(tmp_path / "c"))
    corpus.create("receipts/a.parquet", b"1")
    left = tmp_path / "c/receipts/b.parquet#123456"
    left.write_bytes(b"half")
    (tmp_path / "c/shards").mkdir()
    young = tmp_path / "c/shards/x.tar#1"
    young.write_bytes(b"half")
    os.utime(left, (time.time() - 1000, time.time() - 1000))
    assert [item.key for item in corpus.list("")] == ["receipts/a.parquet"]
    assert [item.key for item in corpus.sweep_uploads(500, delete=True)] == ["receipts/b.parquet#123456"]
    assert young.exists()


UPLOAD = """
import sys
from pathlib import Path
from pipeline.store import open_store
open_store(sys.argv[1]).create_blob("shards/big.tar", Path(sys.argv[2]), Path(sys.argv[2]).stat().st_size)
"""


def test_an_upload_whose_writer_was_killed_is_found_and_aborted(s3_url: str, tmp_path: Path) -> None:
    _, path = blob(tmp_path / "blob", 40 * 2**20)
    url = f"{s3_url}/killed"
    corpus = open_store(url)
    with fault_proxy(os.environ["AWS_ENDPOINT_URL"]) as proxy:
        last = proxy.harm(Fault(status=503, delay_s=2), method="POST", query="uploadId", times=None)
        environment = os.environ | {"AWS_ENDPOINT_URL": proxy.url}
        writer = subprocess.Popen([sys.executable, "-c", UPLOAD, url, str(path)], cwd=ROOT, env=environment)
        until = time.monotonic() + 60
        while not last.hits and time.monotonic() < until:
            time.sleep(0.02)
        writer.kill()
        writer.wait()
    assert last.hits, "all parts are there, the upload is not completed"
    assert corpus.size("shards/big.tar") is None, "a killed upload must not show"
    other = open_store(f"{s3_url}/killed-not")
    assert other.sweep_uploads(0) == [], "another corpus of the bucket is not ours to sweep"
    assert corpus.sweep_uploads(3600, delete=True) == [], "young uploads may be under way"
    assert garbage.collect(corpus, grace_s=0).uploads == ("shards/big.tar",), "`make gc` tells of it"
    assert garbage.collect(corpus, grace_s=3600, delete=True).uploads == ()
    assert garbage.collect(corpus, grace_s=0, delete=True).uploads == ("shards/big.tar",)
    assert corpus.sweep_uploads(0) == []
    assert corpus.create_blob("shards/big.tar", path, 40 * 2**20) is Outcome.CREATED


def test_signatures_are_those_of_the_public_example() -> None:
    # "GET Bucket (List Objects)" of Amazon's page "Signature Calculations for the Authorization Header".
    import datetime

    keys = {
        "AWS_ACCESS_KEY_ID": "AKIAIOSFODNN7EXAMPLE",
        "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY",
    }
    headers = uploads.signed_headers(
        "GET", "examplebucket.s3.amazonaws.com", "/", "max-keys=2&prefix=J", "us-east-1", keys,
        datetime.datetime(2013, 5, 24, tzinfo=datetime.UTC),
    )  # fmt: skip
    assert headers["authorization"].endswith(
        "Signature=34b48302e7b5fa45bde8084f4b7868a86f0a534bc59db6670ed5711ef69dc6f7"
    )


def test_uploads_without_keys_in_the_environment_are_one_clear_line(
    s3_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = open_store(f"{s3_url}/keyless")
    monkeypatch.setattr(store.Store, "list", lambda *_: iter([]))
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    with pytest.raises(StoreError, match="lifecycle rule") as info:
        corpus.sweep_uploads(0)
    assert "\n" not in str(info.value)


def test_a_folder_is_written_durably_and_without_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    for name in ("fsync", "link"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, name=name, real=real: (calls.append(name), real(*a))[1])
    corpus = open_store(str(tmp_path / "c"))
    corpus.create("k", b"1")
    assert calls == ["fsync", "link", "fsync"], "bytes are on disk before the name, the name before the reply"
    calls.clear()
    key, path = blob(tmp_path / "blob", 1000)
    corpus.create_blob(key, path, 1000)
    assert calls == ["fsync", "link", "fsync"]
    assert path.samefile(tmp_path / "c" / key)


def test_a_blob_from_another_file_system_is_copied(tmp_path: Path) -> None:
    if not os.access("/dev/shm", os.W_OK) or Path("/dev/shm").stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("/dev/shm is not another file system")
    source = Path(f"/dev/shm/lrm-test-{os.getpid()}")
    try:
        key, path = blob(source, 3 * 2**20)
        corpus = open_store(str(tmp_path / "c"))
        assert corpus.create_blob(key, path, 3 * 2**20) is Outcome.CREATED
        assert corpus.create_blob(key, path, 3 * 2**20) is Outcome.SAME
        assert (tmp_path / "c" / key).read_bytes() == path.read_bytes()
        assert folder.leftovers(tmp_path, 0) == []
    finally:
        source.unlink(missing_ok=True)


@pytest.mark.parametrize("key", ["../up", "a/../../up", "/etc/passwd", "a#1", "a//b", ""])
def test_a_key_cannot_leave_its_folder(tmp_path: Path, key: str) -> None:
    with pytest.raises(StoreError, match="was refused"):
        open_store(str(tmp_path / "c")).create(key, b"1")
    assert list(tmp_path.rglob("*")) == [tmp_path / "c"]


CLOUDS = ["s3", "gs", "az"]


def environment_of(cloud: str, url: str, tmp_path: Path) -> dict[str, str]:
    if cloud == "s3":
        return {"AWS_ENDPOINT_URL": url, "AWS_ACCESS_KEY_ID": "a-key-id", "AWS_SECRET_ACCESS_KEY": "a-secret-key"}
    if cloud == "az":
        key = base64.b64encode(b"a-secret-key" * 3).decode()
        return {
            "AZURE_STORAGE_ACCOUNT_NAME": "account",
            "AZURE_STORAGE_ACCOUNT_KEY": key,
            "AZURE_STORAGE_ENDPOINT": url,
        }
    account = {"gcs_base_url": url, "disable_oauth": True, "client_email": "", "private_key": "", "private_key_id": ""}
    (tmp_path / "account.json").write_text(json.dumps(account))
    return {"GOOGLE_SERVICE_ACCOUNT": str(tmp_path / "account.json")}


@pytest.mark.parametrize("cloud", CLOUDS)
def test_each_cloud_is_asked_in_its_own_dialect(cloud: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with small_server(conflict=409 if cloud == "az" else 412) as (url, seen):
        for name, value in environment_of(cloud, url, tmp_path).items():
            monkeypatch.setenv(name, value)
        corpus = open_store(f"{cloud}://bucket/corpus")
        corpus.probe()
        assert corpus.create("k", b"1") is Outcome.CREATED
        assert corpus.create("k", b"1") is Outcome.SAME
        assert corpus.create("k", b"2") is Outcome.CONFLICT
        assert (corpus.get("k"), corpus.size("k"), corpus.size("none")) == (b"1", 1, None)
        wanted = ("x-goog-if-generation-match", "0") if cloud == "gs" else ("if-none-match", "*")
        assert all(wanted in headers.items() for headers in seen)


@pytest.mark.parametrize("cloud", CLOUDS)
def test_a_store_that_ignores_preconditions_is_refused(
    cloud: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with small_server(heeds=False) as (url, _):
        for name, value in environment_of(cloud, url, tmp_path).items():
            monkeypatch.setenv(name, value)
        with pytest.raises(UserError, match="ignores create-if-absent") as info:
            open_store(f"{cloud}://bucket/corpus").probe()
        assert "\n" not in str(info.value)


def test_a_real_server_behind_a_gateway_that_drops_the_precondition_is_refused(
    s3_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gateway forwards everything but one header, so the server overwrites: only the probe can tell."""
    with fault_proxy(os.environ["AWS_ENDPOINT_URL"]) as proxy:
        rule = proxy.harm(Fault(strip="if-none-match"), method="PUT", times=None)
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        corpus = open_store(f"{s3_url}/careless")
        with pytest.raises(UserError, match="ignores create-if-absent") as info:
            corpus.probe()
        assert rule.hits >= 2
        assert "\n" not in str(info.value)
        assert list(corpus.list("")) == []


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("s3://key:hunter2@bucket/x", "do not belong in a URL"),
        ("az://box/x?sig=hunter2", r"URL with \? or # is not taken"),
        ("s3:///x", "names no bucket"),
        ("ftp://host/x", "ftp:// is not known"),
        ("az://box/x", "set AZURE_STORAGE_ACCOUNT_NAME"),
        ("  ", "CORPUS is empty"),
    ],
)
def test_a_url_that_cannot_be_used_is_one_clear_line(url: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("AZURE_")]:
        monkeypatch.delenv(name)
    with pytest.raises(UserError, match=message) as info:
        open_store(url)
    assert "\n" not in str(info.value)
    assert "hunter2" not in str(info.value)


def test_a_store_that_is_not_there_is_one_clear_line_in_bounded_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a-key-id")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a-secret-key")
    monkeypatch.setattr("pipeline.backends.MAX_RETRIES", 2)
    begun = time.monotonic()
    with pytest.raises(UserError, match="cannot be reached") as info:
        open_store("s3://bucket/x").probe()
    assert time.monotonic() - begun < 20
    assert "\n" not in str(info.value)


def test_errors_hold_no_secret(s3_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = "not-the-right-secret-0123456789"
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)
    monkeypatch.setenv("AWS_SESSION_TOKEN", "a-token-0123456789")
    corpus = open_store(f"{s3_url}/denied")
    texts = []
    for action in (
        lambda: corpus.create("k", b"1"), lambda: corpus.get("k"), lambda: corpus.size("k"), corpus.probe,
        lambda: list(corpus.list("")), lambda: corpus.sweep_uploads(0), lambda: corpus.get_ranges("k", [0], [1]),
    ):  # fmt: skip
        with pytest.raises((StoreError, UserError)) as info:
            action()
        error: BaseException | None = info.value
        while error is not None:
            texts.append(f"{error} {error!r}")
            error = error.__cause__ if error.__suppress_context__ else error.__context__
    assert all(secret not in text and "a-token-0123456789" not in text for text in texts)
    assert all("\n" not in text for text in texts)
    monkeypatch.setenv("AZURE_STORAGE_SAS_TOKEN", "sv=1&sig=abcdef")
    shown = short_error(OSError(f"GET https://a.blob/x?sv=1&sig=abc%3D failed, {secret}\nDebug source: {secret}"))
    assert shown == "GET https://a.blob/x failed, ***"


def test_no_secret_name_of_a_cloud_reaches_the_child() -> None:
    from render.process import ALLOWED_ENVIRONMENT

    assert not [name for name in ALLOWED_ENVIRONMENT if re.match("AWS|AZURE|GOOGLE|GCS|HF|WANDB|RAY", name)]


def test_a_folder_that_another_makes_meanwhile_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks of an array begin in the same second, and none of them may end for it."""
    real = Path.is_dir

    def late(path: Path) -> bool:
        there = real(path)
        os.makedirs(path, exist_ok=True)  # noqa: PTH103 - Path.mkdir would ask `is_dir`
        return there

    monkeypatch.setattr(Path, "is_dir", late)
    assert open_store(str(tmp_path / "new" / "corpus")).create("a", b"x") is Outcome.CREATED


def test_a_file_in_the_place_of_a_corpus_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for must_exist in (True, False):
        with pytest.raises(UserError, match=r"file: is not a folder; give the folder or URL"):
            open_store(str(tmp_path / "file"), must_exist=must_exist)
