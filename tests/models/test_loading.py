"""`open_model`: a model by name or folder on whichever TransformerLens is installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import PreTrainedTokenizerFast

from spd_lens import decompose_layer
from spd_lens.models import open_model
from tests.conftest import TL_MAJOR, needs_hooked
from tests.small_models import tiny_tokenizer, tokens

SIZES: dict[str, Any] = {
    "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 12, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
CONFIGS = {
    "gpt2": lambda: transformers.GPT2Config(**SIZES, n_inner=24, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0),
    "llama": lambda: transformers.LlamaConfig(**SIZES, intermediate_size=24, num_key_value_heads=2, head_dim=4),
}
HOSTS = [pytest.param("hooked", marks=needs_hooked), "bridge", None]


def _saved(family: str, folder: Path) -> Any:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[family](), attn_implementation="eager").eval()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.2 * torch.randn_like(p)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("family", CONFIGS)
def test_a_folder_gives_the_logits_of_the_model_that_was_saved(family: str, host: Any, tmp_path: Path) -> None:
    folder = tmp_path / "my-model"
    reference = _saved(family, folder)
    tiny_tokenizer(PreTrainedTokenizerFast).save_pretrained(folder)  # pyright: ignore[reportAttributeAccessIssue]
    model = open_model(str(folder), host=host)
    expected_host = host or ("bridge" if TL_MAJOR >= 4 else "hooked")
    assert type(model).__name__ == {"hooked": "HookedTransformer", "bridge": "TransformerBridge"}[expected_host]
    with torch.no_grad():
        torch.testing.assert_close(model(tokens(3)), reference(tokens(3)).logits, rtol=1e-4, atol=1e-4)
    assert not model.training
    assert model.tokenizer is not None
    assert model.cfg.model_name == "my-model"
    assert len(decompose_layer(model, 0, 4)) in (2, 3)


@needs_hooked
def test_a_hooked_transformer_needs_no_tokenizer(tmp_path: Path) -> None:
    _saved("gpt2", tmp_path / "m")
    assert open_model(tmp_path / "m").tokenizer is None


def test_a_bridge_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    _saved("gpt2", tmp_path / "m")
    with pytest.raises(ValueError, match=r"has no tokenizer.*tokenizer\.save_pretrained"):
        open_model(tmp_path / "m", host="bridge")


def test_dtype_is_chosen(tmp_path: Path) -> None:
    _saved("gpt2", tmp_path / "m")
    tiny_tokenizer(PreTrainedTokenizerFast).save_pretrained(tmp_path / "m")  # pyright: ignore[reportAttributeAccessIssue]
    model = open_model(tmp_path / "m", dtype=torch.float64)
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    with torch.no_grad():
        assert model(tokens(1)).dtype == torch.float64


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda folder: folder / "absent", "there is no such folder"),
        (lambda folder: str(folder) + "/absent", "there is no such folder"),
        (lambda folder: folder / "a.txt", "that is a file; give the folder"),
        (lambda folder: folder, r"there is no config\.json in it, but a\.txt"),
        (lambda folder: folder / "other", "holds no language model that transformers can open"),
    ],
)
def test_a_path_that_is_no_model_is_named(make: Any, text: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "none of them"}')
    with pytest.raises(ValueError, match=text):
        open_model(make(tmp_path))


def test_wrong_arguments_are_refused(without_type_checks: None) -> None:
    with pytest.raises(TypeError, match="dtype is 'float32'; expected a torch dtype"):
        open_model("gpt2", dtype="float32")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="host is 'vllm'; expected 'hooked', 'bridge' or None"):
        open_model("gpt2", host="vllm")  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="given a Linear; expected a model's name"):
        open_model(torch.nn.Linear(2, 2))  # pyright: ignore[reportArgumentType]


@needs_hooked
def test_an_unknown_name_lists_near_ones() -> None:
    with pytest.raises(ValueError, match=r"HookedTransformer has no model 'gpt2-smol'; near: .*'gpt2-small'"):
        open_model("gpt2-smol")


def test_a_name_that_the_hub_does_not_give_lists_near_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformer_lens.model_bridge import TransformerBridge

    def absent(*args: Any, **kwargs: Any) -> Any:
        raise OSError("not a valid model identifier")

    monkeypatch.setattr(TransformerBridge, "boot_transformers", staticmethod(absent))
    with pytest.raises(ValueError, match=r"Hub gave a model 'gpt2-larg'; near: .*gpt2-large"):
        open_model("gpt2-larg", host="bridge")
