"""The page on hardware from runs of job=cost: networks and recipes, the multiplier without multiplications, gates.

luqrun -m +experiment=hardware/paper                                       the runs; two minutes
python scripts/hardware.py outputs/paper/hardware --out outputs/published  hardware.md and hardware.json; some minutes
"""

import argparse
import json
import tempfile
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, help="a folder with runs of job=cost")
    parser.add_argument("--out", type=Path, required=True, help="where hardware.md and hardware.json go")
    parser.add_argument(
        "--recipes", default="luq,luq_smp2", help="that are trained without multiplications (default: %(default)s)"
    )
    options = parser.parse_args()

    from luqrun.bench import mfbprop
    from luqrun.bench.torch_counts import counts_of
    from luqrun.errors import UserError
    from luqrun.report import hardware

    try:
        records = hardware.read(options.runs)
        counts = counts_of(options.runs)
    except UserError as error:
        raise SystemExit(f"luqrun: {error}") from None
    with tempfile.TemporaryDirectory() as folder:
        multiplier = mfbprop.show(Path(folder), [name for name in options.recipes.split(",") if name])
    commands = [
        "luqrun -m +experiment=hardware/paper",
        "python scripts/hardware.py outputs/paper/hardware --out outputs/published",
    ]
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "hardware.md").write_text(hardware.page(records, counts, multiplier, commands))
    content = {"networks": records, "torch_counts": counts, "multiplier": multiplier}
    (options.out / "hardware.json").write_text(json.dumps(content, indent=1) + "\n")
    facts = [multiplier["signed"]["exact"], multiplier["unsigned"]["exact"], multiplier["gemms_equal"]]
    facts += [run["identical"] for run in multiplier["trained"]]
    facts += [(row["forward"], row["as_torch"]) == (row["torch_forward"], row["torch_backward"]) for row in counts]
    print(f"{options.out / 'hardware.md'}: {sum(facts)} of {len(facts)} facts hold")
    raise SystemExit(0 if all(facts) else 1)


if __name__ == "__main__":
    main()
