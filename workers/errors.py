"""The errors that `workers` raises for something its caller can put right."""


class InferenceError(ValueError):
    """Weights, rows or options that no answer can come from."""

    user_facing = True
