"""A report against an earlier one of the same case: which stages became slower, by more than they vary."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from wanfast.bench.schema import faults, report_schema
from wanfast.errors import RequestError

# A stage is slower when its median is later than the earlier one's by more than any of these.
_LEAST_SHARE = 0.05  # of the earlier median: less is not worth a word
_LEAST_SECONDS = 0.002  # what timers and a busy machine cost

_SAME_CASE = (
    *("model", "weights", "width", "height", "num_frames", "steps", "solver", "shift", "guidance", "has_picture"),
    *("loras", "device", "threads"),
)


def read_report(path: str | Path) -> dict[str, Any]:
    """Read an earlier report; it may come from anybody.

    Raises:
        RequestError: it cannot be read, or is not what `wanfast bench` writes.
    """
    try:
        report = json.loads(Path(path).read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise RequestError(f"compare: must be a JSON file that wanfast bench wrote, got {path} ({error})") from None
    if found := faults(report, report_schema()):
        raise RequestError(f"compare: must be a JSON file that wanfast bench wrote, got {path} ({found[0]})")
    kept: dict[str, Any] = report
    return kept


def check_comparable(case: Mapping[str, Any], earlier: Mapping[str, Any], path: str | Path) -> None:
    """Refuse to hold two cases to one another that are not the same.

    Args:
        case: `case` of the new report, or as much of it as is known.
        earlier: the earlier report.
        path: of it, for the message.

    Raises:
        RequestError: they differ in what costs time; the message names the first thing.
    """
    for name in _SAME_CASE:
        before = earlier["case"].get(name, [])  # reports from before there were LoRAs have none
        if case[name] != before:
            raise RequestError(
                f"compare: must be of the same case, got {path} with {name} {before!r}, not {case[name]!r}"
            )


def slower_stages(report: Mapping[str, Any], earlier: Mapping[str, Any]) -> list[dict[str, Any]]:
    """List the stages of wanfast that take longer than they did, as findings.

    Only wanfast's warm stages are held to the earlier ones; where the references ran, a note says if they became
    slower too, as then the machine did.
    """
    theirs = {engine["name"]: engine for engine in earlier["engines"]}
    findings: list[dict[str, Any]] = []
    for engine in report["engines"]:
        if engine["name"] not in theirs:
            continue
        for stage, says in _slower(engine["warm"], theirs[engine["name"]]["warm"]):
            kind = "slower" if engine["role"] == "wanfast" else "note"
            findings.append({"kind": kind, "engine": engine["name"], "stage": stage, "says": says})
    if report["machine"] != earlier["machine"]:
        says = "the earlier report is of another machine, or of one that has changed"
        findings.append({"kind": "note", "engine": None, "stage": None, "says": says})
    return findings


def _slower(warm: Mapping[str, Any], earlier: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for stage, now in warm.items():
        before = earlier.get(stage)
        if before is None or stage == "other":
            continue
        noise = max(
            now["max"] - now["min"],
            before["max"] - before["min"],
            _LEAST_SHARE * before["median"],
            _LEAST_SECONDS,
        )
        more = now["median"] - before["median"]
        if more > noise:
            yield (
                stage,
                f"{now['median']:.4g} s instead of {before['median']:.4g} s, {more:.2g} s more, where {noise:.2g} s is"
                " the noise",
            )
