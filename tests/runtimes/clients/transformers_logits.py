"""Logits of plain transformers: whatever the checkpoint misses or has too much is an error."""

import job
import torch
import transformers


def measure(item):
    options = {"torch_dtype": getattr(torch, item["dtype"])}
    model, info = transformers.AutoModelForCausalLM.from_pretrained(item["path"], output_loading_info=True, **options)
    problems = {key: sorted(map(str, info[key]))[:4] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    problems = {key: names for key, names in problems.items() if names}
    with torch.no_grad():
        logits = model.eval()(torch.from_numpy(job.load_ids(item))).logits
    job.save_logits(item, logits.float())
    return {
        "experts": getattr(model.config, "num_experts", getattr(model.config, "num_local_experts", None))
    } | problems


job.run(measure, ["transformers", "torch"])
