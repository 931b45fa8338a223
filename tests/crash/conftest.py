"""Stores that several processes share."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from pipeline.store import Store, open_store

_names = itertools.count()


@pytest.fixture(params=["folder", "s3"])
def shared_store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """An empty corpus that other processes can open: one in memory lives in its own process alone."""
    if request.param == "folder":
        return open_store(str(tmp_path / "corpus"))
    return open_store(f"{request.getfixturevalue('s3_url')}/shared-{next(_names)}")
