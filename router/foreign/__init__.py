"""Servers of others as nodes: OpenAI-compatible, reached by URL, dispatched to beside our own replicas."""
