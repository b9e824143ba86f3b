"""Formats of sources: each opened to the same few facts and a stream of batches."""
