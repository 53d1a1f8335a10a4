"""wan-tiny: a complete Wan 2.2 text-to-video checkpoint small enough to make on the spot.

It has the official layout and every part of T2V-A14B (two experts, VAE, umT5, tokenizer), so it runs through exactly
the code the 14B models run through. Its weights are random with a fixed seed: it shows that everything works, not what
Wan can do.
"""

import atexit
import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import Tensor

from wanfast.config import T2V_A14B, VAE_2_1, DiTConfig, TextConfig, VAEConfig
from wanfast.dit.weights import expected_tensors as dit_tensors
from wanfast.errors import CheckpointError
from wanfast.text.weights import expected_tensors as text_tensors
from wanfast.vae.weights import expected_tensors as vae_tensors

NAME = "wan-tiny"
_SIZES = "sizes.json"  # bytes of every file, so that a damaged copy is noticed and made anew
_REVISION = 1  # part of the folder's name: a change of anything below is a new revision

_TEXT = TextConfig(
    vocab_size=512,
    dim=64,
    attention_dim=64,
    ffn_dim=128,
    num_heads=4,
    num_layers=2,
    num_buckets=32,
    max_distance=128,
    eps=1e-6,
)
_DIT = DiTConfig(
    in_channels=16,
    out_channels=16,
    dim=256,
    ffn_dim=512,
    num_heads=2,
    num_layers=4,
    text_dim=_TEXT.dim,
    text_len=512,
    freq_dim=256,
    patch_size=(1, 2, 2),
    eps=1e-6,
)
_VAE: VAEConfig = replace(VAE_2_1, encoder_dim=16, decoder_dim=16)
_DEFAULTS = {"name": NAME, "width": 128, "height": 128, "num_frames": 17, "num_inference_steps": 20}

# fmt: off
_WORDS = (
    "a", "an", "the", "of", "on", "in", "and", "to", "with", "moves", "moving", "rolls", "slides", "left",
    "right", "up", "down", "slowly", "fast", "red", "green", "blue", "yellow", "white", "black", "circle",
    "square", "triangle", "ball", "box", "star", "background", "cat", "dog", "bird", "tree", "sky", "sea",
    "street", "night", "day", "light", "video", "camera",
)
# fmt: on


def default_folder() -> Path:
    """Where wan-tiny is kept: `$XDG_CACHE_HOME/wanfast`, by default `~/.cache/wanfast`."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "wanfast" / f"{NAME}-r{_REVISION}"


def ensure_tiny(folder: Path | None = None) -> Path:
    """Write wan-tiny unless it is there and whole, and return its folder.

    Args:
        folder: where it shall stand; None is `default_folder()`, or where that cannot be written a temporary folder,
            which goes when the process ends.

    Returns:
        A folder in the official layout. It appears under its name only when it is complete.

    Raises:
        CheckpointError: something else stands there.
    """
    target = folder or default_folder()
    if _is_whole(target):
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        return _build(target)
    except OSError:
        if folder is not None:
            raise
        temporary = Path(tempfile.mkdtemp(prefix="wanfast-"))
        atexit.register(shutil.rmtree, temporary, ignore_errors=True)
        return _build(temporary / target.name)


def _build(target: Path) -> Path:
    if target.is_dir() and any(target.iterdir()) and not (target / _SIZES).is_file():
        raise CheckpointError(f"{target}: is not {NAME}, which is kept there; move it away")
    building = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        write_tiny(building)
        (building / _SIZES).write_text(json.dumps(_sizes(building)))
        shutil.rmtree(target, ignore_errors=True)  # a damaged copy of what was just written
        building.rename(target)
    except OSError:  # another process may have finished first: its copy is the same to the byte
        if not _is_whole(target):
            raise
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return target


def _is_whole(folder: Path) -> bool:
    try:
        return bool(json.loads((folder / _SIZES).read_text()) == _sizes(folder))
    except (OSError, ValueError):
        return False


def _sizes(folder: Path) -> dict[str, int]:
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != _SIZES]
    return {str(path.relative_to(folder)): path.stat().st_size for path in files}


def write_tiny(folder: Path) -> None:
    """Write wan-tiny's files into an existing folder, in the layout of Wan-AI/Wan2.2-T2V-A14B."""
    (folder / "wanfast.json").write_text(json.dumps(_DEFAULTS, indent=1))
    for expert in T2V_A14B.experts:
        part = folder / f"{expert.name}_model"
        part.mkdir()
        (part / "config.json").write_text(json.dumps(_official_config(), indent=1))
        save_file(random_tensors(dit_tensors(_DIT), seed=expert.name), part / "diffusion_pytorch_model.safetensors")
    text = random_tensors(text_tensors(_TEXT), seed="text")
    torch.save({name: tensor.bfloat16() for name, tensor in text.items()}, folder / "models_t5_umt5-xxl-enc-bf16.pth")
    torch.save(random_tensors(vae_tensors(_VAE), seed="vae"), folder / "Wan2.1_VAE.pth")
    (folder / "google" / "umt5-xxl").mkdir(parents=True)
    byte_tokenizer(_TEXT.vocab_size).save(str(folder / "google" / "umt5-xxl" / "tokenizer.json"))


def random_tensors(shapes: Mapping[str, tuple[int, ...]], seed: str) -> dict[str, Tensor]:
    """Draw tensors of healthy size: every layer keeps the scale of its input.

    Args:
        shapes: shape by official name.
        seed: another string gives other tensors.

    Returns:
        fp32 by name: norm weights near 1, biases and modulation small, matrices of unit gain; order does not matter.
    """
    tensors = {}
    for name, shape in shapes.items():
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
        values = torch.randn(shape, generator=generator)
        if name.endswith("gamma") or ("norm" in name and name.endswith(".weight")):
            tensors[name] = 1 + 0.1 * values
        elif name.endswith((".bias", "modulation")):
            tensors[name] = 0.1 * values
        else:
            tensors[name] = values / (values.numel() / shape[0]) ** 0.5
    return tensors


def byte_tokenizer(vocab_size: int) -> Tokenizer:
    """Build a small SentencePiece-like tokenizer: common words as pieces, everything else as bytes.

    Args:
        vocab_size: pieces at most; special tokens stand where T5 has them (pad 0, end 1, unknown 3).
    """
    scored = [("<pad>", 0.0), ("</s>", 0.0), ("<s>", 0.0), ("<unk>", 0.0)]
    scored += [(f"<0x{byte:02X}>", -8.0) for byte in range(256)]
    scored += [(f"▁{word}", -2.0) for word in _WORDS] + [("▁", -3.0)]
    scored += [(chr(letter), -4.0) for letter in range(ord("!"), ord("~") + 1)]
    tokenizer = Tokenizer(models.Unigram(scored[:vocab_size], unk_id=3, byte_fallback=True))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    tokenizer.add_special_tokens(["<pad>", "</s>", "<s>", "<unk>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return tokenizer


def _official_config() -> dict[str, Any]:
    sizes = asdict(_DIT)
    return {
        "_class_name": "WanModel",
        "dim": sizes["dim"],
        "eps": sizes["eps"],
        "ffn_dim": sizes["ffn_dim"],
        "freq_dim": sizes["freq_dim"],
        "in_dim": sizes["in_channels"],
        "model_type": T2V_A14B.task,
        "num_heads": sizes["num_heads"],
        "num_layers": sizes["num_layers"],
        "out_dim": sizes["out_channels"],
        "text_len": sizes["text_len"],
    }
