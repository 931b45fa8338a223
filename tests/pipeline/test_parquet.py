"""Parquet that Python holds is read by the caller's thread alone."""

from __future__ import annotations

import ast
import io
import threading
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import parquet

ROOT = Path(__file__).parents[2]
COLUMNS = ["uid", *(f"c{i}" for i in range(6))]


def file_of(uids: list[str], rows_per_group: int, *, statistics: bool = True) -> bytes:
    """A file with columns `COLUMNS` and one that nobody asks for, in groups of so many rows."""
    rows = {"other": uids} | {name: [f"{name} of {uid}" for uid in uids] for name in COLUMNS[1:]} | {"uid": uids}
    sink = io.BytesIO()
    table = pa.table(rows, schema=pa.schema([(name, pa.string()) for name in rows]))
    pq.write_table(table, sink, row_group_size=rows_per_group, write_statistics=statistics)
    return sink.getvalue()


class Watched(io.BytesIO):
    """A file that notes which threads read it, and how much."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self.threads: set[int] = set()
        self.num_bytes = 0

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(size)
        self.threads.add(threading.get_ident())
        self.num_bytes += len(data)
        return data


def test_no_thread_of_arrow_reads_a_file_of_pythons() -> None:
    """One that still holds it while Python ends aborts the process: exit status 134 after the work was done."""
    data = file_of([str(i) for i in range(3000)], 500)
    file: Any = Watched(data)
    assert parquet.read(file, COLUMNS).equals(pq.read_table(pa.BufferReader(data), columns=COLUMNS))
    assert parquet.read_where(file, "uid", "7", COLUMNS).num_rows == 1
    assert file.threads == {threading.get_ident()}


@given(
    st.lists(st.text(st.characters(codec="utf-8"), max_size=3), max_size=12),
    st.text(st.characters(codec="utf-8"), max_size=3),
    st.integers(1, 5),
    st.booleans(),
)
def test_rows_are_found_in_whatever_group_they_lie(uids: list[str], wanted: str, size: int, statistics: bool) -> None:
    rows = [*uids, *uids[:1]]
    data = file_of(rows, size, statistics=statistics)
    for uid in {wanted, *uids}:
        found = parquet.read_where(data, "uid", uid, COLUMNS).to_pylist()
        assert found == [{"uid": uid} | {name: f"{name} of {uid}" for name in COLUMNS[1:]}] * rows.count(uid)


def test_groups_that_cannot_hold_a_row_are_not_read() -> None:
    data = file_of([f"{i:05}" for i in range(20_000)], 1000)
    file: Any = Watched(data)
    assert parquet.read_where(file, "uid", "07005", COLUMNS)["c0"].to_pylist() == ["c0 of 07005"]
    assert file.num_bytes < len(data) / 5


@pytest.mark.parametrize("package", ["pipeline", "jobs", "lrm", "render"])
def test_nothing_else_reads_parquet_out_of_python(package: str) -> None:
    """Elsewhere Arrow opens files by their path only, or reads a footer."""
    for path in sorted((ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or ast.unparse(node.func) not in ("pq.read_table", "pq.ParquetFile"):
                continue
            source = ast.unparse(node.args[0])
            known = path.name == "parquet.py" or source in ("path", "manifest")
            assert known, f"{path}:{node.lineno} reads {source}: take pipeline.parquet"
