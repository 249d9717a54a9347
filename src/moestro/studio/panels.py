"""The studio's pictures as HTML: the map of tokens and layers, one token's experts, and the grids of switches.

Everything that can be clicked has `data-pick`: "token:T", "expert:LAYER:NUMBER" or "head:LAYER:NUMBER".
"""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

from jaxtyping import Float
from torch import Tensor

from moestro.sets import Member
from moestro.studio.session import Setting, Trace

MOST_TOKENS = 256
"""Tokens in the map; of a longer text the last ones."""
MARKS: dict[str, str] = {"off": "×", "boost": "▲"}


def token_map(trace: Trace, chosen: int | None = None) -> str:
    """One row a token, one column a layer: its first expert, in a colour as strong as its part of the gate weights."""
    layers = list(trace.experts)
    shares = {i: w[:, 0] / w.sum(dim=1).clamp_min(1e-9) for i, w in trace.weights.items()}
    first = {i: trace.experts[i][:, 0].tolist() for i in layers}
    head = "".join(f"<th>{i}</th>" for i in layers)
    start = max(0, len(trace.tokens) - MOST_TOKENS)
    rows = []
    for t in range(start, len(trace.tokens)):
        cells = "".join(f'<td style="--s:{float(shares[i][t]):.2f}">{first[i][t]}</td>' for i in layers)
        kind = "prompt" if t < trace.prompt else "made"
        own = " chosen" if t == chosen else ""
        rows.append(
            f'<tr class="{kind}{own}" data-pick="token:{t}" tabindex="0">'
            f"<th>{_visible(trace.tokens[t])}</th>{cells}</tr>"
        )
    note = f"<p>the last {MOST_TOKENS} of {len(trace.tokens)} tokens</p>" if start else ""
    return (
        f'{note}<div class="scroll"><table class="map"><thead><tr><th>token</th>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def token_detail(trace: Trace, token: int, settings: Mapping[Member, Setting]) -> str:
    """Every layer's experts of one token, with their gate weights."""
    rows = []
    for layer, experts in trace.experts.items():
        size = len(trace.counts[layer])
        chips = "".join(
            f'<button data-pick="expert:{layer}:{e}" class="chip {settings.get((layer, e), "")}" '
            f'style="--s:{w:.2f}">{MARKS.get(settings.get((layer, e), ""), "")}{e}<small>{w:.2f}</small></button>'
            for e, w in zip(experts[token].tolist(), trace.weights[layer][token].tolist())
            if e < size
        )
        rows.append(f"<tr><th>{layer}</th><td>{chips}</td></tr>")
    title = f"token {token}: <code>{_visible(trace.tokens[token])}</code>"
    return f'<h4>{title}</h4><div class="scroll"><table class="detail">{"".join(rows)}</table></div>'


def switch_grid(
    unit: str,
    sizes: Mapping[int, int],
    settings: Mapping[Member, Setting],
    shades: Mapping[int, Float[Tensor, " e"]] | None = None,
) -> str:
    """One row a layer, one cell an expert or head; the stronger the colour, the more it was used. A click switches."""
    widest = max(sizes.values(), default=0)
    rows = []
    for layer, size in sizes.items():
        shade = [0.0] * size
        if shades and layer in shades:
            values = shades[layer]
            shade = (values / values.max().clamp_min(1e-9)).sqrt().tolist()
        cells = "".join(_cell(unit, layer, n, settings.get((layer, n)), shade[n]) for n in range(size))
        rows.append(f'<div class="line"><b>{layer}</b>{cells}</div>')
    return f'<div class="scroll"><div class="grid" style="--n:{widest}">{"".join(rows)}</div></div>'


def _cell(unit: str, layer: int, number: int, setting: Setting | None, shade: float) -> str:
    told = {"off": ", off", "boost": ", boosted", None: ""}[setting]
    return (
        f'<button data-pick="{unit}:{layer}:{number}" class="{setting or ""}" style="--s:{shade:.2f}" '
        f'title="layer {layer}, {unit} {number}{told}">{MARKS.get(setting or "", "")}</button>'
    )


def _visible(token: str) -> str:
    return escape(token.replace("\n", "⏎").replace("\t", "⇥")).replace(" ", "·") or "∅"


PICK = """
const pick = (e) => {
  const found = e.target.closest('[data-pick]');
  if (found && element.contains(found)) { e.preventDefault(); trigger('select', {pick: found.dataset.pick}); }
};
element.addEventListener('click', pick);
element.addEventListener('keydown', (e) => { if (e.key === 'Enter') pick(e); });
"""
"""What a panel does when something in it is clicked."""

CSS = """
.panel .scroll { overflow: auto; max-height: 30rem; }
.panel table { border-collapse: collapse; font-size: 12px; width: auto; margin: 0; }
.panel table, .panel th, .panel td { border: 1px solid var(--border-color-primary) !important; }
.panel .map th { position: sticky; left: 0; background: var(--background-fill-primary); text-align: right;
  color: var(--body-text-color); font-family: monospace; font-weight: 400; padding: 0 6px; white-space: nowrap; }
.panel .map thead th { top: 0; z-index: 2; position: sticky; }
.panel .map td { min-width: 2.1em; text-align: center; padding: 1px 3px;
  background: color-mix(in srgb, #0072b2 calc(var(--s) * 75%), transparent); }
.panel .map tbody tr { cursor: pointer; }
.panel .map tr.made th { font-weight: 700; }
.panel .map tbody tr:hover, .panel .map tbody tr:focus, .panel .map tr.chosen { outline: 2px solid #d55e00; }
.panel .detail th { padding-right: 8px; text-align: right; }
.panel .chip { margin: 1px 3px; padding: 1px 6px; border-radius: 9px; border: 1px solid var(--border-color-primary);
  background: color-mix(in srgb, #0072b2 calc(var(--s) * 75%), transparent); }
.panel .chip small { margin-left: 4px; opacity: .75; }
.panel .grid { width: max-content; }
.panel .line { display: flex; align-items: center; }
.panel .line b { width: 2.2em; font-size: 11px; text-align: right; padding-right: 5px; font-weight: 500; }
.panel .grid button { width: 15px; height: 15px; margin: 0 1px 1px 0; padding: 0; font-size: 11px; line-height: 13px;
  border: 1px solid var(--border-color-primary);
  background: color-mix(in srgb, #0072b2 calc(var(--s) * 85%), transparent); }
.panel .off { background: #d55e00 !important; color: white; }
.panel .boost { background: #009e73 !important; color: white; }
.panel button:hover, .panel button:focus-visible { outline: 2px solid currentColor; }
"""
