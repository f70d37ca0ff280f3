"""A batch in parts, and what is computed again: the losses and gradients of the plain step, with less memory."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from spd_lens import PGD, Batch, Decomposition, Reconstruction, TokenBatches, TrainConfig, decompose, train
from spd_lens.data import cache_residuals
from spd_lens.objective import MaskSource, Merged, Persistent
from spd_lens.training import Evaluations, Learner, make_learner, offloading, take_step
from tests.conftest import TL_MAJOR
from tests.small_models import tiny_transformer, tokens
from tests.training.counting import peak_bytes
from tests.training.test_loop import _fresh
from tests.training.test_processes import _assert_close, _assert_same_run, _batches, _config, _train

# In float64, so that a rounding that Adam makes a whole step of (where a gradient is 0) stays small.
CLOSE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-7}
HIDDEN = ("blocks.1.hook_out",) if TL_MAJOR >= 4 else ("blocks.1.hook_resid_post",)
# Everything that draws, climbs, counts or clips.
EVERYTHING = TrainConfig(
    steps=2,
    lr=1e-3,
    minimality=1e-2,
    frequency=1e-2,
    clip_subcomponents=0.5,
    clip_gates=0.5,
    reconstructions=(
        Reconstruction(1.0, "stochastic", "subset", draws=2),
        Reconstruction(0.5, "bernoulli", "layerwise"),
        Reconstruction(0.5, PGD(2, 0.1, "batch"), "subset"),
        Reconstruction(0.5, Persistent(lr=0.05, first_steps=2), "all"),
    ),
    hidden=0.1,
    hidden_points=HIDDEN,
)
OF_ROWS = EVERYTHING.changed(
    reconstructions=(
        Reconstruction(1.0, PGD(2, 0.1, "position"), "all"),
        Reconstruction(0.5, Persistent(scope="example", lr=0.05), "subset"),
        Reconstruction(0.5, Merged(0.5, Persistent(scope="position", lr=0.05)), "subset"),
    )
)


def _batch(masked: bool = False, n: int = 4) -> Batch:
    """Rows of which, if masked, the later have fewer positions that count."""
    rows = tokens(n)
    if not masked:
        return Batch(rows)
    width = rows.shape[1]
    return Batch(rows, position_mask=torch.arange(width) < torch.linspace(width, 1, n).long().unsqueeze(1))


def _learner(config: TrainConfig, **settings: Any) -> tuple[Decomposition, Learner]:
    decomposition = _fresh(**settings).to(torch.float64)
    for p in decomposition.model.parameters():
        p.requires_grad_(False)
    for p in decomposition.subcomponent_parameters() + decomposition.gate_parameters():
        p.requires_grad_(True)
    return decomposition, make_learner(decomposition, config)


def _trained(config: TrainConfig, batch: Batch, **settings: Any) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
    """Losses, L0 and norms of every step, and everything that a checkpoint would hold at the end."""
    _, learner = _learner(config, **settings)
    found = [take_step(learner, batch, step) for step in range(config.steps)]
    values = [{**losses, **{f"L0/{k}": v for k, v in active.items()}, **norms} for losses, active, norms in found]
    return values, {name: t.detach().clone() for name, t in learner.tensors().items()}


def _assert_same(config: TrainConfig, other: TrainConfig, batch: Batch, **settings: Any) -> None:
    (losses, tensors), (others, others_tensors) = (
        _trained(config, batch, **settings),
        _trained(other, batch, **settings),
    )
    for one, two in zip(losses, others, strict=True):
        assert one.keys() == two.keys()
        for name in one:
            torch.testing.assert_close(two[name], one[name], **CLOSE, msg=lambda m, n=name: f"{n}: {m}")
    assert tensors.keys() == others_tensors.keys()
    for name, expected in tensors.items():
        torch.testing.assert_close(others_tensors[name], expected, **CLOSE, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(("config", "masked"), [(EVERYTHING, False), (OF_ROWS, True)], ids=["shared", "of rows"])
def test_a_batch_in_parts_trains_what_it_trains_whole(config: TrainConfig, masked: bool) -> None:
    _assert_same(config, config.changed(accumulate=2), _batch(masked))


def test_what_is_computed_again_has_the_same_gradients() -> None:
    _assert_same(EVERYTHING, EVERYTHING.changed(recompute="all"), _batch(masked=True), gate="vector")


def _peak(decomposition: Decomposition, **options: Any) -> int:
    config = TrainConfig(reconstructions=(Reconstruction(), Reconstruction(0.5, Persistent())), **options)
    learner = make_learner(decomposition, config)
    batch = _batch(n=32)
    take_step(learner, batch, 0)
    moments = [t for state in learner.optimizer.state.values() for t in state.values()]
    return peak_bytes(lambda: take_step(learner, batch, 1), [*decomposition.model.parameters(), *moments])


@pytest.mark.slow
def test_each_option_saves_memory() -> None:
    def wide() -> Decomposition:
        return _fresh(gate="vector")

    plain = _peak(wide())
    assert _peak(wide(), accumulate=8) < 0.5 * plain
    assert _peak(wide(), recompute="gates") < 0.9 * plain

    def deep() -> Decomposition:  # what is inside its eight blocks is most of a step, and one of them is left
        return decompose(tiny_transformer(n_layers=8), {"blocks.0.mlp.W_in": 4}, gate="shared", gate_width=4)

    assert _peak(deep(), recompute="passes") < 0.5 * _peak(deep())


def test_parts_share_the_rows_of_processes_and_a_run_goes_on_in_other_parts(tmp_path: Path) -> None:
    config = _config("persistent", accumulate=2)
    alone = _train(1, tmp_path / "1", config.changed(accumulate=1), _batches(masked=True))
    _assert_close(_train(2, tmp_path / "2", config, _batches(masked=True)), alone)
    _assert_same_run(tmp_path / "2", tmp_path / "1")
    decomposition = _fresh()
    train(decomposition, _batches(masked=True), resume_from=tmp_path / "2/run/checkpoints/step-00000002", accumulate=4)
    _assert_close({name: t.detach() for name, t in decomposition.tensors().items()}, alone)


class _Climbing(MaskSource):
    name, climbs = "climbing", True

    def masks(self, importances: Any, *, delta: bool, generator: torch.Generator) -> Any:
        raise AssertionError


def test_what_cannot_be_in_parts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"accumulate=2 with the climbing mask source 'climbing' of your own"):
        _learner(TrainConfig(accumulate=2, reconstructions=(Reconstruction(1.0, _Climbing()),)))
    _, learner = _learner(TrainConfig(accumulate=3))
    with pytest.raises(ValueError, match=r"4 rows on each process, for accumulate=3"):
        take_step(learner, _batch(), 0)
    _, learner = _learner(TrainConfig(accumulate=4, reconstructions=(Reconstruction(1.0, Merged(0.5)),)))
    with pytest.raises(ValueError, match=r"first 2 rows of a batch in 4 parts"):
        take_step(learner, _batch(), 0)
    with pytest.raises(ValueError, match="accumulate"):
        TrainConfig(accumulate=0)
    with pytest.raises(ValueError, match="recompute"):
        TrainConfig(recompute="gate")  # pyright: ignore[reportArgumentType]


def test_blocks_that_no_pass_enters_lie_elsewhere_meanwhile() -> None:
    decomposition = decompose(tiny_transformer(n_layers=4), {"blocks.1.mlp.W_*": 8}, gate="shared", gate_width=4)
    cached = cache_residuals(decomposition, TokenBatches(tokens(8), 4))
    config = TrainConfig(steps=2, stop_at=2, divergence="relative_mse", recompute="passes")
    # From the meta device nothing comes back: what is asked here is that no pass touches these blocks.
    taken = False
    with suppress(NotImplementedError), offloading.only_entered_blocks(decomposition, 1, 2, "meta") as moved:
        assert moved == [0, 2, 3]
        blocks = [decomposition.host.block(i) for i in moved]
        assert {p.device.type for block in blocks if block is not None for p in block.parameters()} == {"meta"}
        learner = make_learner(decomposition, config)
        take_step(learner, next(iter(cached)), 0)
        taken = True
    assert taken


def test_offloading_changes_nothing_and_is_refused_where_all_blocks_are_entered(tmp_path: Path) -> None:
    found = []
    for offload in (False, True):
        decomposition = _fresh()
        where = [p.device for p in decomposition.model.parameters()]
        config = TrainConfig(steps=2, offload=offload)
        train(
            decomposition,
            cache_residuals(decomposition, TokenBatches(tokens(8), 4)),
            config,
            out_dir=tmp_path / str(offload),
        )
        assert [p.device for p in decomposition.model.parameters()] == where
        found.append({name: t.detach().clone() for name, t in decomposition.tensors().items()})
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    with pytest.raises(ValueError, match="every block is entered"):
        train(decomposition, _batches(), steps=1, offload=True, out_dir=tmp_path / "all")
    with pytest.raises(ValueError, match="offload=True with evaluations"):
        train(decomposition, _batches(), steps=1, offload=True, evaluations=Evaluations(_batches(), fast_every=1))


class _NoSync(TorchDispatchMode):
    """Refuses what makes a host wait for a device: a value read from a tensor."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default), func
        return func(*args, **(kwargs or {}))


def test_a_step_in_parts_reads_no_value() -> None:
    _, learner = _learner(EVERYTHING.changed(accumulate=2, recompute="all"))
    with _NoSync():
        take_step(learner, _batch(), 0)
        with pytest.raises(AssertionError, match="_local_scalar_dense"):
            torch.ones(()).item()


def test_a_target_in_half_precision_has_masters_that_learn_what_half_precision_cannot_hold() -> None:
    model = tiny_transformer(dtype=torch.bfloat16)
    decomposition = decompose(model, {"blocks.1.mlp.W_*": 8}, gate="shared", gate_width=4)
    target = {name: w.target_weight.clone() for name, w in decomposition.items()}
    trained = decomposition.subcomponent_parameters() + decomposition.gate_parameters()
    for p in decomposition.model.parameters():
        p.requires_grad_(False)
    for p in trained:
        p.requires_grad_(True)
    before = [p.detach().clone() for p in trained]
    learner = make_learner(decomposition, TrainConfig(lr=1e-6, steps=10, schedule="constant", precision="bf16"))
    take_step(learner, _batch(), 0)
    assert {t.dtype for state in learner.optimizer.state.values() for t in state.values()} == {torch.float32}
    assert {p.dtype for p in trained} == {torch.float32}
    assert {w.target_weight.dtype for w in decomposition.values()} == {torch.bfloat16}
    assert all(torch.equal(target[name], w.target_weight) for name, w in decomposition.items())
    V, was = trained[0].detach(), before[0]
    assert (was != V).float().mean() > 0.9
    assert (V.bfloat16() != was.bfloat16()).float().mean() < 0.1
