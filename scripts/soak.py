"""Train 2,000 steps: memory, threads and open files must not grow. The long form of tests/runs/test_kills.py.

python scripts/soak.py                                  some minutes on one core; exits with 1 where memory grows
python scripts/soak.py precision=bf16 dataset.workers=2 with any override of luqrun
"""

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000, help="20 an epoch (default: %(default)s)")
    parser.add_argument("--warm-up", type=int, default=200, help="steps that do not count (default: %(default)s)")
    parser.add_argument("--bound", type=float, default=16.0, help="MiB that memory may grow (default: %(default)s)")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    options = parser.parse_args()
    if options.steps % 20 or options.steps < options.warm_up + 100 or options.warm_up < 0:
        parser.error("--steps: whole epochs of 20 steps, and 100 steps more than --warm-up")

    from shell import Shell
    from soaking import soak, summary

    with tempfile.TemporaryDirectory() as folder:
        shell = Shell(Path(folder) / "cache")
        samples = soak(shell, Path(folder), options.steps, *options.overrides)
        shell.close()
    found = summary(samples, options.warm_up)
    print(f"{options.steps} steps, {len(samples)} samples, {options.warm_up} steps of warm-up")
    for name, value in found.items():
        print(f"{name:48} {value:12.1f}")
    return 1 if found["growth MiB"] > options.bound else 0


if __name__ == "__main__":
    sys.exit(main())
