"""Asks the judge about clips of an exported checkpoint, made by wanfast or by diffusers.

Usage: python judge_checkpoint.py CHECKPOINT_FOLDER
       python judge_checkpoint.py CHECKPOINT_FOLDER --engine diffusers
       python judge_checkpoint.py CHECKPOINT_FOLDER --preset lightning4 --lora HIGH.safetensors LOW.safetensors

The captions and the noise are those of evaluate.py, so all of these can be compared clip by clip.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from data import make_scene
from dit_model import BOUNDARY, FREQ_DIM
from evaluate import SEED, write_sheet
from safetensors.torch import load_file
from text_model import DIM, FFN_DIM, HEADS, LAYERS, VOCABULARY, make_tokenizer

import wanfast
from wanfast.checkpoint.names import dit_to_diffusers, text_to_transformers, vae_to_diffusers
from wanfast.config import VAE_2_1
from wanfast.judge import Array, accuracies, background_change, flicker, judge
from wanfast.presets import PRESETS

SHIFT, GUIDANCE = 12.0, (4.0, 3.0)


def wanfast_engine(folder: Path, options: argparse.Namespace) -> Callable[[str, int], Array]:
    """Make clips with wanfast: from a caption and a seed to frames in [0, 1]."""
    pipeline = wanfast.load(folder, device="cpu")

    def make(caption: str, seed: int) -> Array:
        video = pipeline.generate(
            caption, num_inference_steps=options.steps, seed=seed, preset=options.preset, loras=options.lora
        )
        return np.asarray(video.frames, dtype=np.float32) / 255

    return make


def diffusers_engine(folder: Path, options: argparse.Namespace) -> Callable[[str, int], Array]:
    """Make clips with diffusers' own pipeline over the same tensors, in fp32."""
    pipeline = diffusers_pipeline(folder)

    def make(caption: str, seed: int) -> Array:
        frames: Array = pipeline(
            prompt=caption, height=64, width=64, num_frames=17, num_inference_steps=options.steps,
            guidance_scale=GUIDANCE[0], guidance_scale_2=GUIDANCE[1], output_type="np",
            latents=torch.randn(16, 5, 8, 8, generator=torch.Generator().manual_seed(seed))[None],
        ).frames[0]  # fmt: skip
        return frames

    return make


def diffusers_pipeline(folder: Path) -> Any:
    """Load an exported checkpoint into diffusers' text-to-video pipeline."""
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
    from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

    transformers = []
    for name in ("high_noise", "low_noise"):
        path = folder / f"{name}_model"
        config = json.loads((path / "config.json").read_text())
        transformer = WanTransformer3DModel(
            num_attention_heads=config["num_heads"], attention_head_dim=config["dim"] // config["num_heads"],
            in_channels=config["in_dim"], out_channels=config["out_dim"], text_dim=DIM, freq_dim=FREQ_DIM,
            ffn_dim=config["ffn_dim"], num_layers=config["num_layers"], cross_attn_norm=True,
        ).eval()  # fmt: skip
        state = load_file(path / "diffusion_pytorch_model.safetensors")
        transformer.load_state_dict({dit_to_diffusers(key): value.float() for key, value in state.items()})
        transformers.append(transformer)
    state = torch.load(folder / "Wan2.1_VAE.pth", weights_only=True)
    vae = AutoencoderKLWan(base_dim=len(state["encoder.conv1.bias"]), z_dim=VAE_2_1.z_dim).eval()
    vae.load_state_dict({vae_to_diffusers(key, "2.1"): value.float() for key, value in state.items()})
    encoder = UMT5EncoderModel(
        UMT5Config(
            vocab_size=VOCABULARY, d_model=DIM, d_kv=DIM // HEADS, d_ff=FFN_DIM, num_layers=LAYERS, num_heads=HEADS,
            feed_forward_proj="gated-gelu",
        )
    ).eval()  # fmt: skip
    state = torch.load(folder / "models_t5_umt5-xxl-enc-bf16.pth", weights_only=True)
    tensors = {text_to_transformers(key): value.float() for key, value in state.items()}
    encoder.load_state_dict(tensors | {"encoder.embed_tokens.weight": tensors["shared.weight"]})
    pipeline = WanPipeline(
        tokenizer=PreTrainedTokenizerFast(
            tokenizer_object=make_tokenizer(), pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
        ),
        text_encoder=encoder, vae=vae, transformer=transformers[0], transformer_2=transformers[1],
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=SHIFT
        ),
        boundary_ratio=BOUNDARY,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def main() -> None:
    """Make clips, judge them and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--engine", choices=["wanfast", "diffusers"], default="wanfast")
    parser.add_argument("--captions", type=int, default=200)
    parser.add_argument("--steps", type=int, help="default: those of the preset, or 40")
    parser.add_argument("--preset", help="of wanfast")
    parser.add_argument("--lora", nargs="*", default=[], help="LoRA files, of wanfast")
    parser.add_argument("--sheet", type=Path, help="picture to write of the first clips")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    if options.steps is None:
        options.steps = PRESETS[options.preset].num_inference_steps if options.preset else 40
    torch.set_num_threads(options.threads)
    make = {"wanfast": wanfast_engine, "diffusers": diffusers_engine}[options.engine](options.folder, options)
    scenes = [make_scene(SEED, index, kind="single", held_out=True) for index in range(options.captions)]
    start = time.perf_counter()
    clips = [make(scene.caption, index) for index, scene in enumerate(scenes)]
    seconds = (time.perf_counter() - start) / len(clips)
    verdicts = [judge(clip, scene.caption) for clip, scene in zip(clips, scenes, strict=True)]
    result = {
        "settings": {key: str(value) for key, value in vars(options).items()},
        "following": accuracies(verdicts),
        "flicker": float(np.mean([flicker(clip) for clip in clips])),
        "background change": float(np.nanmean([background_change(clip) for clip in clips])),
        "seconds per clip": round(seconds, 3),
    }
    print(json.dumps(result, indent=1))
    if options.sheet:
        write_sheet(clips[:16], options.sheet)


if __name__ == "__main__":
    main()
