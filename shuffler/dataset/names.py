"""How data that are no files are named."""

from __future__ import annotations

from typing import Final

OWN_DATA: Final = "dataset:"
"""Begins the name of a dataset of the user's own, `dataset:module:function`."""
