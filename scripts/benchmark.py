"""What 4-bit training costs here: encode kernels, layers, whole steps and memory, against what they replace.

python scripts/benchmark.py --out outputs/benchmark             20 minutes on two CPU cores
python scripts/benchmark.py --out DIR --quick                   minutes, most of them compiling: no speeds
python scripts/benchmark.py --out DIR --only encode,memory      the rest of DIR's record stays, if all is of one commit
"""

import argparse
from pathlib import Path

from luqrun.runtime.memory import keep_memory
from luqrun.runtime.openmp import limit_spinning

limit_spinning()  # before torch loads its OpenMP
keep_memory()  # as the command line does


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for benchmark.json, benchmark.md and step.svg")
    parser.add_argument("--quick", action="store_true", help="tiny sizes and few rounds")
    parser.add_argument(
        "--only", default="encode,layer,gemm,step,memory", help="sections, with commas (default: %(default)s)"
    )
    parser.add_argument("--models", default="", help="networks of step and memory, with commas (default: all)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--threads", type=int, help="threads of the CPU (default: torch's choice)")
    options = parser.parse_args()

    from luqrun.bench.run import REPORT, run
    from luqrun.bench.sections import IMAGES, SECTIONS, TOKENS
    from luqrun.errors import UserError, check_at_least
    from luqrun.quant.kernels.cpu.process import keep_threads

    chosen = {}
    for key, known in (("only", SECTIONS), ("models", (*IMAGES, *TOKENS))):
        chosen[key] = [name for name in getattr(options, key).split(",") if name]
        unknown = [name for name in chosen[key] if name not in known]
        if unknown:
            parser.error(f"--{key}: {', '.join(unknown)} is not known; allowed: {', '.join(known)}")
    try:
        if options.threads is not None:
            check_at_least("threads", options.threads, 1)
            keep_threads(options.threads)
        run(options.out, quick=options.quick, device=options.device, **chosen)
    except UserError as error:
        parser.error(str(error))
    print((options.out / REPORT).read_text().partition("## All ratios")[0])


if __name__ == "__main__":
    main()
