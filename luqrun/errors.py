"""The one exception that stands for a user's mistake, and the checks that most often raise it."""


class UserError(ValueError):
    """A wrong setting, file or piece of data. Its text names the key or file and what is allowed.

    The command line prints the text alone, without a traceback; from Python it is a ValueError.
    """


class TensorError(UserError, RuntimeError):
    """What a quantized layer cannot compute, from tensors or calls that torch too answers with a RuntimeError."""


def check_choice(key: str, value: str, allowed) -> None:
    """Raise UserError naming `key` and what is allowed."""
    if value not in allowed:
        raise UserError(f"{key}={value} is not known; allowed: {', '.join(allowed)}")


def check_at_least(key: str, value: float, least: float) -> None:
    """Raise UserError if value < least."""
    if value < least:
        raise UserError(f"{key}={value} is too small; it must be at least {least}")


def check_at_most(key: str, value: float, most: float) -> None:
    """Raise UserError if value > most."""
    if value > most:
        raise UserError(f"{key}={value} is too large; it must be at most {most}")
