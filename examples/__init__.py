"""Examples of what users write."""
