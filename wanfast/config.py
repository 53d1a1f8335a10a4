"""The models as one table of numbers: what differs between T2V-A14B, I2V-A14B and TI2V-5B is in `MODELS`.

Sizes of a loaded model are read from its own tensors; the table then only gives the sampling defaults.
Source: Wan-Video/Wan2.2, wan/configs/*.py.
"""

from dataclasses import dataclass
from typing import Literal

ExpertName = Literal["high_noise", "low_noise", "single"]
Task = Literal["t2v", "i2v", "ti2v"]
SolverName = Literal["unipc", "dpmpp", "euler"]
VAEVersion = Literal["2.1", "2.2"]

NUM_TRAIN_TIMESTEPS = 1000

# Wan's own; an empty negative prompt means this one, as in the reference.
DEFAULT_NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，丑陋的，残缺的，"
    "多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class DiTConfig:
    """Sizes of one diffusion transformer."""

    in_channels: int  # latent channels plus condition channels
    out_channels: int
    dim: int
    ffn_dim: int
    num_heads: int
    num_layers: int
    text_dim: int  # width of the text encoder's output
    text_len: int  # text rows attended to, padding included
    freq_dim: int  # width of the timestep sinusoid
    patch_size: tuple[int, int, int]  # frames, rows, columns
    eps: float

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.dim // self.num_heads


@dataclass(frozen=True, slots=True, kw_only=True)
class VAEConfig:
    """Sizes and latent statistics of one VAE."""

    version: VAEVersion
    z_dim: int
    encoder_dim: int  # channels of the encoder's first level
    decoder_dim: int  # channels of the decoder's last level
    multipliers: tuple[int, ...]  # channels per level, in units of the base
    num_res_blocks: int  # per encoder level; the decoder has one more
    temporal_downsample: tuple[bool, ...]  # per encoder level but the last
    patch_size: int  # pixels folded into channels per side before the encoder
    latents_mean: tuple[float, ...]
    latents_std: tuple[float, ...]

    @property
    def spatial_stride(self) -> int:
        """Pixels per latent row or column."""
        return self.patch_size << (len(self.multipliers) - 1)

    @property
    def temporal_stride(self) -> int:
        """Video frames per latent frame after the first."""
        return 1 << sum(self.temporal_downsample)


@dataclass(frozen=True, slots=True, kw_only=True)
class TextConfig:
    """Sizes of the umT5 encoder."""

    vocab_size: int
    dim: int
    attention_dim: int  # heads x head channels
    ffn_dim: int
    num_heads: int
    num_layers: int
    num_buckets: int  # of relative positions
    max_distance: int  # beyond it all positions share the last bucket
    eps: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Expert:
    """One diffusion transformer of a model and the guidance it runs with."""

    name: ExpertName
    guidance: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """One Wan 2.2 model: its parts and the official sampling defaults."""

    name: str
    task: Task
    experts: tuple[Expert, ...]  # in the order they run
    boundary: float | None  # sigma; the high-noise expert runs where timestep >= 1000 x boundary
    num_inference_steps: int
    shift: float  # of the noise schedule
    solver: SolverName
    width: int  # pixels
    height: int
    sizes: tuple[tuple[int, int], ...]  # (width, height) the reference offers
    num_frames: int  # 4n + 1
    fps: int
    dit: DiTConfig
    vae: VAEConfig
    text: TextConfig


UMT5_XXL = TextConfig(
    vocab_size=256_384,
    dim=4096,
    attention_dim=4096,
    ffn_dim=10_240,
    num_heads=64,
    num_layers=24,
    num_buckets=32,
    max_distance=128,
    eps=1e-6,
)

# Statistics of the latents over the training set, per channel.
# fmt: off
_MEAN_2_1 = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)
_STD_2_1 = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.916,
)
_MEAN_2_2 = (
    -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542, 0.2813, 0.0891,
    0.157, -0.0098, 0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
    -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.123, -0.0313, -0.1649, 0.0117, 0.0723,
    -0.2839, -0.2083, -0.052, 0.3748, 0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667,
)
_STD_2_2 = (
    0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.499, 0.4818, 0.5013, 0.8158, 1.0344, 0.5894, 1.0901,
    0.6885, 0.6165, 0.8454, 0.4978, 0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
    0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093, 0.5709, 0.6065, 0.6415, 0.4944,
    0.5726, 1.2042, 0.5458, 1.6887, 0.3971, 1.06, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
)
# fmt: on

VAE_2_1 = VAEConfig(
    version="2.1",
    z_dim=16,
    encoder_dim=96,
    decoder_dim=96,
    multipliers=(1, 2, 4, 4),
    num_res_blocks=2,
    temporal_downsample=(False, True, True),
    patch_size=1,
    latents_mean=_MEAN_2_1,
    latents_std=_STD_2_1,
)

VAE_2_2 = VAEConfig(
    version="2.2",
    z_dim=48,
    encoder_dim=160,
    decoder_dim=256,
    multipliers=(1, 2, 4, 4),
    num_res_blocks=2,
    temporal_downsample=(False, True, True),
    patch_size=2,
    latents_mean=_MEAN_2_2,
    latents_std=_STD_2_2,
)


def _dit_14b(in_channels: int) -> DiTConfig:
    return DiTConfig(
        in_channels=in_channels,
        out_channels=16,
        dim=5120,
        ffn_dim=13_824,
        num_heads=40,
        num_layers=40,
        text_dim=4096,
        text_len=512,
        freq_dim=256,
        patch_size=(1, 2, 2),
        eps=1e-6,
    )


_SIZES_A14B = ((1280, 720), (720, 1280), (832, 480), (480, 832))

T2V_A14B = ModelConfig(
    name="t2v-A14B",
    task="t2v",
    experts=(Expert(name="high_noise", guidance=4.0), Expert(name="low_noise", guidance=3.0)),
    boundary=0.875,
    num_inference_steps=40,
    shift=12.0,
    solver="unipc",
    width=1280,
    height=720,
    sizes=_SIZES_A14B,
    num_frames=81,
    fps=16,
    dit=_dit_14b(in_channels=16),
    vae=VAE_2_1,
    text=UMT5_XXL,
)

I2V_A14B = ModelConfig(
    name="i2v-A14B",
    task="i2v",
    experts=(Expert(name="high_noise", guidance=3.5), Expert(name="low_noise", guidance=3.5)),
    boundary=0.9,
    num_inference_steps=40,
    shift=5.0,
    solver="unipc",
    width=1280,
    height=720,
    sizes=_SIZES_A14B,
    num_frames=81,
    fps=16,
    dit=_dit_14b(in_channels=36),  # 16 noise + 4 mask + 16 image latent
    vae=VAE_2_1,
    text=UMT5_XXL,
)

TI2V_5B = ModelConfig(
    name="ti2v-5B",
    task="ti2v",
    experts=(Expert(name="single", guidance=5.0),),
    boundary=None,
    num_inference_steps=50,
    shift=5.0,
    solver="unipc",
    width=1280,
    height=704,
    sizes=((1280, 704), (704, 1280)),
    num_frames=121,
    fps=24,
    dit=DiTConfig(
        in_channels=48,
        out_channels=48,
        dim=3072,
        ffn_dim=14_336,
        num_heads=24,
        num_layers=30,
        text_dim=4096,
        text_len=512,
        freq_dim=256,
        patch_size=(1, 2, 2),
        eps=1e-6,
    ),
    vae=VAE_2_2,
    text=UMT5_XXL,
)

MODELS: dict[str, ModelConfig] = {model.name: model for model in (T2V_A14B, I2V_A14B, TI2V_5B)}
