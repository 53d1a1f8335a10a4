"""Runs `wanfast generate` in forked processes, each with a file cut to half at some moment: tests/test_truncated.py.

A process that touches a page of a mapped file behind its new end dies of SIGBUS, which no test in the same process
would outlive.
"""

import io
import json
import os
import sys
import traceback
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from wanfast import loaded
from wanfast.__main__ import main
from wanfast.loaded import LoadedModel
from wanfast.residency import Residency


def cut(path: str) -> None:
    """Leave the first half of a file."""
    os.truncate(path, os.stat(path).st_size // 2)


def at_block(number: int, then: Callable[[], None]) -> None:
    """Act before a block of the diffusion transformers is given out, counted from 0 over the whole run."""
    own, given = Residency.blocks, [0]

    def blocks(self: Any, expert: str) -> Any:
        for block in own(self, expert):
            if expert != "text":
                if given[0] == number:
                    then()
                given[0] += 1
            yield block

    Residency.blocks = blocks  # type: ignore[method-assign]


def before(owner: Any, name: str, number: int, then: Callable[[], None]) -> None:
    """Act before a function is called for the given time, counted from 0."""
    own, calls = getattr(owner, name), [0]

    def call(*arguments: Any, **more: Any) -> Any:
        if calls[0] == number:
            then()
        calls[0] += 1
        return own(*arguments, **more)

    setattr(owner, name, call)


MOMENTS: dict[str, Callable[[int, Callable[[], None]], None]] = {
    "block": at_block,
    "text block": lambda number, then: before(LoadedModel, "_read_text_block", number, then),
    "decoder": lambda number, then: before(LoadedModel, "vae_decoder", number, then),
    "adapter": lambda number, then: before(loaded, "make_adapter", number, then),
}


def run(case: dict[str, Any]) -> int:
    """One run; gives the exit code of the command."""
    if case["cut"] is not None:
        MOMENTS[case["moment"]](case["number"], lambda: cut(case["cut"]))
    os.environ["XDG_CACHE_HOME"] = case["cache"]
    return main(["generate", "a red ball", *case["words"], "-o", case["output"], "--quiet"])


def forked(case: dict[str, Any]) -> dict[str, Any]:
    """Run a case in a process of its own, and tell how that ended."""
    told = Path(case["output"]).with_suffix(".told")
    process = os.fork()
    if process == 0:
        code = 70
        try:
            with (
                told.open("w") as stream,
                redirect_stderr(stream),
                redirect_stdout(io.StringIO()),
            ):
                try:
                    code = run(case)
                except BaseException:
                    traceback.print_exc()
        finally:
            os._exit(code)
    _, status = os.waitpid(process, 0)
    return {"code": os.waitstatus_to_exitcode(status), "told": told.read_text()}


if __name__ == "__main__":
    print(json.dumps([forked(case) for case in json.load(sys.stdin)]))
