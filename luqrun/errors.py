"""The one exception that stands for a user's mistake."""


class UserError(ValueError):
    """A wrong setting, file or piece of data. Its text names the key or file and what is allowed.

    The command line prints the text alone, without a traceback; from Python it is a ValueError.
    """


class TensorError(UserError, RuntimeError):
    """What a quantized layer cannot compute, from tensors or calls that torch too answers with a RuntimeError."""
