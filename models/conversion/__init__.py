"""PyTorch's layers made into ours, and what else a network brings along besides parameters."""
