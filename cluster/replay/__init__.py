"""Computing a recorded run again."""
