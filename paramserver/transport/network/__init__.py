"""TCP between a partition and processes on other machines: who may talk, and what they say."""
