"""Which replica serves a request: leases, the replica table, expected latency, and the wire between them."""
