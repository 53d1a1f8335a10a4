"""Progress on stderr: one bar per stage, each with its time left."""

import sys
import time
from types import TracebackType

from tqdm import tqdm

_TITLES = {"text": "text encoder", "image": "image encoder", "steps": "denoising steps", "decode": "frames decoded"}


class Progress:
    """Shows how far a generation is, and keeps the seconds each stage took."""

    def __init__(self, *, is_shown: bool, unit: str = "it") -> None:
        """Show nothing yet; `unit` is what is counted, "B" for bytes."""
        self._is_shown = is_shown
        self._unit = unit
        self._stage: str | None = None
        self._about = ""  # which clip of several
        self._bar: tqdm[None] | None = None
        self._started = time.perf_counter()
        self._seconds: dict[str, float] = {}

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._close()

    def update(self, stage: str, done: int, total: int, *, about: str = "") -> None:
        """Say that `done` of `total` parts of a stage are finished; a new stage, or clip, ends the one before."""
        if (stage, about) != (self._stage, self._about):
            self._close()
            self._stage, self._about, self._started = stage, about, time.perf_counter()
            self._bar = tqdm(
                total=total,
                desc=f"{about} {_TITLES.get(stage, stage)}".lstrip(),
                file=sys.stderr,
                disable=not self._is_shown,
                unit=self._unit,
                unit_scale=self._unit == "B",
                mininterval=0.1 if sys.stderr.isatty() else 10.0,
                dynamic_ncols=True,
            )
        if self._bar is not None:
            self._bar.update(done - self._bar.n)

    def seconds(self) -> dict[str, float]:
        """Wall seconds by stage, the running one included."""
        self._close()
        return dict(self._seconds)

    def _close(self) -> None:
        if self._bar is not None and self._stage is not None:
            self._bar.close()
            self._seconds[self._stage] = self._seconds.get(self._stage, 0.0) + time.perf_counter() - self._started
        self._bar, self._stage = None, None
