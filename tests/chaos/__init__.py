"""The chaos bench: streams of known text, faults with a seed, and the books at the end.

`python -m chaos` runs it (`make chaos`); docs/reliability.md says what is measured and how.
"""
