"""python -m luqrun is luqrun; torchrun -m luqrun needs it."""

import gc


def main() -> None:
    """The `luqrun` command."""
    # What is loaded stays: looking through it for garbage again and again is a quarter of the time until --help shows.
    gc.disable()
    try:
        from luqrun import cli
    finally:
        gc.enable()
    cli.main()


if __name__ == "__main__":
    main()
