"""Credentials stay in the environment: in no URL that is printed, no error, no child process."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from pipeline import garbage, version
from pipeline.backends import short_error
from pipeline.store import StoreError, open_store
from pipeline.types import UserError
from tests import corpora
from tests.jobs.test_cli import run
from tests.proxy import Fault, fault_proxy


@pytest.mark.parametrize(
    "url",
    [
        "s3://key:hunter2@bucket/x",
        "s3://key:hun/ter2@bucket/x",  # keys of AWS hold slashes
        "s3://key:hun?ter2@bucket/x",
        "s3://key:hunter2",
        "s3:key:hunter2@bucket",
        "S3://key:hunter2@bucket",
        "gs://a:hunter2@bucket",
        "az://box/x?sig=hunter2",
        "az://box/x#hunter2",
        "abfss://box:hunter2@account/x",
        "file://user:hunter2@host/x",
        "http://user:hun/ter2@host/x",
        "ftp://user:hunter2@host/x",
        "s3://[hunter2@x",
    ],
)
def test_a_url_with_credentials_is_refused_and_not_printed(url: str) -> None:
    with pytest.raises(UserError) as info:
        open_store(url)
    assert "\n" not in str(info.value)
    assert "ter2" not in str(info.value)


def test_no_verb_prints_the_credentials_of_a_url() -> None:
    for verb in ("status", "gc"):
        done = run(verb, "--corpus", "s3://key:hun/ter2@bucket/x")
        assert done.returncode == 2
        assert "ter2" not in done.stderr + done.stdout
        assert "credentials do not belong in a URL" in done.stderr


def test_errors_name_no_user_and_no_query() -> None:
    shown = short_error(OSError("PUT http://user:hunter2@host/k?X-Amz-Signature=abc failed at s3://host/k\nhunter2"))
    assert shown == "PUT http://...@host/k failed at s3://host/k"


def test_git_is_asked_without_credentials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    git = tmp_path / "git"
    git.write_text(f"#!/bin/sh\nenv >> {tmp_path}/seen\necho abc\n")
    git.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for name in ("AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "AZURE_STORAGE_SAS_TOKEN", "WANDB_API_KEY"):
        monkeypatch.setenv(name, "hunter2")
    assert version.code_commit() == "abc+dirty"
    seen = (tmp_path / "seen").read_text()
    assert "PATH=" in seen
    assert "hunter2" not in seen


def test_a_deletion_that_fails_is_one_line_without_a_secret(s3_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    url, secret = f"{s3_url}/undeletable", os.environ["AWS_SECRET_ACCESS_KEY"]
    key = f"shards/{'a' * 64}.tar"
    open_store(url).create(key, b"orphan")
    with fault_proxy(os.environ["AWS_ENDPOINT_URL"]) as proxy, monkeypatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", proxy.url.replace("://", "://user:hunter2@"))
        for method in ("POST", "DELETE"):
            proxy.harm(Fault(status=403), method=method, times=None)
        with pytest.raises(StoreError, match=f"deleting {key} failed") as info:
            garbage.collect(open_store(url), grace_s=-0.0, delete=True)
    assert "\n" not in str(info.value)
    assert not [word for word in ("hunter2", secret, "Debug") if word in str(info.value)]
    assert info.value.__suppress_context__
    assert open_store(url).size(key) == 6


def test_no_record_of_a_corpus_holds_a_credential(s3_url: str) -> None:
    """What is stored of a corpus on S3 is read back whole, and searched for the key that wrote it."""
    store = open_store(f"{s3_url}/searched")
    plan = corpora.freeze(store)
    for shard in plan.shards:
        corpora.commit(store, shard)
    published, _ = version.publish(store, [plan])
    said = json.dumps(published.record)
    for item in store.list(""):
        said += store.get(item.key).decode("latin-1")
    assert os.environ["AWS_SECRET_ACCESS_KEY"] not in said
    assert os.environ["AWS_ACCESS_KEY_ID"] not in said
