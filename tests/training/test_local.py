"""Local training: the residual stream behind the decomposed block is reconstructed, and no block behind it is run."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spd_lens import Decomposition, Reconstruction, TrainConfig, decompose, evaluate, train
from spd_lens.core import SiteMask
from spd_lens.data import Batch, TokenBatches, cache_residuals
from spd_lens.hosts import open_host
from spd_lens.objective import Merged, Persistent
from spd_lens.training import TunedReadout, accumulate_gradients, make_learner, train_many, tune_readout
from tests.bridge_models import CONFIGS, boot, pristine, random_tokens
from tests.conftest import TL_MAJOR
from tests.small_models import TiedAutoencoder, tiny_transformer, tokens

N_LAYERS = 3
SITES = ("blocks.0.mlp.W_in", "blocks.0.attn.W_V")
ALL_ON = (Reconstruction(masks="none"),)


def _bridge() -> nn.Module:
    return boot("gpt2", "raw", copy.deepcopy(pristine("gpt2", N_LAYERS)))


def _hosts() -> list[Any]:
    return [pytest.param(lambda: tiny_transformer(n_layers=N_LAYERS), id="own"), pytest.param(_bridge, id="bridge")]


def _decomposed(model: nn.Module) -> Decomposition:
    return decompose(model, dict.fromkeys(SITES, 3), gate="shared", gate_width=8, seed=1)


def _words(n: int = 4) -> Tensor:
    return tokens(n) % 30


def _stream_behind(model: Any, layer: int, batch: Tensor) -> Tensor:
    """By a hook of PyTorch's own on the block, in a whole pass."""
    found: list[Any] = []
    handle = model.blocks[layer].register_forward_hook(lambda module, args, output: found.append(output))
    with torch.no_grad():
        model(batch)
    handle.remove()
    return (found[0][0] if isinstance(found[0], tuple) else found[0]).double()


def _by_hand(make: Any, decomposition: Decomposition, batch: Tensor) -> tuple[Tensor, Tensor]:
    """The stream behind block 0 of the target, and of a model whose matrices are `V U`, in float64."""
    clean, written = make().double(), make().double()
    for name in SITES:
        weight = decomposition[name]
        product = weight.V.detach().double() @ weight.U.detach().double()
        open_host(written).site(name).matrix.write(product)
    return _stream_behind(clean, 0, batch), _stream_behind(written, 0, batch)


def _loss(decomposition: Decomposition, batch: Batch, **settings: Any) -> float:
    config = TrainConfig(steps=1, stop_at=1, reconstructions=ALL_ON, minimality=0.0, **settings)
    losses, _ = accumulate_gradients(make_learner(decomposition, config), batch, 0)
    return float(losses["none_all"])


@pytest.mark.parametrize("make", _hosts())
@pytest.mark.parametrize("cached", [False, True])
def test_the_loss_is_the_distance_of_the_streams_behind_the_block(make: Any, cached: bool) -> None:
    decomposition, batch = _decomposed(make()), _words()
    clean, masked = _by_hand(make, decomposition, batch)
    counted = torch.ones(batch.shape, dtype=torch.bool)
    counted[:, 0] = False
    given = Batch(batch, position_mask=counted)
    if cached:
        entering = next(cache_residuals(decomposition, TokenBatches(batch, len(batch))).once())
        given = Batch(entering.inputs, start_at=0, tokens=batch, position_mask=counted)
    error = (clean - masked)[counted].square().mean(-1)
    variance = clean[counted].var(-1, correction=0)
    assert _loss(decomposition, given, divergence="mse") == pytest.approx(float(error.mean()), rel=1e-4)
    expected = float((error / variance).mean())
    assert expected > 1e-3
    assert _loss(decomposition, given, divergence="relative_mse") == pytest.approx(expected, rel=1e-4)


def test_a_readout_is_compared_instead_of_the_stream() -> None:
    decomposition, batch = _decomposed(tiny_transformer()), _words()
    clean, masked = _by_hand(tiny_transformer, decomposition, batch)
    matrix = torch.randn(16, 5)
    size = clean.square().mean(-1, keepdim=True).sqrt()
    expected = (((clean - masked) / size) @ matrix.double()).square().mean()
    found = _loss(decomposition, Batch(batch), divergence="mse", readout=TunedReadout(matrix))
    assert found == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize("family", CONFIGS)
def test_a_pass_that_stops_gives_the_stream_there_and_runs_no_block_behind(family: str) -> None:
    model: Any = boot(family, "raw", copy.deepcopy(pristine(family, N_LAYERS)))
    host, batch = open_host(model), random_tokens(3, 4)
    ran: list[int] = []
    for stop in range(1, N_LAYERS + 1):
        expected = _stream_behind(model, stop - 1, batch)
        handles = [b.register_forward_hook(lambda *_, i=i: ran.append(i)) for i, b in enumerate(model.blocks)]
        with torch.no_grad():
            found = host.forward_until(stop, batch)
            assert ran == list(range(stop))
            from_the_stream = host.forward_until(stop, host.residual_before(stop - 1, batch), start_at=stop - 1)
        for handle in handles:
            handle.remove()
        ran.clear()
        assert torch.equal(found.double(), expected)
        assert torch.equal(from_the_stream, found)


@pytest.mark.parametrize("stop_at", [-1, 0, 99, True, "1", 1.5])
def test_a_pass_that_stops_where_no_block_is_is_refused(stop_at: Any, without_type_checks: None) -> None:
    """TransformerLens takes such numbers for slices of its list of blocks."""
    decomposition, words = _decomposed(tiny_transformer(n_layers=N_LAYERS)), _words()
    masks = {SITES[0]: SiteMask()}
    for run in (
        lambda: decomposition.clean_pass(words, stop_at=stop_at),
        lambda: decomposition.masked_forward(words, masks, stop_at=stop_at),
        lambda: decomposition.masked_hidden(words, masks, ["blocks.0.hook_resid_post"], stop_at=stop_at),
    ):
        with pytest.raises((TypeError, ValueError), match=r"stop_at=.*expected"):
            run()


@pytest.mark.parametrize("make", _hosts())
def test_a_step_runs_the_decomposed_block_and_no_other(make: Any, tmp_path: Path) -> None:
    decomposition = decompose(make(), {"blocks.1.mlp.W_in": 6}, gate="shared", gate_width=8)
    batches = cache_residuals(decomposition, TokenBatches(_words(8), 4))
    adversary = Merged(0.5, Persistent(scope="position"))
    config = TrainConfig(
        steps=3, stop_at=2, divergence="relative_mse", reconstructions=(Reconstruction(masks=adversary),)
    )
    ran: list[int] = []
    for i, block in enumerate(decomposition.model.blocks):
        block.register_forward_hook(lambda *_, i=i: ran.append(i))
    train(decomposition, batches, config, out_dir=tmp_path / "run")
    assert set(ran) == {1}


def test_local_training_lowers_the_kl_on_the_logits(tmp_path: Path) -> None:
    decomposition = decompose(tiny_transformer(n_layers=N_LAYERS), {"blocks.1.mlp.W_*": 16}, gate="shared", seed=1)
    batches = TokenBatches(tokens(64), 16)
    before = evaluate(decomposition, batches, quick=True).divergence["stochastic"]
    config = TrainConfig(steps=150, minimality=1e-4, stop_at=2, divergence="relative_mse")
    train(decomposition, cache_residuals(decomposition, batches), config, out_dir=tmp_path / "run")
    assert evaluate(decomposition, batches, quick=True).divergence["stochastic"] < 0.25 * before


def test_a_resumed_local_run_equals_the_uninterrupted_one(tmp_path: Path) -> None:
    readout = TunedReadout(torch.randn(16, 16))
    config = TrainConfig(
        steps=6, stop_at=1, divergence="mse", readout=readout, checkpoint_every=2, keep_checkpoints=9, log_every=1
    )
    whole = _decomposed(tiny_transformer())
    train(whole, TokenBatches(_words(16), 4), config, out_dir=tmp_path / "run")
    again = _decomposed(tiny_transformer())
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000002"
    with pytest.raises(ValueError, match="readout"):
        train(again, TokenBatches(_words(16), 4), resume_from=checkpoint)
    other = config.changed(readout=TunedReadout(torch.randn(16, 16)))
    with pytest.raises(ValueError, match="readout"):
        train(again, TokenBatches(_words(16), 4), other, resume_from=checkpoint)
    train(again, TokenBatches(_words(16), 4), config, resume_from=checkpoint)
    assert all(torch.equal(t, again.tensors()[name]) for name, t in whole.tensors().items())


def test_a_tuned_readout_is_the_kl_of_small_errors() -> None:
    decomposition = _decomposed(tiny_transformer().double())
    host, batch = decomposition.host, _words(8)
    readout = tune_readout(decomposition, [batch], 1, samples=400, ridge=0.0)
    stream = host.residual_before(1, batch)
    # One error for all positions in units of their size; one position of each row at a time, where they do not add up.
    size = stream.square().mean(-1, keepdim=True).sqrt()
    error = 1e-2 * torch.randn(16, dtype=torch.float64)
    total = 0.0
    with torch.no_grad():
        clean = host.forward_from(1, stream).log_softmax(-1)
        for position in range(batch.shape[1]):
            moved = stream.clone()
            moved[:, position] += error * size[:, position]
            found = host.forward_from(1, moved).log_softmax(-1)
            total += float((clean.exp() * (clean - found)).sum()) / batch.numel()
    matrix = readout.matrix.double()
    assert float((error @ matrix).square().mean()) == pytest.approx(total, rel=0.1)


def test_what_cannot_stop_is_refused_by_name(tmp_path: Path) -> None:
    local: dict[str, Any] = {"steps": 1, "stop_at": 1, "divergence": "mse"}
    toy = decompose(TiedAutoencoder(), {"*": 4})
    with pytest.raises(ValueError, match="TiedAutoencoder cannot stop behind a block"):
        train(toy, torch.rand(4, 5), out_dir=tmp_path / "a", **local)
    late = decompose(tiny_transformer(), {"blocks.1.mlp.W_in": 4})
    with pytest.raises(ValueError, match=r"never reaches blocks\.1\.mlp\.W_in"):
        train(late, _words(), out_dir=tmp_path / "b", **local)
    with pytest.raises(ValueError, match="expected 1 to 2"):
        train(late, _words(), out_dir=tmp_path / "c", **{**local, "stop_at": 3})
    unembedding = decompose(tiny_transformer(), {"unembed.W_U": 4})
    with pytest.raises(ValueError, match=r"never reaches unembed\.W_U"):
        train(unembedding, _words(), out_dir=tmp_path / "d", **{**local, "stop_at": 2})
    with pytest.raises(ValueError, match="no local training" if TL_MAJOR < 4 else "cannot run a TransformerBridge"):
        train_many([late], [[_words()]], TrainConfig(**{**local, "stop_at": 2}))
    with pytest.raises(ValueError, match="where passes cannot start"):
        tune_readout(late, [_words()], 2)


def test_a_readout_is_refused_where_the_logits_depend_on_more_than_the_stream(without_type_checks: None) -> None:
    decomposition, words = _decomposed(tiny_transformer()), _words()
    padded = torch.ones_like(words, dtype=torch.bool)
    padded[:, 0] = False
    with pytest.raises(ValueError, match="an attention_mask, which passes from block 1 on have lost"):
        tune_readout(decomposition, [Batch(words, position_mask=padded, attention_mask=padded)], 1)
    embedded: list[Tensor] = []

    def keep(value: Tensor, hook: Any) -> None:
        embedded[:] = [value]

    def add(value: Tensor, hook: Any) -> Tensor:
        return value + embedded.pop() if embedded else value

    with (
        decomposition.model.hooks(fwd_hooks=[("hook_embed", keep), ("blocks.1.hook_mlp_out", add)]),
        pytest.raises(ValueError, match="its blocks read more than the residual stream"),
    ):
        tune_readout(decomposition, [words], 1)
    for wrong in ({"seed": "a"}, {"samples": 1.5}, {"stop_at": "1"}):
        arguments: Any = {"stop_at": 1, **wrong}
        with pytest.raises(TypeError, match=f"{next(iter(wrong))}=.*; expected"):
            tune_readout(decomposition, [words], **arguments)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stop_at": 1}, "relative_mse"),
        ({"stop_at": 0, "divergence": "mse"}, "stop_at"),
        ({"stop_at": True, "divergence": "mse"}, "stop_at"),
        ({"readout": TunedReadout(torch.eye(4)), "divergence": "mse"}, "the block that it was tuned for"),
        ({"readout": TunedReadout(torch.eye(4)), "divergence": "relative_mse", "stop_at": 1}, "divergence='mse'"),
    ],
)
def test_choices_that_make_no_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(**settings)


def test_a_readout_is_no_tensor() -> None:
    with pytest.raises(TypeError, match="tune_readout"):
        TrainConfig(stop_at=1, divergence="mse", readout=torch.eye(4))
    with pytest.raises(ValueError, match="NaN"):
        TunedReadout(torch.full((4, 4), torch.nan))
