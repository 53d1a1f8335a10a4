"""torch.compile beside `accelerate`, and looking at what is accelerated: neither raises where it need not."""

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from reference.pipelines import Case, furthest, make_case

import wanfast

SAME = 3e-5  # of values in [0, 1]


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return make_case("t2v", tmp_path)


def fails(graph: Any, inputs: Any) -> Any:
    raise AssertionError("nothing of wanfast's is to be compiled")


@pytest.mark.parametrize("is_before", [True, False])
def test_the_vaes_methods(case: Case, is_before: bool) -> None:
    """They run as they are: a script that compiles them still works, and waits for nothing."""
    want = case.run()
    if not is_before:
        wanfast.accelerate(case.pipe)
    case.pipe.vae.decode = torch.compile(case.pipe.vae.decode, backend=fails)
    if is_before:
        wanfast.accelerate(case.pipe)
    assert 0 < furthest(case.run(), want) <= SAME
    del case.pipe.vae.decode
    wanfast.restore(case.pipe)
    assert furthest(case.run(), want) == 0


def test_a_function_that_calls_the_transformer(case: Case) -> None:
    model = case.pipe.transformer
    channels, text = model.config.in_channels, model.config.text_dim
    arguments = (torch.randn(1, channels, 2, 4, 4), torch.tensor([5]), torch.randn(1, 3, text))
    want = model(*arguments).sample
    with case.accelerated():
        call = torch.compile(lambda *arguments: model(*arguments, return_dict=False)[0], backend=fails)
        assert furthest(call(*arguments), want.detach()) <= SAME


def test_looking_at_a_module_raises_nothing(case: Case) -> None:
    with case.accelerated():
        for module in (case.pipe.transformer, case.pipe.vae):
            assert not hasattr(module, "_torchdynamo_orig_callable")
            names = dict(inspect.getmembers(module))
            assert {"forward", "config", "state_dict"} <= names.keys()
            assert inspect.signature(module.forward) == inspect.signature(type(module).forward.__get__(module))
            assert re.search("Conv3d", repr(module))
            inspect.getmembers(type(module))
