"""How linear layers hold and apply their weights."""
