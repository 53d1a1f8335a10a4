"""A batch in trouble: memory that runs out, clips that fail or are cancelled, processes that are killed."""

import json
import subprocess
import sys
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import pytest
import torch
from batches import SMALL, TEXTS, finish, jobs_of, line, load, undisturbed
from blocks import movers
from torch import Tensor

from wanfast import batch, batch_command, denoise
from wanfast.__main__ import main
from wanfast.batch import Job, generate_batch
from wanfast.dit.chunking import CHUNKINGS
from wanfast.errors import MemoryBudgetError, NumericsError
from wanfast.loaded import LoadedModel
from wanfast.request import Request
from wanfast.residency import Residency


def out_of_memory(calls: set[int], monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let calls of the DiT fail; tell how many prompts each of them had."""
    own, prompts = denoise.predict_velocities, []

    def predict(*arguments: Any, **more: Any) -> list[Tensor]:
        prompts.append(len(arguments[2]))
        if len(prompts) in calls:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return own(*arguments, **more)

    monkeypatch.setattr(denoise, "predict_velocities", predict)
    return prompts


def announced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is announced, as text: h for a pass of the high-noise expert."""
    begun: list[str] = []
    own = Residency.begin

    def begin(self: Residency[Any], passes: list[str]) -> None:
        begun.append("".join(name[0] for name in passes))
        own(self, passes)

    monkeypatch.setattr(Residency, "begin", begin)
    return begun


def test_what_a_step_down_found_is_kept_for_the_clips_that_follow(monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = load(2)
    steps = pipeline.plan(Request("a", **SMALL)).steps_per_expert
    high, low = steps["high_noise"], steps["low_noise"]
    wanted = undisturbed(2)
    prompts, begun = out_of_memory({2}, monkeypatch), announced(monkeypatch)
    videos, errors = finish(pipeline, jobs_of(pipeline))
    assert errors == [None] * 3 and all(torch.equal(a, b) for a, b in zip(videos, wanted, strict=True))
    # The second step fails; from there on, in every clip, prompts take turns.
    assert prompts == [2, 2] + [1] * 2 * (3 * (high + low) - 1)
    before = "h" * 3 * high + "l" * 3 * low
    after = "h" * 2 * (3 * high - 1) + "l" * 2 * 3 * low
    assert begun[:2] == [before, after], "all that follows is announced, the other clips' too"


def test_clips_are_cut_as_much_finer_as_was_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not as fine as a larger clip before them, which was planned so."""
    pipeline = load(2)
    own, planned = batch.budget_here, [1, 0, 2]
    budgets = dict(zip(TEXTS, planned, strict=True))

    def budget(model: LoadedModel, plan: Any, loras: Any) -> Any:
        from dataclasses import replace

        return replace(own(model, plan, loras), chunking=CHUNKINGS[budgets[plan.prompt]])

    monkeypatch.setattr(batch, "budget_here", budget)
    seen: dict[str, list[int]] = {text: [] for text in TEXTS}
    take = denoise._take

    def taking(run: Any, step: Any, before: Any, chunking: Any, memory: Any, *, is_exact: bool) -> Any:
        seen[run.plan.prompt].append(CHUNKINGS.index(chunking))
        return take(run, step, before, chunking, memory, is_exact=is_exact)

    monkeypatch.setattr(denoise, "_take", taking)
    out_of_memory({2}, monkeypatch)  # the pass without the prompt of the first step
    assert finish(pipeline, jobs_of(pipeline))[1] == [None] * 3
    assert seen == {TEXTS[0]: [1] + [2] * 4, TEXTS[1]: [1] * 4, TEXTS[2]: [3] * 4}


@pytest.mark.parametrize("failing", [0, 2])
def test_a_clip_that_drops_out_is_not_waited_for(failing: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its passes are not announced any more, or the swap would come as a surprise."""
    pipeline = load(3)
    wanted = [*undisturbed(3)]
    steps = pipeline.plan(Request("a", **SMALL)).steps_per_expert
    high, low = steps["high_noise"], steps["low_noise"]
    begun, own = announced(monkeypatch), batch.denoise

    def denoising(model: LoadedModel, plan: Any, *arguments: Any, **more: Any) -> Any:
        if plan.prompt == TEXTS[failing]:
            raise NumericsError("step 1 of 4: latents are not finite any more")
        return own(model, plan, *arguments, **more)

    monkeypatch.setattr(batch, "denoise", denoising)
    videos, errors = finish(pipeline, jobs_of(pipeline))
    assert [error is None for error in errors] == [index != failing for index in range(3)]
    del wanted[failing]
    assert all(torch.equal(a, b) for a, b in zip(videos, wanted, strict=True))
    assert begun[:2] == ["h" * 3 * high + "l" * 3 * low, "h" * (2 - failing) * high + "l" * 2 * low]
    assert movers() == []


def test_memory_that_does_not_suffice_is_one_clips_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that fails in every way, and what no step is needed for; the errors keep no tensors alive."""
    pipeline = load(2)
    wanted = undisturbed(2)
    for name, failures in {"predict_velocities": len(CHUNKINGS), "rope_rotations": 1}.items():
        calls: list[int] = []
        own = getattr(denoise, name)

        def fail(*arguments: Any, own: Any = own, calls: list[int] = calls, most: int = failures, **more: Any) -> Any:
            calls.append(1)
            if len(calls) <= most:
                raise MemoryError
            return own(*arguments, **more)

        pipeline.release()  # the decoder would make room
        with monkeypatch.context() as patched:
            patched.setattr(denoise, name, fail)
            videos, errors = finish(pipeline, jobs_of(pipeline))
        assert isinstance(errors[0], MemoryBudgetError) and errors[1:] == [None, None]
        assert "are free; try a smaller size" in str(errors[0])
        assert errors[0].__traceback__ is errors[0].__context__ is errors[0].__cause__ is None
        assert all(torch.equal(a, b) for a, b in zip(videos, wanted[1:], strict=True))


@pytest.mark.parametrize("asked", [1, 3, 7, 8, 9])
def test_a_clip_that_is_cancelled_leaves_the_others_alone(asked: int) -> None:
    """Before a step, before its frames, between two chunks of them."""
    pipeline = load(None)
    wanted = undisturbed(None)
    count = 0

    def is_cancelled() -> bool:
        nonlocal count
        count += 1
        return count >= asked

    jobs = jobs_of(pipeline)
    jobs[1] = Job(plan=jobs[1].plan, inputs=jobs[1].inputs, is_cancelled=is_cancelled)
    videos, states = [], []
    for made in generate_batch(pipeline.loaded, jobs):
        try:
            if made.error is not None:
                raise made.error
            videos.append(torch.cat(list(made.frames or ())))
            states.append("made")
        except CancelledError as error:
            assert str(error) == "clip 2: cancelled"
            states.append("cancelled")
    assert states == ["made", "cancelled", "made"]
    assert torch.equal(videos[0], wanted[0]) and torch.equal(videos[1], wanted[2])


@pytest.fixture
def clips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("\n".join(TEXTS) + "\n")
    Path("clips").mkdir()
    return Path("clips")


def test_a_line_that_cannot_fit_fails_alone(
    clips: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    own = batch_command.plan_for

    def refusing(model: LoadedModel, request: Request, *loras: Any) -> Any:
        if request.prompt == TEXTS[1]:
            raise MemoryBudgetError("vram: 1280x720 needs 40 GB at its peak, got 24 GB; 832x480 fits")
        return own(model, request, *loras)

    monkeypatch.setattr(batch_command, "plan_for", refusing)
    assert main(line("clips", "--json")) == 1
    told = capsys.readouterr()
    results = json.loads(told.out)
    assert [(result["line"], result["error"] is None) for result in results] == [(1, True), (2, False), (3, True)]
    assert "1 of 3 clips failed: line 2: vram: 1280x720 needs 40 GB" in told.err
    assert len(list(clips.glob("*.mp4"))) == 2


KILLS = {
    "a high-noise step of the second group": """
own = run_state.RunKeeper.update
states = []
def update(self, state):
    own(self, state)
    states.append(state.next_step)
    if len(states) == 3:
        finished()
        os.kill(os.getpid(), signal.SIGKILL)
run_state.RunKeeper.update = update
""",
    "decoding the second clip": """
own = batch.decode_frames
videos = []
def decode(*arguments):
    videos.append(1)
    for chunk in own(*arguments):
        yield chunk
        if len(videos) == 2:
            finished()
            os.kill(os.getpid(), signal.SIGKILL)
batch.decode_frames = decode
""",
    "a file that has all its frames": """
own = Mp4Encoder.finish
files = []
def finish(self):
    files.append(1)
    if len(files) == 2:
        finished()
        os.kill(os.getpid(), signal.SIGKILL)
    own(self)
Mp4Encoder.finish = finish
""",
}


@pytest.fixture(scope="module")
def whole_batch(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The clips of a batch that nothing happens to."""
    folder = tmp_path_factory.mktemp("whole_batch")
    with pytest.MonkeyPatch.context() as moved:
        moved.chdir(folder)
        Path("prompts.txt").write_text("\n".join(TEXTS) + "\n")
        Path("clips").mkdir()
        assert main(line("clips", steps=2)) == 0
    return {path.name: path.read_bytes() for path in (folder / "clips").iterdir()}


@pytest.mark.parametrize("where", KILLS)
def test_a_batch_that_is_killed_goes_on(where: str, clips: Path, whole_batch: dict[str, bytes]) -> None:
    """Each clip a group of its own; the first is there by then."""
    code = f"""
import os, signal, sys, time
from pathlib import Path
import torch
import wanfast.batch as batch
import wanfast.run_state as run_state
from wanfast.mp4 import Mp4Encoder
from wanfast.__main__ import main
torch.set_num_threads({torch.get_num_threads()})  # another number of them sums in another order
run_state.KEEP_AFTER_SECONDS = 0.0
batch.GROUP_BYTES = 1
def finished():
    while not list(Path("clips").glob("*.mp4")):
        time.sleep(0.01)
{KILLS[where]}
main({line("clips", steps=2)!r})
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=120)
    assert result.returncode == -9, result.stderr
    first = clips / "0001-a-red-ball.mp4"
    assert [path.name for path in clips.glob("*.mp4")] == [first.name]
    written = first.stat().st_mtime_ns
    kept = {path.name: batch_command.read_run(path).state.next_step for path in clips.glob("*.resume")}
    assert kept == {"0002-the-cat-jumps.mp4.resume": 1 if "step" in where else 2}
    assert main(line("clips", steps=2)) == 0
    assert first.stat().st_mtime_ns == written
    assert {path.name: path.read_bytes() for path in clips.iterdir()} == whole_batch, "and nothing else is left"
