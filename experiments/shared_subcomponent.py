"""Why a later block of a residual MLP wants a subcomponent that is always on: `python
experiments/shared_subcomponent.py`.

What a feature brings to block 1 is not the same for its positive and its negative values, because block 0 has a ReLU.
The first lines say by how much, for every feature's pre-activation there. Then V and U of `blocks.1.mlp.W_in` are
trained on the reconstruction alone while importances are held at the wanted answer: one subcomponent per feature, on
exactly when the feature is, and so many more that are always on. What the first of these saves is the coefficient of
minimality below which it pays. (One reconstruction term, all other sites unmasked, delta on, as in the stages of
`W_in`.)
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from torch.nn.functional import cosine_similarity

from spd_lens.support import tqdm

if __package__ in (None, ""):  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from experiments.paper import EXPERIMENTS
from experiments.runs import DECOMPOSITION_SEED, RESULTS, WORK, accepted_targets, write_at_once
from spd_lens.support import library_versions
from spd_lens.toys import ResidMLP, ml2r, mmcs, one_hot_inputs

VALUE, LR = 0.75, 3e-3
# Steps at the end over which the loss is averaged.
LAST = 300


@torch.no_grad()
def signed_streams(model: ResidMLP) -> tuple[Tensor, Tensor]:
    """What every feature brings to block 1 per unit of its value, at 0.75 and at -0.75."""
    x = one_hot_inputs(model.cfg.n_features, VALUE)
    return tuple(_stream(model, sign * x) / (sign * VALUE) for sign in (1, -1))  # pyright: ignore[reportReturnType]


def _stream(model: ResidMLP, x: Tensor) -> Tensor:
    """The residual stream that enters block 1."""
    r = x @ model.W_E
    return r + model.mlps()[0](r)


def best_reconstruction(model: ResidMLP, n_always_on: int, *, steps: int, seed: int) -> dict[str, Any]:
    """Reconstruction loss that V and U reach with importances held, and MMCS and ML2R of the features' subcomponents
    against the slopes of the streams (`ResidMLPReport`) and against the streams of positive values."""
    generator = torch.Generator().manual_seed(seed)
    data, n_features = EXPERIMENTS["resid_mlp_2"].features(seed), model.cfg.n_features
    W = model.mlps()[1].W_in.detach()
    up, down = signed_streams(model)
    slopes = (up + down) / 2
    V = torch.cat([torch.linalg.pinv(slopes), 0.1 * torch.randn(len(W), n_always_on, generator=generator)], dim=1)
    U = torch.cat([slopes @ W, 0.1 * torch.randn(n_always_on, W.shape[1], generator=generator)])
    V.requires_grad_()
    U.requires_grad_()
    optimizer = torch.optim.Adam([V, U], lr=LR)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    losses = []
    for step in tqdm(range(steps), desc=f"{n_always_on} always on", leave=False):
        x = data.batch(step)
        with torch.no_grad():
            r, clean = _stream(model, x), model(x)
        g = torch.cat([(x != 0).float(), torch.ones(len(x), n_always_on)], dim=1)
        mask = g + (1 - g) * torch.rand(g.shape, generator=generator)
        delta = torch.rand(len(x), 1, generator=generator)
        hidden = torch.relu((r @ V * mask) @ U + delta * (r @ (W - V @ U)))
        output = (r + hidden @ model.mlps()[1].W_out.detach()) @ model.W_U
        loss = (output - clean).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.detach())
    V, U = V.detach()[:, :n_features], U.detach()[:n_features]
    return {
        "always_on": n_always_on,
        "reconstruction": float(torch.stack(losses[-LAST:]).mean()),
        "against_slopes": {"mmcs": mmcs(slopes @ V, U, slopes @ W), "ml2r": ml2r(slopes @ V, U, slopes @ W)},
        "against_positive_values": {"mmcs": mmcs(up @ V, U, up @ W), "ml2r": ml2r(up @ V, U, up @ W)},
    }


def main(
    steps: Annotated[int, typer.Option(help="Training steps.")] = 3_000,
    results: Annotated[Path, typer.Option(help="Where shared_subcomponent.json goes.")] = RESULTS / "resid_mlp_2",
    work: Annotated[Path, typer.Option(help="Where trained targets are kept.")] = WORK,
) -> None:
    """Why a later block wants a subcomponent that is always on."""
    torch.set_num_threads(1)
    model: Any = accepted_targets(EXPERIMENTS["resid_mlp_2"], 1, work / "targets").models[0]
    up, down = (streams @ model.mlps()[1].W_in.detach() for streams in signed_streams(model))
    cosines, lengths = cosine_similarity(up, down, dim=1), up.norm(dim=1) / down.norm(dim=1)
    content = {
        "cosine_of_positive_and_negative": {"mean": float(cosines.mean()), "min": float(cosines.min())},
        "length_of_positive_over_negative": float(lengths.mean()),
        "trained": [best_reconstruction(model, n, steps=steps, seed=DECOMPOSITION_SEED) for n in (0, 1, 2)],
        "settings": {"steps": steps, "lr": LR, "target_seed": 0, "seed": DECOMPOSITION_SEED},
        "versions": library_versions(),
        "command": " ".join(["python", *sys.argv]),
    }
    write_at_once(results / "shared_subcomponent.json", content)
    print(json.dumps({key: value for key, value in content.items() if key != "versions"}, indent=1))


if __name__ == "__main__":
    typer.run(main)
