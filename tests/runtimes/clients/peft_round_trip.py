"""PEFT: LoRA on attention and experts, two steps, merged and saved; reports the logits of the merged model."""

import json
from pathlib import Path

import job
import peft
import torch
import transformers


def measure(item):
    ids = torch.from_numpy(job.load_ids(item))
    model = transformers.AutoModelForCausalLM.from_pretrained(item["path"], dtype=torch.float32)
    experts = [name for name, p in model.named_parameters() if p.dim() == 3 and "experts" in name]
    config = peft.LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "v_proj"],
        target_parameters=sorted({".".join(name.split(".")[-2:]) for name in experts}),
        init_lora_weights=False,
    )
    torch.manual_seed(0)
    adapted = peft.get_peft_model(model, config)
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for _ in range(3):
        loss = adapted(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    with torch.no_grad():
        with_adapter = adapted.eval()(ids).logits
        merged = adapted.merge_and_unload().eval()
        job.save_logits(item, merged(ids).logits)
        difference = (merged(ids).logits - with_adapter).abs().max().item()
    merged.save_pretrained(item["merged"])
    assert json.loads((Path(item["merged"]) / "config.json").read_text())["architectures"]
    return {"losses": losses, "merge_difference": difference, "expert_adapters": len(experts)}


job.run(measure, ["peft", "transformers"])
