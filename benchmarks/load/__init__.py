"""What `throughput.py`, `latency.py`, `serving.py` and `compare_transformers.py` share: work, targets, figures."""
