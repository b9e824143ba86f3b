"""Hangs: how long each wait may last, and what has waited for longer. Pure."""
