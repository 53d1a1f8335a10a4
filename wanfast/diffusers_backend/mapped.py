"""Parameters that are pages of a file, as safetensors loads them, and were written to since.

Such a write, as of `fuse_lora`, is in memory alone. Blocks on their way to a device are read from the file.
"""

import os

import torch
from torch import Tensor, nn

from wanfast.mappings import FileRange, MappedFiles

_PIECE_BYTES = 1 << 24


def own_written_pages(module: nn.Module) -> None:
    """Give every parameter that is no longer as in its file memory of its own, with the same values.

    Args:
        module: in host memory; its mapped parameters are read once, beside their files.
    """
    mapped = MappedFiles()
    for parameter in module.parameters():
        at = mapped.find(parameter.data) if parameter.is_contiguous() else None
        if at is not None and not _is_as_in_file(parameter.data, at):
            parameter.data = parameter.data.clone()


def _is_as_in_file(data: Tensor, at: FileRange) -> bool:
    """Whether bytes in memory are those of the file; if that cannot be opened, nobody reads it either."""
    content = data.view(-1).view(torch.uint8)
    try:
        descriptor = os.open(at.path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return True
    try:
        pieces = torch.split(content, _PIECE_BYTES)
        stored = (os.pread(descriptor, len(piece), at.offset + i * _PIECE_BYTES) for i, piece in enumerate(pieces))
        return all(piece.numpy().data == bytes_ for piece, bytes_ in zip(pieces, stored, strict=True))
    finally:
        os.close(descriptor)
