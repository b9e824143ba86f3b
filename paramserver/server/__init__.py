"""The thread that serves a partition."""
