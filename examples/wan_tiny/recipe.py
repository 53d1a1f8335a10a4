"""Makes wan-tiny from nothing: every step in order, each taken up where it was left.

Usage: python recipe.py RUN_FOLDER

Stop it at any time (SIGTERM), start it again, or let it wait by creating RUN_FOLDER/PAUSE. On two free CPU cores it
takes about four hours; README.md has the times of the parts. The checkpoint is then in RUN_FOLDER/checkpoint.
"""

import argparse
import os
import signal
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
# Script and arguments, and the file in the run's folder that keeps what it prints ("" if it need not run but once).
STEPS = (
    ("train_vae.py", (), ""),
    ("evaluate_vae.py", ("--require", "--clips", "60"), "vae_judged.txt"),
    ("latents.py", (), ""),
    ("train_dit.py", ("base",), ""),
    ("evaluate.py", ("--parts", "base"), "base_judged.json"),
    ("train_dit.py", ("high_noise",), ""),
    ("train_dit.py", ("low_noise",), ""),
    ("evaluate.py", (), "experts_judged.json"),
    ("evaluate.py", ("--parts", "high_noise"), "high_noise_alone_judged.json"),
    ("evaluate.py", ("--parts", "low_noise"), "low_noise_alone_judged.json"),
    ("evaluate.py", ("--kind", "pair"), "pairs_judged.json"),
    ("evaluate.py", ("--kind", "camera"), "cameras_judged.json"),
)


def main() -> None:
    """Take all steps; stop at the first that fails or is interrupted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--threads", type=int, default=1, help="of every step")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    for script, arguments, output in STEPS:
        result = options.folder / output if output else None
        if result is not None and result.exists():
            continue
        print("*", script, *arguments, flush=True)
        code, text = call(
            [sys.executable, str(HERE / script), str(options.folder), *arguments, "--threads", str(options.threads)]
        )
        if result is not None and code == 0:
            result.write_text(text)
        print(text, end="", flush=True)
        if code:
            sys.exit(code)
    sys.exit(
        call([sys.executable, str(HERE / "export.py"), str(options.folder), str(options.folder / "checkpoint")])[0]
    )


def call(command: list[str]) -> tuple[int, str]:
    """Run a script, passing on the signal to stop; its exit status and what it printed."""
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        signal.signal(signal.SIGTERM, lambda *_: process.terminate())
        assert process.stdout is not None
        text = process.stdout.read()
    return process.returncode, text


if __name__ == "__main__":
    main()
