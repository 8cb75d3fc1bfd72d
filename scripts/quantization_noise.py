"""What 4 bits cost a network before it is trained, on one batch: relative errors of its activations, and the noise of
its gradients.

python scripts/quantization_noise.py                                       the default network and data
python scripts/quantization_noise.py dataset=squad dataset.root=DIR model.weights=DIR2
"""

import argparse
from functools import partial


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=16, help="of gradients, at most (default: %(default)s)")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="as of luqrun")
    options = parser.parse_args()

    import torch

    from luqrun.bench import activation_errors, gradient_noise
    from luqrun.bench.settings import config_of
    from luqrun.errors import UserError
    from luqrun.quant.recipe import Recipe
    from luqrun.tasks import build_task
    from luqrun.tasks.loader import train_loader
    from luqrun.train import setup

    try:
        config = config_of(options.overrides)
        task = build_task(config)
        recipe = Recipe.from_config(config.quant)
        model = setup.build(config, recipe, task, torch.device("cpu")).train()
        batch = next(iter(train_loader(task.data, config.dataset, config.seed, 0)))
    except UserError as error:
        raise SystemExit(f"luqrun: {error}") from None
    print(task.data.describe() + "\n")
    print(activation_errors.markdown(activation_errors.activation_errors(model, lambda: task.loss(model, batch))))
    torch.manual_seed(config.seed)
    counts = [2**n for n in range(options.draws.bit_length())]
    loss = partial(_loss, task, batch)
    print("The mean of so many gradients of this batch, against the exact one of the same forward pass:\n")
    print(gradient_noise.markdown(gradient_noise.gradient_noise(task.network(), recipe, loss, counts, task.example())))


def _loss(task, batch, model):
    return task.loss(model, batch)[0]


if __name__ == "__main__":
    main()
