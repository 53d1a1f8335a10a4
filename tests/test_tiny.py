"""The built-in model: made once, whole or not at all, and made anew where it is damaged."""

from pathlib import Path

import pytest

from wanfast.errors import CheckpointError
from wanfast.model import open_model
from wanfast.tiny import ensure_tiny


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_it_is_the_same_to_the_byte_and_made_once(tmp_path: Path) -> None:
    first, second = ensure_tiny(tmp_path / "a"), ensure_tiny(tmp_path / "b")
    assert contents(first) == contents(second)
    made = (first / "wanfast.json").stat().st_mtime_ns
    assert ensure_tiny(first) == first
    assert (first / "wanfast.json").stat().st_mtime_ns == made
    assert {p.name for p in tmp_path.iterdir()} == {"a", "b"}
    assert open_model(first).config.name == "wan-tiny"


@pytest.mark.parametrize("damage", ["truncated", "missing", "empty"])
def test_a_damaged_copy_is_made_anew(damage: str, tmp_path: Path) -> None:
    folder = ensure_tiny(tmp_path / "tiny")
    whole = contents(folder)
    victim = folder / "Wan2.1_VAE.pth"
    if damage == "truncated":
        victim.write_bytes(victim.read_bytes()[:-100])
    elif damage == "missing":
        victim.unlink()
    else:
        for path in sorted(folder.rglob("*"), reverse=True):
            path.unlink() if path.is_file() else path.rmdir()
    assert contents(ensure_tiny(folder)) == whole
    assert {p.name for p in tmp_path.iterdir()} == {"tiny"}


def test_what_is_not_ours_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "mine.txt").write_text("precious")
    with pytest.raises(CheckpointError, match="move it away"):
        ensure_tiny(tmp_path / "tiny")
    assert (tmp_path / "tiny" / "mine.txt").read_text() == "precious"


def test_without_a_writable_cache_a_temporary_copy_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert open_model(ensure_tiny()).config.name == "wan-tiny"
