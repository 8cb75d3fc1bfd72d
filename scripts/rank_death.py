"""Seconds from a rank's death to the end of its job: kills a rank of a job of two, again and again.

python scripts/rank_death.py --deaths 10                some minutes on two cores; exits with 1 if a job does not end
"""

import argparse
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--deaths", type=int, default=10, help="how often (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of ranks and instants (default: %(default)s)")
    options = parser.parse_args()

    from jobs import finish, processes_of, reached, start

    rng, seconds = random.Random(options.seed), []
    for _ in range(options.deaths):
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            job = start(folder, 2, "schedule.epochs=100")
            step, victim = rng.randint(2, 20), rng.randint(0, 1)
            reached(folder, step)
            os.kill(processes_of(job)[victim], signal.SIGKILL)
            killed = time.monotonic()
            code, _ = finish(job, folder)
            seconds.append(time.monotonic() - killed)
            print(f"rank {victim}, step {step}: exit code {code} after {seconds[-1]:.1f} s", flush=True)
            if code == 0:
                return 1
    print(f"median {statistics.median(seconds):.1f} s, longest {max(seconds):.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
