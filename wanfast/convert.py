"""Writes a model, from whatever files it is in, as wanfast's own folder: packed by block, exact or in 8 bits.

`exact` keeps every number that the exact precision computes with: what the files store small stays as it is, the rest
gets the dtype that it runs in. `fp8` and `int8` also quantise the matrices of the DiT's blocks, with one scale per
output channel; text encoder and VAE stay exact.
"""

import json
import logging
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from wanfast.checkpoint.bind import read_linear, read_tensor
from wanfast.checkpoint.packed_format import Form, Group, packed_bytes, scale_name, stored_tensors, write_packed
from wanfast.checkpoint.quantize import quantize_rows, rotates
from wanfast.checkpoint.reader import Reader
from wanfast.checkpoint.ready_layout import TEXT_ENCODER, TOKENIZER, VAE, expert_file, write_manifest
from wanfast.dit.weights import is_fp32
from wanfast.errors import CheckpointError, RequestError
from wanfast.locks import lock_file
from wanfast.model import Model
from wanfast.stored import ScaledWeight, Weight

StoredPrecision = Literal["exact", "fp8", "int8"]
OnProgress = Callable[[str, int, int], None]  # the file, its bytes that are written, and all its bytes

_LOG = logging.getLogger(__name__)
_EIGHT_BIT = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}
_STATE = "conversion.json"  # in an unfinished folder: what it is to become, and of what
_BLOCK = re.compile(r"blocks\.(\d+)\.")
_QUANTIZED = re.compile(r"blocks\.\d+\.((self|cross)_attn\.[qkvo]|ffn\.[02])\.weight")
_A_MATRIX = "blocks.0.ffn.0.weight"
_ROOM_FOR_HEADERS = 1 << 24


def convert_model(
    model: Model, output: str | Path, precision: StoredPrecision = "exact", *, on_progress: OnProgress | None = None
) -> Path:
    """Write a model as a folder that opens at once and loads block by block.

    A conversion that was interrupted goes on where it was when it is asked for again. The folder has its name only when
    it is whole; until then it is `<output>.partial`.

    Args:
        model: from `open_model`.
        output: folder that must not exist yet; its parent must.
        precision: "exact", or "fp8" or "int8" for the matrices of the DiT's blocks.
        on_progress: is told file, bytes written and bytes in all.

    Returns:
        The folder. `wanfast.load` takes it, and so does every command as `--model`.

    Raises:
        RequestError: an argument breaks a rule, or there is too little room on the disk.
        CheckpointError: a tensor cannot be read or is not finite, or a file cannot be written.
    """
    if precision not in get_args(StoredPrecision):
        raise RequestError(f"precision: must be exact, fp8 or int8, got {precision!r}; try int8")
    target = Path(output).expanduser()
    building = target.with_name(f"{target.name}.partial") if target.name else target
    try:
        _check_output(target)
        with _claimed(building, _state_of(model, precision)):
            _check_output(target)  # another process may have made it until the claim
            files = _files_to_write(model, precision)
            _warn_of_rounding(model, precision)
            _check_room(building, [packed_bytes(groups) for groups in files.values()])
            for name, groups in files.items():
                if not (building / name).exists():
                    told = _told(on_progress, name, packed_bytes(groups))
                    write_packed(building / name, groups, {"format": "pt", "precision": precision}, told)
            model.tokenizer.vocabulary.save(str(building / TOKENIZER))
            loras = _copy_loras(model, building)
            write_manifest(building, model.config, precision, made_from=_names(model), preset_loras=loras)
            building.rename(target)  # from here on it is whole, whatever becomes of the note that it was not
            (target / _STATE).unlink(missing_ok=True)
    except OSError as error:
        raise CheckpointError(f"{building}: cannot be written ({error.strerror or error})") from None
    return target


def _check_output(target: Path) -> None:
    if not target.name or os.path.lexists(target):
        raise RequestError(f"output: must not exist yet, got {target}; choose another name")
    if not target.parent.is_dir() or not os.access(target.parent, os.W_OK):
        raise RequestError(f"output: must lie in a folder that can be written to, got {target}; make that folder first")


def _state_of(model: Model, precision: str) -> bytes:
    """What a folder is to become, and of what."""
    sources = sorted({reader.ref(name).file.resolve() for reader in model.readers for name in reader.names()})
    marks = [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in sources]
    return json.dumps({"model": model.config.name, "precision": precision, "files": marks}, indent=1).encode()


def _names(model: Model) -> list[str]:
    """The experts' files, which may say what a model was distilled to."""
    files = sorted({reader.ref(name).file for reader in model.experts.values() for name in reader.names()})
    return [*model.made_from, *(f"{file.parent.name}/{file.name}" for file in files)]


def _copy_loras(model: Model, building: Path) -> dict[str, list[str]]:
    """Take along the LoRAs that the model has for presets; by preset their places in the folder."""
    copied: dict[str, list[str]] = {}
    for preset, files in model.preset_loras.items():
        # A folder for each: two may have one name, and the name stays, as it says which expert's it is.
        copied[preset] = [f"{preset}/{number}/{file.name}" for number, file in enumerate(files)]
        for file, place in zip(files, copied[preset], strict=True):
            (building / place).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, building / place)
    return copied


@contextmanager
def _claimed(building: Path, state: bytes) -> Iterator[None]:
    """Begin an unfinished folder, or find one of the same conversion, and keep other processes out of it."""
    with suppress(FileExistsError):
        building.mkdir()
    with (building / _STATE).open("a+b") as file:
        if not lock_file(file):
            raise RequestError(
                f"output: must not be written by two processes at once, got {building}, which another one is writing"
            )
        file.seek(0)
        found = file.read()
        if found not in (state, b"") or (found == b"" and len(list(building.iterdir())) > 1):
            raise RequestError(
                f"output: must not have the unfinished folder of another conversion beside it, got {building}; "
                "delete that folder or choose another name"
            )
        if found == b"":
            file.write(state)
            file.flush()
        yield


def _check_room(building: Path, sizes: Iterable[int]) -> None:
    there = sum(file.stat().st_size for file in building.iterdir())
    needed, free = sum(sizes) + _ROOM_FOR_HEADERS - there, shutil.disk_usage(building).free
    if needed > free:
        raise RequestError(
            f"output: must have {needed / 1e6:,.0f} MB of room on its disk, got {building} with {free / 1e6:,.0f} MB"
        )


def _told(on_progress: OnProgress | None, name: str, total: int) -> Callable[[int], None]:
    done = 0

    def told(num_bytes: int) -> None:
        nonlocal done
        done += num_bytes
        if on_progress is not None:
            on_progress(name, done, total)

    return told


def _warn_of_rounding(model: Model, precision: StoredPrecision) -> None:
    """Say where numbers change in a way that the precision's name does not tell."""
    if precision == "exact":
        wide = [reader for reader in model.experts.values() if reader.dtype(_A_MATRIX) == torch.float32]
        if wide:
            _LOG.warning(
                "%s holds fp32; the folder gets what precision exact rounds it to, so use the original files with fp32",
                wide[0].path,
            )
        return
    kept = str(_EIGHT_BIT[precision]).removeprefix("torch.")
    kinds: Counter[str] = Counter()
    for reader in model.experts.values():
        stored = (reader.ref(name).stored_as for name in reader.names() if _QUANTIZED.fullmatch(name))
        kinds.update(kind for kind in stored if kind is not None and kind != kept)
    if kinds:
        _LOG.warning(
            "%d matrices are stored as %s already; %s rounds them a second time: convert the 16-bit files if there "
            "are any",
            kinds.total(),
            " and ".join(kinds),
            precision,
        )


def _files_to_write(model: Model, precision: StoredPrecision) -> dict[str, list[Group]]:
    """What each file of the folder holds, from headers alone."""
    files = {expert_file(name): expert_groups(reader, precision) for name, reader in model.experts.items()}
    files[TEXT_ENCODER] = _groups(model.text, lambda name: torch.bfloat16)
    files[VAE] = _groups(model.vae, lambda name: max(model.vae.dtype(name), torch.bfloat16, key=_width))
    return files


def expert_groups(reader: Reader, precision: StoredPrecision) -> list[Group]:
    """What the packed file of a DiT holds: what stands outside the blocks, then each block; no numbers are read yet.

    Raises:
        CheckpointError: the file has gone; when a group is loaded, also that a tensor is not finite.
    """
    eight_bit = None if precision == "exact" else _EIGHT_BIT[precision]

    def dtype_of(name: str) -> torch.dtype:
        if eight_bit is not None and _QUANTIZED.fullmatch(name):
            return eight_bit
        return torch.float32 if is_fp32(name) else torch.bfloat16

    return _groups(reader, dtype_of)


def _width(dtype: torch.dtype) -> int:
    return dtype.itemsize


def _groups(reader: Reader, dtype_of: Callable[[str], torch.dtype]) -> list[Group]:
    """What stands outside the blocks, if anything does, then each block."""
    by_block: dict[int, list[str]] = {-1: []}
    for name in sorted(reader.names()):
        match = _BLOCK.match(name)
        by_block.setdefault(int(match[1]) if match else -1, []).append(name)
    groups = []
    for _, names in sorted(by_block.items()):
        dtypes = {name: dtype_of(name) for name in _in_order_of_use(names)}
        groups.append(Group(_forms(reader, dtypes), partial(_load, reader, dtypes)))
    return groups


def _in_order_of_use(names: Sequence[str]) -> list[str]:
    """Bring the matrices that take the same input next to each other: q, k and v, and both halves of a gated FFN."""
    projections = [f"{attention}.{part}" for attention in ("self_attn", "cross_attn", "attn") for part in "qkvo"]
    order = [*projections, "ffn.0", "ffn.2", "ffn.gate", "ffn.fc1", "ffn.fc2"]

    def rank(name: str) -> int:
        stem = _BLOCK.sub("", name)
        return next((place for place, start in enumerate(order) if stem.startswith(start)), -1)

    return sorted(names, key=rank)


def _forms(reader: Reader, dtypes: Mapping[str, torch.dtype]) -> dict[str, Form]:
    """Dtype and shape of every tensor that `_load` will give; no numbers are read."""
    forms: dict[str, Form] = {}
    for name, dtype in dtypes.items():
        weight = reader.load(name, "meta")
        if _stays(weight, dtype):
            parts = stored_tensors(name, weight)
            forms |= {key: (part.dtype, tuple(part.shape)) for key, part in parts.items()}
            continue
        forms[name] = dtype, reader.shape(name)
        if dtype in _EIGHT_BIT.values():
            rows, columns = reader.shape(name)
            forms[scale_name(name, rotates(dtype, columns), dtype != torch.int8)] = torch.float32, (rows, 1)
    return forms


def _load(reader: Reader, dtypes: Mapping[str, torch.dtype]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, dtype in dtypes.items():
        tensors |= stored_tensors(name, _converted(reader, name, dtype))
    return tensors


def _converted(reader: Reader, name: str, dtype: torch.dtype) -> Weight:
    """Load one weight, checked, in the form it is written in."""
    shape = reader.shape(name)
    if _stays(reader.load(name, "meta"), dtype):
        return read_linear(reader, name.removesuffix(".weight"), *shape, bias=False, dtype=torch.bfloat16).weight
    if dtype in _EIGHT_BIT.values():
        return quantize_rows(read_tensor(reader, name, shape, dtype=torch.float32), dtype)
    return read_tensor(reader, name, shape, dtype=dtype)


def _stays(weight: Weight, dtype: torch.dtype) -> bool:
    """Whether a weight that is stored small keeps its bytes: unless it is to get 8 bits of another kind."""
    if isinstance(weight, Tensor):
        return False
    return dtype not in _EIGHT_BIT.values() or (isinstance(weight, ScaledWeight) and weight.values.dtype == dtype)
