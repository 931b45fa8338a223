"""Plan, commit, publish, read: the promises of a corpus, on a folder and in memory."""

from __future__ import annotations

import contextlib
import itertools
import json
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jobs.status import corpus_status
from pipeline import plan as plans
from pipeline import receipt, version
from pipeline.reader import DamagedDataError, VersionReader
from pipeline.sample import decode_rgba
from pipeline.shard import shard_key
from pipeline.spec import DatasetSpec, ProceduralSource, ShardSpec
from pipeline.store import Outcome, Store, open_store
from pipeline.types import Failure, FailureKind, Sample, UserError
from tests.conftest import SHARED, make_asset, make_sample

SPEC = DatasetSpec(name="fake", source=ProceduralSource(num_objects=5), shards=ShardSpec(objects_per_shard=3))
counter = itertools.count()


@pytest.fixture(params=["folder", "memory", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "folder":
        return open_store(str(tmp_path / "corpus"))
    root = "memory:/" if request.param == "memory" else request.getfixturevalue("s3_url")
    return open_store(f"{root}/test-{next(counter)}")


def make_plan(store: Store, count: int = 5, fingerprint: str = "f") -> plans.PlanSet:
    return plans.freeze(store, SPEC, fingerprint, lambda: [make_asset(f"ball-{i}") for i in range(count)])


def results_of(shard: plans.ShardPlan) -> dict[str, Sample | Failure]:
    out: dict[str, Sample | Failure] = {a.uid: make_sample(a.uid, fingerprint=shard.fingerprint) for a in shard.assets}
    if "ball-1" in out:
        out["ball-1"] = Failure(uid="ball-1", kind=FailureKind.EMPTY_SCENE, message="no mesh")
    return out


def commit_all(store: Store, plan: plans.PlanSet, tmp_path: Path) -> None:
    for shard in plan.shards:
        receipt.commit_shard(store, shard, results_of(shard), tmp_path)
        (tmp_path / f"{shard.plan_id}.tar").unlink(missing_ok=True)


def test_a_corpus_is_planned_committed_published_and_read(store: Store, tmp_path: Path) -> None:
    store.probe()
    plan = make_plan(store)
    assert [len(s.assets) for s in plan.shards] == [3, 2]
    commit_all(store, plan, tmp_path)
    published, new = version.publish(store, [plan])
    assert (new, published.number, published.counts["samples"]) == (True, 1, 4)
    assert published.counts["failures"] == {"empty_scene": 1}
    again, new = version.publish(store, [plan])
    assert (new, again.number) == (False, 1)

    reader = VersionReader(store, version.open_version(store))
    assert reader.rows["uid"].to_pylist() == ["ball-0", "ball-2", "ball-3", "ball-4"]
    got = reader.read_views(2, [3, 0])
    sample = make_sample("ball-3")
    assert [p["rgba"] for p in got.planes] == [sample.views[3].planes["rgba"].data, sample.views[0].planes["rgba"].data]
    assert (got.header.cameras[3].world_from_camera == sample.views[3].camera.world_from_camera).all()
    assert decode_rgba(got.planes[0]["rgba"]).shape == (32, 32, 4)


def test_the_same_samples_give_the_same_bytes(tmp_path: Path) -> None:
    digests = []
    for name in ("a", "b"):
        store = open_store(str(tmp_path / name))
        plan = make_plan(store)
        commit_all(store, plan, tmp_path)
        version.publish(store, [plan])
        digests.append(version.open_version(store).digest)
    assert digests[0] == digests[1]
    names = [sorted(p.name for p in (tmp_path / n / "shards").iterdir()) for n in ("a", "b")]
    assert names[0] == names[1]


def test_a_shard_is_committed_once_and_the_winner_is_adopted(store: Store, tmp_path: Path) -> None:
    shard = make_plan(store).shards[0]
    first, ours = receipt.commit_shard(store, shard, results_of(shard), tmp_path)
    assert ours
    (tmp_path / f"{shard.plan_id}.tar").unlink()
    other = results_of(shard) | {"ball-0": Failure(uid="ball-0", kind=FailureKind.RENDER_CRASH, message="late")}
    second, ours = receipt.commit_shard(store, shard, other, tmp_path)
    assert not ours
    assert second.rows.equals(first.rows)


def test_results_that_do_not_account_for_the_plan_are_refused(store: Store, tmp_path: Path) -> None:
    shard = make_plan(store).shards[0]
    results = results_of(shard)
    results.pop("ball-2")
    with pytest.raises(ValueError, match=r"missing \['ball-2'\]"):
        receipt.commit_shard(store, shard, results, tmp_path)
    assert list(store.list("")) == [i for i in store.list("") if i.key.startswith("plans/")]


def test_create_never_overwrites(store: Store) -> None:
    assert store.create("k", b"one") is Outcome.CREATED
    assert store.create("k", b"one") is Outcome.SAME
    assert store.create("k", b"two") is Outcome.CONFLICT
    assert store.get("k") == b"one"


def test_a_store_that_ignores_preconditions_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import obstore

    real = obstore.put

    def careless(store: object, key: str, data: object, **options: object) -> object:
        options.pop("mode", None)
        return real(store, key, data, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(obstore, "put", careless)
    with pytest.raises(UserError, match="ignores create-if-absent"):
        open_store(str(tmp_path / "c")).probe()


def test_damage_is_named(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "corpus"))
    plan = make_plan(store)
    commit_all(store, plan, tmp_path)
    version.publish(store, [plan])
    reader = VersionReader.open(str(tmp_path / "corpus"))
    path = tmp_path / "corpus" / shard_key(reader.rows["shard_sha256"][0].as_py())
    data = bytearray(path.read_bytes())
    entry = receipt.member_index(reader.rows.slice(0, 1).to_pylist()[0])
    data[entry.offsets[2] + 5] ^= 1
    path.write_bytes(data)
    reader.read_views(0, [0])
    with pytest.raises(DamagedDataError, match="ball-0"):
        reader.read_views(0, [1])


def test_publish_refuses_a_missing_shard(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "corpus"))
    plan = make_plan(store)
    commit_all(store, plan, tmp_path)
    next((tmp_path / "corpus" / "shards").iterdir()).unlink()
    with pytest.raises(UserError, match="is missing"):
        version.publish(store, [plan])


def test_a_frozen_plan_does_not_move(store: Store) -> None:
    first = make_plan(store, 5)
    assert make_plan(store, 9).num_assets == first.num_assets == 5


def test_two_samples_of_one_uid_need_a_choice(store: Store, tmp_path: Path) -> None:
    a, b = make_plan(store), make_plan(store, fingerprint="g")
    commit_all(store, a, tmp_path)
    commit_all(store, b, tmp_path)
    with pytest.raises(UserError, match="two fingerprints"):
        version.publish(store, [a, b])
    assert version.publish(store, [b])[0].record["fingerprints"] == ["g"]


def test_a_corpus_of_another_schema_is_refused(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "corpus"))
    plan = make_plan(store)
    commit_all(store, plan, tmp_path)
    version.publish(store, [plan])
    path = tmp_path / "corpus" / version.version_key(1)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema": 99}))
    with pytest.raises(UserError, match="schema 99"):
        VersionReader.open(str(tmp_path / "corpus"))


def test_latest_is_found_without_listing(store: Store) -> None:
    assert version.latest_number(store) == 0
    for number in range(1, 12):
        store.create(version.version_key(number), b"{}")
        assert version.latest_number(store) == number


def test_the_tar_is_canonical_and_webdataset_reads_it(tmp_path: Path) -> None:
    wds = pytest.importorskip("webdataset")
    store = open_store(str(tmp_path / "corpus"))
    plan = make_plan(store)
    commit_all(store, plan, tmp_path)
    version.publish(store, [plan])
    lines = (tmp_path / "corpus/versions/000001.shards.txt").read_text().split()
    urls = [str(tmp_path / "corpus" / line) for line in lines]
    with tarfile.open(urls[0]) as tar:
        assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in tar} == {(0, 0, 0, "", "", 0o644)}
    found = list(wds.WebDataset(urls, shardshuffle=False).decode("pil"))
    assert sorted(s["__key__"] for s in found) == ["ball-0", "ball-2", "ball-3", "ball-4"]
    assert all(s["json"]["num_views"] == 4 and s["003.rgba.webp"].size == (32, 32) for s in found)


def test_the_independent_checker_finds_nothing(tmp_path: Path) -> None:
    checker = SHARED / "tools" / "check_corpus.py"
    if not checker.is_file():
        pytest.skip("shared/tools is not present")
    store = open_store(str(tmp_path / "corpus"))
    shard = make_plan(store).shards[0]
    results = {a.uid: make_sample(a.uid, num_views=8, size_px=96) for a in shard.assets}
    receipt.commit_shard(store, shard, results, tmp_path)
    done = subprocess.run(
        [sys.executable, str(checker), str(tmp_path / f"{shard.plan_id}.tar")],
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout


@given(st.sets(st.integers(0, 99), min_size=1))
def test_shard_lists_round_trip(chosen: set[int]) -> None:
    assert plans.parse_shards(",".join(map(str, chosen)), 100) == sorted(chosen)


@pytest.mark.parametrize("text", ["9-2", "4", "0-4", "x", "", "1,,2", "-1", "1-2-3", "99999999999"])
def test_bad_shard_lists_are_one_clear_line(text: str) -> None:
    with pytest.raises(UserError) as info:
        plans.parse_shards(text, 4)
    assert "\n" not in str(info.value)
    assert "SHARDS=" in str(info.value)


def test_assets_that_share_a_key_are_refused() -> None:
    with pytest.raises(UserError, match="uids must differ"):
        plans.deal([make_asset("a"), replace(make_asset("a"))], 2, "f")


def published(tmp_path: Path) -> tuple[Store, plans.PlanSet]:
    store = open_store(str(tmp_path / "corpus"))
    plan = make_plan(store)
    commit_all(store, plan, tmp_path)
    version.publish(store, [plan])
    return store, plan


def test_a_list_of_shards_that_was_never_written_is_written_by_the_next_publish(tmp_path: Path) -> None:
    store, plan = published(tmp_path)
    path = tmp_path / "corpus/versions/000001.shards.txt"
    before = path.read_bytes()
    path.unlink()
    assert version.publish(store, [plan])[1] is False
    assert path.read_bytes() == before
    path.write_bytes(before[:10])
    with pytest.raises(UserError, match="is damaged"):
        version.publish(store, [plan])


def test_a_damaged_manifest_is_not_published_again(tmp_path: Path) -> None:
    store, plan = published(tmp_path)
    path = next((tmp_path / "corpus/manifests").iterdir())
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match="is damaged"):
        version.publish(store, [plan])
    with pytest.raises(UserError, match="differs from its digest"):
        VersionReader.open(str(tmp_path / "corpus"))
    path.unlink()
    with pytest.raises(UserError, match="manifest of version 1 is missing"):
        VersionReader.open(str(tmp_path / "corpus"))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(part=st.sampled_from(["plans", "receipts", "manifests", "versions"]), at=st.floats(0, 1), cut=st.booleans())
def test_any_damage_to_a_record_is_one_typed_error_or_does_no_harm(
    damaged_corpus: Path, part: str, at: float, cut: bool
) -> None:
    """A flipped bit or a cut anywhere in a record: reading verbs raise UserError or DamagedDataError, nothing else."""
    path = sorted((damaged_corpus / part).iterdir())[0]
    whole = path.read_bytes()
    data, place = bytearray(whole), min(int(at * len(whole)), len(whole) - 1)
    data[place] ^= 0x10
    path.write_bytes(whole[:place] if cut else bytes(data))
    try:
        store = open_store(str(damaged_corpus))
        with contextlib.suppress(UserError, DamagedDataError):
            corpus_status(store)
        with contextlib.suppress(UserError, DamagedDataError):
            version.publish(store, version.plan_sets(store))
        with contextlib.suppress(UserError, DamagedDataError):
            VersionReader(store, version.open_version(store, 1)).read_views(0, [0])
    finally:
        path.write_bytes(whole)
        for extra in (damaged_corpus / "versions").glob("00000[2-9]*"):
            extra.unlink()


@pytest.fixture(scope="module")
def damaged_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("damaged")
    published(folder)
    return folder / "corpus"
