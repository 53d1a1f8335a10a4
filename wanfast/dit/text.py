"""What the blocks attend to of a prompt: its embedded rows, and their keys and values, the same in every step.

A context is padded with zero rows up to the length the model was trained with, and they are attended to like the
others. They are all alike, so one row stands for them all and is counted as often as it would be there.
Source: Wan-Video/Wan2.2, wan/modules/model.py, WanModel.forward and WanCrossAttention.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from wanfast.config import DiTConfig
from wanfast.dit.chunking import KEPT_TEXT_BYTES
from wanfast.dit.weights import OuterWeights
from wanfast.linear import linear

_PROMPTS = 2  # with and without the prompt


@dataclass(frozen=True, slots=True)
class Text:
    """An embedded context."""

    rows: Tensor  # [B, S, C], in the weights' dtype
    last_count: int  # how many times the last row is attended to


@dataclass(frozen=True, slots=True)
class KeyValues:
    """A context as one block attends to it."""

    keys: Tensor  # [B, S, N, D]
    values: Tensor  # [B, S, N, D]
    last_count: int  # how many times the last row is attended to

    @property
    def nbytes(self) -> int:
        """Of both tensors."""
        return self.keys.nbytes + self.values.nbytes


def embed_text(context: Tensor, outer: OuterWeights, config: DiTConfig) -> Text:
    """Project a context, its padding once.

    Args:
        context: [B, n, text_dim], n <= text_len; rows of zeros at its end are padding too.
        outer: the weights around the blocks, on the context's device.
        config: sizes of the DiT.
    """
    used = context.ne(0).any(2).any(0).nonzero()
    num_rows = int(used[-1]) + 1 if len(used) else 0
    num_padding = config.text_len - num_rows
    rows = F.pad(context[:, :num_rows], (0, 0, 0, min(num_padding, 1)))
    embedded = linear(F.gelu(linear(rows, outer.text_in), approximate="tanh"), outer.text_out)
    return Text(embedded, max(num_padding, 1))


@dataclass(frozen=True, slots=True)
class RememberedText:
    """One context and what was made of it."""

    context: Tensor
    version: int | None  # how often it had been written to
    text: Text
    kept: dict[int, KeyValues]  # by block


class TextMemory:
    """What one expert makes of the prompts of a run, kept from step to step as far as its limit goes.

    It is for one expert with one set of LoRAs: with others, keys and values are others.
    """

    def __init__(self, limit: int = KEPT_TEXT_BYTES) -> None:
        """Nothing is kept yet.

        Args:
            limit: bytes of keys and values; what is beyond is made again for each use.
        """
        self._left = limit
        self._texts: list[RememberedText] = []  # the last used come first

    def texts(self, contexts: Sequence[Tensor], outer: OuterWeights, config: DiTConfig) -> list[RememberedText]:
        """Give each context embedded, with what is kept of it if it is the same tensor as before, unchanged."""
        used = [self._find(context) or _remember(context, outer, config) for context in contexts]
        others = [text for text in self._texts if not any(text is one for one in used)]
        room = max(_PROMPTS - len(used), 0)
        self._left += sum(kept.nbytes for text in others[room:] for kept in text.kept.values())
        self._texts = used + others[:room]
        return used

    def let_go(self, limit: int) -> None:
        """Forget all keys and values, and keep no more than `limit` bytes from here on."""
        for text in self._texts:
            text.kept.clear()
        self._left = limit

    def key_values(self, text: RememberedText, block: int, make: Callable[[], KeyValues]) -> KeyValues:
        """Give keys and values of a context in a block; made where they are not kept."""
        kept = text.kept.get(block)
        if kept is None:
            kept = make()
            if kept.nbytes <= self._left:
                self._left -= kept.nbytes
                text.kept[block] = kept
        return kept

    def _find(self, context: Tensor) -> RememberedText | None:
        version = _version(context)
        same = (text for text in self._texts if text.context is context and text.version == version is not None)
        return next(same, None)


def _remember(context: Tensor, outer: OuterWeights, config: DiTConfig) -> RememberedText:
    return RememberedText(context, _version(context), embed_text(context, outer, config), {})


def _version(context: Tensor) -> int | None:
    """How often a tensor was written to; a tensor of inference mode does not tell."""
    return None if context.is_inference() else context._version
