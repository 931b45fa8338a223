"""Names and words of strangers that would break a line, a terminal, JSON or UTF-8, on their way into rows and logs."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.sources.directory import DirectoryAssets
from pipeline.spec import DirectorySource
from pipeline.store import open_store
from pipeline.types import Failure, FailureKind, UserError, printable
from tests import corpora

EVIL = "line\nbreak \x1b[31mred\x07\r\u202edlrow"


@given(st.text(st.characters(), max_size=200))
def test_what_is_made_printable_fits_a_line_and_utf8(text: str) -> None:
    found = printable(text)
    assert found.isprintable()
    assert len(found) == len(text)
    assert found.encode().decode() == found
    assert printable(found) == found
    assert not text.isprintable() or found == text


def test_a_file_whose_name_breaks_lines_gets_another_uid(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    names = [f"{EVIL}.glb", "two\nlines.glb", "two\tlines.glb", "plain é.glb"]
    for name in names:
        (tmp_path / name).write_bytes(b"glTF")
    with caplog.at_level(logging.WARNING):
        assets = DirectoryAssets(DirectorySource(path=str(tmp_path))).list_assets()
    uids = [asset.uid for asset in assets]
    assert len(set(uids)) == len(names)
    assert all(uid.isprintable() for uid in uids)
    assert "plain é.glb" in uids
    assert {Path(asset.uri).name for asset in assets} == set(names)
    assert not any("\n" in record.getMessage() or "\x1b" in record.getMessage() for record in caplog.records)


def test_a_listed_uid_that_cannot_be_printed_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.glb").write_bytes(b"glTF")
    (tmp_path / "list.csv").write_text('file,uid\na.glb,"x\x1b[2Jy"\n')
    with pytest.raises(UserError, match="cannot be printed") as caught:
        DirectoryAssets(DirectorySource(path=str(tmp_path / "list.csv"))).list_assets()
    assert str(caught.value).isprintable()


def test_a_failure_with_such_words_is_committed_in_one_line(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    frozen = corpora.freeze(store, 3)
    (shard,) = frozen.shards
    said = EVIL + "\ud800 lone \x00 null"
    results = {
        asset.uid: Failure(uid=asset.uid, kind=FailureKind.IMPORT_ERROR, message=said, log_tail=said)
        for asset in shard.assets
    }
    written, _ = corpora.commit(store, shard, dict(results))
    for row in written.rows.to_pylist():
        assert row["message"].isprintable()
        assert "\x1b" not in row["log_tail"]
        assert "lone" in row["log_tail"]
