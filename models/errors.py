"""The errors that `models` raises for something its caller can put right.

All are `ModelError`, hence `ValueError`; each message is one line that names the value and the
remedy. Broken invariants of our own are `AssertionError`s and are not here.
"""


class ModelError(ValueError):
    """Root of the tree: the model, or what was given to it, cannot be used as it is."""

    user_facing = True


class BatchError(ModelError):
    """A batch has a shape or a length that the layer cannot take."""


class MomentsError(ModelError):
    """Statistics cannot be merged, or were asked for before there were enough values."""


class LayoutError(ModelError):
    """A model cannot be laid out flat, or a buffer or checkpoint does not match its layout."""


class FoldError(ModelError):
    """A batch normalization layer has no layer before it that it can be folded into."""


class RegistryError(ModelError):
    """A model's name or its arguments are unknown, or a user's factory failed."""
