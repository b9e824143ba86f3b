"""Clusters: their files checked, jobs submitted to them."""
