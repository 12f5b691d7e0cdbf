"""Text to tokens and back. Needs the tokenizers library only; knows no HTTP and no requests."""
