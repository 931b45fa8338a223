"""What a child may reach: the border's lists of files, made by its supervisor from where this installation lies.

Readable are the interpreter, its packages, our own code, the system's libraries, fonts and facts about processors;
nothing of a home folder, of /etc but what loaders need, of other corpora, of other processes. Landlock follows what a
symbolic link means, so a file that links to the outside opens nothing.
"""

from __future__ import annotations

import os
import site
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from render.confine import Border

_PACKAGE_ROOT = Path(__file__).resolve().parents[1]
_OURS = ("pipeline", "render", "jobs")

_LIBRARIES = ("/usr", "/lib", "/lib32", "/lib64", "/nix/store", "/gnu/store")
_PROGRAMS = ("/bin", "/sbin", *_LIBRARIES)
_FACTS = (
    "/etc/ld.so.cache", "/etc/fonts", "/etc/localtime", "/etc/ssl/openssl.cnf", "/etc/pki/tls/openssl.cnf",
    "/proc/cpuinfo", "/proc/meminfo", "/proc/stat", "/proc/filesystems", "/proc/sys/vm", "/proc/self",
    "/sys/devices/system", "/sys/kernel/mm/transparent_hugepage", "/sys/fs/cgroup",
)  # fmt: skip
_DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")

# What drivers of GPUs open; the patterns' numbers are those of the cards.
_GPU_DEVICES = ("/dev/nvidia*", "/dev/nvidia-caps/*", "/dev/dri", "/dev/kfd")
_GPU_FACTS = (
    "/sys", "/proc/driver", "/proc/devices", "/proc/modules", "/proc/version", "/proc/mounts", "/etc/OpenCL",
    "/etc/vulkan", "/etc/glvnd", "/etc/nvidia", "/opt/rocm", "/etc/alternatives",
)  # fmt: skip


def border_of(
    sandbox: str,
    *,
    write: Iterable[Path],
    read: Iterable[Path] = (),
    run: Sequence[Path] = (),
    device: str = "cpu",
    environment: Mapping[str, str],
    cpu_s: int,
) -> Border:
    """Return the border of a child.

    Args:
        sandbox: "strict" or "basic".
        write: folders that it writes to.
        read: folders that it reads beside the installation, and, where it starts programs, runs them from.
        run: folders of programs that it may start, the system's included if there is any; with none it starts nothing.
        device: as in `WorkerSpec`.
        environment: the child's; libraries lie on its LD_LIBRARY_PATH, packages on its PYTHONPATH.
        cpu_s: CPU time in its life.
    """
    packages = [*_installation(), *_folders(environment.get("PYTHONPATH", ""), but=_PACKAGE_ROOT)]
    libraries = [*map(Path, _LIBRARIES), *_folders(environment.get("LD_LIBRARY_PATH", ""))]
    programs = [*run, *read, *packages, *libraries, *map(Path, _PROGRAMS)] if run else []
    readable = [*packages, *libraries, *read, *map(Path, _FACTS), *write]
    writable, devices = list(write), [Path(name) for name in _DEVICES]
    if device != "cpu":
        readable += map(Path, _GPU_FACTS)
        devices += [path for pattern in _GPU_DEVICES for path in Path("/").glob(pattern[1:])]
        writable += [Path(environment[name]) for name in ("XDG_CACHE_HOME", "CUDA_CACHE_PATH", "OPTIX_CACHE_PATH")]
    return Border(
        sandbox=sandbox,
        read=_texts(readable),
        run=_texts(programs),
        write=_texts(writable),
        devices=_texts(devices),
        cpu_s=cpu_s,
    )


def _installation() -> list[Path]:
    """Return where Python, its packages and our own code lie; not the folder around ours, which may hold anything."""
    folders = [sys.prefix, sys.base_prefix, sys.exec_prefix, sys.base_exec_prefix, *site.getsitepackages()]
    zipped = [path for path in sys.path if path.endswith(".zip")]
    return [Path(path) for path in (*folders, *zipped)] + [_PACKAGE_ROOT / name for name in _OURS]


def _folders(paths: str, but: Path | None = None) -> list[Path]:
    found = [Path(path) for path in paths.split(os.pathsep) if path]
    return [path for path in found if path.is_absolute() and path != but and path.is_dir()]


def _texts(paths: Iterable[Path]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(str(path) for path in paths))
