"""How the forwards of a step are cut, so that they hold less at a time.

Cut in any way they compute the same, but for the order in which a product sums.
"""

from dataclasses import dataclass

KEPT_TEXT_BYTES = 256_000_000  # keys and values of 300 tokens in a 14B expert: two prompts of usual length


@dataclass(frozen=True, slots=True)
class Chunking:
    """One way to cut them."""

    tokens: int  # computed at a time where tokens do not see one another
    in_turn: bool  # with and without the prompt one after the other, so that one residual stream is alive
    text_bytes: int = KEPT_TEXT_BYTES  # of keys and values of the prompts that are kept from step to step


# From the one that copies blocks least and fills a large GPU to the one that holds least.
CHUNKINGS = (
    Chunking(2048, in_turn=False),
    Chunking(2048, in_turn=True),
    Chunking(512, in_turn=True),
    Chunking(512, in_turn=True, text_bytes=0),
)


def leaner(chunking: Chunking) -> Chunking | None:
    """Give the next one that holds less, if there is one."""
    rest = CHUNKINGS[CHUNKINGS.index(chunking) + 1 :]
    return rest[0] if rest else None
