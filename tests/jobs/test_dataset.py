"""`make dataset` and the verbs of versions, on a real local Ray with producers that need no Blender."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from jobs.build import build
from jobs.cli import app
from jobs.dataset import Rebuilt, make_dataset, plan_delta, retry
from pipeline import version
from pipeline.spec import DatasetSpec, ProceduralSource
from pipeline.store import open_store
from pipeline.types import FailureKind, UserError
from tests.jobs import fakes
from tests.jobs.test_build import files, make_spec
from tests.jobs.test_cli import refused, run
from tests.pipeline.histories import Workshop, changed_spec


def grown(spec: DatasetSpec, num_objects: int) -> DatasetSpec:
    return spec.model_copy(update={"source": ProceduralSource(num_objects=num_objects)})


def names(corpus: Path) -> set[str]:
    return set(files(corpus))


def test_a_rebuild_makes_what_is_lacking_and_publishes(tmp_path: Path) -> None:
    corpus, said = tmp_path / "corpus", list[str]()
    options: dict[str, Any] = {"produce": fakes.produce, "show_progress": False, "say": said.append}
    spec = make_spec(7, 3)
    looked = make_dataset(spec, str(corpus), dry_run=True, **options)
    assert (looked.found.counts["new"], looked.version) == (7, None)
    assert names(corpus) == set(), "a dry run writes nothing"
    first = make_dataset(spec, str(corpus), **options)
    assert first.summary is not None
    assert (first.summary.samples, first.summary.failures) == (6, {"empty_scene": 1})
    assert first.version is not None
    assert (first.version.number, first.version.counts["samples"]) == (1, 6)
    before = names(corpus)
    assert build(spec, str(corpus), show_progress=False).shards_done_before == 3, "its base plan is the one of render"
    again = make_dataset(spec, str(corpus), **options)
    assert (again.summary, again.new) == (None, False)
    assert names(corpus) == before
    more = make_dataset(grown(spec, 9), str(corpus), **options)
    assert more.summary is not None
    assert (more.summary.planned, more.summary.samples) == (2, 2)
    assert more.version is not None
    assert more.version.counts["samples"] == 8
    assert said[-1] == "9 listed: to make 2 object(s), 64 views (2 new); 6 held, 1 failed"
    assert json.loads(json.dumps(more.as_json()))["published"]["version"] == 2
    assert names(corpus) >= before

    planned_and_shared_out(corpus, options, said)


def planned_and_shared_out(corpus: Path, options: dict[str, Any], said: list[str]) -> None:
    """Go on with the corpus: a delta that is planned first and made by the shard, then retries by kind."""
    spec, quiet = grown(make_spec(7, 1), 11), {"produce": fakes.produce_slowly, "show_progress": False}
    delta = plan_delta(spec, str(corpus), said.append)
    assert delta is not None
    assert (delta.kind, delta.number, delta.num_assets, len(delta.shards)) == ("delta", 2, 2, 2)
    assert plan_delta(spec, str(corpus), said.append) is None, "what is planned is lacking no more"
    done = build(spec, str(corpus), "1", plan_set=delta.id, **quiet)
    assert (done.planned, done.samples) == (1, 1)
    tried = retry(spec, str(corpus), ("empty_scene",), **quiet)
    assert tried.summary is not None
    assert (tried.summary.planned, tried.summary.samples) == (1, 1)
    assert retry(spec, str(corpus), ("empty_scene",), **quiet).summary is None
    last = make_dataset(spec, str(corpus), **options)
    assert said[-1] == "11 listed: to make 1 object(s), 32 views (1 open); 10 held"
    assert last.version is not None
    assert (last.version.counts["samples"], last.version.counts["failures"]) == (11, {})
    other = spec.model_copy(update={"render": spec.render.model_copy(update={"samples": 3})})
    with pytest.raises(UserError, match="is not one of these settings"):
        build(other, str(corpus), "0", plan_set=delta.id)
    with pytest.raises(UserError, match="there is no plan nowhere"):
        build(spec, str(corpus), "0", plan_set="nowhere")


def test_a_rebuild_by_the_job_pays_for_what_changed_alone(tmp_path: Path) -> None:
    """A hundred objects; a knob that changes no pixels; one percent more; another number of samples a pixel."""
    notes, corpus, said = tmp_path / "notes", str(tmp_path / "corpus"), list[str]()
    notes.mkdir()
    produce = functools.partial(fakes.produce_noting, str(notes))

    def rebuild(spec: DatasetSpec, **options: Any) -> tuple[Rebuilt, list[str]]:
        """Rebuild; return what came of it, and the uids that were rendered for it."""
        before = set(notes.iterdir())
        done = make_dataset(spec, corpus, produce=produce, show_progress=False, say=said.append, **options)
        return done, sorted(path.name.split()[0] for path in set(notes.iterdir()) - before)

    spec = make_spec(100, 25)
    first, made = rebuild(spec)
    assert sorted(made) == sorted(f"procedural-{i}" for i in range(100))
    assert first.version is not None
    shards = version.shards_of(open_store(corpus), first.version.number)

    knobs = changed_spec(
        spec, split={"salt": "other"}, limits={"deadline_s": 7}, workers={"open_shards": 9},
        admission={"max_clipped": 0.9}, shards={"objects_per_shard": 10},
    )  # fmt: skip
    same, made = rebuild(knobs)
    assert (same.summary, made) == (None, [])
    assert said[-1] == "100 listed: nothing to make; 100 held"
    assert same.version is not None
    assert version.shards_of(open_store(corpus), same.version.number) == shards

    more, made = rebuild(grown(spec, 101))
    assert made == ["procedural-100"]
    assert said[-1] == "101 listed: to make 1 object(s), 32 views (1 new); 100 held"
    assert more.version is not None
    assert set(shards) < set(version.shards_of(open_store(corpus), more.version.number))

    finer = changed_spec(grown(spec, 101), render={"samples": 64})
    looked, made = rebuild(finer, dry_run=True)
    assert (looked.version, made) == (None, [])
    assert said[-1] == "101 listed: to make 101 object(s), 3232 views (101 new); none held"
    done, made = rebuild(finer)
    assert (len(made), len(set(made))) == (101, 101)
    assert done.version is not None
    assert done.version.counts["samples"] == 101


def test_a_mistyped_list_of_shards_leaves_no_plan_behind(tmp_path: Path) -> None:
    """An absent GPU leaves none either: `tests/jobs/test_devices.py`."""
    with pytest.raises(UserError, match="out of range"):
        build(make_spec(), str(tmp_path / "corpus"), "0-7", produce=fakes.produce, show_progress=False)
    assert names(tmp_path / "corpus") == set()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verbs") / "corpus"
    shop = Workshop(open_store(str(folder)), fails={"ball-3": FailureKind.EMPTY_SCENE})
    shop.put(f"ball-{i}" for i in range(7))
    shop.dataset()
    return folder


def call(*arguments: str, status: int = 0) -> dict[str, Any]:
    """Run a verb with --json, and return what it printed last."""
    done = CliRunner().invoke(app, [*arguments, "--json"], catch_exceptions=False)
    assert done.exit_code == status, done.output
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def test_the_verbs_of_versions(corpus: Path, tmp_path: Path) -> None:
    at = ("--corpus", str(corpus))
    assert call("verify", *at, "--deep")["decoded_samples"] == 6
    buried = call("tombstone", *at, "--uid", "ball-1, ball-2")
    assert (buried["version"], buried["tombstones"]) == (2, ["ball-1", "ball-2"])
    found = call("diff", *at, "--a", "1", "--b", "2", "--out", str(tmp_path / "diff.json"))
    assert found["counts"]["removed"] == 2
    assert json.loads((tmp_path / "diff.json").read_text()) == found
    assert call("compact", *at, "--dead", "0.4")["samples"] == 1
    assert call("publish", *at)["new"] is False
    assert call("diff", *at, "--a", "2")["counts"]["moved"] == 1
    (corpus / "shards" / ("a" * 64 + ".tar")).write_bytes(b"orphan")
    assert call("gc", *at)["objects"] == []
    dry = call("gc", *at, "--grace-s", "0")
    assert (dry["objects"], dry["deleted"]) == (["shards/" + "a" * 64 + ".tar"], False)
    assert call("gc", *at, "--grace-s", "0", "--delete")["deleted"] is True
    assert not (corpus / "shards" / ("a" * 64 + ".tar")).exists()
    assert call("verify", *at, "--version", "3")["problems"] == []
    shard = corpus / "shards" / f"{version.shards_of(open_store(str(corpus)), 1)[0]}.tar"
    data = shard.read_bytes()
    shard.write_bytes(data[:-512])
    assert "its receipt says" in call("verify", *at, "--version", "1", status=1)["problems"][0]
    shard.write_bytes(data)
    plans = call("status", *at)["plans"]
    assert sorted(plan["kind"] for plan in plans) == ["base", "compact"]


def test_a_receipt_tells_who_made_what_from_what(corpus: Path) -> None:
    """The provenance that a row owes; `fetched_at`, `device` and `blender` come with a real producer."""
    store = open_store(str(corpus))
    first = version.open_version(store, 1)
    told = {"spec", "fingerprints", "producers", "code_commit", "license_policy", "counts", "parent", "created_at"}
    assert told <= set(first.record)
    assert first.record["producers"] == ["fake 1"]
    assert set(first.counts) >= {"sources", "licenses", "failures"}
    row = version.open_rows(store, first).to_pylist()[0]
    assert row["uri"] == "fake:ball-0"
    assert {"asset_sha256", "license", "attribution"} <= set(row)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("diff", "--a", "9"), ["there is no version 9", "versions 1 to"]),
        (("diff", "--a", "one"), ["VERSION=one"]),
        (("tombstone", "--uid", " ,"), ["UID is empty"]),
        (("tombstone", "--uid", "nobody"), ["no object 'nobody'"]),
        (("retry", "--spec", "jobs/specs/demo.toml", "--kind", "bad_luck"), ["'bad_luck' is no kind", "network"]),
    ],
)
def test_a_mistake_with_a_verb_is_one_line(corpus: Path, arguments: tuple[str, ...], words: list[str]) -> None:
    refused(run(*arguments, "--corpus", str(corpus)), *words)
