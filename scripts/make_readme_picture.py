"""The picture of the README: `python scripts/make_readme_picture.py` writes docs/subcomponents.png.

Nothing in it is invented. Above: run 0 of TMS 5-2 (`experiments/results/tms_5-2/run-000.safetensors`), the target's
matrix and the five subcomponents that SPD found, with the importances that its gates give. Below: subcomponent 521 of
`blocks.28.mlp.W_in` of SmolLM2-135M, as `make demo` printed it (`docs/demo.txt`).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spd_lens.support import read_tensors

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ROOT = Path(__file__).resolve().parents[1]
RUN = ROOT / "experiments" / "results" / "tms_5-2" / "run-000.safetensors"
SITE, SUBCOMPONENT = "blocks.28.mlp.W_in", 521
FEATURE = 2
BLUE, GREY = "#30509a", "#c8c8c8"


def main() -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(10.4, 6.6))
    tensors = read_tensors(RUN)
    W = tensors["target|W"].numpy()
    V, U = tensors["decomposition|W_enc.V"].numpy(), tensors["decomposition|W_enc.U"].numpy()
    importances = tensors["importance|W_enc"].numpy()  # [feature that is on, subcomponent]
    found = [int(row.argmax()) for row in importances]
    subcomponents = [V[:, [c]] @ U[[c]] for c in found]
    grid = figure.add_gridspec(2, 6, left=0.03, right=0.98, top=0.83, bottom=0.46, hspace=0.75, wspace=0.55)
    masks = importances[FEATURE][found]
    for row, (label, shown) in enumerate({"all masks 1": [1.0] * 5, "on one input": list(masks)}.items()):
        total = W if row == 0 else sum(m * part for m, part in zip(shown, subcomponents, strict=True))
        heat(figure.add_subplot(grid[row, 0]), total, "the weight W" if row == 0 else "what is used", faded=False)
        for i, (part, mask) in enumerate(zip(subcomponents, shown, strict=True)):
            axis = figure.add_subplot(grid[row, i + 1])
            heat(axis, part, f"mask {mask:.0f}", faded=mask < 0.5)
            axis.text(-0.42, 0.5, "=" if i == 0 else "+", transform=axis.transAxes, ha="center", va="center", size=17)
        y = 0.885 if row == 0 else 0.657
        figure.text(0.03, y, TITLES[label], size=11.5)
    figure.text(0.03, 0.95, "A weight is a sum of rank-one subcomponents", size=15, weight="bold")
    figure.text(0.03, 0.395, "A subcomponent has contexts, and its removal has an effect", size=15, weight="bold")
    contexts(figure.add_axes((0.03, 0.02, 0.52, 0.35)))
    effects(figure.add_axes((0.68, 0.08, 0.29, 0.22)))
    figure.savefig(ROOT / "docs" / "subcomponents.png", dpi=150, facecolor="white")


TITLES = {
    "all masks 1": "All masks 1: the sum is W, and the model is the model.",
    "on one input": "An input with one of five features on: one subcomponent is important, the others are masked.",
}


def heat(axis: Axes, matrix: Any, title: str, *, faded: bool) -> None:
    axis.imshow(matrix, cmap="RdBu", vmin=-1.2, vmax=1.2, aspect="auto", alpha=0.12 if faded else 1.0)
    axis.set(xticks=[], yticks=[])
    axis.set_title(title, size=10, color="#999999" if faded else "black")
    for spine in axis.spines.values():
        spine.set_color(GREY if faded else "black")


def contexts(axis: Axes) -> None:
    """The examples on which the subcomponent fires, the token marked."""
    axis.axis("off")
    text = (ROOT / "docs" / "demo.txt").read_text(encoding="utf-8")
    block = re.search(rf"{SITE} {SUBCOMPONENT}: on at (.*)\n((?:    .*\n)+)", text)
    assert block is not None
    axis.text(0, 0.9, f"{SITE} {SUBCOMPONENT} (SmolLM2-135M): on at {block[1]}", size=10.5, family="monospace")
    for i, line in enumerate(block[2].splitlines()):
        before, token, after = re.split(r"\[\[|\]\]", line.strip().split("  ", 1)[1].strip())
        y = 0.68 - 0.2 * i
        axis.text(0.62, y, before, ha="right", size=10.5, family="monospace")
        marked = {"boxstyle": "round,pad=0.15", "facecolor": "#ffd37a", "edgecolor": "none"}
        shown = axis.text(0.63, y, token, size=10.5, family="monospace", bbox=marked)
        axis.annotate(after, (1, 0), xycoords=shown, xytext=(4, 3), textcoords="offset points", size=10.5,
                      family="monospace")  # fmt: skip
    axis.text(0, 0.04, "It is on at the first part of a split word.", size=10.5)


def effects(axis: Axes) -> None:
    """Probabilities of the next token with and without the subcomponent."""
    text = (ROOT / "docs" / "demo.txt").read_text(encoding="utf-8")
    block = re.search(rf"without {SITE} {SUBCOMPONENT}, after '(.*)' .*\n((?:    .*\n)+)", text)
    assert block is not None
    rows = [re.findall(r"'(.*?)'|([\d.]+)%", line) for line in block[2].splitlines()[:4]]
    words = [row[0][0] for row in rows]
    before, after = ([float(row[i][1]) for row in rows] for i in (1, 2))
    places = range(len(words))
    axis.barh([p - 0.2 for p in places], before, height=0.36, color=GREY, label="with it")
    axis.barh([p + 0.2 for p in places], after, height=0.36, color=BLUE, label="ablated")
    axis.set_yticks(list(places), [f"bo|{word}" for word in words], family="monospace")
    axis.invert_yaxis()
    axis.set_xlabel("probability of the next token, %")
    axis.set_title("... the whole world bo|", size=10.5, family="monospace")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, loc="lower right")


if __name__ == "__main__":
    main()
