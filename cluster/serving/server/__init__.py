"""The HTTP server: its gate and line, batches on their way, and what a replica answers."""
