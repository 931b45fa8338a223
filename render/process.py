"""A supervised child process: its environment, its life, its memory, its last words.

The child leads a session of its own, so that a signal reaches all that it started; what left the session is found by
parentage. Everything it prints runs through one pipe into a ring of bounded size, drained by a thread, so that a
gigabyte of stderr neither blocks the child nor fills memory. `render.border` asks the kernel to be killed when the
*thread* that started it ends; the child is therefore started by a thread that lives as long as it may. Behind the
border the child is the third process of three, and its death, or ours, ends all that it started.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import select
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pipeline.types import UserError
from render.reach import border_of

ALLOWED_ENVIRONMENT = (
    "PATH", "LANG", "LC_ALL", "TZ", "LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES",
)  # fmt: skip
LOG_RING_BYTES = 64 * 1024
_PIPE_BYTES = 2**20
_PACKAGE_ROOT = Path(__file__).resolve().parents[1]
_PROGRESS = re.compile(r"^Fra:\d")
_FOLDER_PREFIX = "lrm-render-"


class LogRing:
    """The last LOG_RING_BYTES that a file descriptor gave, drained by a daemon thread until its end."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._data = bytearray()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._drain, name="render-log", daemon=True)
        self._thread.start()

    def _drain(self) -> None:
        with os.fdopen(self._fd, "rb", buffering=0) as pipe:
            while piece := pipe.read(2**16):
                with self._lock:
                    self._data += piece
                    del self._data[:-LOG_RING_BYTES]

    def clear(self) -> None:
        """Forget what was printed so far: the next asset's tail is its own."""
        with self._lock:
            self._data.clear()

    def text(self, settle_s: float = 0.3) -> str:
        """Return what is kept, without Cycles' progress lines; wait briefly for what was printed last."""
        self._settle(settle_s)
        with self._lock:
            text = self._data.decode("utf-8", "replace")
        return "\n".join(line for line in text.splitlines() if line.strip() and not _PROGRESS.match(line))

    def _settle(self, seconds: float) -> None:
        """Wait until the pipe is empty: a reply may overtake the lines printed before it."""
        until = time.monotonic() + seconds
        while self._thread.is_alive() and time.monotonic() < until:
            time.sleep(0.01)
            with contextlib.suppress(OSError, ValueError):
                if not select.select([self._fd], [], [], 0)[0]:
                    return


class ScratchFolder:
    """A folder under a lock: removed on close, and by the next owner of a folder beside it if its owner was killed."""

    def __init__(self, root: Path | None, newborn_s: float = 60.0, prefix: str = _FOLDER_PREFIX) -> None:
        self._prefix = prefix
        self._root = Path(root if root is not None else tempfile.gettempdir())
        self._root.mkdir(parents=True, exist_ok=True)
        self._sweep(newborn_s)
        self.path = Path(tempfile.mkdtemp(prefix=prefix, dir=self._root))
        # The folder itself carries the lock; the kernel frees it when the owner dies, however it dies.
        self._lock = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        fcntl.flock(self._lock, fcntl.LOCK_EX)

    def _sweep(self, newborn_s: float) -> None:
        old = time.time() - newborn_s  # a folder younger than this may wait for its owner's lock
        for path in self._root.glob(f"{self._prefix}*"):
            with contextlib.suppress(OSError):
                if path.is_symlink() or path.stat().st_uid != os.getuid() or path.stat().st_ctime > old:
                    continue
                fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(path, ignore_errors=True)
                finally:
                    os.close(fd)

    def fresh(self, name: str) -> Path:
        """Return an empty folder of this name inside; the folders above it stay, if they are there."""
        path = self.path / name
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(mode=0o700, parents=True)
        return path

    def close(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.path, ignore_errors=True)
        with contextlib.suppress(OSError):
            os.close(self._lock)


def scrubbed_environment(
    home: Path, num_threads: int, source: Mapping[str, str] | None = None, *, device: str = "cpu"
) -> dict[str, str]:
    """Return the child's environment: built from an allow-list, so that no credential can be in it.

    Args:
        home: the child's home, which no other child shares.
        num_threads: what OpenMP may use.
        source: what to take variables from; default this process's environment.
        device: as in `WorkerSpec`; a GPU's compiled kernels are kept outside of `home`.

    Raises:
        UserError: if the folder for kernels cannot be made.
    """
    given = os.environ if source is None else source
    folder = str(home)
    return {name: given[name] for name in ALLOWED_ENVIRONMENT if name in given} | {
        "PYTHONPATH": os.pathsep.join([str(_PACKAGE_ROOT), *_extra_paths()]),
        "PYTHONHASHSEED": "0",  # importers walk over sets
        "PYTHONUNBUFFERED": "1",
        "PYTHONFAULTHANDLER": "1",
        "HOME": folder,
        "TMPDIR": folder,
        "BLENDER_USER_RESOURCES": folder,
        "OMP_NUM_THREADS": str(num_threads),
        **({} if device == "cpu" else _kernel_caches(given)),
    }


def _kernel_caches(given: Mapping[str, str]) -> dict[str, str]:
    """Return where a GPU's compiled kernels are kept, folders made: a child finds what the ones before it compiled.

    Cycles and AMD's compiler put theirs below XDG_CACHE_HOME; what CUDA compiles goes where CUDA_CACHE_PATH says, and
    OptiX's database where OPTIX_CACHE_PATH does, by default a folder of /var/tmp that a container loses. Both are the
    user's to set: OptiX wants no network file system. No credential is in these folders, but a child that a file has
    taken over could write to them.
    """
    base = given.get("XDG_CACHE_HOME") or str(Path(given.get("HOME") or "~").expanduser() / ".cache")
    root = Path(base).absolute() / "lrm-corpus" / "gpu"
    folders = {
        "XDG_CACHE_HOME": str(root),
        "CUDA_CACHE_PATH": given.get("CUDA_CACHE_PATH") or str(root / "cuda"),
        "OPTIX_CACHE_PATH": given.get("OPTIX_CACHE_PATH") or str(root / "optix"),
    }
    for name, folder in folders.items():
        try:
            Path(folder).mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"folder {folder} for compiled GPU kernels cannot be made ({error.strerror}); set {name} to a folder "
                "that can be written"
            ) from None
    return folders


def _extra_paths() -> list[str]:
    """Return where a parent with a PYTHONPATH of its own finds packages: absolute, existing folders only."""
    given = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return [path for path in given if Path(path).is_absolute() and Path(path).is_dir()]


class ChildProcess:
    """One child and its pipes. `result_fd` is non-blocking; `log` holds the tail of what it printed."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        home: Path,
        num_threads: int,
        memory_bytes: int,
        cpu_s: int,
        starter: ThreadPoolExecutor,
        sandbox: str,
        write: Sequence[Path],
        read: Sequence[Path],
        run: Sequence[Path] = (),
        device: str = "cpu",
        variables: Mapping[str, str] | None = None,
    ) -> None:
        environment = scrubbed_environment(home, num_threads, device=device) | dict(variables or {})
        border = border_of(
            sandbox, write=write, read=read, run=run, device=device, environment=environment, cpu_s=cpu_s
        )
        log_read, log_write = os.pipe()
        result_read, result_write = os.pipe()
        arguments = {
            "--result-fd": result_write,
            "--parent-pid": os.getpid(),
            "--memory-bytes": memory_bytes,
            "--threads": num_threads,
            "--device": device,
            "--border": border.to_json(),
        }
        try:
            self._process = starter.submit(
                subprocess.Popen,
                [*command, *(str(part) for pair in arguments.items() for part in pair)],
                stdin=subprocess.PIPE,
                stdout=log_write,
                stderr=log_write,
                pass_fds=[result_write],
                env=environment,
                cwd=home,
                start_new_session=True,
                bufsize=0,
            ).result()
        except BaseException:
            os.close(log_read)
            os.close(result_read)
            raise
        finally:
            os.close(log_write)
            os.close(result_write)
        self.pid = self._process.pid
        self.result_fd = result_read
        os.set_blocking(result_read, False)
        with contextlib.suppress(OSError):  # a system may allow less
            fcntl.fcntl(result_read, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        self.log = LogRing(log_read)
        self.num_objects = 0

    @property
    def stdin_fd(self) -> int:
        """The file descriptor that the child reads from."""
        assert self._process.stdin is not None
        return self._process.stdin.fileno()

    def tell(self, line: bytes) -> None:
        """Write one request; a child that is gone is found out when its reply is read."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(line + b"\n")

    def memory_bytes(self) -> int:
        """Return the resident bytes of the child and its descendants; cheap enough to poll."""
        return sum(_resident_bytes(pid) for pid in _descendants_by_kernel(self.pid))

    def disk_bytes(self, folder: Path) -> int:
        """Return the bytes on disk, or in files in memory, that a folder and the child's unnamed open files take."""
        found: dict[tuple[int, int], int] = {}
        for path in _files_below(folder / "child"):
            with contextlib.suppress(OSError):
                _count(path.lstat(), found)
        for pid in _descendants_by_kernel(self.pid):
            with contextlib.suppress(OSError):
                for fd in Path(f"/proc/{pid}/fd").iterdir():
                    with contextlib.suppress(OSError):
                        one = fd.stat()
                        if one.st_nlink == 0:  # the folder shows no sign of it, and the disk is full of it
                            _count(one, found)
        return sum(found.values())

    def exit_reason(self) -> str:
        """Return how the child ended, once its result pipe has: "exit status 3", "signal SIGSEGV"."""
        until = time.monotonic() + 5
        while time.monotonic() < until:
            info = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if info is not None:
                if info.si_code == os.CLD_EXITED:
                    return f"exit status {info.si_status}"
                return f"signal {signal.Signals(info.si_status).name}"
            time.sleep(0.01)
        return "a closed result pipe, still running"

    def kill(self) -> None:
        """Kill the child and all that it started, and reap it. Safe to call twice."""
        if self._process.returncode is not None:
            return
        # The child is reaped last: until then its process group's number cannot be given to anybody else.
        for _ in range(5):
            pids = family(self.pid)
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)
            for pid in pids - {self.pid}:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)
            if not pids - {self.pid}:
                break
            time.sleep(0.02)
        self._process.wait()
        if self._process.stdin is not None:
            self._process.stdin.close()
        os.close(self.result_fd)


def default_command() -> list[str]:
    """Return the command of the real child: -P keeps the working folder, which holds assets' files, off sys.path."""
    return child_command("render.child")


def child_command(module: str) -> list[str]:
    """Return the command that runs a module of ours behind the border; -s keeps the home's packages out as well."""
    return [sys.executable, "-P", "-s", "-m", "render.border", module]


def family(pid: int) -> set[int]:
    """Return the living processes that descend from `pid` or are in its session, itself included, zombies not."""
    rows = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError, ValueError, IndexError):
                # The command's name may hold spaces and brackets; fields start after the last bracket.
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                if fields[0] not in ("Z", "X"):
                    rows[int(entry.name)] = (int(fields[1]), int(fields[3]))
    found = {one for one, (_, session) in rows.items() if session == pid} | ({pid} & rows.keys())
    while True:
        grown = {one for one, (parent, _) in rows.items() if parent in found or parent == pid} - found
        if not grown:
            return found
        found |= grown


def _descendants_by_kernel(pid: int) -> list[int]:
    """Return `pid` and its descendants from the kernel's lists of children: no walk over all of /proc."""
    found: list[int] = []
    waiting = [pid]
    while waiting and len(found) < 1000:
        one = waiting.pop()
        found.append(one)
        with contextlib.suppress(OSError, ValueError):
            for task in Path(f"/proc/{one}/task").iterdir():
                waiting.extend(int(child) for child in (task / "children").read_text().split())
    return found


def _files_below(folder: Path) -> Iterator[Path]:
    for root, _, names in os.walk(folder):
        yield from (Path(root, name) for name in names)


def _count(one: os.stat_result, found: dict[tuple[int, int], int]) -> None:
    if stat.S_ISREG(one.st_mode):
        found[one.st_dev, one.st_ino] = one.st_blocks * 512


def _resident_bytes(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0
