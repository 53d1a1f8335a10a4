"""Files of the published sizes, to the byte: found, opened, bound by name and described; their data is not there."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from reference.checkpoints import dit_shapes, text_shapes, vae_shapes
from reference.meta_files import comfy_text_encoder, fp8_scaled, lightx2v, plain, write_meta

from wanfast.checkpoint.inspect import describe
from wanfast.random_weights import byte_tokenizer

A14B = {"dim": 5120, "ffn_dim": 13824, "out_dim": 16, "layers": 40}
T2V, I2V = dit_shapes(in_dim=16, **A14B), dit_shapes(in_dim=36, **A14B)
TI2V = dit_shapes(dim=3072, ffn_dim=14336, in_dim=48, out_dim=48, layers=30)
UMT5 = text_shapes(vocab=256_384, dim=4096, ffn_dim=10_240, heads=64, layers=24)
VAE_2_1 = vae_shapes("2.1", z=16, encoder_dim=96, decoder_dim=96)
VAE_2_2 = vae_shapes("2.2", z=48, encoder_dim=160, decoder_dim=256)

# name: header entries, tensors, bytes of the published file (None where they are not known)
FILES = {
    "wan2.2_t2v_high_noise_14B_fp8_scaled": (fp8_scaled(T2V), 1908, 14_293_923_632),
    "wan2.2_t2v_low_noise_14B_fp8_scaled": (fp8_scaled(T2V), 1908, 14_293_923_632),
    "wan2.2_i2v_high_noise_14B_fp8_scaled": (fp8_scaled(I2V), 1908, 14_294_742_832),
    "wan2.2_t2v_high_noise_14B_fp16": (plain(T2V, "F16"), 1095, 28_577_095_592),
    "wan2.2_ti2v_5B_fp16": (plain(TI2V, "F16"), 825, 9_999_658_848),
    "wan2.2_i2v_A14b_high_noise_int8_lightx2v_4step": (lightx2v(I2V, "I8"), 1495, None),
    "wan2.2_vae": (plain(VAE_2_2, "F16"), 196, 1_409_400_960),
    "wan_2.1_vae": (plain(VAE_2_1, "BF16"), 194, None),
    "umt5_xxl_fp8_e4m3fn_scaled": (comfy_text_encoder(UMT5), 412, 6_735_906_897),
}
PLACES = {"vae": "vae", "umt5": "text_encoders"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("full") / "models"
    for name, (entries, _, _) in FILES.items():
        place = next((place for part, place in PLACES.items() if part in name), "diffusion_models")
        write_meta(folder / place / f"{name}.safetensors", entries)
    byte_tokenizer(500).save(str(folder / "tokenizer.json"))
    return folder


def path_of(models: Path, name: str) -> Path:
    return next(models.rglob(f"{name}.safetensors"))


@pytest.mark.parametrize("name", FILES)
def test_a_file_has_the_published_size_and_is_described_in_under_a_second(models, name):
    path, (_, num_tensors, num_bytes) = path_of(models, name), FILES[name]
    assert len(FILES[name][0]) == num_tensors
    assert num_bytes in (None, path.stat().st_size)
    start = time.perf_counter()
    part = describe(path)["parts"]["file"]
    assert time.perf_counter() - start < 1
    assert part["num_bytes"] <= path.stat().st_size < 1.01 * part["num_bytes"] + 5_000_000


def test_inspect_tells_the_mix_of_a_scaled_file(models):
    part = describe(path_of(models, "wan2.2_t2v_high_noise_14B_fp8_scaled"))["parts"]["file"]
    assert (part["kind"], part["task"], part["expert"]) == ("dit", "t2v", "high_noise")
    assert (part["num_tensors"], part["num_parameters"]) == (1095, 14_288_491_584)
    assert part["sizes"] == {"dim": 5120, "in_channels": 16, "out_channels": 16, "num_layers": 40}
    matrices = 40 * (8 * 5120**2 + 2 * 5120 * 13824) + 5120 * (4096 + 5120 + 256 + 5120 + 6 * 5120 + 64)
    assert part["bytes_by_dtype"]["float8_e4m3fn"] == matrices + 4 * 406


OPEN = """
import json, re, sys, time
from pathlib import Path
import wanfast.model
from wanfast.checkpoint.lookup import Sources
def peak():  # of this process alone: what getrusage tells begins with the parent's
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) / 1000
before, start = peak(), time.perf_counter()
model = wanfast.model.open_model(Sources(**json.loads(sys.argv[1])))
seconds = time.perf_counter() - start
grown = peak() - before
print(json.dumps({"seconds": seconds, "megabytes": grown, "name": model.config.name, "vae": str(model.vae.path)}))
"""


@pytest.mark.parametrize(
    ("model", "name", "vae"),
    [
        ("wan2.2_t2v_low_noise_14B_fp8_scaled", "t2v-A14B", "wan_2.1_vae"),
        ("wan2.2_ti2v_5B_fp16", "ti2v-5B", "wan2.2_vae"),
    ],
)
def test_a_whole_model_opens_in_two_seconds_and_little_memory(models, model, name, vae):
    sources = {"model": str(path_of(models, model)), "tokenizer": str(models / "tokenizer.json")}
    result = subprocess.run([sys.executable, "-c", OPEN, json.dumps(sources)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    told = json.loads(result.stdout)
    assert told["seconds"] < 2 and told["megabytes"] < 500
    assert (told["name"], Path(told["vae"]).stem) == (name, vae)
