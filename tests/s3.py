"""A real S3 server on loopback: SeaweedFS over a fresh folder, for tests and for `make s3-up`.

Ready means that a conditional create was honoured through the S3 API, not that a port is open: the volume server joins
some seconds after the gateway answers.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

BUCKET = "corpora"
START_TIMEOUT_S = 120.0


def free_ports(count: int) -> list[int]:
    """Return TCP ports that are free, as are those 10000 above, which SeaweedFS takes for gRPC.

    Both lie below 32768, where Linux begins to give ports to outgoing connections.
    """
    ports: list[int] = []
    while len(ports) < count:
        port = 10000 + secrets.randbelow(12000)
        with contextlib.suppress(OSError), socket.socket() as one, socket.socket() as two:
            one.bind(("127.0.0.1", port))
            two.bind(("127.0.0.1", port + 10000))
            if not {port - 10000, port, port + 10000} & set(ports):
                ports.append(port)
    return ports


@contextmanager
def s3_server(
    folder: Path, *, num_volumes: int = 8, address: str = "127.0.0.1", prefix: Sequence[str] = ()
) -> Iterator[dict[str, str]]:
    """Run a server over `folder`, of at most `num_volumes` x 512 MB; yields the environment variables of a client.

    Args:
        address: where it listens; loopback, unless it runs in a network of the test's own.
        prefix: what to put before its command, and before those of its first clients, to run them there.

    A server that ends while it starts, such as for a port that was taken meanwhile, is started again with other ports.
    """
    for last in (False, False, True):
        with contextlib.ExitStack() as stack:
            try:
                environment = stack.enter_context(_server(folder, num_volumes, address, prefix))
            except ConnectionAbortedError:
                if last:
                    raise
                continue
            yield environment
            return


@contextmanager
def _server(folder: Path, num_volumes: int, address: str, prefix: Sequence[str]) -> Iterator[dict[str, str]]:
    folder.mkdir(parents=True, exist_ok=True)
    ports = dict(zip(("master", "volume", "filer", "s3"), free_ports(4)))
    keys = {"accessKey": "test-key", "secretKey": secrets.token_hex(16)}
    identity = {"name": "test", "credentials": [keys], "actions": ["Admin", "Read", "Write", "List", "Tagging"]}
    (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
    beside = Path(sys.executable).parent / "weed"
    weed = str(beside if beside.exists() else shutil.which("weed"))
    command = [
        *prefix, weed, "server", f"-ip={address}", f"-ip.bind={address}",
        f"-dir={folder}", f"-master.port={ports['master']}", f"-volume.port={ports['volume']}", "-filer",
        f"-filer.port={ports['filer']}", "-s3", f"-s3.port={ports['s3']}", f"-s3.config={folder / 's3.json'}",
        "-s3.port.iceberg=0", "-s3.port.lance=0", "-master.volumeSizeLimitMB=512", f"-volume.max={num_volumes}",
    ]  # fmt: skip
    environment = {
        "AWS_ENDPOINT_URL": f"http://{address}:{ports['s3']}",
        "AWS_ACCESS_KEY_ID": keys["accessKey"],
        "AWS_SECRET_ACCESS_KEY": keys["secretKey"],
        "AWS_REGION": "us-east-1",
    }
    with (folder / "weed.log").open("wb") as log:
        server = subprocess.Popen(
            command,
            stdout=log,
            stderr=log,
            start_new_session=True,
            cwd=folder,
            # It takes keys of the environment for an administrator's, in the place of its own of the same name.
            env={name: value for name, value in os.environ.items() if not name.startswith("AWS_")},
            preexec_fn=die_with_parent,  # noqa: PLW1509 - prctl alone
        )
        try:
            reach = [f"-master={address}:{ports['master']}", f"-filer={address}:{ports['filer']}"]
            _make_bucket([*prefix, weed, "shell", *reach], folder, server)
            _wait(environment, server, prefix)
            yield environment
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGKILL)
            server.wait()
            for port in ports.values():
                for number in (port, port + 10000):
                    for path in Path("/tmp").glob(f"seaweedfs-*-{number}.sock"):
                        path.unlink(missing_ok=True)


def die_with_parent() -> None:
    """Ask the kernel to kill this process with the one that started it, however that ends (PR_SET_PDEATHSIG)."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)


def _make_bucket(command: Sequence[str], folder: Path, server: subprocess.Popen[bytes]) -> None:
    wanted = f"s3.bucket.create -name {BUCKET}\ns3.bucket.list\nexit\n"
    deadline, said = time.monotonic() + START_TIMEOUT_S, ""
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise ConnectionAbortedError(f"SeaweedFS ended at once; see {folder / 'weed.log'}")
        # A shell that comes before the filer waits for ever: ask again.
        with contextlib.suppress(subprocess.TimeoutExpired):
            done = subprocess.run(
                command, input=wanted, capture_output=True, text=True, timeout=10, check=False, cwd=folder
            )
            said = f"{done.stdout[-500:]} {done.stderr[-500:]}"
            if BUCKET in done.stdout.replace(f"-name {BUCKET}", ""):
                return
        time.sleep(1)
    raise TimeoutError(f"SeaweedFS made no bucket in {START_TIMEOUT_S:.0f} s: {said}")


def _wait(environment: dict[str, str], server: subprocess.Popen[bytes], prefix: Sequence[str]) -> None:
    code = (
        "import sys; from pipeline.store import open_store; from pipeline.types import UserError\n"
        f"try: open_store('s3://{BUCKET}/ready').probe()\n"
        "except UserError as error: sys.exit(str(error))\n"
    )
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline and server.poll() is None:
        done = subprocess.run(
            [*prefix, sys.executable, "-c", code],
            env=os.environ | environment,
            capture_output=True,
            check=False,
            timeout=120,
        )
        if done.returncode == 0:
            return
        time.sleep(0.5)
    raise TimeoutError(f"SeaweedFS took no write within {START_TIMEOUT_S:.0f} s: {done.stderr[-500:]!r}")


def _stop(_number: int, _frame: object) -> None:
    for stop in (signal.SIGINT, signal.SIGTERM):
        signal.signal(stop, signal.SIG_IGN)  # a terminal's Ctrl-C often comes twice, from it and from make
    raise KeyboardInterrupt


if __name__ == "__main__":
    for stop in (signal.SIGINT, signal.SIGTERM):
        signal.signal(stop, _stop)
    with contextlib.suppress(KeyboardInterrupt), s3_server(Path(sys.argv[1]).resolve()) as variables:
        print(f"# an S3 server is up; corpora go to s3://{BUCKET}/NAME; Ctrl-C ends it", flush=True)
        for name, value in variables.items():
            print(f"export {name}={value}", flush=True)
        signal.pause()
    print("# ended")
