"""The command line's door: `wanfast generate | plan | inspect | rerun`.

The result goes to stdout, everything else to stderr. Exit codes: 0 done, 1 failed, 2 bad usage, 130 cancelled.
"""

import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: arguments after the program's name; None takes the process's own.

    Returns:
        The exit code.
    """
    from wanfast.arguments import parse_arguments

    arguments = parse_arguments(argv)  # before torch is imported: help and mistakes answer at once
    try:
        from wanfast.commands import run

        return run(arguments)
    except KeyboardInterrupt:
        print("wanfast: cancelled; nothing was written", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
