"""What a run needs of its surroundings, set when it begins and put back as it was when it ends, however it ends."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from spd_lens.core.decomposition import Decomposition
from spd_lens.data.processes import whole


@contextmanager
def training_conditions(decomposition: Decomposition) -> Iterator[None]:
    """Gradients on and only for subcomponents and gates (M3); the target in evaluation mode; float32 by default.

    - `torch.set_grad_enabled(False)`, `no_grad` and `inference_mode` of the caller do not act inside.
    - Gradients that lie on subcomponents and gates are dropped, before and after: a step that broke off leaves none.
    - Every module's training flag (dropout) and every parameter's `requires_grad` are put back.

    Raises ValueError for parameters that were made in inference mode (they cannot be trained), or that are not finite.
    """
    trained = decomposition.subcomponent_parameters() + decomposition.gate_parameters()
    for name, tensor in decomposition.tensors().items():
        if tensor.is_inference():
            raise ValueError(
                f"{name} was made under torch.inference_mode() and cannot be trained; decompose outside it"
            )
    if wrong := not_finite(decomposition):
        raise ValueError(f"{wrong} is NaN or infinite before the first step; load or decompose again")
    modules = {id(m): m for m in decomposition.model.modules()}
    flags = {key: module.training for key, module in modules.items()}
    parameters = {id(p): p for p in [*decomposition.model.parameters(), *trained]}
    required = {key: p.requires_grad for key, p in parameters.items()}
    dtype = torch.get_default_dtype()
    try:
        for module in modules.values():
            module.training = False
        for p in parameters.values():
            p.requires_grad_(False)
        for p in trained:
            p.requires_grad_(True)
            p.grad = None
        torch.set_default_dtype(torch.float32)
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        torch.set_default_dtype(dtype)
        for p in trained:
            p.grad = None
        for key, p in parameters.items():
            p.requires_grad_(required[key])
        for key, module in modules.items():
            module.training = flags[key]


def not_finite(decomposition: Decomposition) -> str | None:
    """The name of a trained tensor with NaN or infinite entries, or None; waits for the device once."""
    tensors = decomposition.tensors()
    finite = torch.stack([whole(tensor.detach().isfinite().all()) for tensor in tensors.values()]).tolist()
    return next((name for name, is_finite in zip(tensors, finite, strict=True) if not is_finite), None)


class Stop:
    """Whether the run was asked to stop, and by which signal."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self.signal: int | None = None

    def is_set(self) -> bool:
        """Whether the run was asked to stop."""
        return self._event.is_set()

    def ask(self, number: int) -> None:
        """Ask the run to stop."""
        self.signal = number
        self._event.set()


@contextmanager
def stop_on_signals() -> Iterator[Stop]:
    """While open, Ctrl-C and SIGTERM ask for a stop instead of breaking into a half-done step.

    A second Ctrl-C interrupts at once. After a SIGTERM the process ends by it when the block is left, as whoever sent
    it (a scheduler, a time limit) expects. In a thread that is not the main one signals are left alone.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    previous: dict[int, Any] = {number: signal.getsignal(number) for number in numbers}

    def on_signal(number: int, frame: Any) -> None:
        stop.ask(number)
        signal.signal(number, previous[number])

    try:
        for number in numbers:
            # None: a handler that was not set by Python, which could not be put back.
            if previous[number] is not None:
                signal.signal(number, on_signal)
        yield stop
    finally:
        for number in numbers:
            if previous[number] is not None:
                signal.signal(number, previous[number])
    if stop.signal == signal.SIGTERM:
        os.kill(os.getpid(), signal.SIGTERM)
