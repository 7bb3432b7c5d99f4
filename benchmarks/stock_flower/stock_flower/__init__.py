"""The app that `benchmarks/round_overhead.py` has stock Flower run."""
