"""The errors that a user can cause in this package, named by cause.

    ShufflerError(ValueError)
    ├── PlanError      a plan or a permutation that cannot be laid out, or is asked beyond its end
    ├── LeaseError     a lease that does not exist, or a resume state that does not fit the plan
    ├── DatasetError   a dataset that is missing, damaged, mixed or out of range
    │   └── BadValueError    a value of a table that cannot be an input or a target
    ├── DecodeError    a row whose image cannot become an input
    │   ├── ImageTooLarge    an image that would take too much memory or time
    │   └── UnknownFormat    bytes that are no image of a format that is read
    └── IngestError    a source that cannot be read, or a destination that must not be written

Every message is one line that names the value and the remedy. Nothing else lives here.
"""


class ShufflerError(ValueError):
    """Base of every error that this package raises for a cause outside its own code."""

    user_facing = True


class PlanError(ShufflerError):
    """A plan that cannot be laid out, or an epoch, index or window beyond its end."""


class LeaseError(ShufflerError):
    """A lease that was never granted, or a resume state that does not fit the plan."""


class DatasetError(ShufflerError):
    """A dataset that is missing, damaged, mixed, or holds a value out of range."""


class DecodeError(ShufflerError):
    """A row whose image cannot be decoded, or does not have the shape asked for."""


class ImageTooLarge(DecodeError):
    """An image whose header asks for more memory or time than one image may take."""


class UnknownFormat(DecodeError):
    """Bytes that are no image of a format that is read."""


class IngestError(ShufflerError):
    """A source that cannot be read, or a destination that must not be written."""


class BadValueError(DatasetError):
    """A value of a table cannot be a number of an input or a target."""

    def __init__(self, position: int, what: str) -> None:
        """`position` is the row's among those that were packed."""
        super().__init__(what)
        self.position = position
        self.what = what
