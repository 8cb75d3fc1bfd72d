"""What only a GPU can show, in one command: bits, exactness, tests, bandwidth, steps and memory, in this order.

python scripts/gpu_check.py --minutes 12 --out DIR      writes gpu_check.json and gpu_check.md after every finding
python scripts/gpu_check.py --device cpu --out DIR      the same lines on tiny sizes, to see that they work: no numbers

Each line runs in a process of its own within its share of the time: what fails, crashes or takes too long ends no
other. Exit code: 1 where a line failed or found something wrong, 2 where there is no GPU.
"""

import argparse
import sys
from pathlib import Path

from luqrun.runtime.memory import keep_memory
from luqrun.runtime.openmp import limit_spinning

limit_spinning()  # before torch loads its OpenMP
keep_memory()  # as the command line does


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for gpu_check.json and gpu_check.md")
    parser.add_argument("--minutes", type=float, default=12.0, help="at most (default: %(default)g)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    options = parser.parse_args()
    if not options.minutes > 0:
        parser.error("--minutes: more than 0")

    import torch

    if options.device == "cuda" and not torch.cuda.is_available():
        print(
            "torch finds no GPU here: nothing is checked (--device cpu tries the lines on tiny sizes)", file=sys.stderr
        )
        return 2

    from luqrun.bench.gpu_check import REPORT, run
    from luqrun.bench.gpu_lines import SIZES, lines
    from luqrun.errors import UserError

    device = torch.device(options.device)
    try:
        results = run(options.out, lines(device), SIZES[device.type], device, options.minutes)
    except UserError as error:
        parser.error(str(error))
    print((options.out / REPORT).read_text())
    return 1 if any(result.right is False for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
