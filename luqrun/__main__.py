"""python -m luqrun is luqrun; torchrun -m luqrun needs it."""

from luqrun.cli import main

if __name__ == "__main__":
    main()
