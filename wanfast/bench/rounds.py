"""Who runs when: every engine once from nothing, then in turn, so that a slow spell of the machine meets all alike."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from wanfast.bench.case import Tier
from wanfast.bench.engine import Run
from wanfast.bench.worker import Host, Loaded
from wanfast.errors import MemoryBudgetError

Role = Literal["wanfast", "reference"]
Told = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """One engine of the benchmark."""

    name: str
    role: Role
    host: Host
    tier: Tier | None = None  # of wanfast's


@dataclass(slots=True, kw_only=True)
class Result:
    """What became of a contender."""

    contender: Contender
    loaded: Loaded | None = None
    cold: Run | None = None  # the first run of its process
    warm: list[Run] = field(default_factory=list)
    error: str | None = None  # why it has no runs, or no more

    @property
    def runs(self) -> list[Run]:
        """All that were kept."""
        return [*([] if self.cold is None else [self.cold]), *self.warm]


def in_turn(contenders: Sequence[Contender]) -> list[Contender]:
    """Order a round: the first tier of wanfast, the references, the other tiers; of two engines each is every other."""
    ours = [contender for contender in contenders if contender.role == "wanfast"]
    references = [contender for contender in contenders if contender.role == "reference"]
    return [*ours[:1], *references, *ours[1:]]


def run_rounds(contenders: Sequence[Contender], noise: Tensor, *, runs: int, warmup: int, tell: Told) -> list[Result]:
    """Run everything.

    In its first run each engine denoises from its own encodings of the prompts; in all others everyone does from those
    of the first reference, if it gives them. An engine that runs out of memory is left out from there on.

    Args:
        contenders: at least one; their hosts are closed at the end, however it comes.
        noise: initial latents [C, F, H, W].
        runs: after the warm-up, of each engine.
        warmup: runs that are not kept, of each engine, after its first one.
        tell: called with an engine's name, runs done and runs in all, before each run.

    Returns:
        In the order of a round.
    """
    results = [Result(contender=contender) for contender in in_turn(contenders)]
    total, done = len(results) * (1 + warmup + runs), 0
    context: Tensor | None = None
    try:
        for turn in range(1 + warmup + runs):
            for result in results:
                if result.error is None:
                    tell(result.contender.name, done, total)
                    _take_turn(result, noise, context, turn, turn - 1 - warmup)
                done += 1
            if turn == 0:
                firsts = [result.cold for result in results if result.contender.role == "reference"]
                context = next((run.context for run in firsts if run is not None and run.context is not None), None)
    finally:
        for result in results:
            result.contender.host.close()
    return results


def _take_turn(result: Result, noise: Tensor, context: Tensor | None, turn: int, kept_turn: int) -> None:
    host = result.contender.host
    try:
        if turn == 0:
            result.loaded = host.load()
            result.cold = host.run(noise, None, keeps_frames=False)
            return
        run = host.run(noise, context, keeps_frames=kept_turn == 0)
        if kept_turn >= 0:
            result.warm.append(run)
    except MemoryBudgetError as error:
        result.error = str(error)
        host.close()  # what it holds is the others'
