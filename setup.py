"""Packages and the C++ extension; everything else is in pyproject.toml."""

import sys
from glob import glob
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import setup


class OptionalBuildExt(build_ext):
    """Build the extension where a C++ compiler is found; without one the install still succeeds.

    The torch reference then serves in its place, and `wanfast` says so in one line when it is first needed.
    """

    def build_extension(self, ext: Pybind11Extension) -> None:
        """Build one extension, with OpenMP if the compiler has it, or say why not."""
        compile_args, link_args = ext.extra_compile_args, ext.extra_link_args
        for openmp in (["-fopenmp"], []):
            ext.extra_compile_args, ext.extra_link_args = compile_args + openmp, link_args + openmp
            try:
                return super().build_extension(ext)
            except Exception as error:  # distutils raises many kinds; none of them may stop the install
                reason = error
        print(f"wanfast: no C++ extension ({reason}); the VAE runs on torch instead", file=sys.stderr)

    def copy_extensions_to_source(self) -> None:
        """Copy what was built; an editable install would fail on what was not."""
        self.extensions = [ext for ext in self.extensions if _was_built(self, ext)]
        super().copy_extensions_to_source()


def _was_built(command: build_ext, ext: Pybind11Extension) -> bool:
    return Path(command.build_lib, command.get_ext_filename(command.get_ext_fullname(ext.name))).exists()


setup(
    packages=[
        "wanfast",
        "wanfast.bench",
        "wanfast.checkpoint",
        "wanfast.diffusers_backend",
        "wanfast.dit",
        "wanfast.residency",
        "wanfast.text",
        "wanfast.vae",
        "wanfast.kernels",
    ],
    package_dir={"wanfast": "wanfast", "wanfast.kernels": "kernels"},
    package_data={"wanfast": ["py.typed", "_C.pyi", "wan_tiny/**/*"], "wanfast.bench": ["report.schema.json"]},
    ext_modules=[
        Pybind11Extension(
            "wanfast._C",
            sorted(glob("csrc/*.cpp")),
            depends=sorted(glob("csrc/*.h") + glob("csrc/*.inc")),
            cxx_std=17,
            # One build serves every CPU of its kind: instruction sets are chosen when it runs, never with -march.
            extra_compile_args=["-O3", "-ffp-contract=fast", "-pthread"],
            extra_link_args=["-pthread"],
        )
    ],
    cmdclass={"build_ext": OptionalBuildExt},
)
