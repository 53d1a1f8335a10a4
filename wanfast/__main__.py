"""The command line's door: `wanfast generate | plan | inspect | convert | rerun | resume | doctor | bench | verify`.

The result goes to stdout, everything else to stderr. Exit codes: 0 done, 1 failed, 2 bad usage, 130 cancelled (Ctrl-C),
143 terminated (SIGTERM).
"""

import argparse
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from wanfast.errors import CheckpointError, MediaError, MemoryBudgetError, NumericsError, RequestError


class _Terminated(KeyboardInterrupt):
    """SIGTERM, unwinding as Ctrl-C does."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: arguments after the program's name; None takes the process's own, as a program does, and SIGTERM then
            cleans up as Ctrl-C does.

    Returns:
        The exit code.
    """
    from wanfast.arguments import parse_arguments

    arguments = parse_arguments(argv)  # before torch is imported: help and mistakes answer at once
    try:
        if argv is None:
            _unwind_on_sigterm()
        with _interrupts_held_back():
            command = _command(arguments.command)
        return _run(command, arguments)
    except _Terminated:
        print(f"wanfast: terminated; {_left_behind(arguments.command)}", file=sys.stderr)
        return 143
    except KeyboardInterrupt:
        print(f"wanfast: cancelled; {_left_behind(arguments.command)}", file=sys.stderr)
        return 130


def _command(name: str) -> Callable[[argparse.Namespace], None]:
    """Import what does a command."""
    if name == "inspect":  # alone it needs no torch, and is done before torch would be imported
        from wanfast.inspect_command import inspect

        return inspect
    from wanfast.commands import COMMANDS

    return COMMANDS[name]


def _run(command: Callable[[argparse.Namespace], None], arguments: argparse.Namespace) -> int:
    """Run a parsed command; what a user can mend is one line on stderr and code 2 for a bad request, 1 for the rest."""
    try:
        with _warnings_on_stderr():
            command(arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read the output has seen enough, as `head` does
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())  # or Python writes there again as it ends
        return 141
    except (RequestError, CheckpointError, MediaError, MemoryBudgetError, NumericsError) as error:
        told = " ".join(str(error).splitlines())
        # A file can hold a name with any characters: those that steer a terminal are spelled out.
        plain = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in told)
        print(f"wanfast {arguments.command}: {plain}", file=sys.stderr)
        return 2 if isinstance(error, RequestError) else 1
    return 0


@contextmanager
def _warnings_on_stderr() -> Iterator[None]:
    """Show what the library logs as warnings, each as one line."""
    logger, handler = logging.getLogger("wanfast"), logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("wanfast: %(message)s"))
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


def _left_behind(command: str) -> str:
    told = {"convert": "the same command goes on where it was", "bench": "no report was written"}
    told["verify"] = "nothing is kept of what was seen so far"
    return told.get(command, "no clip is half-written")


@contextmanager
def _interrupts_held_back() -> Iterator[None]:
    """Raise a Ctrl-C after the body instead of inside it: somewhere in the imports of torch it would be swallowed."""
    is_ours = threading.current_thread() is threading.main_thread()
    if not is_ours or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    seen: list[int] = []
    signal.signal(signal.SIGINT, lambda number, frame: seen.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if seen:
        raise KeyboardInterrupt


def _unwind_on_sigterm() -> None:
    """Turn the first SIGTERM into an exception; a second one ends the process at once."""
    is_ours = threading.current_thread() is threading.main_thread()
    if is_ours and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _raise_terminated)


def _raise_terminated(signal_number: int, frame: FrameType | None) -> NoReturn:
    signal.signal(signal_number, signal.SIG_DFL)
    raise _Terminated


if __name__ == "__main__":
    sys.exit(main())
