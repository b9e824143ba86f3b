"""Datasets on disk: shards, rows, manifests."""
