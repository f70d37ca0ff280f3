"""Ctrl-C inside `decompose` and `remove` leaves the model whole or undone."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
import torch

from spd_lens import Decomposition, decompose
from spd_lens.core import input_reader, new_modules, site_checks, swap
from spd_lens.support import hold_interrupts
from tests.small_models import tiny_transformer, tokens

SITES = {"blocks.1.mlp.W_*": 4, "blocks.0.attn.W_V": 3}
FILES = {module.__file__ for module in (input_reader, new_modules, site_checks, swap)}


def interrupted_at(n: int, call: Callable[[], Any]) -> bool:
    """Run `call`; raise KeyboardInterrupt at the n-th line of the swap's files that runs. False if there are fewer."""
    seen = 0

    def trace(frame: FrameType, event: str, arg: Any) -> Any:
        nonlocal seen
        if frame.f_code.co_filename not in FILES:
            return None
        if event == "line":
            seen += 1
            if seen == n:
                sys.settrace(None)
                raise KeyboardInterrupt
        return trace

    sys.settrace(trace)
    try:
        call()
        return False
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(None)


def anatomy(model: Any) -> tuple[Any, ...]:
    hooks = [(len(m._forward_pre_hooks), len(m._forward_hooks), type(m).__name__) for m in model.modules()]
    return list(model.hook_dict), hooks, [sorted(vars(m)) for m in model.modules()]


@pytest.mark.parametrize("gate", ["scalar", "global"])
def test_an_interrupt_at_any_line_of_the_swap_leaves_the_model_as_it_was(gate: Any) -> None:
    model = tiny_transformer()
    before, n = anatomy(model), 1
    while interrupted_at(n, lambda: decompose(model, SITES, gate=gate, gate_width=4)):
        assert anatomy(model) == before, n
        n += 7
    assert n > 50
    Decomposition.of(model).remove()
    assert anatomy(model) == before


def test_removing_can_be_called_again_after_an_interrupt_at_any_line() -> None:
    model = tiny_transformer()
    expected, n = model(tokens(1)), 1  # a bridge puts hooks of its own on its norms in the first pass
    before = anatomy(model)
    while interrupted_at(n, (decomposition := decompose(model, SITES)).remove):
        decomposition.remove()
        assert anatomy(model) == before, n
        n += 7
    assert n > 50
    assert torch.equal(model(tokens(1)), expected)


def test_a_signal_waits_until_the_work_is_done() -> None:
    done = []

    def work() -> None:
        with hold_interrupts():
            os.kill(os.getpid(), signal.SIGINT)
            done.append("work")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert done == ["work"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_signal_inside_decompose_undoes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_transformer()
    before, real = anatomy(model), swap._connect

    def connect_and_press(weight: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        real(weight)

    monkeypatch.setattr(swap, "_connect", connect_and_press)
    with pytest.raises(KeyboardInterrupt):
        decompose(model, SITES)
    assert anatomy(model) == before
