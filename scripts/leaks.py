"""Whether a sweep leaks from job to job: memory, tensors, threads and file handles after each of its jobs (Linux).

python scripts/leaks.py --out DIR                       20 jobs in one process, four networks in turn: some minutes
python scripts/leaks.py --out DIR quant=fp32,luq        overrides of luqrun, instead of the four networks
"""

import argparse
import json
import sys
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for leaks.jsonl and the runs; not one in use")
    parser.add_argument("--repeats", type=int, default=5, help="seeds of each job (default: %(default)s)")
    parser.add_argument("overrides", nargs="*", default=["model=resnet8,mobilenet_tiny,resnext8,vit_tiny"])
    options = parser.parse_args()
    options.out.mkdir(parents=True)  # runs that are there already would not run again
    record = options.out.resolve() / "leaks.jsonl"

    from luqrun.cli import command

    small = ("schedule.epochs=1", "finetune=none", "dataset.glyphs.train_images=1280", "dataset.glyphs.val_images=940")
    measure = "+hydra.callbacks.leaks._target_=luqrun.bench.leaks.Measure", f"+hydra.callbacks.leaks.path={record}"
    places = f"hydra.sweep.dir={options.out}/runs", f"seed=range({options.repeats})"
    sys.argv[1:] = ["-m", *places, *measure, *small, *options.overrides]
    command.main()
    rows = [json.loads(line) for line in record.read_text().splitlines()]
    print("\n" + "  ".join(rows[0]))
    for row in rows:
        print("  ".join(f"{value:>{len(name)}}" for name, value in row.items()))


if __name__ == "__main__":
    main()
