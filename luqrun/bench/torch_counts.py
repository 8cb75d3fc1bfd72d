"""Our multiply-accumulates beside those of torch's counter, of the networks of runs."""

from __future__ import annotations

from pathlib import Path

from omegaconf import OmegaConf

from luqrun.config import Config
from luqrun.cost.job import DATA
from luqrun.cost.products import observe
from luqrun.cost.torch_counter import as_torch_counts, counted_by_torch
from luqrun.runs.reading import read_config
from luqrun.tasks import outline_task


def counts_of(folder: Path) -> list[dict]:
    """A row for each network of the runs of job=cost under a folder: multiply-accumulates of a step, without a recipe.

    forward, backward: ours; as_torch: ours of the backward pass as torch counts it (cost.torch_counter).
    """
    rows: dict[str, dict] = {}
    for path in sorted(folder.rglob(DATA), key=lambda path: (path.stat().st_mtime, str(path))):
        config = OmegaConf.to_object(
            OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.create(read_config(path.parent)))
        )
        if config.model.name in rows:
            continue
        outline = outline_task(config)
        products = observe(outline.network, outline.inputs).products
        forward, as_torch = as_torch_counts(products)
        backward = sum((product.macs or 0) * sum(product.wants) for product in products)
        theirs = counted_by_torch(outline.network, outline.inputs)
        rows[config.model.name] = {
            **{"model": config.model.name, "forward": forward, "backward": backward, "as_torch": as_torch},
            **{"torch_forward": theirs[0], "torch_backward": theirs[1]},
        }
    return list(rows.values())
