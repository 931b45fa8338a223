"""The simulated farm of `make bench-jobs` keeps to what arithmetic says where arithmetic can say it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.bench.simulation import Farm, Simulation, simulate

NEVER = 1e12
CALM = Farm(
    nodes=10, slots=4, objects=4000, per_shard=16, object_sigma=0.0, object_s=10.0, driver_s=0.0, assemble_s=0.0,
    node_mtbf_s=NEVER, driver_mtbf_s=NEVER,
)  # fmt: skip


def test_nothing_dies_and_nothing_costs_so_all_time_is_useful() -> None:
    found = simulate(CALM)
    assert found["efficiency"] == pytest.approx(1.0)
    assert found["hours"] * 3600 == pytest.approx(4000 * 10 / 40)


def test_a_driver_that_is_slower_than_its_slots_sets_the_pace() -> None:
    found = simulate(replace(CALM, driver_s=0.5))
    assert found["objects_per_s"] == pytest.approx(2.0, rel=0.05)
    assert found["driver_busy"] == pytest.approx(1.0, rel=0.05)


def test_a_node_that_dies_loses_half_an_object_a_slot_on_average() -> None:
    farm = replace(CALM, objects=40_000, node_mtbf_s=2000.0, node_return_s=50.0, detect_s=5.0)
    found = simulate(farm)
    lost_s = found["waste_running"] * found["hours"] * 3600 * 40 * (2000 / 2050)
    assert lost_s / found["node_deaths"] / farm.slots == pytest.approx(5.0, rel=0.25)


@given(seed=st.integers(0, 10**6), mtbf=st.floats(200, 5000), driver=st.floats(300, 5000))
@settings(max_examples=15, deadline=None)
def test_whatever_dies_every_object_is_committed_once_and_all_time_is_accounted_for(
    seed: int, mtbf: float, driver: float
) -> None:
    farm = replace(CALM, objects=1000, object_sigma=0.5, node_mtbf_s=mtbf, driver_mtbf_s=driver, assemble_s=0.1)
    run = Simulation(farm, seed)
    found = run.run()
    assert run.committed == farm.objects
    assert run.left == 0
    assert run.open == []
    spent = found["efficiency"] + sum(share for name, share in found.items() if name.startswith("waste_"))
    assert spent <= 1 + 1e-9
