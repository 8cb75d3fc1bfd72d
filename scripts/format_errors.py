"""Error, bias, shrinkage and clipping of every quantizer, on drawn numbers and on the tensors of a layer in training.

python scripts/format_errors.py --out DIR                the default network and data, after one epoch in fp32
python scripts/format_errors.py --out DIR --layer NAME dataset=sentences            another layer, of a Transformer
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="where format_errors.json and .md go")
    parser.add_argument("--layer", help="of which layer (default: the last one but one)")
    parser.add_argument("--steps", type=int, default=79, help="of training before (default: %(default)s, an epoch)")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="as of luqrun")
    options = parser.parse_args()

    import torch

    from luqrun.bench import format_errors
    from luqrun.bench.settings import config_of
    from luqrun.errors import UserError
    from luqrun.quant.recipe import Recipe
    from luqrun.tasks import build_task
    from luqrun.tasks.loader import train_loader
    from luqrun.train import setup
    from luqrun.train.schedules import build_optimizer

    try:
        config = config_of(["quant=fp32", *options.overrides])
        task = build_task(config)
    except UserError as error:
        raise SystemExit(f"luqrun: {error}") from None
    model = setup.build(config, Recipe.from_config(config.quant), task, torch.device("cpu")).train()
    layers = [name for name, module in model.named_modules() if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear))]
    layer = options.layer or layers[-2]
    if layer not in layers:
        raise SystemExit(f"luqrun: --layer {layer} is not a layer; allowed: {', '.join(layers)}")
    optimizer = build_optimizer(model, config.schedule)
    batches = iter(train_loader(task.data, config.dataset, config.seed, 0))

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        task.loss(model, next(batches))[0].backward()
        optimizer.step()

    for _ in range(options.steps - 1):
        step()
    tensors = {**format_errors.drawn(), **format_errors.real(model, layer, step)}
    found = list(format_errors.format_errors(tensors))
    options.out.mkdir(parents=True, exist_ok=True)
    about = f"{config.model.name} on {config.dataset.name}, layer {layer}, step {options.steps}, seed {config.seed}"
    record = {"tensors": about, "errors": [asdict(each) for each in found]}
    (options.out / "format_errors.json").write_text(json.dumps(record, indent=1) + "\n")
    (options.out / "format_errors.md").write_text(format_errors.markdown(found))
    print(about + "\n\n" + format_errors.markdown(found))


if __name__ == "__main__":
    main()
