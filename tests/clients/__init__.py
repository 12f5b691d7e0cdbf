"""Clients that we did not write, unmodified, against a live server: `make test-clients`."""
