"""`make s3-up`: a server that the printed lines lead to, and nothing left of it afterwards."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from pipeline.store import Outcome, open_store
from pipeline.types import UserError

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=["ctrl-c", "kill"])
def test_s3_up_gives_a_server_and_takes_it_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test-key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "of-another-server")
    if number == signal.SIGINT:
        made = subprocess.run(["make", "-n", "s3-up", "OUT=x"], cwd=ROOT, capture_output=True, text=True, check=True)
        assert "-m tests.s3 'x/s3'" in made.stdout
    command = [sys.executable, "-m", "tests.s3", str(tmp_path / "s3")]
    server = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        said = [server.stdout.readline() for _ in range(5)]
        values = dict(re.fullmatch(r"export (\w+)=(.*)\n", line).groups() for line in said[1:])  # type: ignore[union-attr]
        for name, value in values.items():
            monkeypatch.setenv(name, value)
        url = re.search(r"s3://\w+", said[0])
        assert url is not None
        store = open_store(f"{url[0]}/mine")
        store.probe()
        assert store.create("k", b"1") is Outcome.CREATED
        below = psutil.Process(server.pid).children(recursive=True)
        assert any("weed" in one.name() for one in below)
        server.send_signal(number)
        code = server.wait(20)
        assert code == (0 if number == signal.SIGINT else -signal.SIGKILL)
        assert psutil.wait_procs(below, timeout=20)[1] == []
    finally:
        server.kill()
        server.wait()
    monkeypatch.setattr("pipeline.backends.MAX_RETRIES", 0)
    with pytest.raises(UserError, match="cannot be reached"):
        open_store(f"{url[0]}/mine").probe()
