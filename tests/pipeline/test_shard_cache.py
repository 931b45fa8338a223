"""The node's cache of shards: whole files, what is in use stays, limits hold across processes."""

from __future__ import annotations

import contextlib
import errno
import gc
import hashlib
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from pipeline.shard import DamagedDataError, shard_key
from pipeline.shard_cache import CachedReads, CacheFullError, ShardCache
from pipeline.shard_reads import FolderReads, ShardRef
from pipeline.store import MissingObjectError, Store, open_store
from pipeline.types import UserError

NUM_BYTES = 100_000


def make_store(folder: Path, num_shards: int) -> tuple[Store, list[ShardRef]]:
    store, shards = open_store(str(folder)), []
    for number in range(num_shards):
        data = bytes([number]) * NUM_BYTES
        sha256 = hashlib.sha256(data).hexdigest()
        store.create(shard_key(sha256), data)
        shards.append(ShardRef(sha256, NUM_BYTES))
    return store, shards


def hold_one(folder: Path) -> tuple[list[ShardRef], ShardCache, CachedReads]:
    """Read of the one shard of a corpus, so that it is cached and held."""
    store, shards = make_store(folder / "corpus", 1)
    cache = ShardCache(folder / "cache", 4 * NUM_BYTES)
    reads = CachedReads(store, cache, FolderReads(store), max_open=2)
    reads.submit(shards[0], [0], [100]).result()
    return shards, cache, reads


def held_files(folder: Path) -> set[str]:
    return {path.stem for path in folder.glob("*.tar")}


def test_a_shard_is_brought_once_and_found_again(tmp_path: Path) -> None:
    store, shards = make_store(tmp_path / "corpus", 1)
    cache = ShardCache(tmp_path / "cache", 10 * NUM_BYTES)
    for brought in (True, False, False):
        descriptor, was_brought = cache.bring(store, shards[0])
        assert was_brought is brought
        assert os.pread(descriptor, NUM_BYTES, 0) == bytes(NUM_BYTES)
        os.close(descriptor)


def test_a_shard_that_is_damaged_in_the_store_is_brought_once_and_read_by_ranges(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store, shards = make_store(tmp_path / "corpus", 1)
    (tmp_path / "corpus" / shards[0].key).write_bytes(b"!" + bytes(NUM_BYTES - 1))
    reads = CachedReads(store, ShardCache(tmp_path / "cache", 4 * NUM_BYTES), FolderReads(store), max_open=2)
    for _ in range(3):
        assert reads.submit(shards[0], [1], [100]).result() == [bytes(100)]
    reads.bring_ahead(shards)
    assert caplog.text.count(f"{shards[0].key}: the store holds other bytes than its name") == 1
    assert reads.stats.num_wire_bytes == 300
    assert held_files(tmp_path / "cache") == set()
    reads.close()


def test_the_least_recently_opened_goes_first_and_what_is_in_use_stays(tmp_path: Path) -> None:
    store, shards = make_store(tmp_path / "corpus", 5)
    cache = ShardCache(tmp_path / "cache", 3 * NUM_BYTES)
    used = [cache.bring(store, shard)[0] for shard in shards[:3]]
    with pytest.raises(CacheFullError):
        cache.bring(store, shards[3])
    for descriptor in used[1:]:
        os.close(descriptor)
    time.sleep(0.01)
    os.close(cache.open(shards[1]) or -1)  # the third is now the one not opened for longest, the first is in use
    os.close(cache.bring(store, shards[3])[0])
    assert held_files(cache.folder) == {shards[i].sha256 for i in (0, 1, 3)}
    os.close(used[0])
    for shard in shards:
        os.close(cache.bring(store, shard)[0])
        assert len(held_files(cache.folder)) <= 3


def test_a_limit_below_one_shard_is_refused(tmp_path: Path) -> None:
    store, shards = make_store(tmp_path / "corpus", 1)
    with pytest.raises(UserError, match=r"data.cache_bytes 10 is less than one shard of 100000 bytes"):
        ShardCache(tmp_path / "cache", 10).bring(store, shards[0])


def test_what_arrives_is_checked_against_its_name(tmp_path: Path) -> None:
    store, shards = make_store(tmp_path / "corpus", 3)
    cache = ShardCache(tmp_path / "cache", 10 * NUM_BYTES)
    paths = [tmp_path / "corpus" / shard.key for shard in shards]
    for path, data in ((paths[0], b"x" * NUM_BYTES), (paths[1], b"\1" * (NUM_BYTES // 2))):
        path.chmod(0o644)
        path.write_bytes(data)
    paths[2].unlink()
    with pytest.raises(DamagedDataError, match=f"{shards[0].key}: the store holds other bytes than its name"):
        cache.bring(store, shards[0])
    with pytest.raises(DamagedDataError, match=f"{shards[1].key}: the store holds 50000 bytes"):
        cache.bring(store, shards[1])
    with pytest.raises(MissingObjectError, match=f"there is no {shards[2].key}"):
        cache.bring(store, shards[2])
    assert not list(cache.folder.glob("*.tar")) + list(cache.folder.glob(".*.tmp"))


def test_a_file_of_another_length_counts_as_absent_and_stale_leftovers_are_removed(tmp_path: Path) -> None:
    store, shards = make_store(tmp_path / "corpus", 2)
    cache = ShardCache(tmp_path / "cache", 2 * NUM_BYTES)
    cache.path(shards[0]).write_bytes(b"half")
    stale = cache.folder / f".{shards[1].sha256}.{NUM_BYTES}.abcdef.tmp"
    stale.write_bytes(b"of a killed process")
    descriptor, brought = cache.bring(store, shards[0])
    os.close(descriptor)
    assert brought
    assert not stale.exists()


def test_files_that_are_not_the_caches_own_are_never_removed(tmp_path: Path) -> None:
    """A cache on a scratch disk that other things lie on: room is made from the cache's own files alone."""
    store, shards = make_store(tmp_path / "corpus", 4)
    cache = ShardCache(tmp_path / "cache", 2 * NUM_BYTES)
    others = [cache.folder / name for name in ("backup.tar", "notes.tmp", ".a.b.tmp", f".{'0' * 64}.x.tmp")]
    for path in others:
        path.write_bytes(b"somebody's")
        os.utime(path, (1, 1))
    for shard in shards:
        os.close(cache.bring(store, shard)[0])
    assert all(path.read_bytes() == b"somebody's" for path in others)
    assert held_files(cache.folder) == {"backup", *(shard.sha256 for shard in shards[2:])}


def test_half_a_shard_never_has_the_name_of_a_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The store sends slowly, in pieces; meanwhile the folder is looked at all the time."""
    from pipeline import shard_cache

    store, shards = make_store(tmp_path / "corpus", 1)
    cache = ShardCache(tmp_path / "cache", 2 * NUM_BYTES)
    real, seen = shard_cache.obstore.get, list[int]()

    class Slow:
        def __init__(self, result: object) -> None:
            self._data = bytes(result.bytes())  # type: ignore[attr-defined]

        def stream(self, min_chunk_size: int) -> object:
            for start in range(0, NUM_BYTES, NUM_BYTES // 10):
                time.sleep(0.02)
                yield self._data[start : start + NUM_BYTES // 10]

    monkeypatch.setattr(shard_cache.obstore, "get", lambda *a: Slow(real(*a)))
    worker = threading.Thread(target=lambda: os.close(cache.bring(store, shards[0])[0]))
    worker.start()
    partial = 0
    while worker.is_alive():
        seen += [path.stat().st_size for path in cache.folder.glob("*.tar")]
        partial += any(0 < path.stat().st_size < NUM_BYTES for path in cache.folder.glob(".*.tmp") if path.exists())
        time.sleep(0.002)
    worker.join()
    assert set(seen) <= {NUM_BYTES}
    assert partial


BRING = """
import os, sys, time
from pathlib import Path
from pipeline.shard_cache import CacheFullError, ShardCache
from pipeline.shard_reads import ShardRef
from pipeline.store import open_store
corpus, folder, limit, turns = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
store, cache = open_store(corpus), ShardCache(Path(folder), limit)
shards = [ShardRef(name, 100000) for name in sys.argv[5:]]
brought = full = 0
for turn in range(turns):
    for number, shard in enumerate(shards):
        try:
            descriptor, new = cache.bring(store, shard)
        except CacheFullError:
            full += 1
            continue
        brought += new
        data = os.pread(descriptor, 100001, 0)
        assert len(data) == 100000 and len(set(data)) == 1, (len(data), set(data))
        os.close(descriptor)
        with cache._locked(".lock"):  # else one is gone and another there before the listing is done
            kept = [p.stat().st_size for p in Path(folder).glob("*.tar")]
            assert sum(kept) <= limit
print(brought, full)
"""


def run_processes(corpus: Path, folder: Path, limit: int, turns: int, shards: list[ShardRef]) -> list[tuple[int, int]]:
    command = [sys.executable, "-c", BRING, str(corpus), str(folder), str(limit), str(turns)]
    running = [
        subprocess.Popen([*command, *(shard.sha256 for shard in order)], stdout=subprocess.PIPE, text=True)
        for order in (shards, shards[::-1], shards[1:] + shards[:1])
    ]
    out = [process.communicate(timeout=120)[0] for process in running]
    assert all(process.returncode == 0 for process in running)
    return [(int(one.split()[0]), int(one.split()[1])) for one in out]


def test_processes_share_what_one_of_them_brought(tmp_path: Path) -> None:
    _, shards = make_store(tmp_path / "corpus", 8)
    counts = run_processes(tmp_path / "corpus", tmp_path / "cache", 8 * NUM_BYTES, 2, shards)
    assert sum(brought for brought, _ in counts) == 8, "each shard was brought by one process"
    assert not any(full for _, full in counts)


def test_the_limit_holds_while_processes_compete(tmp_path: Path) -> None:
    """Each process looks at the folder's size after every turn."""
    _, shards = make_store(tmp_path / "corpus", 8)
    counts = run_processes(tmp_path / "corpus", tmp_path / "cache", 4 * NUM_BYTES, 6, shards)
    assert sum(brought for brought, _ in counts) > 8
    assert len(held_files(tmp_path / "cache")) <= 4


def test_a_shard_that_arrives_while_room_is_made_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its writer gives it its name after the folder was listed and before its reservation is looked at."""
    store, shards = make_store(tmp_path / "corpus", 2)
    cache = ShardCache(tmp_path / "cache", 2 * NUM_BYTES - 1)
    on_its_way = cache.folder / f".{shards[0].sha256}.{NUM_BYTES}.abcdef.tmp"
    on_its_way.write_bytes(bytes(NUM_BYTES))
    real = ShardCache._remove_unlocked

    def arrives(path: Path) -> bool:
        if on_its_way.exists():
            on_its_way.rename(cache.path(shards[0]))
        return real(path)

    monkeypatch.setattr(ShardCache, "_remove_unlocked", staticmethod(arrives))
    os.close(cache.bring(store, shards[1])[0])
    assert held_files(cache.folder) == {shards[1].sha256}


def open_descriptors(folder: Path) -> int:
    links = list(Path("/proc/self/fd").iterdir())
    return sum(link.is_symlink() and str(folder) in str(link.readlink()) for link in links)


def test_no_shard_stays_locked_when_threads_bring_and_let_go(tmp_path: Path) -> None:
    """A descriptor that is forgotten keeps its shard from eviction until the process ends, on the whole node."""
    store, shards = make_store(tmp_path / "corpus", 4)
    cache = ShardCache(tmp_path / "cache", 4 * NUM_BYTES)
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    reads = CachedReads(store, cache, FolderReads(store), max_open=1, num_threads=8)
    futures = [reads.submit(shards[number * 7 % 11 % 4], [0], [3]) for number in range(6000)]
    for future in futures:
        future.result()
    reads.close()
    sys.setswitchinterval(before)
    assert open_descriptors(cache.folder) == 0
    dropped = CachedReads(store, cache, FolderReads(store), max_open=4)
    dropped.submit(shards[0], [0], [3]).result()
    assert open_descriptors(cache.folder) == 1
    del dropped
    deadline = time.monotonic() + 10
    while open_descriptors(cache.folder) and time.monotonic() < deadline:
        time.sleep(0.01)
        gc.collect()
    assert open_descriptors(cache.folder) == 0


def test_where_the_cache_has_no_room_reads_go_past_it_and_are_counted(tmp_path: Path) -> None:
    store, shards = make_store(tmp_path / "corpus", 3)
    cache = ShardCache(tmp_path / "cache", 2 * NUM_BYTES)
    others = [cache.bring(store, shard)[0] for shard in shards[:2]]  # another process's, in use
    reads = CachedReads(store, cache, FolderReads(store), max_open=2)
    assert reads.submit(shards[2], [5], [3]).result() == [b"\2\2\2"]
    assert reads.submit(shards[0], [0, 7], [1, 2]).result() == [b"\0", b"\0\0"]
    assert (reads.stats.cache_bypasses, reads.stats.cache_hits, reads.stats.cache_misses) == (1, 1, 0)
    for descriptor in others:
        os.close(descriptor)
    reads.close()


def test_shards_brought_ahead_are_there_when_they_are_read(tmp_path: Path) -> None:
    store, shards = make_store(tmp_path / "corpus", 4)
    cache = ShardCache(tmp_path / "cache", 4 * NUM_BYTES)
    reads = CachedReads(store, cache, FolderReads(store), max_open=4)
    reads.bring_ahead(shards)
    deadline = time.monotonic() + 30
    while reads.stats.cache_misses < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    for number, shard in enumerate(shards):
        assert reads.submit(shard, [0], [1]).result() == [bytes([number])]
    assert (reads.stats.cache_hits, reads.stats.num_wire_bytes) == (4, 4 * NUM_BYTES)
    reads.close()


def damage(path: Path, how: str) -> None:
    """Change a cached file as a disk does: its time, and so its place among the evicted, stays."""
    found = path.stat()
    with path.open("r+b") as file:
        if how == "flipped":
            file.seek(77)
            file.write(b"!")
        else:
            file.truncate(80)
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))


@pytest.mark.parametrize("how", ["flipped", "cut"])
@pytest.mark.parametrize("held", [True, False])
def test_a_shard_that_the_disk_changed_is_removed_and_the_store_is_read(tmp_path: Path, how: str, held: bool) -> None:
    store, shards = make_store(tmp_path / "corpus", 2)
    cache = ShardCache(tmp_path / "cache", 4 * NUM_BYTES)
    reads = CachedReads(store, cache, FolderReads(store), max_open=2)
    for shard in shards:
        assert len(reads.submit(shard, [0], [100]).result()[0]) == 100
    if not held:
        reads.close()
        reads = CachedReads(store, cache, FolderReads(store), max_open=2)
    damage(cache.path(shards[1]), how)
    if held and how == "cut":
        with pytest.raises(DamagedDataError, match="is cut"):
            reads.submit(shards[1], [0], [100]).result()
    elif how == "flipped":
        assert reads.submit(shards[1], [0], [100]).result() != [b"\1" * 100]
    assert reads.submit_again(shards[1], [0], [100]).result() == [b"\1" * 100]
    assert reads.submit_again(shards[0], [0], [100]).result() == [bytes(100)], "and a whole one stays"
    assert held_files(cache.folder) == {shards[0].sha256}
    assert reads.stats.cache_damaged == 1
    assert reads.submit(shards[1], [0], [100]).result() == [b"\1" * 100]
    assert held_files(cache.folder) == {shard.sha256 for shard in shards}
    reads.close()
    assert open_descriptors(cache.folder) == 0


def test_what_another_process_brought_again_stays(tmp_path: Path) -> None:
    store, shards = make_store(tmp_path / "corpus", 1)
    cache = ShardCache(tmp_path / "cache", 4 * NUM_BYTES)
    spoilt = cache.bring(store, shards[0])[0]
    damage(cache.path(shards[0]), "flipped")
    cache.path(shards[0]).unlink()
    os.close(cache.bring(store, shards[0])[0])
    assert not cache.remove_damaged(shards[0], spoilt)
    os.close(spoilt)
    assert held_files(cache.folder) == {shards[0].sha256}


def test_a_file_of_another_length_that_was_brought_again_meanwhile_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, shards = make_store(tmp_path / "corpus", 1)
    cache, fstat = ShardCache(tmp_path / "cache", 4 * NUM_BYTES), os.fstat
    os.close(cache.bring(store, shards[0])[0])
    damage(cache.path(shards[0]), "cut")

    def others_are_quicker(descriptor: int) -> os.stat_result:
        found = fstat(descriptor)
        if found.st_size == 80:
            monkeypatch.undo()
            cache.path(shards[0]).unlink()
            os.close(cache.bring(store, shards[0])[0])
        return found

    monkeypatch.setattr(os, "fstat", others_are_quicker)
    assert cache.open(shards[0]) is None
    assert held_files(cache.folder) == {shards[0].sha256}
    assert open_descriptors(cache.folder) == 0


def test_a_damaged_shard_that_several_hold_is_counted_by_the_one_that_removes_it(tmp_path: Path) -> None:
    store, shards = make_store(tmp_path / "corpus", 1)
    cache = ShardCache(tmp_path / "cache", 4 * NUM_BYTES)
    both = [
        CachedReads(store, each, FolderReads(store), max_open=2)
        for each in (cache, ShardCache(cache.folder, cache.max_bytes))
    ]
    for reads in both:
        reads.submit(shards[0], [0], [100]).result()
    damage(cache.path(shards[0]), "flipped")
    for reads in both:
        assert reads.submit_again(shards[0], [0], [100]).result() == [bytes(100)]
        reads.close()
    assert [reads.stats.cache_damaged for reads in both] == [1, 0]


def test_nobody_takes_up_a_damaged_shard_while_it_is_being_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards, cache, reads = hold_one(tmp_path)
    damage(cache.path(shards[0]), "flipped")
    begun, go_on, remove = threading.Event(), threading.Event(), cache.remove_damaged

    def slowly(shard: ShardRef, descriptor: int) -> bool:
        begun.set()
        return go_on.wait(30) and remove(shard, descriptor)

    monkeypatch.setattr(cache, "remove_damaged", slowly)
    again = reads.submit_again(shards[0], [0], [100])
    assert begun.wait(30)
    another = reads.submit(shards[0], [0], [100])
    with contextlib.suppress(TimeoutError):
        another.result(timeout=0.2)
    go_on.set()
    assert again.result() == another.result() == [bytes(100)]
    assert (reads.stats.cache_damaged, reads.stats.cache_misses) == (1, 2)
    reads.close()


def test_a_damaged_shard_that_cannot_be_removed_is_passed_by(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a disk fails, the system mounts it anew to be read only."""
    shards, cache, reads = hold_one(tmp_path)
    damage(cache.path(shards[0]), "flipped")

    def refuse(path: Path, missing_ok: bool = False) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(Path, "unlink", refuse)
    assert reads.submit_again(shards[0], [0], [100]).result() == [bytes(100)]
    assert reads.submit(shards[0], [0], [100]).result() == [bytes(100)], "and not from the damaged file"
    monkeypatch.undo()
    reads.close()
    assert reads.stats.cache_damaged == 0
    assert open_descriptors(cache.folder) == 0


def test_of_all_that_ask_for_a_shard_that_is_damaged_in_the_store_one_brings_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline import shard_cache

    store, shards = make_store(tmp_path / "corpus", 1)
    (tmp_path / "corpus" / shards[0].key).write_bytes(b"\7" * NUM_BYTES)
    cache, get, times = ShardCache(tmp_path / "cache", 4 * NUM_BYTES), shard_cache.obstore.get, list[str]()

    def counted(backend: object, key: str) -> object:
        times.append(key)
        time.sleep(0.1)  # so that all that ask come while it is on its way
        return get(backend, key)  # type: ignore[arg-type]

    monkeypatch.setattr(shard_cache.obstore, "get", counted)
    reads = CachedReads(store, cache, FolderReads(store), max_open=2)
    reads.bring_ahead(shards)
    for future in [reads.submit(shards[0], [0], [9]) for _ in range(8)]:
        assert future.result() == [b"\7" * 9]
    reads.close()
    assert times == [shards[0].key]


def test_a_cached_shard_that_the_disk_cannot_read_is_read_from_the_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards, cache, reads = hold_one(tmp_path)
    bad, pread = cache.path(shards[0]).stat().st_ino, os.pread

    def refuse(descriptor: int, num_bytes: int, at: int) -> bytes:
        if os.fstat(descriptor).st_ino == bad:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return pread(descriptor, num_bytes, at)

    monkeypatch.setattr(os, "pread", refuse)
    assert reads.submit(shards[0], [0], [100]).result() == [bytes(100)]
    assert reads.stats.cache_damaged == 1
    assert held_files(cache.folder) == set()
    reads.close()
