"""Parquet that Python holds, read by the caller's thread alone.

Threads of Arrow's outlive a read by a moment, and hold what they read from. Where that is a Python file or buffer, and
Python ends in that moment, letting go of it aborts the process ("terminate called without an active exception", exit
status 134) after its work was done: up to one `make why` in twenty did. So Arrow's threads read no memory or file of
Python's; files by their path they may. `pq.read_table` has such threads whatever it is told, `pq.ParquetFile` has not.
"""

from __future__ import annotations

import io
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq


def opened(source: bytes | io.RawIOBase, *, checksums: bool = False) -> pq.ParquetFile:
    """Open a Parquet file of bytes, or of a Python file, for reads with `use_threads=False`.

    Args:
        source: what holds it.
        checksums: verify the checksum of each page that is read.

    Raises:
        pa.ArrowException: if it is no Parquet file.
    """
    file = pa.BufferReader(source) if isinstance(source, bytes) else pa.PythonFile(source, mode="r")
    return pq.ParquetFile(file, page_checksum_verification=checksums, pre_buffer=False)


def read(source: bytes | io.RawIOBase, columns: Sequence[str] | None = None, *, checksums: bool = False) -> pa.Table:
    """Return the rows of a Parquet file, all columns of it or some."""
    with opened(source, checksums=checksums) as file:
        return file.read(columns=None if columns is None else list(columns), use_threads=False)


def read_where(source: bytes | io.RawIOBase, name: str, value: str, columns: Sequence[str]) -> pa.Table:
    """Return columns of the rows whose column `name`, one of them, is `value`: only row groups that can hold some."""
    with opened(source) as file:
        place, tables = file.schema.names.index(name), [file.schema_arrow.empty_table().select(list(columns))]
        for group in range(file.metadata.num_row_groups):
            found = file.metadata.row_group(group).column(place).statistics
            if found is None or not found.has_min_max or found.min <= value <= found.max:
                table = file.read_row_group(group, columns=list(columns), use_threads=False)
                tables.append(table.filter(pc.equal(table[name], value)))
    return pa.concat_tables(tables)
