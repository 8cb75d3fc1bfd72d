"""python -m luqrun is luqrun; torchrun -m luqrun needs it."""

import gc
import sys


def main() -> None:
    """The `luqrun` command."""
    # What is loaded stays: looking through it for garbage again and again is a quarter of the time until --help shows.
    gc.disable()
    try:
        from luqrun.cli import command
    except KeyboardInterrupt:  # later ones are cli's to answer
        print("luqrun: interrupted before the run began", file=sys.stderr)
        sys.exit(130)
    finally:
        gc.enable()
    command.main()


if __name__ == "__main__":
    main()
