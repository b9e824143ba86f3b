"""The errors that `workers` raises for something its caller can put right."""


class InferenceError(ValueError):
    """Weights, rows or options that no answer can come from."""

    user_facing = True


class DeviceMissing(ValueError):
    """Replicas are to compute on a device that this process cannot use."""

    user_facing = True
