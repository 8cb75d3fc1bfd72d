"""Compare the GEMMs of random layers with int64 arithmetic, bit for bit: long form of tests/quant/test_exactness.py.

python scripts/exactness.py                     2,000 layers, some minutes; exits with 1 where a number is wrong
python scripts/exactness.py --cases 100 --seed 7
MALLOC_PERTURB_=165 MALLOC_CHECK_=3 LD_PRELOAD=libc_malloc_debug.so.0 python scripts/exactness.py

The last also notices memory that is written outside its bounds or read before it is written (glibc 2.34; before,
without LD_PRELOAD). Each unit (our own blocks, products of patches, oneDNN's convolution, floating point) is tried on
any CPU that has it, whether or not layers there would take it.
"""

import argparse
import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=2000, help="random layers (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="others with each (default: %(default)s)")
    options = parser.parse_args()
    if options.cases < 1:
        parser.error("--cases: at least 1")

    from exactness import Tally, compare, draw

    from luqrun.quant.kernels import own_process

    own_process()  # the kernels are those of the command line

    # The table counts what the units were not taken for; a line for each would hide it.
    logging.getLogger("luqrun.quant.kernels.cpu.proofs").setLevel(logging.ERROR)
    tally = Tally()
    for number in range(options.cases):
        compare(draw(number, options.seed), tally)
    print(f"{options.cases} random layers, seed {options.seed}")
    print(tally.table())
    print(*tally.failures[:20], sep="\n")
    return 1 if tally.failures else 0


if __name__ == "__main__":
    sys.exit(main())
