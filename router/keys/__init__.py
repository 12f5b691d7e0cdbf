"""API keys: the file that lists them, the ring that is looked up, its reload, and who a request's key makes it."""
