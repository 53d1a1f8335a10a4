"""The umT5 encoder in plain PyTorch for training, with official tensor names, and its small tokenizer."""

import math

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from torch.nn import functional

from wanfast.judge import BACKGROUNDS, COLOURS, SHAPES

VOCABULARY = 512
DIM = 128
HEADS = 4
LAYERS = 2
FFN_DIM = 256
_BUCKETS = 32  # of relative positions, half of them for keys behind the query
_EXACT = 8  # distances below this have a bucket of their own
_FURTHEST = 128
_END = 1  # </s>
_NUM_BYTES_AND_SPECIAL = 4 + 256

_WORDS = """
a an the of on in and to with over front background dotted plain small little large big
moves moving slides sliding drifts drifting goes going left leftwards right rightwards up upwards down downwards
stands standing still rests resting is motionless slowly gently quickly fast above below
camera pans zooms while video shows two both
"""


def make_tokenizer() -> Tokenizer:
    """Whole words of the captions as pieces, everything else letter by letter or byte by byte; case does not matter.

    A prompt with Chinese in it reads as an empty one: the model knows no Chinese, and Wan's standard negative prompt,
    which is Chinese, then stands for "no caption", as it did in training.
    """
    scored = [("<pad>", 0.0), ("</s>", 0.0), ("<s>", 0.0), ("<unk>", 0.0)]
    scored += [(f"<0x{byte:02X}>", -8.0) for byte in range(_NUM_BYTES_AND_SPECIAL - len(scored))]
    scored += [(f"▁{word}", -2.0) for word in (*COLOURS, *BACKGROUNDS, *SHAPES, *_WORDS.split())] + [("▁", -3.0)]
    scored += [(chr(letter), -4.0) for letter in range(ord("!"), ord("~") + 1) if not chr(letter).isupper()]
    scored += [(f"<unused_{number}>", -99.0) for number in range(VOCABULARY - len(scored))]
    tokenizer = Tokenizer(models.Unigram(scored, unk_id=3, byte_fallback=True))
    chinese = normalizers.Replace(Regex(r"^.*[\u4e00-\u9fff].*$"), "")
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase(), chinese])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    tokenizer.add_special_tokens(["<pad>", "</s>", "<s>", "<unk>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", _END)])
    return tokenizer


def tokenize(tokenizer: Tokenizer, captions: list[str]) -> tuple[Tensor, Tensor]:
    """Ids of captions and how many of them are true.

    Returns:
        ids, [B, T + 1], padded with 0 so that every caption has at least one padding; lengths, [B].
    """
    lists = [encoding.ids for encoding in tokenizer.encode_batch(captions)]
    lengths = torch.tensor([len(one) for one in lists])
    ids = torch.zeros(len(lists), int(lengths.max()) + 1, dtype=torch.int64)
    for row, one in zip(ids, lists, strict=True):
        row[: len(one)] = torch.tensor(one)
    return ids, lengths


class RMSNorm(nn.Module):
    """Scales rows to a root mean square of the weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(DIM))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise [..., C]."""
        return functional.rms_norm(x.float(), (DIM,), self.weight, 1e-6).to(x.dtype)


class Attention(nn.Module):
    """Attention without scale and without biases."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(DIM, DIM, bias=False) for _ in range(4))
        nn.init.normal_(self.q.weight, std=(DIM * DIM / HEADS) ** -0.5)
        for linear in (self.k, self.v, self.o):
            nn.init.normal_(linear.weight, std=DIM**-0.5)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """Let rows [B, T, C] attend to each other, with what [B, N, T, T] adds to the logits."""
        q, k, v = (part(x).unflatten(2, (HEADS, -1)).transpose(1, 2) for part in (self.q, self.k, self.v))
        mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype), scale=1.0)
        return self.o(mixed.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """Two layers, the first gated."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Sequential(nn.Linear(DIM, FFN_DIM, bias=False), nn.GELU(approximate="tanh"))
        self.fc1, self.fc2 = nn.Linear(DIM, FFN_DIM, bias=False), nn.Linear(FFN_DIM, DIM, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., C]."""
        return self.fc2(self.fc1(x) * self.gate(x))


class Positions(nn.Module):
    """A bias per head for every distance between two tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(_BUCKETS, HEADS)
        nn.init.normal_(self.embedding.weight, std=0.1)

    def forward(self, length: int) -> Tensor:
        """Give the bias, [1, N, T, T]."""
        positions = torch.arange(length)
        return self.embedding(_bucket(positions[None, :] - positions[:, None])).permute(2, 0, 1)[None]


class Block(nn.Module):
    """One layer of the encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.attn, self.norm2, self.ffn = RMSNorm(), Attention(), RMSNorm(), FeedForward()
        self.pos_embedding = Positions()

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Map [B, T, C]; the mask [B, 1, 1, T] is 0 or very negative."""
        x = x + self.attn(self.norm1(x), self.pos_embedding(x.shape[1]) + mask)
        return x + self.ffn(self.norm2(x))


class TextEncoder(nn.Module):
    """Token ids to rows that the transformer attends to."""

    def __init__(self) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(VOCABULARY, DIM)
        with torch.no_grad():
            self.token_embedding.weight[4:_NUM_BYTES_AND_SPECIAL] = 0  # bytes never seen in training say nothing
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm = RMSNorm()

    def forward(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """Map [B, T] to [B, T, C]; rows beyond a caption's length mean nothing."""
        is_padding = torch.arange(ids.shape[1]) >= lengths[:, None]
        mask = torch.zeros(ids.shape).masked_fill(is_padding, -1e4)[:, None, None, :]
        x = self.token_embedding(ids)
        for block in self.blocks:
            x = block(x, mask)
        return self.norm(x)


def _bucket(distance: Tensor) -> Tensor:
    """Number of the bucket of key position less query position: exact when near, logarithmic when far."""
    half = _BUCKETS // 2
    away = distance.abs()
    steps = (away.clamp_min(1) / _EXACT).log() / math.log(_FURTHEST / _EXACT) * (half - _EXACT)
    far = (_EXACT + steps.long()).clamp_max(half - 1)
    return torch.where(away < _EXACT, away, far) + half * (distance > 0)
