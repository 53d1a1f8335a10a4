"""The install itself: a broken build of the extension must not pass as a machine without a compiler."""

import importlib.util
import os
import shutil

import pytest


def test_the_extension_is_there_where_a_compiler_is() -> None:
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)
    if compiler is None or shutil.which(compiler) is None:
        pytest.skip("this machine has no C++ compiler")
    assert importlib.util.find_spec("wanfast._C") is not None, f"{compiler} is there, but the extension was not built"
