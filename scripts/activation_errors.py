"""What 4 bits cost each activation of a network before it is trained: relative errors of one training batch.

python scripts/activation_errors.py                                       the default network and data
python scripts/activation_errors.py dataset=squad dataset.root=DIR model=bert model.weights=DIR2 schedule=squad
"""

import argparse


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="as of luqrun")
    options = parser.parse_args()

    import torch
    from hydra import compose, initialize_config_dir
    from hydra.core.config_store import ConfigStore

    from luqrun.bench.activation_errors import activation_errors, markdown
    from luqrun.cli.validation import to_config, validate
    from luqrun.config import Config, conf_dir
    from luqrun.errors import UserError
    from luqrun.quant.recipe import Recipe
    from luqrun.tasks import build_task
    from luqrun.tasks.loader import train_loader
    from luqrun.train import setup

    ConfigStore.instance().store(name="schema", node=Config)
    try:
        with initialize_config_dir(str(conf_dir()), version_base="1.3"):
            config = to_config(compose("config", options.overrides))
        validate(config)
        task = build_task(config)
        model = setup.build(config, Recipe.from_config(config.quant), task, torch.device("cpu")).train()
        batch = next(iter(train_loader(task.data, config.dataset, config.seed, 0)))
    except UserError as error:
        raise SystemExit(f"luqrun: {error}") from None
    print(task.data.describe() + "\n")
    print(markdown(activation_errors(model, lambda: task.loss(model, batch))))


if __name__ == "__main__":
    main()
