"""wanfast and diffusers as engines of one case: the same weights, the same video, and the stages that each tells."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from PIL import Image
from reference.tiny import random_tiny

from wanfast.bench import measure
from wanfast.bench.case import Case, Tier, open_case, parse_tiers, plan_of
from wanfast.bench.difference import compare_videos
from wanfast.bench.diffusers_engine import DiffusersEngine
from wanfast.bench.diffusers_pipeline import build_pipeline, hold_to_schedule, make_scheduler
from wanfast.bench.engine import WanfastEngine, measured_run
from wanfast.bench.random_model import tiny_of
from wanfast.bench.settle import drawn_picture
from wanfast.checkpoint.lookup import Sources
from wanfast.checkpoint.names import dit_to_diffusers
from wanfast.config import MODELS
from wanfast.errors import RequestError
from wanfast.generation import draw_noise
from wanfast.model import open_model
from wanfast.plan import make_plan
from wanfast.request import Request

CPU = torch.device("cpu")
FP32 = Tier("fp32", "fp32")
WIDTH, HEIGHT = 64, 32


@pytest.fixture(autouse=True)
def _no_collection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "gc", SimpleNamespace(collect=lambda: 0))  # half a second with diffusers imported


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_tiny(tmp_path_factory.mktemp("tiny") / "wan-tiny")


def make_case(tiny: Path, name: str = "t2v-A14B", *, picture: Image.Image | None = None, **asked: Any) -> Case:
    request = {"width": WIDTH, "height": HEIGHT, "num_frames": 5, "num_inference_steps": 3, "seed": 0} | asked
    image_size = None if picture is None else picture.size
    return Case(
        weights="tiny random",
        sources=Sources(),
        config=tiny_of(MODELS[name], open_model(tiny).config),
        request=Request("a red ball", image_size=image_size, **request),
        picture=picture,
        tiers=(FP32,),
        reference_precision="fp32",
        placement="model",
        device="cpu",
        vram=None,
        ram=None,
        runs=1,
        warmup=0,
        threads=1,
    )


@pytest.mark.parametrize(
    ("name", "takes_picture", "solver"),
    [
        ("t2v-A14B", False, "unipc"),
        ("t2v-A14B", False, "euler"),
        ("i2v-A14B", True, "unipc"),
        ("ti2v-5B", False, "dpmpp"),
        ("ti2v-5B", True, "unipc"),
    ],
)
def test_both_engines_make_one_video(tiny: Path, tmp_path: Path, name: str, takes_picture: bool, solver: str) -> None:
    """From one noise and the reference's encodings, in fp32, with every solver on the plan's own steps."""
    picture = drawn_picture(WIDTH, HEIGHT) if takes_picture else None
    case = make_case(tiny, name, picture=picture, solver=solver)
    ours, theirs = WanfastEngine(case, FP32), DiffusersEngine(case)
    noise, clip = draw_noise(plan_of(case))[0], tmp_path / "clip.mp4"
    for engine in (ours, theirs):
        engine.load()
    want = measured_run(theirs, CPU, noise, None, clip, keeps_frames=True)
    got = measured_run(ours, CPU, noise, want.context, clip, keeps_frames=True)
    assert got.frames is not None and want.frames is not None and got.context is not None and want.context is not None
    assert got.frames.shape == (5, HEIGHT, WIDTH, 3)
    difference = compare_videos(got.frames, want.frames)
    assert difference.worst_pixel <= 1 and (difference.psnr is None or difference.psnr > 60)
    assert got.frames.std() > 5  # not a blank one
    stages = {"text", "decode", "write", "total"} | ({"image"} if takes_picture else set())
    assert got.seconds.keys() == want.seconds.keys() == stages
    assert len(got.steps) == len(want.steps) == 3
    length = got.context.shape[1]
    assert torch.allclose(got.context, want.context[:, :length], atol=1e-4)
    assert (want.context[:, length:] == 0).all()
    assert not clip.exists()


def test_another_noise_or_other_encodings_make_another_video(tiny: Path, tmp_path: Path) -> None:
    """So that what was held equal above was computed from what was given."""
    case = make_case(tiny, width=32, num_frames=1, num_inference_steps=2)
    for engine in (WanfastEngine(case, FP32), DiffusersEngine(case)):
        engine.load()
        noise, clip = draw_noise(plan_of(case))[0], tmp_path / "clip.mp4"
        runs = [
            measured_run(engine, CPU, given, context, clip, keeps_frames=False)
            for given, context in ((noise, None), (noise, None), (noise.flip(-1), None), (noise, torch.ones(2, 3, 64)))
        ]
        assert runs[0].digest == runs[1].digest
        assert len({run.digest for run in runs}) == 3


def test_without_guidance_each_step_is_one_forward(tiny: Path, tmp_path: Path) -> None:
    case = make_case(tiny, guidance=1.0, width=32, num_frames=1)
    noise, clip = draw_noise(plan_of(case))[0], tmp_path / "clip.mp4"
    videos = []
    for engine in (WanfastEngine(case, FP32), DiffusersEngine(case)):
        engine.load()
        videos.append(measured_run(engine, CPU, noise, None, clip, keeps_frames=True).frames)
    assert plan_of(case).num_forwards == 3
    assert videos[0] is not None and videos[1] is not None
    assert compare_videos(videos[0], videos[1]).worst_pixel <= 1


def test_a_streamed_model_counts_what_it_copies(tiny: Path, tmp_path: Path) -> None:
    case = make_case(tiny, width=32, num_frames=1, num_inference_steps=3)
    blocks = open_case(case, "fp32").model.experts["high_noise"]
    size = sum(blocks.ref(name).num_bytes for name in blocks.names() if name.startswith("blocks.0."))
    engine = WanfastEngine(Case(**{name: getattr(case, name) for name in Case.__slots__} | {"vram": 3 * size}), FP32)
    engine.load()
    run = measured_run(engine, CPU, draw_noise(plan_of(case))[0], None, tmp_path / "clip.mp4", keeps_frames=False)
    assert run.copied_bytes is not None and run.copied_bytes >= 8 * size  # both experts' blocks at least once
    assert run.stall_seconds is not None and run.stall_seconds > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_pipelines_weights_are_the_models(tiny: Path, dtype: torch.dtype) -> None:
    case = make_case(tiny, "i2v-A14B", picture=drawn_picture(WIDTH, HEIGHT))
    model = open_case(case, "fp32").model
    pipeline = build_pipeline(model, plan_of(case), dtype, takes_picture=True)
    for reader, module in zip(model.experts.values(), (pipeline.transformer, pipeline.transformer_2), strict=True):
        state = module.state_dict()
        assert len(state) == len(reader.names())
        for name in reader.names():
            stored, taken = reader.load(name), state[dit_to_diffusers(name)]
            assert isinstance(stored, torch.Tensor) and torch.equal(stored.to(taken.dtype), taken)
    kinds = {name: tensor.dtype for name, tensor in pipeline.transformer.state_dict().items()}
    assert kinds["blocks.0.attn1.to_q.weight"] == dtype
    assert kinds["blocks.0.norm2.weight"] == kinds["condition_embedder.time_embedder.linear_1.weight"] == torch.float32
    assert {parameter.dtype for parameter in pipeline.vae.parameters()} == {torch.float32}
    assert {parameter.dtype for parameter in pipeline.text_encoder.parameters()} == {dtype}
    for module in (pipeline.transformer, pipeline.vae, pipeline.text_encoder):
        tensors = [*module.parameters(), *module.buffers()]
        assert not any(tensor.is_meta for tensor in tensors)
        assert not any(tensor.requires_grad for tensor in tensors)


def test_weights_of_the_references_own_dtype_are_not_copied(tiny: Path) -> None:
    model = open_case(make_case(tiny), "fp32").model
    pipeline = build_pipeline(model, plan_of(make_case(tiny)), torch.float32, takes_picture=False)
    stored = model.experts["high_noise"].load("blocks.0.ffn.0.weight")
    assert isinstance(stored, torch.Tensor)
    assert pipeline.transformer.blocks[0].ffn.net[0].proj.weight.data_ptr() == stored.data_ptr()


@pytest.mark.parametrize("solver", ["unipc", "dpmpp", "euler"])
def test_the_reference_takes_the_plans_steps(solver: Any) -> None:
    plan = make_plan(MODELS["t2v-A14B"], Request("a", solver=solver, num_inference_steps=7, seed=0), precision="fp32")
    scheduler = make_scheduler(plan)
    distance = hold_to_schedule(scheduler, plan)
    own = make_scheduler(plan)
    own.set_timesteps(7)
    want = torch.tensor([step.sigma for step in plan.steps])
    assert distance == pytest.approx(float((own.sigmas[:7] - want).abs().max()), abs=1e-6)
    has_official_grid = tuple(map(int, diffusers.__version__.split(".")[:2])) < (0, 36)  # of UniPC
    assert (distance < 1e-5) == (solver == "unipc" and has_official_grid)
    scheduler.set_timesteps(7, device="cpu")
    assert torch.equal(scheduler.sigmas[:7], want) and scheduler.sigmas[7] == 0
    assert scheduler.timesteps.tolist() == pytest.approx([step.timestep for step in plan.steps])


def test_tiers_are_read() -> None:
    assert parse_tiers(None, CPU) == (FP32,)
    assert parse_tiers(None, torch.device("cuda")) == (Tier("exact", "exact"),)
    assert parse_tiers("exact, lightning4,exact+lightning4", CPU) == (
        Tier("exact", "exact"),
        Tier("lightning4", "fp32", "lightning4"),
        Tier("exact+lightning4", "exact", "lightning4"),
    )
    assert parse_tiers("density0.5,int8+density.25, exact+lightning4+density1,lightning4+density0.3", CPU) == (
        Tier("density0.5", "fp32", None, 0.5),
        Tier("int8+density.25", "int8", None, 0.25),
        Tier("exact+lightning4+density1", "exact", "lightning4", 1.0),
        Tier("lightning4+density0.3", "fp32", "lightning4", 0.3),
    )
    wrong = ("exact,", "lightning4+exact", "auto", "fp32,fp32", "density0", "density0.0", "density1.5", "density", "+")
    for text in (*wrong, "density0.5+exact", "exact+density", "density0.5+density0.4", "exact+int8", ""):
        with pytest.raises(RequestError, match="tiers: "):
            parse_tiers(text, CPU)


def test_a_density_is_of_its_tier_alone(tiny: Path) -> None:
    case = make_case(tiny, num_inference_steps=4)
    assert plan_of(case).attention_density == 1
    sparse = plan_of(case, Tier("density0.5", "fp32", None, 0.5))
    assert (sparse.attention_density, sparse.num_dense_steps, len(sparse.steps)) == (0.5, 1, 4)
    few = plan_of(case, Tier("lightning4+density0.5", "fp32", "lightning4", 0.5))
    assert (few.attention_density, few.solver) == (0.5, "euler")


def test_a_preset_leaves_the_rest_of_a_request_alone(tiny: Path) -> None:
    case = make_case(tiny, shift=3.0, solver="dpmpp", guidance_high=2.0, guidance_low=4.0)
    base, few = plan_of(case), plan_of(case, Tier("lightning4", "fp32", "lightning4"))
    assert (base.shift, base.solver, len(base.steps), base.num_forwards) == (3.0, "dpmpp", 3, 6)
    assert (few.shift, few.solver, len(few.steps), few.num_forwards) == (5.0, "euler", 4, 4)
    assert (few.seed, few.width, few.num_frames, few.prompt) == (base.seed, base.width, base.num_frames, base.prompt)
