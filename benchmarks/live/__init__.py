"""Figures of a running cluster: real Ray Serve, the demo model, real HTTP."""
