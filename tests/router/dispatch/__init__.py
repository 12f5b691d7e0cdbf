"""Tests of leases, dispatch and sessions."""
