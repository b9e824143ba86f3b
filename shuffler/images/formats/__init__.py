"""Decoders of single formats that are faster than Pillow."""
