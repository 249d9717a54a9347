"""Started by tests/test_lm.py in a process of its own: torch.compile cannot look through run-time type checks."""

import torch
from torch.testing import assert_close

from native_lm import small_lm, token_ids

if __name__ == "__main__":
    torch.set_num_threads(1)
    ids, hidden = token_ids(), torch.randn(2, 8, 32)
    for experts in ("grouped_mm", "batched_mm"):
        model = small_lm(initializer_range=0.05)
        model.set_experts_implementation(experts)
        block = model.model.layers[0].mlp.eval()
        compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
        with torch.no_grad():
            assert_close(compiled(hidden), block(hidden))
        block.train()
        gradients = []
        for run in (compiled, block):
            block.zero_grad()
            run(hidden).square().sum().backward()
            gradients.append([p.grad.clone() for p in block.parameters()])
        for a, b in zip(*gradients):
            assert_close(a, b, rtol=1e-4, atol=1e-5)
        torch.compiler.reset()
        print(experts, "compiles in one graph")
    model = small_lm()
    for training in (False, True):
        model.train(training)
        compiled = torch.compile(model, backend="aot_eager")
        with torch.set_grad_enabled(training):
            ours, plain = (m(input_ids=ids, labels=ids, use_cache=False).loss for m in (compiled, model))
        assert_close(ours, plain)
    print("moestro runs")
