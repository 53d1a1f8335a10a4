"""Who runs when, with which encodings, and what becomes of an engine that cannot."""

from pathlib import Path

import pytest
import torch
from bench_engines import InProcess, StandIn, stop_time

from wanfast.bench.case import Tier
from wanfast.bench.rounds import Contender, in_turn, run_rounds
from wanfast.errors import CheckpointError

NOISE = torch.zeros(16, 2, 4, 6)


@pytest.fixture(autouse=True)
def _stopped_time(monkeypatch: pytest.MonkeyPatch) -> None:
    stop_time(monkeypatch)


def contenders(folder: Path, **engines: StandIn) -> dict[str, Contender]:
    """Engines named ours_... are wanfast's, the others references."""
    made = {}
    for name, engine in engines.items():
        is_ours = name.startswith("ours")
        role, tier = ("wanfast", Tier(name, "fp32")) if is_ours else ("reference", None)
        made[name] = Contender(name=name, role=role, host=InProcess(engine, folder), tier=tier)
    return made


def ordered(given: dict[str, Contender], runs: int = 3, warmup: int = 0) -> list[str]:
    order: list[str] = []
    run_rounds(list(given.values()), NOISE, runs=runs, warmup=warmup, tell=lambda name, *_: order.append(name))
    return order


def test_two_engines_alternate(tmp_path: Path) -> None:
    order = ordered(contenders(tmp_path, theirs=StandIn(), ours=StandIn()))
    assert order == ["ours", "theirs"] * 4


def test_the_reference_runs_between_the_tiers(tmp_path: Path) -> None:
    given = contenders(tmp_path, theirs=StandIn(), official=StandIn(), ours_1=StandIn(), ours_2=StandIn())
    assert [c.name for c in in_turn(list(given.values()))] == ["ours_1", "theirs", "official", "ours_2"]
    assert ordered(given, runs=2) == ["ours_1", "theirs", "official", "ours_2"] * 3


def test_cold_and_warm_up_runs_are_kept_apart(tmp_path: Path) -> None:
    given = contenders(tmp_path, ours=StandIn(), theirs=StandIn())
    told: list[tuple[int, int]] = []
    results = run_rounds(
        list(given.values()), NOISE, runs=2, warmup=3, tell=lambda name, done, total: told.append((done, total))
    )
    assert told == [(done, 12) for done in range(12)]
    for result in results:
        assert result.cold is not None and result.cold.frames is None
        assert [run.frames is None for run in result.warm] == [False, True]  # the first one's are compared
        host = result.contender.host
        assert isinstance(host, InProcess) and host.asked == ["load", *["run"] * 6, "close"]


def test_after_the_cold_runs_all_start_from_the_references_encodings(tmp_path: Path) -> None:
    encoded = torch.randn(2, 7, 24)
    ours, theirs, other = StandIn(context=torch.zeros(2, 3, 24)), StandIn(context=encoded), StandIn()
    run_rounds(
        list(contenders(tmp_path, ours=ours, theirs=theirs, ours_2=other).values()),
        NOISE,
        runs=1,
        warmup=1,
        tell=lambda *_: None,
    )
    for engine in (ours, theirs, other):
        cold, *warm = engine.seen
        assert cold is None and len(warm) == 2
        assert all(context is encoded for context in warm)


@pytest.mark.parametrize("fails", ["load memory", "run memory"])
def test_an_engine_without_memory_is_left_out_and_said(tmp_path: Path, fails: str) -> None:
    given = contenders(tmp_path, ours=StandIn(), theirs=StandIn(fails=fails))
    ours, theirs = run_rounds(list(given.values()), NOISE, runs=2, warmup=0, tell=lambda *_: None)
    assert len(ours.warm) == 2 and ours.error is None
    assert (theirs.cold, theirs.warm, theirs.error) == (None, [], "vram: too little")
    host = given["theirs"].host
    assert isinstance(host, InProcess) and host.asked.count("run") == (fails == "run memory")


def test_another_error_ends_all_and_closes_all(tmp_path: Path) -> None:
    given = contenders(tmp_path, ours=StandIn(), theirs=StandIn(fails="run checkpoint"))
    with pytest.raises(CheckpointError):
        run_rounds(list(given.values()), NOISE, runs=2, warmup=0, tell=lambda *_: None)
    for contender in given.values():
        assert isinstance(contender.host, InProcess) and contender.host.asked[-1] == "close"
