"""The table of promises names tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

TESTS = Path(__file__).parent


def test_every_test_that_the_table_names_exists() -> None:
    text = (TESTS / "PROMISES.md").read_text()
    named = re.findall(r"`([\w/]+\.py)(?:::(test_\w+))?`", text)
    assert len(named) > 80
    lost = []
    for file, name in named:
        path = TESTS / file
        if not path.is_file() or (name and f"def {name}(" not in path.read_text()):
            lost.append(f"{file}::{name}")
    assert not lost
