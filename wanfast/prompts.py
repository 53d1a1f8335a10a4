"""Prompts to contexts: what is on the disk is read, the others are encoded in as few passes as memory allows."""

import logging
from collections.abc import Iterator, Sequence
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from wanfast.denoise import OnProgress
from wanfast.errors import MemoryBudgetError
from wanfast.loaded import LoadedModel
from wanfast.out_of_memory import OutOfMemory, attempt
from wanfast.plan import Plan
from wanfast.prompt_cache import context_file, read_context, write_context
from wanfast.residency import free_memory, gigabytes
from wanfast.residency.residency import MIN_SLOTS
from wanfast.text.memory import text_activations
from wanfast.text.tokenizer import clean_prompt, tokenize
from wanfast.text.umt5 import encode_texts
from wanfast.weight_sizes import largest_block

MOST_PROMPTS = 64  # in a pass over the encoder; of full length they hold half a GB of a GPU

_log = logging.getLogger("wanfast")
_HOST = torch.device("cpu")

Block = TypeVar("Block")
Ids = tuple[int, ...]


def encode_prompts(model: LoadedModel, plans: Sequence[Plan], progress: OnProgress) -> list[list[Tensor]]:
    """Encode the prompt and the negative prompt of each plan, each text once.

    A prompt that was encoded before, by the same encoder on the same machine, is read from the disk. How many are
    encoded together changes no number.

    Returns:
        For each plan its prompt and its negative prompt, [1, T, text channels] each with its own T, on the host.

    Raises:
        MemoryBudgetError: there is not even memory to encode one prompt.
        CheckpointError: the encoder cannot be read.
    """
    named = [("prompt", plan.prompt) for plan in plans] + [("negative_prompt", plan.negative_prompt) for plan in plans]
    ids = [_token_ids(model, name, text) for name, text in named]
    config, dtype = model.config.text, model.compute_dtype
    files = {prompt: context_file(model.model.text, config, prompt, dtype, model.device) for prompt in ids}
    stored = {prompt: read_context(file, len(prompt), config, dtype) for prompt, file in files.items()}
    contexts = {prompt: context for prompt, context in stored.items() if context is not None}
    missing = [prompt for prompt in files if prompt not in contexts]
    at_once = MOST_PROMPTS
    while missing:
        some = missing[:at_once]
        encoded = attempt(partial(_encode, model, some, progress))
        if isinstance(encoded, OutOfMemory):
            at_once = _less(model, some, encoded)
            continue
        for prompt, context in zip(some, encoded, strict=True):
            contexts[prompt] = context
            if (file := files[prompt]) is not None:
                write_context(file, context)
        missing = missing[len(some) :]
    ready = [contexts[prompt][None] for prompt in ids]
    return [list(pair) for pair in zip(ready[: len(plans)], ready[len(plans) :], strict=True)]


def _encode(model: LoadedModel, prompts: Sequence[Ids], progress: OnProgress) -> list[Tensor]:
    outer, blocks = model.text_encoder()
    config = model.config.text
    counted = _counted(blocks, config.num_layers, progress)
    return [context.to(_HOST) for context in encode_texts(prompts, outer, counted, config)]


def _less(model: LoadedModel, prompts: Sequence[Ids], failure: OutOfMemory) -> int:
    """Let weights go that are not the encoder's, or take fewer prompts at a time: give how many."""
    if model.release_device():
        remedy, at_once = "without the other weights", len(prompts)
    elif len(prompts) > 1:
        remedy, at_once = "with fewer prompts at a time", len(prompts) // 2
    else:
        (prompt,) = prompts
        needed = MIN_SLOTS * largest_block(model.model.text, model.compute_dtype) + text_activations(
            model.config.text, num_tokens=len(prompt), num_prompts=1, itemsize=model.compute_dtype.itemsize
        )
        raise MemoryBudgetError(
            f"text: out of memory with one prompt of {len(prompt)} tokens and no other weights ({failure.reason});"
            f" encoding it needs {gigabytes(needed)}, {gigabytes(free_memory(model.device))} are free; end what else"
            " takes memory, or try a shorter prompt"
        )
    _log.warning("text: out of memory (%s); it is encoded again %s", failure.reason, remedy)
    return at_once


def _token_ids(model: LoadedModel, name: str, text: str) -> Ids:
    limit = model.config.dit.text_len
    tokens = tokenize(model.model.tokenizer, clean_prompt(text), limit)
    if tokens.is_truncated:
        _log.warning("%s: the model reads %d tokens, the last %d are cut off", name, limit, tokens.num_dropped)
    return tokens.ids


def _counted(blocks: Iterator[Block], total: int, progress: OnProgress) -> Iterator[Block]:
    """Pass blocks on, saying which one is in use."""
    for index, block in enumerate(blocks):
        progress("text", index, total)
        yield block
    progress("text", total, total)
