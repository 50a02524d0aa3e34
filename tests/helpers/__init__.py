"""What test modules share. Tiny models and token trees are in `benchmarks/common`, which benchmarks use too."""
