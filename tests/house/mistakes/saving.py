"""Saving and loading."""

from __future__ import annotations

import torch

from spd_lens import Decomposition
from tests.house.mistakes.table import SITE, Table, file_in, result, saved
from tests.small_models import tiny_transformer

TABLE = Table()
add = TABLE.add

add("save file", lambda d, m, p: d.save_pretrained(file_in(p)))
add("save None", lambda d, m, p: d.save_pretrained(None))
add("save number", lambda d, m, p: d.save_pretrained(3))
add("save empty", lambda d, m, p: d.save_pretrained(""))
add("save bytes", lambda d, m, p: d.save_pretrained(b"x"))
add("save below file", lambda d, m, p: d.save_pretrained(file_in(p) / "x"))
add("save /proc", lambda d, m, p: d.save_pretrained("/proc/nope/x"))
add("save license None", lambda d, m, p: d.save_pretrained(p / "x", license=None))
add("save license number", lambda d, m, p: d.save_pretrained(p / "x", license=3))
add("save license empty", lambda d, m, p: d.save_pretrained(p / "x", license=""))
add("save license newline", lambda d, m, p: d.save_pretrained(p / "x", license="mit\ntags: [x]"))
add("save over foreign", lambda d, m, p: ((p / "spd_config.json").write_text("{}"), d.save_pretrained(p)))
add("save nan", lambda d, m, p: (d[SITE].V.data.fill_(float("nan")), d.save_pretrained(p / "x")))
add("load nothing", lambda d, m, p: Decomposition.from_pretrained(p / "x", tiny_transformer()))
add("load file", lambda d, m, p: Decomposition.from_pretrained(file_in(p), tiny_transformer()))
add("load None", lambda d, m, p: Decomposition.from_pretrained(None, tiny_transformer()))
add("load number", lambda d, m, p: Decomposition.from_pretrained(3, tiny_transformer()))
add("load swapped", lambda d, m, p: Decomposition.from_pretrained(tiny_transformer(), saved(d, p)))
add("load onto other", lambda d, m, p: Decomposition.from_pretrained(saved(d, p), tiny_transformer(seed=3)))
add("load onto itself", lambda d, m, p: Decomposition.from_pretrained(saved(d, p), m))
add("load onto fewer", lambda d, m, p: Decomposition.from_pretrained(saved(d, p), tiny_transformer(n_layers=1)))
add("load onto text", lambda d, m, p: Decomposition.from_pretrained(saved(d, p), "gpt2"))
add("load onto decomposition", lambda d, m, p: Decomposition.from_pretrained(saved(d, p), d))
add("load onto bf16", lambda d, m, p: Decomposition.from_pretrained(saved(d, p), tiny_transformer().to(torch.bfloat16)))
add("load onto meta", lambda d, m, p: Decomposition.from_pretrained(saved(d, p), tiny_transformer().to("meta")))
add("load revision", lambda d, m, p: Decomposition.from_pretrained(saved(d, p), tiny_transformer(), revision="main"))
add("load run", lambda d, m, p: Decomposition.from_pretrained(result(d, p).directory, tiny_transformer()))
add(
    "load checkpoint",
    lambda d, m, p: Decomposition.from_pretrained(
        result(d, p).directory / "checkpoints/step-00000002", tiny_transformer()
    ),
)
add(
    "load gate of own unneeded",
    lambda d, m, p: Decomposition.from_pretrained(saved(d, p), tiny_transformer(), gate="scalar"),
)
add("load gate number", lambda d, m, p: Decomposition.from_pretrained(saved(d, p), tiny_transformer(), gate=3))
add(
    "load unreadable",
    lambda d, m, p: (
        (saved(d, p) / "spd_config.json").unlink(),
        Decomposition.from_pretrained(p / "s", tiny_transformer()),
    ),
)
add(
    "load no tensors",
    lambda d, m, p: (
        (saved(d, p) / "subcomponents.safetensors").unlink(),
        Decomposition.from_pretrained(p / "s", tiny_transformer()),
    ),
)
