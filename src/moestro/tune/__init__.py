"""Fine-tuning: regularisers, adapters as experts, what is unlearned."""
