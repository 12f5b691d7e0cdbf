"""Models: native implementations, found by architecture name."""
