"""Nodes that are to leave, and until when what is out there may be finished. Pure."""
