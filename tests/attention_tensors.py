"""Queries, keys and values with the difficulties that Wan's have, and attention over them in float64."""

from dataclasses import dataclass

import torch
from torch import Tensor

KINDS = ("gaussian", "biased", "outlier", "one-hot")


def attention_tensors(
    kind: str, *, queries: int, keys: int, heads: int, dim: int, dtype: torch.dtype = torch.bfloat16
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw q [1, queries, heads, dim], k and v [1, keys, heads, dim] of one of KINDS from torch's generator.

    biased: k and v have large channel means, as Wan's have. outlier: some tokens and one channel are larger as well.
    one-hot: nearly all of a row's weight is on one key.
    """
    q, k, v = torch.randn(1, queries, heads, dim), torch.randn(1, keys, heads, dim), torch.randn(1, keys, heads, dim)
    if kind == "one-hot":
        found = torch.arange(queries) * 7 % keys
        q = 1.2 * k[:, found] + 0.3 * q
    if kind != "gaussian":
        k += 20 * torch.randn(heads, dim) * (torch.rand(heads, dim) < 0.15)
        v += 2 * torch.randn(heads, dim)
    if kind == "outlier":
        q[..., 5] *= 4
        k[..., 5] *= 3
        k[:, ::101] *= 2
        v[:, ::101] *= 10
    return q.to(dtype), k.to(dtype), v.to(dtype)


def exact_attention(q: Tensor, k: Tensor, v: Tensor, *, live: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(D)) v in float64, [B, T, N, D]; `live` [B, N, T, S] says which keys a query sees."""
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    scores = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5
    if live is not None:
        scores = scores.masked_fill(~live, float("-inf"))
    return (scores.softmax(-1) @ v).transpose(1, 2)


@dataclass(frozen=True)
class Distance:
    """How far a result is from the truth."""

    cosine: float
    centred_cosine: float  # after the truth's mean over queries is taken off both: what the mean of v cannot hide
    worst_row: float  # largest |got - want| / |want| of a query's D channels


def distance(*, got: Tensor, want: Tensor) -> Distance:
    """Compare a result with the truth, both [B, T, N, D]."""
    got = got.double()
    assert got.shape == want.shape and got.isfinite().all()
    mean = want.mean(1, keepdim=True)
    cosine = torch.cosine_similarity(got.flatten(), want.flatten(), 0).item()
    centred = torch.cosine_similarity((got - mean).flatten(), (want - mean).flatten(), 0).item()
    return Distance(cosine, centred, ((got - want).norm(dim=-1) / want.norm(dim=-1)).max().item())
