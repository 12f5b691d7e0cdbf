"""From an answer's text to its parts: reasoning, content, tool calls."""
