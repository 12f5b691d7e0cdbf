"""Guarantees measured at one engine in this process, on its real device and clock: no Ray, no HTTP."""
