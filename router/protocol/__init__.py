"""What travels over HTTP: bodies, errors, events. No sockets, no tokens."""
