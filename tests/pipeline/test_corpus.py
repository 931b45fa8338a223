"""Plan, commit, publish, read: the promises of a corpus, on a folder and in memory."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from jobs.status import corpus_status
from pipeline import manifest, receipt, version
from pipeline import plan as plans
from pipeline.reader import DamagedDataError, VersionReader
from pipeline.report import write_report
from pipeline.sample import decode_rgba
from pipeline.shard import shard_key
from pipeline.spec import DatasetSpec, ProceduralSource, ShardSpec
from pipeline.store import Outcome, Store, open_store
from pipeline.types import Failure, FailureKind, Sample, UserError
from tests import corpora
from tests.conftest import SHARED, make_asset, make_sample

SPEC = DatasetSpec(name="fake", source=ProceduralSource(num_objects=5), shards=ShardSpec(objects_per_shard=3))


@pytest.fixture
def store(any_store: Store) -> Store:
    return any_store


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


def test_the_same_samples_give_the_same_bytes(store: Store, tmp_path: Path) -> None:
    """On each kind of store what a folder holds, in the other order of shards: all names, and bytes of shards."""
    folder, found = open_store(str(tmp_path / "other")), []
    for one, turn in ((folder, 1), (store, -1)):
        plan = make_plan(one)
        for shard in plan.shards[::turn]:
            receipt.commit_shard(one, shard, results_of(shard), tmp_path)
            (tmp_path / f"{shard.plan_id}.tar").unlink()
        found.append((version.publish(one, [plan])[0].digest, sorted(item.key for item in one.list(""))))
    assert found[0] == found[1]
    for item in folder.list("shards/"):
        assert folder.get(item.key) == store.get(item.key)


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


def test_damage_is_named(store: Store, tmp_path: Path) -> None:
    plan = make_plan(store)
    commit_all(store, plan, tmp_path)
    version.publish(store, [plan])
    reader = VersionReader(store, version.open_version(store))
    key = shard_key(reader.rows["shard_sha256"][0].as_py())
    data = bytearray(store.get(key))
    entry = receipt.member_index(reader.rows.slice(0, 1).to_pylist()[0])
    data[entry.offsets[2] + 5] ^= 1
    corpora.overwrite(store, key, bytes(data))
    reader.read_views(0, [0])
    with pytest.raises(DamagedDataError, match="ball-0"):
        reader.read_views(0, [1])


def test_publish_refuses_a_missing_shard(store: Store, tmp_path: Path) -> None:
    plan = make_plan(store)
    commit_all(store, plan, tmp_path)
    corpora.remove(store, next(store.list("shards/")).key)
    with pytest.raises(UserError, match="is missing"):
        version.publish(store, [plan])


def test_a_frozen_plan_does_not_move(store: Store) -> None:
    first = make_plan(store, 5)
    assert make_plan(store, 9).num_assets == first.num_assets == 5


def test_two_samples_of_one_uid_need_a_choice(store: Store, tmp_path: Path) -> None:
    a, b = make_plan(store), make_plan(store, fingerprint="g")
    commit_all(store, a, tmp_path)
    commit_all(store, b, tmp_path)
    with pytest.raises(UserError, match=f"'ball-0' of source fake .*two fingerprints.* in the plans {a.id}, {b.id}$"):
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
@settings(deadline=None)
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


def published(store: Store, tmp_path: Path) -> plans.PlanSet:
    plan = make_plan(store)
    commit_all(store, plan, tmp_path)
    version.publish(store, [plan])
    return plan


def test_a_list_of_shards_that_was_never_written_is_written_by_the_next_publish(store: Store, tmp_path: Path) -> None:
    plan, key = published(store, tmp_path), "versions/000001.shards.txt"
    before = store.get(key)
    corpora.remove(store, key)
    assert version.publish(store, [plan])[1] is False
    assert store.get(key) == before
    corpora.overwrite(store, key, before[:10])
    with pytest.raises(UserError, match="is damaged"):
        version.publish(store, [plan])


def test_a_damaged_manifest_is_not_published_again(store: Store, tmp_path: Path) -> None:
    plan, key = published(store, tmp_path), next(store.list("manifests/")).key
    corpora.overwrite(store, key, store.get(key)[:-1])
    with pytest.raises(UserError, match="is damaged"):
        version.publish(store, [plan])
    with pytest.raises(UserError, match="differs from its digest"):
        VersionReader(store, version.open_version(store)).rows  # noqa: B018 - the table is read when it is asked for
    corpora.remove(store, key)
    with pytest.raises(UserError, match="manifest of version 1 is missing"):
        VersionReader(store, version.open_version(store)).rows  # noqa: B018


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(part=st.sampled_from(["plans", "receipts", "manifests", "versions"]), at=st.floats(0, 1), cut=st.booleans())
@example(part="plans", at=0.7024654899668782, cut=False)  # within the spec that a plan holds
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
    published(open_store(str(folder / "corpus")), folder)
    return folder / "corpus"


def hash_near(bits: int) -> str:
    """A perceptual hash that differs from all zeros in so many bits."""
    return f"{(1 << bits) - 1:064x}"


def duplicate_corpus(store: Store, tmp_path: Path, hashes: dict[str, str | None], **changes: object) -> plans.PlanSet:
    """Commit samples with these hashes; `changes` are of every asset."""
    values = {"format": "obj", "sha256": None} | changes
    plan = plans.freeze(store, SPEC, "f", lambda: [make_asset(uid, **values) for uid in hashes])
    for shard in plan.shards:
        results: dict[str, Sample | Failure] = {}
        for asset in shard.assets:
            record = {"mean_alpha_coverage": 0.5, "thickness_min": 0.2, "phash": hashes[asset.uid]}
            sample = make_sample(asset.uid, fingerprint=shard.fingerprint, asset=asset, num_views=2, size_px=16)
            results[asset.uid] = replace(sample, quality={k: v for k, v in record.items() if v is not None})
            if asset.uid.startswith("lost"):
                results[asset.uid] = Failure(uid=asset.uid, kind=FailureKind.EMPTY_SCENE, message="no mesh")
        receipt.commit_shard(store, shard, results, tmp_path)
        (tmp_path / f"{shard.plan_id}.tar").unlink(missing_ok=True)
    return plan


def with_rules(**rules: object) -> DatasetSpec:
    return SPEC.model_validate(SPEC.model_dump() | {"admission": rules})


CROWD = {"a": hash_near(0), "b": hash_near(100), "c": hash_near(6), "d": hash_near(13), "e": None, "f": hash_near(0)}


def test_duplicates_are_withdrawn_and_accounted_for(store: Store, tmp_path: Path) -> None:
    plan = duplicate_corpus(store, tmp_path, CROWD | {"lost": None})
    kept, _ = version.publish(store, [plan])
    assert kept.counts["samples"] == 6, "without a distance duplicates stay"
    published, new = version.publish(store, [plan], with_rules(duplicate_distance=8))
    assert (new, published.number) == (True, 2)
    counts = published.counts
    assert counts["failures"] == {"duplicate": 2, "empty_scene": 1}
    assert counts["samples"] + sum(counts["failures"].values()) == counts["planned"] == 7
    assert counts["views"] == 8
    assert published.spec.admission.duplicate_distance == 8

    reader = VersionReader(store, published)
    assert reader.rows["uid"].to_pylist() == ["a", "b", "d", "e"], "d is 13 bits from a, and c, 7 bits away, is gone"
    assert len(reader.read_views(2, [1]).planes) == 1
    assert reader.num_failures == 3

    rows = {row["uid"]: row for row in version.open_rows(store, published).to_pylist()}
    assert rows["c"]["message"] == "within 8 bits of 'a' of source fake, which stays (admission.duplicate_distance)"
    assert rows["f"]["failure_kind"] == "duplicate"
    assert rows["f"]["retryable"] is False
    assert json.loads(rows["f"]["quality"])["phash"] == hash_near(0), "what was measured stays as evidence"
    assert {rows["f"][name] for name in ("shard_sha256", "offset", "num_views", "lengths", "planes")} == {None}
    assert rows["lost"]["message"] == "no mesh"
    assert version.publish(store, [plan], with_rules(duplicate_distance=8)) == (published, False)


def test_a_plain_reader_of_the_listed_shards_still_meets_withdrawn_samples(tmp_path: Path) -> None:
    """What the version's docstring and the README tell: shards are shared and never rewritten, rows decide."""
    store = open_store(str(tmp_path / "corpus"))
    plan = duplicate_corpus(store, tmp_path, CROWD)
    published, _ = version.publish(store, [plan], with_rules(duplicate_distance=8))
    listed = (tmp_path / f"corpus/versions/{published.number:06d}.shards.txt").read_text().split()
    met = set()
    for line in listed:
        with tarfile.open(tmp_path / "corpus" / line) as tar:
            met |= {member.name.split(".")[0] for member in tar}
    assert met == set(CROWD)


def test_a_shard_of_duplicates_only_is_no_part_of_the_version(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "corpus"))
    plan = duplicate_corpus(store, tmp_path, {uid: hash_near(0) for uid in ("a", "b", "c", "d", "e", "f")})
    published, _ = version.publish(store, [plan], with_rules(duplicate_distance=0))
    assert published.counts["samples"] == 1
    assert len((tmp_path / "corpus/versions/000001.shards.txt").read_text().split()) == 1


@pytest.mark.parametrize(("format", "expected"), [("glb", ["a", "b"]), ("obj", ["a", "b", "c", "d"])])
def test_equal_files_are_duplicates_where_the_file_is_the_whole_object(
    tmp_path: Path, format: str, expected: list[str]
) -> None:
    """Two OBJ files may be equal and name other textures: their pictures decide. c has the file of b, d of a."""
    store = open_store(str(tmp_path / "corpus"))
    digests = {"a": "1" * 64, "b": "2" * 64, "c": "2" * 64, "d": "1" * 64}
    assets = [make_asset(uid, format=format, sha256=digest) for uid, digest in digests.items()]
    plan = plans.freeze(store, SPEC, "f", lambda: assets)
    for shard in plan.shards:
        results = {a.uid: make_sample(a.uid, asset=a, num_views=2, size_px=16) for a in shard.assets}
        receipt.commit_shard(store, shard, results, tmp_path)
    published, _ = version.publish(store, [plan], with_rules(duplicate_distance=0))
    assert VersionReader(store, published).rows["uid"].to_pylist() == expected
    rows = {row["uid"]: row for row in version.open_rows(store, published).to_pylist()}
    if format == "glb":
        assert rows["c"]["message"].startswith("the same file as 'b' of source fake, which stays")


def test_of_equal_files_the_first_answers_for_all(tmp_path: Path) -> None:
    """b is near a; c is the file of b and has no hash: the one that is named must be one that stays."""
    store = open_store(str(tmp_path / "corpus"))
    plan = duplicate_corpus(
        store, tmp_path, {"a": hash_near(0), "b": hash_near(3), "c": None}, format="glb", sha256=None
    )
    table = manifest.merge(manifest.load_receipts(store, [s.plan_id for s in plan.shards]), SPEC)
    digests = pa.array([None, "2" * 64, "2" * 64], pa.string())
    table = table.set_column(table.schema.get_field_index("asset_sha256"), "asset_sha256", digests)
    out = manifest.admit(table, with_rules(duplicate_distance=8)).to_pylist()
    assert [row["status"] for row in out] == ["sample", "failure", "failure"]
    assert "'a'" in out[2]["message"]


def test_the_merge_does_not_depend_on_the_order_of_receipts(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "corpus"))
    plan = duplicate_corpus(store, tmp_path, CROWD)
    receipts = manifest.load_receipts(store, [shard.plan_id for shard in plan.shards])
    spec = with_rules(duplicate_distance=8)
    assert manifest.merge(receipts, spec).equals(manifest.merge(receipts[::-1], spec))


def test_stricter_rules_on_pictures_cost_a_publish_and_no_rendering(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "corpus"))
    plan = duplicate_corpus(store, tmp_path, CROWD)
    strict = with_rules(min_thickness=0.3, duplicate_distance=8)
    published, _ = version.publish(store, [plan], strict)
    assert published.counts["failures"] == {"thin": 6}, "what is refused is nobody's duplicate"
    row = version.open_rows(store, published).to_pylist()[0]
    assert "is 0.2; at least 0.3 is required (admission.min_thickness)" in row["message"]
    assert version.publish(store, [plan])[0].counts["samples"] == 6


def test_the_report_counts_flags(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "corpus"))
    plan = make_plan(store, 3)
    for shard in plan.shards:
        results = {a.uid: replace(make_sample(a.uid), quality={"flags": ["over_exposed"]}) for a in shard.assets}
        receipt.commit_shard(store, shard, results, tmp_path)
    version.publish(store, [plan])
    page = write_report(VersionReader.open(str(tmp_path / "corpus")), tmp_path / "report").read_text()
    assert "over exposed" in page
    assert "3 of 3 samples" in page
