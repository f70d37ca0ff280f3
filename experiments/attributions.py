"""Gradient x input, integrated gradients and SHAP on the credit model: what other methods call the reasons."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

IG_STEPS = 32


@dataclass(frozen=True)
class Asked:
    """One applicant: tokens `[21]`, the sign of the decision's margin, and the control cases `[n 21]` of the audit."""

    tokens: Tensor
    sign: float
    controls: Tensor


def margin_of(model: Any, tokens: Tensor, sign: float) -> Tensor:
    """The decision's margin for every row."""
    logits = model(tokens)[:, -1]
    return sign * (logits[:, 1] - logits[:, 0])


def embedding_gradients(model: Any, tokens: Tensor, sign: float, embedding: Tensor) -> Tensor:
    """d margin / d embedding for rows whose embeddings are given."""
    leaf = embedding.clone().requires_grad_(True)
    hooks = [("hook_embed", lambda value, hook: leaf)]
    total = sign * model.run_with_hooks(tokens, fwd_hooks=hooks)[:, -1]
    return torch.autograd.grad((total[:, 1] - total[:, 0]).sum(), leaf)[0]


def embeddings(model: Any, tokens: Tensor) -> Tensor:
    """What `hook_embed` gives."""
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens, names_filter="hook_embed")
    return cache["hook_embed"]


def gradient_x_input(model: Any, asked: Asked) -> Tensor:
    own = embeddings(model, asked.tokens[None])
    return (embedding_gradients(model, asked.tokens[None], asked.sign, own) * own).sum(-1)[0]


def integrated_gradients(model: Any, asked: Asked) -> Tensor:
    own = embeddings(model, asked.tokens[None])
    base = embeddings(model, asked.controls).mean(0, keepdim=True)
    at = (torch.arange(IG_STEPS) + 0.5) / IG_STEPS
    path = base + at[:, None, None] * (own - base)
    rows = asked.tokens.expand(IG_STEPS, -1)
    return (embedding_gradients(model, rows, asked.sign, path).mean(0) * (own - base)[0]).sum(-1)


def shap_values(model: Any, asked: Asked, seed: int) -> Tensor:
    import shap

    n_places = len(asked.tokens) - 1

    def margin(rows: Any) -> Any:
        tokens = torch.cat([torch.as_tensor(rows).long(), asked.tokens[-1:].expand(len(rows), 1)], dim=1)
        with torch.no_grad():
            return margin_of(model, tokens, asked.sign).numpy()

    maskers: Any = shap.maskers  # pyright: ignore[reportAttributeAccessIssue]
    masker = maskers.Independent(asked.controls[:, :-1].numpy(), max_samples=len(asked.controls))
    explainer = shap.explainers.Permutation(margin, masker, seed=seed)
    found: Any = explainer(asked.tokens[None, :-1].numpy(), max_evals=4 * (2 * n_places + 1), silent=True)
    return torch.tensor(found.values[0], dtype=torch.float32)
