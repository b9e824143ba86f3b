"""Leases of windows: which replica trains on what, and how many replicas train."""
