"""Makes docs/kernels-computed.md from benchmarks/computed.json, and from nothing else."""

from typing import Any

_HEAD = """# How fast the kernels should be on an RTX 4090: computed, not measured

Made by `python benchmarks/cycles.py --write`. **No number on this page was measured by wanfast**: nobody has run these
kernels on an RTX 4090 yet. Each is computed from the machine code that a kernel compiles to for sm_89, which
`tests/test_machine_code.py` holds fixed.

## The model

`benchmarks/multiprocessor.py` runs the main loop of a kernel on one streaming multiprocessor (SM), cycle by cycle: all
warps of as many CTAs as registers and shared memory leave room for, in four partitions that issue one instruction a
cycle. When an instruction may issue is not guessed: ptxas writes into each one how long its warp waits and which
results it waits for, and `benchmarks/scheduled.py` reads that. The rest are rates of the hardware:

| | |
|---|---|
| tensor pipe | a 16 x 8 x 32 product of 8 bits or 16 x 8 x 16 of 16: 16 cycles of a partition, 32 with fp32 sums |
| exp2 (MUFU) | 8 cycles of a partition; comparisons, conversions and integers 2; other arithmetic 1 |
| shared memory | one port for the SM, 128 bytes a cycle |
| latencies | public microbenchmarks, rounded: 18 to 33 cycles on the SM, 400 to L2 |
| clock, L2, DRAM | 2.52 GHz (boost), 1700 bytes a cycle for all SMs and 64 for one, 1008 GB/s |

No number in it is fitted to a kernel's speed. Where two CTAs share an SM, the result is the mean over how far they
are apart. A whole launch is waves of CTAs, each as long as its loop plus two cycles for each instruction outside it.

What it leaves out: power (a 4090 may fall below its boost clock under 8-bit products), bank conflicts, DRAM, bursts of
other SMs at L2, instruction caches, jitter. So read "computed 500" as "the code is no obstacle to 500".

## Held to what is published

Kernels of the published recipe and tile (`benchmarks/recipes.py`), compiled by the same Triton and run by the same
model. Their code is not the published kernels' code: what is tested is model and recipe together.
"""


def make_page(numbers: dict[str, Any]) -> str:
    """Write the page."""
    lines = [
        _HEAD,
        "| kernel | GPU | published | computed | computed / published | source |",
        "|---|---|---|---|---|---|",
    ]
    for row in numbers["published"]:
        ratio = row["computed"] / row["published"]
        cells = (row["name"], row["gpu"], row["published"], row["computed"], f"{ratio:.2f}", row["source"])
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    lines += [
        "",
        "TOPS or TFLOPS, kernel alone. The matmuls' tile is a guess; the others' tiles are as published.",
        "",
        "## wanfast's kernels, main loops alone",
        "",
        "Busy: the share of the loop's time that a resource works. `peak` is for the loop's own mix of instructions.",
        "",
        "| kernel | TOPS | peak | tensor | issue | integer | exp2 | shared memory | L2 | CTAs per SM |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in numbers["cases"]:
        busy = [
            f"{row['busy'][name] / row['cycles']:.0%}" for name in ("tensor", "issue", "alu", "mufu", "shared", "L2")
        ]
        cells = (row["name"], f"{row['tops']:.0f}", f"{row['peak']:.0f}", *busy, row["ctas"])
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    lines += [
        "",
        "## At Wan's sizes",
        "",
        "480p and 720p: 81 frames, 32,760 and 75,600 tokens; 5B: 27,280. The linears are q, k and v in one; the first",
        "of the feed-forward layer with GELU and 8-bit result; the second with gate and residual. The convolutions are",
        "those of the VAE's residual blocks, on two frames.",
        "",
        "| kernel | size | TOPS | ms | ms of DRAM traffic alone |",
        "|---|---|---|---|---|",
    ]
    for row in numbers["cases"]:
        for name, shape in row["shapes"].items():
            lines.append(
                f"| {row['name']} | {name} | {shape['tops']:.0f} | {shape['ms']:.2f} | {shape['dram_ms']:.2f} |"
            )
    lines += [
        "",
        "## Decoding",
        "",
        "All launches of the VAE's decoder in fp16 with fp32 sums, made by `benchmarks/decode_cycles.py`: convolutions",
        "on the model; norms, and frames copied to be remembered, at DRAM's rate; the attention at two thirds of the",
        "peak.",
        "",
        "| | TFLOP | launches of the convolution | convolutions, s | passes, s | attention, s | together, s |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in numbers["decodes"]:
        cells = [row[name] for name in ("name", "tflop", "launches", "convolutions", "passes", "attention", "seconds")]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"
