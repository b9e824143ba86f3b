"""The parts of a run: each looks after one kind of member, or after checkpoints. Pure."""
