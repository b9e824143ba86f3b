"""The controller's `Backend` on Ray."""
