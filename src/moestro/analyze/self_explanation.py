"""Let a model say what one of its Monet experts stands for.

    v = mean of the input embeddings of the tokens that activate expert (i, j), by their sum over heads of g1[i] g2[j]
    the model continues "The meaning of the word <v> is"

Monet: Mixture of Monosemantic Experts for Transformers (arXiv:2412.04139). What comes back is only as good as the model
that says it. Shapes: H hidden.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from moestro.models.monet import Parts, routers
from moestro.view.observe import as_batch

TEMPLATE = "The meaning of the word {} is"


@torch.no_grad()
def expert_embedding(model: Any, data: Iterable[Any], expert: tuple[int, int, int]) -> Float[Tensor, " h"]:
    """v of expert (group, left part, right part) over batches of token ids.

    Raises ValueError where no token activates it, or there is no such expert.
    """
    group, left, right = expert
    found = routers(model)
    if not (0 <= group < len(found) and all(0 <= part < found[0].parts for part in (left, right))):
        raise ValueError(f"expert {expert}: there are {len(found)} groups of {found[0].parts} x {found[0].parts}")
    embed: nn.Module = model.get_input_embeddings()
    total, mass = torch.zeros((), device=model.device), torch.zeros((), device=model.device)
    seen: list[Parts] = []
    training = model.training
    hook = found[group].register_forward_hook(lambda _, args, out: seen.append(out))
    try:
        model.eval()
        for item in data:
            batch, inputs = as_batch(item)
            inputs = {name: value.to(model.device) for name, value in inputs.items()}
            model.base_model(**inputs, use_cache=False)
            gates = seen.pop()
            weight = (gates.left[:, :, left] * gates.right[:, :, right]).sum(dim=1)
            kept = slice(None) if batch.kept is None else batch.kept.to(model.device)
            total = total + weight[kept] @ embed(inputs["input_ids"]).flatten(0, 1)[kept].float()
            mass = mass + weight[kept].sum()
    finally:
        hook.remove()
        model.train(training)
    if not mass > 0:
        raise ValueError(f"no token of the data activates expert {expert}; take an expert with mass, or more data")
    return total / mass


@torch.no_grad()
def explain(
    model: Any, tokenizer: Any, vector: Float[Tensor, " h"], *, template: str = TEMPLATE, max_new_tokens: int = 24
) -> str:
    """The model's greedy continuation of `template`, with the vector in the place of {}.

    Raises ValueError where the template does not have exactly one {}.
    """
    parts = template.split("{}")
    if len(parts) != 2:
        raise ValueError(f"template {template!r} has {len(parts) - 1} places for the word; give it one {{}}")
    before = tokenizer(parts[0].rstrip(" "))["input_ids"]
    after = tokenizer(parts[1], add_special_tokens=False)["input_ids"]
    embed = model.get_input_embeddings()
    around = [embed(torch.tensor(ids, dtype=torch.long, device=model.device)) for ids in (before, after)]
    embeds = torch.cat([around[0], vector.to(around[0])[None], around[1]])[None]
    mask = torch.ones(embeds.shape[:2], dtype=torch.long, device=model.device)
    out = model.generate(
        inputs_embeds=embeds,
        attention_mask=mask,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=tokenizer.eos_token_id,
    )
    return str(tokenizer.decode(out[0], skip_special_tokens=True))
