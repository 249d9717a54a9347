"""accelerate: every second decoder layer on disk, the others in memory; logits."""

import job
import torch
import transformers


def measure(item):
    config = transformers.AutoConfig.from_pretrained(item["path"])
    names = ("embed_tokens", "norm", "rotary_emb")
    places = dict.fromkeys([*(f"model.{name}" for name in names), "lm_head"], "cpu")
    places |= {f"model.layers.{i}": "disk" if i % 2 else "cpu" for i in range(config.num_hidden_layers)}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        item["path"], dtype=torch.float32, device_map=places, offload_folder=item["folder"]
    )
    on_disk = sum(p.is_meta for p in model.parameters())
    assert on_disk, "nothing was put on disk"
    with torch.no_grad():
        job.save_logits(item, model(torch.from_numpy(job.load_ids(item))).logits)
    return {"parameters_on_disk": on_disk}


job.run(measure, ["accelerate", "transformers"])
