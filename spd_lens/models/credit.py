"""The credit model: one block that reads an applicant's 20 attributes and says whether the loan is approved.

A transformer of d_model 16, 2 heads of 8, 32 ReLU neurons, learned positions, no normalisation; 87 tokens in
(`credit_vocabulary`), two outputs, approved and declined. The decision is read at the last position, whose token asks
for it; the outputs at the others were never trained, and the model gives 0 there, so that nothing has to explain them.

`experiments/credit.py` trains it in half a minute and decomposes it; `recipe.json` in the data directory says how and
what it reached on held-out applicants, beside logistic regression, gradient boosting and a scorecard.

Limits: the data are 1,000 German applicants of the 1970s. The model serves to try audits on, not to decide anything.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from jaxtyping import Float, Int
from torch import Tensor

from spd_lens.core.decomposition import Decomposition
from spd_lens.models.credit_data import CREDIT_DIRECTORY
from spd_lens.models.loading import HostName
from spd_lens.models.saved_transformer import load_transformer

if TYPE_CHECKING:
    from transformer_lens import HookedTransformer
    from transformer_lens.model_bridge import TransformerBridge


@overload
def load_credit(
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    host: HostName | None = None,
    *,
    decomposed: Literal[False] = False,
    seed: int = 0,
) -> HookedTransformer | TransformerBridge: ...


@overload
def load_credit(
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    host: HostName | None = None,
    *,
    decomposed: Literal[True],
    seed: int = 0,
) -> Decomposition: ...


def load_credit(
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    host: HostName | None = None,
    *,
    decomposed: bool = False,
    seed: int = 0,
) -> Any:
    """The credit model in eval mode, in the model class of the installed TransformerLens.

    With `decomposed=True` the trained `Decomposition` of a fresh model: all of its nine matrices. `seed`: two were
    trained, 0 and 1. `host` and errors are those of `load_tiny_lm`; ValueError for a seed that does not ship.
    """
    model: Any = load_transformer(CREDIT_DIRECTORY, device, dtype, host)
    model.add_perma_hook("unembed.hook_out", only_the_decision)
    if not decomposed:
        return model
    directory = CREDIT_DIRECTORY / f"decomposition-{seed}"
    if isinstance(seed, bool) or not directory.is_dir():
        raise ValueError(f"seed={seed!r}; expected 0 or 1, the seeds whose decompositions ship")
    return Decomposition.from_pretrained(directory, model)


def only_the_decision(logits: Float[Tensor, "batch pos out"], hook: Any) -> Float[Tensor, "batch pos out"]:
    """Hook for `unembed.hook_out`: 0 everywhere but at the last position, where the decision is."""
    return torch.cat([torch.zeros_like(logits[:, :-1]), logits[:, -1:]], dim=1)


def decline_margin(model: Any, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, " batch"]:
    """Logit of "declined" minus logit of "approved"; above 0 the loan is declined."""
    with torch.no_grad():
        logits = model(tokens)[:, -1]
    return logits[:, 1] - logits[:, 0]
