"""The one error of the bridge."""


class BridgeError(ValueError):
    """A checkpoint cannot be read, converted or written; the message names the tensor, file or flag and what to do."""
