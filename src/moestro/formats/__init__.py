"""How checkpoints are stored and what others read of them: configs, named tensors and plain data in; knows no view."""
