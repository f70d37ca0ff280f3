"""Strengths of pairs against attention scores of models whose W_Q and W_K hold only that pair, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from spd_lens import Decomposition, decompose, harvest
from spd_lens.statistics import qk_interactions
from tests.bridge_models import CONFIGS, SIZES
from tests.conftest import needs_hooked
from tests.small_models import tiny_transformer, tokens

Q, K = "blocks.1.attn.W_Q", "blocks.1.attn.W_K"
OFFSETS = (0, 1, 3, 7)


def rotary_hooked(n_key_value_heads: int | None) -> nn.Module:
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    torch.manual_seed(0)
    cfg = HookedTransformerConfig(
        n_layers=2, d_model=16, n_ctx=12, d_head=8, n_heads=4, d_mlp=32, d_vocab=40, act_fn="gelu_new",
        normalization_type="LN", positional_embedding_type="rotary", rotary_dim=6,
        n_key_value_heads=n_key_value_heads, dtype=torch.float64,
    )  # fmt: skip
    return HookedTransformer(cfg)


def hooked_scores(model: Any, rows: torch.Tensor) -> torch.Tensor:
    _, cache = model.run_with_cache(rows)
    return cache["blocks.1.attn.hook_attn_scores"]


def check(decomposition: Decomposition, scores: Any, d_vocab: int = 40, tolerance: float = 1e-9) -> None:
    """What a pair adds to the scores is its activations times its strength, at every head and pair of positions."""
    rows = torch.randint(0, d_vocab, (2, 10))
    found = qk_interactions(decomposition, 1, offsets=OFFSETS)
    with torch.no_grad():
        inputs = decomposition.clean_pass(rows).inputs
        a = {name: inputs[name] @ decomposition[name].V for name in (Q, K)}
        weights = {name: decomposition[name] for name in (Q, K)}
        originals = {name: w.target_weight.clone() for name, w in weights.items()}
        for c, d in ((0, 0), (2, 5), (6, 3)):
            # Scores are bilinear in (query, key): the pair's part is left when all else is taken off.
            parts = {}
            for has_q in (0, 1):
                for has_k in (0, 1):
                    for name, c_own, has in ((Q, c, has_q), (K, d, has_k)):
                        w = weights[name]
                        w.site.matrix.write(has * torch.outer(w.V[:, c_own], w.U[c_own]).to(originals[name]))
                    parts[has_q, has_k] = scores(decomposition.model, rows)
            for name, w in weights.items():
                w.site.matrix.write(originals[name])
            pair = parts[1, 1] - parts[1, 0] - parts[0, 1] + parts[0, 0]
            for o, offset in enumerate(OFFSETS):
                i = torch.arange(offset, 10)
                strength = found.values[:, o, found.queries.index(c), found.keys.index(d)]
                expected = pair[:, :, i, i - offset]
                predicted = (a[Q][:, i, c] * a[K][:, i - offset, d])[:, None] * strength[None, :, None]
                torch.testing.assert_close(predicted.double(), expected.double(), rtol=1e-6, atol=tolerance)


@needs_hooked
@pytest.mark.parametrize("n_key_value_heads", [None, 2])
def test_strengths_with_rotary_embeddings_are_those_of_the_scores(n_key_value_heads: int | None) -> None:
    model = rotary_hooked(n_key_value_heads)
    decomposition = decompose(model, {Q: 7, K: 6})
    decomposition.to(torch.float64)
    for parameter in decomposition.subcomponent_parameters():
        parameter.data = parameter.data.double()
    check(decomposition, hooked_scores)


@needs_hooked
def test_strengths_without_rotary_embeddings_are_the_same_at_every_offset() -> None:
    decomposition = decompose(tiny_transformer(dtype=torch.float64), {Q: 7, K: 6})
    for parameter in decomposition.subcomponent_parameters():
        parameter.data = parameter.data.double()
    check(decomposition, hooked_scores)
    found = qk_interactions(decomposition, 1, offsets=OFFSETS)
    assert torch.equal(found.values, found.values[:, :1].expand_as(found.values))


@pytest.mark.parametrize("family", ["gpt2", "pythia", "llama", "qwen2"])
def test_strengths_of_bridged_models_are_those_of_the_scores(family: str) -> None:
    model = bridge(family)

    def scores(model: Any, rows: torch.Tensor) -> torch.Tensor:
        _, cache = model.run_with_cache(rows)
        return cache["blocks.1.attn.hook_attn_scores"]

    decomposition = decompose(model, {Q: 7, K: 6})
    for parameter in decomposition.subcomponent_parameters():
        parameter.data = parameter.data.double()
    # Hugging Face computes the angles in float32.
    check(decomposition, scores, SIZES["vocab_size"], tolerance=1e-7)


def bridge(family: str) -> Any:
    import transformers
    from tokenizers import Tokenizer, models
    from transformer_lens.model_bridge import TransformerBridge

    from tests.bridge_models import NAMES, VOCAB

    torch.manual_seed(0)
    config = CONFIGS[family](dict(SIZES))
    config._attn_implementation = "eager"
    hf_model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").double().eval()
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="w30", bos_token="w30", pad_token="w30", unk_token="w0", add_bos_token=True,
        name_or_path="tiny",
    )  # fmt: skip
    return TransformerBridge.boot_transformers(
        NAMES[family], hf_model=hf_model, tokenizer=tokenizer, dtype=torch.float64
    )


def test_activations_of_a_harvest_bring_strengths_to_the_units_of_scores() -> None:
    decomposition = decompose(tiny_transformer(), {Q: 7, K: 6})
    found = harvest(decomposition, tokens(8))
    plain = qk_interactions(decomposition, 1, offsets=(0, 2), queries=[4, 1], keys=[0, 5])
    scaled = qk_interactions(decomposition, 1, offsets=(0, 2), queries=[4, 1], keys=[0, 5], harvest=found)
    rms = torch.outer(found[Q].activation_rms[[4, 1]], found[K].activation_rms[[0, 5]])
    torch.testing.assert_close(scaled.values, plain.values * rms)
    assert scaled.in_scores
    strongest = scaled.top(1)[0]
    assert abs(strongest.strength) == pytest.approx(float(scaled.values.abs().max()))
    place = (strongest.head, (0, 2).index(strongest.offset), (4, 1).index(strongest.query), (0, 5).index(strongest.key))
    assert float(scaled.values[place]) == pytest.approx(strongest.strength)


def test_what_cannot_be_asked_is_named() -> None:
    decomposition = decompose(tiny_transformer(), {Q: 7, "blocks.1.mlp.W_in": 4})
    with pytest.raises(ValueError, match=r"blocks\.1\.attn\.W_K is not decomposed"):
        qk_interactions(decomposition, 1)
    decomposition.remove()
    decomposition = decompose(tiny_transformer(), {Q: 7, K: 6})
    with pytest.raises(ValueError, match=r"offset 12; expected a whole number in 0\.\.11"):
        qk_interactions(decomposition, 1, offsets=(12,))
    with pytest.raises(ValueError, match=r"subcomponent 7 of blocks\.1\.attn\.W_Q; expected a whole number in 0\.\.6"):
        qk_interactions(decomposition, 1, queries=[7])


def test_the_heat_map_shows_the_strongest_pairs_of_every_head_and_offset() -> None:
    plt = pytest.importorskip("matplotlib.pyplot", reason="the extra `plots` is not installed")
    from spd_lens.pictures import qk_figure

    decomposition = decompose(tiny_transformer(), {Q: 7, K: 6})
    found = qk_interactions(decomposition, 1, offsets=(0, 2))
    figure = qk_figure(found, rows=3, columns=2)
    figure.canvas.draw()
    panels = [axis for axis in figure.axes if axis.images]
    assert len(panels) == 4 * 2
    most = found.values.abs().amax((0, 1))
    rows = sorted(most.amax(1).topk(3).indices.tolist())
    assert [int(t.get_text()) for t in panels[0].get_yticklabels()] == rows
    columns = sorted(most.amax(0).topk(2).indices.tolist())
    shown = panels[3].images[0].get_array()
    assert shown is not None
    torch.testing.assert_close(torch.tensor(shown.data), found.values[1, 1][rows][:, columns])
    assert panels[3].get_title() == "head 1, key 2 back"
    plt.close(figure)


def test_activations_of_another_decomposition_are_refused() -> None:
    model, rows = tiny_transformer(), tokens(4)
    other = decompose(model, {Q: 6, K: 6}, seed=1)
    of_other = harvest(other, rows)
    other.remove()
    decomposition = decompose(model, {Q: 6, K: 6}, seed=2)
    with pytest.raises(ValueError, match="the harvest is of another decomposition of this target"):
        qk_interactions(decomposition, 1, harvest=of_other)
