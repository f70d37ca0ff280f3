"""Pictures: importance of subcomponents over the tokens of a text, as a figure and as a self-contained HTML page.

matplotlib is imported when a figure is drawn (extra `plots`). All text that comes from models or data is escaped.
"""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxtyping import Float
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Importances below this are not worth a row.
SHOWN_ABOVE = 0.1


def strongest(importance: Float[Tensor, "pos C"], n: int) -> list[int]:
    """Ids of at most `n` subcomponents with importance above 0.1 somewhere, in the order of where they peak."""
    peak, where = importance.max(dim=0)
    chosen = peak.argsort(descending=True, stable=True)[:n]
    chosen = chosen[peak[chosen] > SHOWN_ABOVE]
    return sorted((int(c) for c in chosen), key=lambda c: (int(where[c]), c))


def importance_figure(
    importances: Mapping[str, Float[Tensor, "pos C"]], tokens: Sequence[str], *, rows_per_site: int = 16
) -> Figure:
    """A heat map per site: tokens across, the strongest subcomponents down, colour = importance in [0, 1]."""
    import matplotlib.pyplot as plt

    ids = {name: strongest(g, rows_per_site) for name, g in importances.items()}
    heights = [max(1, len(chosen)) for chosen in ids.values()]
    width = min(16.0, 3.0 + 0.42 * len(tokens))
    figure, axes = plt.subplots(
        len(ids),
        1,
        figsize=(width, 1.6 + 0.24 * sum(heights) + 0.3 * len(ids)),
        gridspec_kw={"height_ratios": heights},
        sharex=True,
        squeeze=False,
        layout="constrained",
    )
    image = None
    for axis, (name, chosen) in zip(axes[:, 0], ids.items(), strict=True):
        axis.set_title(f"{name}: {len(chosen)} strongest of {importances[name].shape[1]}", loc="left", fontsize=10)
        if not chosen:
            axis.text(0.5, 0.5, "no importance above 0.1", ha="center", va="center", transform=axis.transAxes)
            axis.set_yticks([])
            continue
        values = importances[name][:, chosen].T.detach().float().cpu().numpy()
        image = axis.imshow(values, aspect="auto", cmap="magma_r", vmin=0, vmax=1, interpolation="nearest")
        axis.set_yticks(range(len(chosen)), [str(c) for c in chosen], fontsize=7)
        axis.set_ylabel("subcomponent", fontsize=8)
    labels = [_visible(token) for token in tokens]
    axes[-1, 0].set_xticks(range(len(tokens)), labels, rotation=60, ha="right", rotation_mode="anchor", fontsize=8)
    if image is not None:
        figure.colorbar(image, ax=axes[:, 0].tolist(), label="importance", shrink=0.6, pad=0.01)
    return figure


def _visible(token: str) -> str:
    # matplotlib would read $ as the start of a formula.
    return token.replace("\n", "⏎").replace("\t", "⇥").replace("$", r"\$").strip(" ") or "␣"


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>__TITLE__</title><style>
body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:70rem;padding:0 1rem;color:#222}
h1{font-size:1.3rem} h2{font-size:1rem;margin:1.6rem 0 .3rem;font-family:ui-monospace,monospace}
.text{font:16px/2 ui-monospace,monospace;white-space:pre-wrap;border:1px solid #ddd;border-radius:6px;padding:.6rem;
position:sticky;top:0;background:#fff}
.text span{border-radius:3px;padding:1px 0} .chips button{font:12px ui-monospace,monospace;margin:2px;padding:2px 7px;
border:1px solid #bbb;border-radius:10px;background:#f6f6f6;cursor:pointer}
.chips button.on{background:#7a1f6b;color:#fff;border-color:#7a1f6b} .note{color:#666;font-size:13px}
</style></head><body><h1>__TITLE__</h1>
<p class="note">Click a subcomponent to colour the text by its importance (white 0, purple 1); hover over a token for the
value. Nothing chosen: the number of active subcomponents, relative to the most at any token.</p>
<div class="text" id="text"></div><div id="sites"></div>
<script type="application/json" id="data">__DATA__</script><script>
const data=JSON.parse(document.getElementById('data').textContent);
const text=document.getElementById('text'),sites=document.getElementById('sites');let chosen=null;
const spans=data.tokens.map(t=>{const s=document.createElement('span');s.textContent=t;text.append(s);return s});
function paint(values,label){const top=label?1:Math.max(...values,1);
spans.forEach((s,i)=>{const v=values[i]/top;s.style.background=`rgba(122,31,107,${0.75*v})`;
s.style.color=v>.6?'#fff':'';s.title=(label||'active subcomponents')+': '+(label?values[i].toFixed(3):values[i])})}
function overview(){paint(data.tokens.map((_,i)=>data.sites.reduce((n,s)=>n+s.active[i],0)),null)}
data.sites.forEach(site=>{const h=document.createElement('h2');h.textContent=site.name;
const p=document.createElement('div');p.className='chips';
site.rows.forEach(row=>{const b=document.createElement('button');b.textContent=row.id;
b.onclick=()=>{const same=chosen===b;if(chosen)chosen.classList.remove('on');
if(same){chosen=null;overview()}else{chosen=b;b.classList.add('on');paint(row.values,site.name+' '+row.id)}};p.append(b)});
if(!site.rows.length)p.textContent='no importance above 0.1';sites.append(h,p)});overview();
</script></body></html>
"""


def importance_page(
    importances: Mapping[str, Float[Tensor, "pos C"]],
    tokens: Sequence[str],
    *,
    title: str = "Importance of subcomponents",
    rows_per_site: int = 64,
) -> str:
    """A self-contained HTML page: the text, and buttons that colour it by one subcomponent's importance."""
    sites: list[dict[str, Any]] = []
    for name, g in importances.items():
        rows = [{"id": c, "values": [round(float(v), 3) for v in g[:, c]]} for c in sorted(strongest(g, rows_per_site))]
        sites.append({"name": name, "rows": rows, "active": (g > SHOWN_ABOVE).sum(-1).tolist()})
    # "</" would end the script element early, whatever the text says.
    data = json.dumps({"tokens": list(tokens), "sites": sites}).replace("</", "<\\/")
    before, after = _PAGE.replace("__TITLE__", html.escape(title)).rsplit("__DATA__", 1)
    return before + data + after


def save_importance(
    importances: Mapping[str, Float[Tensor, "pos C"]], tokens: Sequence[str], directory: str | Path, *, title: str
) -> tuple[Path, Path]:
    """Write `importance.png` and `importance.html` to `directory`; returns both paths."""
    import matplotlib.pyplot as plt

    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    picture, page = directory / "importance.png", directory / "importance.html"
    figure = importance_figure(importances, tokens)
    figure.suptitle(title, fontsize=11)
    figure.savefig(picture, dpi=130)
    plt.close(figure)
    page.write_text(importance_page(importances, tokens, title=title), encoding="utf-8")
    return picture, page
