"""What a batch does at the same time: weights that come, files that are finished while the next clip is decoded."""

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from batches import TEXTS, finish, jobs_of, line, load, undisturbed
from blocks import Loads, movers

from wanfast import batch
from wanfast.__main__ import main
from wanfast.batch import generate_batch
from wanfast.loaded import LoadedModel
from wanfast.mp4 import Mp4Encoder
from wanfast.residency import Residency
from wanfast.residency.read_ahead import ReadAhead
from wanfast.residency.slots import HostSlots
from wanfast.residency.store import HostBlock, HostStore


@pytest.fixture
def clips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("\n".join(TEXTS) + "\n")
    Path("clips").mkdir()
    return Path("clips")


def test_prompts_of_all_groups_are_encoded_in_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    for name in ("expert", "text_encoder"):
        own = getattr(LoadedModel, name)

        def counted(self: LoadedModel, *more: Any, own: Any = own, **options: Any) -> Any:
            asked.append(more[0][0] if more else "text")
            return own(self, *more, **options)

        monkeypatch.setattr(LoadedModel, name, counted)
    pipeline = load(None)
    text_bytes = pipeline.loaded.config.dit.text_len * pipeline.loaded.config.dit.text_dim * 4

    def phases() -> str:
        asked.clear()
        assert finish(pipeline, jobs_of(pipeline))[1] == [None] * 3
        return " ".join(name for name, before in zip(asked, ["", *asked], strict=False) if name != before)

    monkeypatch.setattr(batch, "_groups", lambda clips: [[clip] for clip in clips])
    assert phases() == "text h l h l h l"
    monkeypatch.setattr(batch, "GROUP_BYTES", 2 * text_bytes)
    assert phases() == "text h l h l text h l", "of as many clips as may wait"


def test_the_next_groups_blocks_arrive_while_this_one_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every slot is filled while the decoder stands still: nothing else could have asked for it."""
    monkeypatch.setattr(batch, "_groups", lambda clips: [[clip] for clip in clips])
    pipeline = load(4)
    wanted = undisturbed(4)
    monkeypatch.setattr(Residency, "_is_in_place", lambda self, experts: False)
    filled, changed = [], threading.Condition()
    fill = HostSlots.fill

    def filling(self: HostSlots, slot: int, block: HostBlock) -> None:
        fill(self, slot, block)
        with changed:
            filled.append(slot)
            changed.notify_all()

    monkeypatch.setattr(HostSlots, "fill", filling)
    denoised, coming = [], batch._weights_coming

    def weights_coming(*arguments: Any) -> Any:
        denoised.append(len(filled))
        return coming(*arguments)

    monkeypatch.setattr(batch, "_weights_coming", weights_coming)
    arrived = []
    for made in generate_batch(pipeline.loaded, jobs_of(pipeline)):
        with changed:
            changed.wait_for(lambda: len(filled) - denoised[-1] >= 4, timeout=10 if made.index < 2 else 0)
        arrived.append(sorted(filled[denoised[-1] :]))
        held = [held.key for held in pipeline.loaded._residency._held if held is not None]
        if made.index < 2:
            assert sorted(held) == [("high_noise", index) for index in range(4)]
        assert torch.allclose(torch.cat(list(made.frames or ())).float(), wanted[made.index].float(), atol=1)
    assert arrived == [[0, 1, 2, 3], [0, 1, 2, 3], []]
    assert movers() == []


def test_a_batch_that_is_left_while_it_decodes_stops_moving(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch, "_groups", lambda clips: [[clip] for clip in clips])
    monkeypatch.setattr(Residency, "_is_in_place", lambda self, experts: False)
    results = generate_batch((pipeline := load(2)).loaded, jobs_of(pipeline))
    next(results)
    assert len(movers()) == 1
    results.close()  # type: ignore[attr-defined]
    assert movers() == []


@pytest.mark.parametrize("fits", [True, False])
def test_a_gpu_keeps_its_blocks_where_the_decoder_leaves_them_room(fits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU is pretended: only what is decided is looked at."""
    pipeline, told = load(None), []
    jobs = jobs_of(pipeline)
    model = SimpleNamespace(
        device=torch.device("cuda"),
        precision=jobs[0].plan.precision,
        config=pipeline.loaded.config,
        release_experts=lambda: told.append("release"),
        reading_ahead=lambda experts: told.append(("to the host", *experts)),
        passes=lambda experts: told.append(("to the device", *experts)),
    )
    monkeypatch.setattr(batch, "decodes_beside_blocks", lambda *_: fits)
    clips = [batch._Clip(index, job) for index, job in enumerate(jobs)]
    batch._weights_coming(model, clips[:1], clips[1:])  # type: ignore[arg-type]
    place = "to the device" if fits else "to the host"
    steps = jobs[0].plan.steps_per_expert
    passes = ["high_noise"] * 2 * steps["high_noise"] + ["low_noise"] * 2 * steps["low_noise"]
    assert told == [*([] if fits else ["release"]), (place, *passes)]
    told.clear()
    batch._weights_coming(model, clips, [])  # type: ignore[arg-type]
    assert told == ["release", ("to the host",)]


def test_blocks_are_read_ahead_into_host_memory() -> None:
    loads = Loads()
    store = HostStore(loads, None, None)
    keys = [("high_noise", index) for index in range(5)]
    reading = ReadAhead(store, [*keys, *keys], 1000)
    reading._thread.join(timeout=10)
    reading.stop()
    assert loads.keys == keys and all(store.is_kept(key) for key in keys)
    store = HostStore(loads, None, 0)  # no room for one
    ReadAhead(store, keys, 1000)._thread.join(timeout=10)
    assert not store.is_kept(keys[0])


def test_reading_ahead_stops_and_its_failure_is_told_later() -> None:
    arrived, go_on = threading.Semaphore(0), threading.Event()

    def wait(expert: str, index: int) -> None:
        arrived.release()
        go_on.wait(10)
        if index == 1:
            raise OSError("the disk is gone")

    for stops in (True, False):
        go_on.clear()
        loads = Loads(wait)
        reading = ReadAhead(HostStore(loads, None, None), [("high_noise", index) for index in range(5)], 1000)
        assert arrived.acquire(timeout=10)
        if stops:
            reading._is_stopped = True
        go_on.set()
        reading.stop() if stops else reading._thread.join(timeout=10)
        assert len(loads.keys) == (1 if stops else 2)


def test_a_file_is_finished_while_the_next_clip_is_decoded(clips: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first file is held back until frames of the second clip are there."""
    decoded, own, decode = [threading.Event() for _ in TEXTS], Mp4Encoder.finish, batch.decode_frames
    order: list[str] = []
    finished = 0

    def finish_late(self: Mp4Encoder) -> None:
        nonlocal finished
        finished += 1
        if finished < len(TEXTS):
            assert decoded[finished].wait(timeout=20), "nothing is decoded meanwhile"
        own(self)
        order.append(f"file {finished}")

    def decoding(model: LoadedModel, plan: Any, *more: Any) -> Any:
        index = TEXTS.index(plan.prompt)
        for chunk in decode(model, plan, *more):
            order.append(f"frames {index + 1}")
            yield chunk
            decoded[index].set()

    monkeypatch.setattr(Mp4Encoder, "finish", finish_late)
    monkeypatch.setattr(batch, "decode_frames", decoding)
    assert main(line("clips")) == 0
    assert len(list(clips.glob("*.mp4"))) == 3
    assert order.index("file 1") > order.index("frames 2") and order.index("file 2") > order.index("frames 3")


def test_a_clip_is_on_disk_before_the_next_group_begins(clips: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch, "GROUP_BYTES", 1)
    seen: list[int] = []
    own = batch._begin

    def begin(model: LoadedModel, group: Any, tell: Any) -> None:
        seen.append(group[0].index)
        deadline = threading.Event()
        while len(list(clips.glob("*.mp4"))) < group[0].index and not deadline.wait(0.05):
            pass
        own(model, group, tell)

    monkeypatch.setattr(batch, "_begin", begin)
    assert main(line("clips")) == 0
    assert seen == [0, 1, 2]


def test_a_clip_that_is_stopped_beside_a_file_being_finished_does_not_harm_it(
    clips: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    own, decode, late = Mp4Encoder.finish, batch.decode_frames, threading.Event()

    def finish_late(self: Mp4Encoder) -> None:
        late.wait(1)
        own(self)

    def decoding(model: LoadedModel, plan: Any, *more: Any) -> Any:
        if plan.prompt == TEXTS[1]:
            raise KeyboardInterrupt
        yield from decode(model, plan, *more)

    monkeypatch.setattr(Mp4Encoder, "finish", finish_late)
    monkeypatch.setattr(batch, "decode_frames", decoding)
    assert main(line("clips")) == 130
    assert capsys.readouterr().out.splitlines() == ["clips/0001-a-red-ball.mp4"]
    assert [path.suffix for path in clips.iterdir()] == [".mp4"]
