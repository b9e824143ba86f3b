"""Gradients and weights in few bits: what `network` sends, and what a replay does again. Pure."""
