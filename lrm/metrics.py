"""The metrics of a run: `metrics.jsonl`, one JSON object a logged step, no step twice.

    {"step": 20, "loss": 0.03, "psnr": 15.2, "lr": 0.001, "grad_norm": 0.4, "objects_per_s": 8.1,
     "data_wait_share": 0.01, "bytes_read": 812345, "skipped": 0, "damaged": 0}

`step` counts finished steps; loss is the mean over the steps since the line before. A resumed run first drops the lines
beyond the step it resumes from, and a line that a kill cut short.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

METRICS_NAME = "metrics.jsonl"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the whole lines of a metrics file, in order; none if it is not there."""
    if not path.is_file():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue  # cut short by a kill
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            lines.append(line)
    return lines


def rewind_metrics(path: Path, step: int) -> None:
    """Drop the lines beyond `step`, replacing the file in one rename."""
    lines = [line for line in read_metrics(path) if line["step"] <= step]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    temporary.replace(path)


def append_metrics(path: Path, line: dict[str, Any]) -> None:
    """Append one line with a single write; a value that is not finite becomes null."""
    clean = {name: None if isinstance(v, float) and v - v != 0 else v for name, v in line.items()}
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(descriptor, (json.dumps(clean, allow_nan=False) + "\n").encode())
    finally:
        os.close(descriptor)
