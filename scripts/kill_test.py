"""Kill runs at random instants and show that they end bit-identical: the long form of tests/runs/test_kills.py.

python scripts/kill_test.py --kills 200                 about ten minutes on one core; exits with 1 if a run differs
python scripts/kill_test.py --kills 20 --only bf16      variants with bf16 in their name
"""

import argparse
import os
import random
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="in all variants together (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the instants (default: %(default)s)")
    parser.add_argument("--only", default="", help="variants whose name contains this")
    parser.add_argument(
        "--images", type=int, default=160, help="or sentences, of an epoch: how long a run is (default: %(default)s)"
    )
    parser.add_argument("--work", type=Path, help="folder for the runs, to be looked at (default: a temporary one)")
    options = parser.parse_args()

    from kills import VARIANTS, Tally, kill_variant
    from shell import Shell

    chosen = [name for name in VARIANTS if options.only in name]
    if not chosen or options.kills < len(chosen):
        parser.error(f"--only, --kills: at least one kill of each of the variants {'; '.join(chosen or VARIANTS)}")
    width, total = max(map(len, chosen)), Tally()
    print(f"{'variant':{width}}  kills  survived  runs  where they came")
    with tempfile.TemporaryDirectory() as temporary:
        root = options.work or Path(temporary)
        shell = Shell(root / "cache")
        for number, name in enumerate(chosen):
            folder = root / f"variant{number}"
            os.makedirs(folder)
            share = options.kills // len(chosen) + (number < options.kills % len(chosen))
            rng = random.Random(f"{options.seed} {name}")
            length = "dataset.examples" if "translation" in name else "dataset.glyphs.train_images"
            tally = kill_variant(shell, folder, (*VARIANTS[name], f"{length}={options.images}"), share, rng)
            total.add(tally)
            print(f"{name:{width}}  {tally.row()}", flush=True)
            for difference in tally.differences:
                print(f"  {difference}", flush=True)
        shell.close()
    print(f"{'all':{width}}  {total.row()}")
    return 1 if total.differences else 0


if __name__ == "__main__":
    sys.exit(main())
