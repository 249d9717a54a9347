"""transformers' Trainer: a few steps on one text; reports the losses."""

import job
import torch
import transformers


def measure(item):
    ids = torch.from_numpy(job.load_ids(item))[0, :64]
    model = transformers.AutoModelForCausalLM.from_pretrained(item["path"], dtype=torch.float32)
    data = [{"input_ids": ids, "labels": ids}] * 8
    arguments = transformers.TrainingArguments(
        output_dir=item["folder"],
        max_steps=8,
        per_device_train_batch_size=1,
        learning_rate=2e-3,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        seed=0,
    )
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=data)
    trainer.train()
    return {"losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]}


job.run(measure, ["transformers", "accelerate"])
