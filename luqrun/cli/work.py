"""What a job does once its config is valid and its folder is there."""

from __future__ import annotations

import traceback

from luqrun.cli.messages import out_of_memory
from luqrun.config import Config
from luqrun.errors import UserError
from luqrun.runs.folder import RunFolder
from luqrun.runtime import process_group
from luqrun.runtime.signals import Requests


def work(config: Config, folder: RunFolder, requests: Requests) -> dict:
    """Do what config.job says; the summary of the run. Raises UserError, also where the memory does not do."""
    # Imported here and not above: --help and typing errors do without torch.
    from luqrun.quant.kernels import own_process

    own_process()
    if config.job == "rounding":
        from luqrun.train import rounding_experiment

        return rounding_experiment.run(config, folder)
    if config.job == "cost":
        from luqrun.cost import job as cost_job

        return cost_job.run(config, folder)
    from tqdm.contrib.logging import logging_redirect_tqdm

    from luqrun.train import evaluation_job, trainer

    run = evaluation_job.run if config.job == "evaluate" else trainer.run
    try:
        with logging_redirect_tqdm():
            return process_group.recorded(run)(config, folder, requests)
    except (MemoryError, RuntimeError) as error:
        if process_group.lost_a_peer(error):
            raise UserError(
                "another process of this job has ended (it says why); the same command goes on from the last checkpoint"
            ) from None
        if not out_of_memory(error):
            raise
        traceback.clear_frames(error.__traceback__)
        sizes = "".join(f", dataset.{key}={value}" for key, value in _sizes(config).items())
        raise UserError(f"there is not enough memory for model.name={config.model.name}{sizes}") from None


def _sizes(config: Config) -> dict[str, int]:
    """By key under `dataset`, what decides how much memory a batch takes."""
    text = config.dataset.max_length is not None
    keys = ("batch_tokens", "batch_size", "max_length") if text else ("batch_size", "image_size")
    sizes = {key: getattr(config.dataset, key) for key in keys}
    return {key: value for key, value in sizes.items() if value is not None}
