"""Packages and the C++ extension; everything else is in pyproject.toml."""

import sys

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import setup


class OptionalBuildExt(build_ext):
    """Build the extension where a C++ compiler is found; without one the install still succeeds.

    The torch reference then serves in its place, and `wanfast` says so in one line when it is first needed.
    """

    def build_extension(self, ext: Pybind11Extension) -> None:
        try:
            super().build_extension(ext)
        except Exception as error:  # distutils raises many kinds; none of them may stop the install
            print(f"wanfast: no C++ extension ({error}); the VAE runs on torch instead", file=sys.stderr)

    def copy_extensions_to_source(self) -> None:
        self.extensions = [ext for ext in self.extensions if _was_built(self, ext)]
        super().copy_extensions_to_source()


def _was_built(command: build_ext, ext: Pybind11Extension) -> bool:
    from pathlib import Path

    return Path(command.build_lib, command.get_ext_filename(command.get_ext_fullname(ext.name))).exists()


setup(
    packages=["wanfast", "wanfast.checkpoint", "wanfast.dit", "wanfast.text", "wanfast.vae", "wanfast.kernels"],
    package_dir={"wanfast": "wanfast", "wanfast.kernels": "kernels"},
    ext_modules=[],
    cmdclass={"build_ext": OptionalBuildExt},
)
