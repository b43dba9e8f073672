"""When tables are clustered and when training ends."""

import json
from dataclasses import asdict

from torchrec_cce.training.schedule import EarlyStopping, Schedule


def test_ct_clusterings_cf_batches_apart_then_rest() -> None:
    schedule = Schedule(ct=3, cf=10, rest=5)
    assert [step for step in range(1, 100) if schedule.clusters_after(step)] == [10, 20, 30]
    assert next(step for step in range(1, 100) if schedule.ends_after(step)) == 35
    assert next(step for step in range(1, 100) if schedule.resting_after(step)) == 30


def test_ids_that_arrive_get_rows_less_and_less_often_in_a_phase() -> None:
    batches = [1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28]
    schedule = Schedule(ct=2, cf=31, rest=None)
    found = [step for step in range(1, 100) if schedule.tops_up_before(step)]
    assert found == batches + [31 + batch for batch in batches]


def test_no_clustering_and_no_end() -> None:
    schedule = Schedule(ct=0, cf=0, rest=None)
    assert not any(schedule.tops_up_before(step) for step in range(1, 100))
    assert not any(schedule.clusters_after(step) or schedule.ends_after(step) for step in range(1, 100))
    assert schedule.resting_after(0)


def test_early_stopping_compares_the_best_of_two_epochs() -> None:
    stopping = EarlyStopping()
    assert [stopping.record(0, bce) for bce in (0.6, 0.5, 0.55)] == [True, True, False]
    assert not stopping.stops_after(0)
    assert [stopping.record(1, bce) for bce in (0.56, 0.49)] == [False, True]
    assert not stopping.stops_after(1), "0.49 is below 0.5, although the epoch began worse"
    assert [stopping.record(2, bce) for bce in (0.49, 0.51)] == [False, False]
    assert stopping.stops_after(2)


def test_an_epoch_without_evaluation_never_stops() -> None:
    stopping = EarlyStopping()
    stopping.record(0, 0.5)
    assert not stopping.stops_after(1)
    stopping.record(2, 0.6)
    assert not stopping.stops_after(1)
    assert not stopping.stops_after(2)


def test_early_stopping_survives_json() -> None:
    stopping = EarlyStopping()
    stopping.record(2, 0.5)
    assert EarlyStopping(**json.loads(json.dumps(asdict(stopping)))) == stopping
