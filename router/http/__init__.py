"""The OpenAI-compatible front: one ASGI application over a `Generator`."""
