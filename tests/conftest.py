"""Shared by all tests: shape checking where it is asked for, one thread, and which TransformerLens is installed."""

import os
import signal
from collections.abc import Iterator
from importlib.metadata import version

import jaxtyping
import pytest
import torch
from jaxtyping import install_import_hook

# Every annotated shape and type is checked in one of CI's two runs of the suite (`make test-tl4`): it doubles the time.
# The other one sees the library as users do.
if os.environ.get("SPD_LENS_CHECK_SHAPES"):
    install_import_hook("spd_lens", "beartype.beartype")

# Tiny tensors: more threads only wait for each other (and pytest-xdist fills the cores).
torch.set_num_threads(1)

TL_MAJOR = int(version("transformer_lens").split(".")[0])

needs_hooked = pytest.mark.skipif(TL_MAJOR >= 4, reason="TransformerLens 4 removed HookedTransformer")

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")),
]


@pytest.fixture(autouse=True, scope="session")
def _interruptible() -> None:
    """A shell that starts a job with `&` lets it ignore Ctrl-C, which tests press."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def without_type_checks() -> Iterator[None]:
    """What a user sees: the library's own errors, not those of the test run's type checker."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
