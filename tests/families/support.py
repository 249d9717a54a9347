"""What moestro can do with each family: the source of docs/families.md (`python -m tests.families.support`)."""

from pathlib import Path

from . import tiny

UNSUPPORTED: dict[str, str] = {
    "inkling": "its router weighs the chosen experts and the shared ones in one sum, which no routing rule describes",
}
"""{family: why `moestro.open` refuses it}"""

NO_SURGERY: dict[str, str] = {
    "deepseek_v4": "its first MoE layers look experts up by token id, so none can be removed there",
    "diffusion_gemma": "encoder and decoder share their expert weights, so none can be removed from one alone",
    "ernie4_5_vl_moe": 'its config states one number of experts for text and vision: open both (`part="all"`) and '
    "keep as many in each",
}
"""{family: why `keep_experts` on one view is refused, or its result cannot be saved}. Observing and editing work."""

FIXED_TOP_K: dict[str, str] = {
    "phimoe": "SparseMixer is written for two experts per token",
    "zaya": "transformers allows one expert per token only",
}
"""{family: why `set_top_k` is refused}"""

NO_GREEDY_GENERATE: dict[str, str] = {"diffusion_gemma": "its `generate`, which denoises whole blocks, is not tested"}

_SEVERAL_STREAMS = "its layers mix several residual streams: no easy-ep there, use reap"
NO_RESIDUAL: dict[str, str] = {
    **dict.fromkeys(("deepseek_v4", "glm5_next", "hy_v4", "inkling2", "qwen4_exp"), _SEVERAL_STREAMS),
    "minimax": "its layers normalise the residual stream itself: no easy-ep there, use reap",
}
"""{family: why observers that need the residual stream are refused}"""

LEFT_PADDING: dict[str, str] = {
    family: "in transformers itself, left padding changes what its tokens compute"
    for family in ("deepseek_v4", "hunyuan_v1_moe", "minimax", "mistral_large4")
}
"""{family: why statistics of a left-padded batch are those of other tokens}. Padding is never counted there either."""

NO_PATTERN: dict[str, str] = {
    "granitemoe_swa": "its eager attention gives no pattern that makes the heads' output: heads can be observed and "
    "masked, patterns neither read nor forced",
    "unlimited_ocr": "its eager attention does not know grouped queries: heads can be observed and masked, patterns "
    "neither read nor forced",
}
"""{family: why attention patterns are refused}"""

LIMITS = (UNSUPPORTED, NO_SURGERY, FIXED_TOP_K, NO_GREEDY_GENERATE, NO_RESIDUAL)

DOCS = Path(__file__).parents[2] / "docs" / "families.md"


def supported() -> list[str]:
    return [family for family in tiny.families() if family not in UNSUPPORTED]


def markdown() -> str:
    """The page docs/families.md."""
    families = tiny.families()
    whole = [f for f in families if f not in {name for note in LIMITS for name in note}]
    rest = len(families) - len(whole)
    lines = [
        "# Model families",
        "",
        f"transformers has {len(families)} model families with an experts class. For each, `tests/families` builds a",
        "tiny random model and runs every seam on it: open and verify the routing rule, observe (padded batches too),",
        "edit and undo, the same for attention heads, `generate` under an edit, the `moestro` experts backend, bf16,",
        "models inside larger ones, keep",
        "half of the experts, change top-k, save, and reload in plain transformers.",
        "",
        f"{len(whole)} families pass all of it. What the other {rest} cannot do is refused with its reason, and",
        "nothing is changed then. No language model in transformers stores a number of experts by layer: keep the same",
        "number everywhere, or let `pad_to_uniform` fill the smaller layers.",
        "",
        "| family | class | open, observe, edit | keep experts, save | top-k | notes |",
        "|---|---|---|---|---|---|",
    ]
    for family in families:
        reasons = [note[family] for note in (*LIMITS, NO_PATTERN, LEFT_PADDING) if family in note]
        cells = [
            "no" if family in UNSUPPORTED else "yes",
            "no" if family in UNSUPPORTED or family in NO_SURGERY else "yes",
            "no" if {family} & {*UNSUPPORTED, *NO_SURGERY, *FIXED_TOP_K} else "yes",
        ]
        name = tiny.model_class(family).__name__
        lines.append(f"| {family} | {name} | {' | '.join(cells)} | {'; '.join(reasons)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    DOCS.write_text(markdown())
