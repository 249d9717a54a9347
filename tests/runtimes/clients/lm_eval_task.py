"""lm-eval: a task of a few local documents, scored by rolling log-likelihood; reports bits per byte."""

import json
from pathlib import Path

import job
import lm_eval
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

TASK = """
task: local_documents
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - metric: bits_per_byte
"""


def measure(item):
    folder = Path(item["folder"])
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / "documents.jsonl"
    data.write_text("\n".join(json.dumps({"text": text}) for text in item["texts"]))
    (folder / "local_documents.yaml").write_text(TASK.format(data=data))
    # the first token is conditioned on the beginning-of-text token, which lm-eval puts there itself
    model = HFLM(pretrained=item["path"], dtype="float32", device="cpu", batch_size=1, add_bos_token=False)
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    result = lm_eval.simple_evaluate(model=model, tasks=["local_documents"], task_manager=manager, bootstrap_iters=0)
    return {"bits_per_byte": result["results"]["local_documents"]["bits_per_byte,none"]}


job.run(measure, ["lm-eval", "transformers"])
