"""A diffusers script on wanfast: one line more than before.

pip install wanfast 'diffusers>=0.35' transformers ftfy imageio imageio-ffmpeg
"""

import torch
from diffusers import AutoencoderKLWan, WanPipeline
from diffusers.utils import export_to_video

import wanfast

MODEL = "Wan-AI/Wan2.2-T2V-A14B-Diffusers"

vae = AutoencoderKLWan.from_pretrained(MODEL, subfolder="vae", torch_dtype=torch.float32)
pipe = WanPipeline.from_pretrained(MODEL, vae=vae, torch_dtype=torch.bfloat16)

wanfast.accelerate(
    pipe, vram="14GB"
)  # blocks of the transformers may keep 14 GB of the card; without vram, all of them
pipe.enable_model_cpu_offload()

frames = pipe(
    prompt="Two anthropomorphic cats in comfy boxing gear fight on a spotlighted stage",
    height=480,
    width=832,
    num_frames=81,
    num_inference_steps=40,
    guidance_scale=4.0,
    guidance_scale_2=3.0,
    generator=torch.Generator().manual_seed(0),
).frames[0]
export_to_video(frames, "cats.mp4", fps=16)
