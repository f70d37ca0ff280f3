"""Stochastic Parameter Decomposition (SPD) for TransformerLens models.

What to call, in this order:

    model = HookedTransformer.from_pretrained("gpt2")        # TransformerLens 3.9; on 4.x a TransformerBridge
    decomposition = decompose_layer(model, layer=0)          # each weight of the MLP as a sum of subcomponents
    tokens = load_tokens("NeelNanda/pile-10k", model.tokenizer, context=128, max_rows=5_000)
    batches = cache_residuals(decomposition, TokenBatches(tokens, batch_size=8))
    train(decomposition, batches, steps=5_000)               # TrainConfig lists every choice
    print(evaluate(decomposition, batches).verdict)          # does it hold against an adversary?
    harvest(decomposition, batches)                          # which tokens each subcomponent fires on

    with model.hooks(fwd_hooks=decomposition.ablate({"blocks.0.mlp.W_in": [3, 17]})):
        model(tokens[:1])                                    # masks are ordinary TransformerLens hooks

- `decompose` takes patterns of sites instead of a layer; `decomposition.save_pretrained` and
  `Decomposition.from_pretrained` keep it.
- More: `spd_lens.patching` (ablate and patch), `.circuits` (find and check a circuit), `.graphs` (attribution graphs),
  `.components` (group subcomponents), `.editing` (find, edit, bake), `.specialists` (a smaller model of one domain),
  `.audit` (reasons that others can check), `.tasks` (prompts), `.pictures`, `.statistics`, `.models` (small models
  that ship with the package, some of them decomposed), `.toys` (models whose mechanisms are known), `.baselines` (APD
  and rivals of edits and specialists), `.core` (the functions that all of this is made of). The shell has
  `spd-lens --help`.

The tutorials begin with `tutorials/01_quickstart.ipynb`.
"""

from spd_lens.core import DecomposedWeight, Decomposition, decompose, decompose_layer
from spd_lens.data import Batch, TokenBatches, cache_residuals, load_tokens, pack_tokens
from spd_lens.evaluation import EvaluationReport, evaluate
from spd_lens.hosts import DeclaredSite
from spd_lens.objective import PGD
from spd_lens.statistics import harvest
from spd_lens.training import Reconstruction, TrainConfig, TrainResult, train

__version__ = "0.1.0"

__all__ = [
    "PGD",
    "Batch",
    "DeclaredSite",
    "DecomposedWeight",
    "Decomposition",
    "EvaluationReport",
    "Reconstruction",
    "TokenBatches",
    "TrainConfig",
    "TrainResult",
    "cache_residuals",
    "decompose",
    "decompose_layer",
    "evaluate",
    "harvest",
    "load_tokens",
    "pack_tokens",
    "train",
]
