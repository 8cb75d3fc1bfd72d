"""The loop: train in 4 bits, fine-tune in high precision, evaluate, and leave a run folder behind.

Read it from `run` down. Nothing random is carried from step to step: data order, augmentation, dropout and
quantizer draws are functions of (seed, epoch or step), so a checkpoint holds weights, optimizer and a position.
"""

from __future__ import annotations

import logging
import math
import time
from contextlib import closing

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import record_function
from tqdm import tqdm

from luqrun.config import Config
from luqrun.errors import UserError
from luqrun.quant import gemms
from luqrun.quant.convert import quantized_layers, remember_ranges, set_finetune, set_step
from luqrun.quant.recipe import Recipe
from luqrun.runs import checkpoint
from luqrun.runs.folder import RunFolder, now
from luqrun.runs.identity import refuse_changed_data
from luqrun.runs.reading import SUMMARY
from luqrun.runs.start import find_start
from luqrun.runtime import process_group
from luqrun.runtime.devices import choose_device, peak_memory, reset_peak_memory
from luqrun.runtime.seeds import DROPOUT, mix
from luqrun.runtime.signals import ASKING, Requests, Stopped
from luqrun.tasks.classification.data import build_dataset
from luqrun.tasks.loader import batches_per_epoch, told_of_workers, train_loader, val_loader
from luqrun.train import setup, throughput
from luqrun.train.compiling import prepare_training
from luqrun.train.profiling import DATA, StepProfiler
from luqrun.train.schedules import build_optimizer, finetune_learning_rate, learning_rate
from luqrun.train.tracking import NoTracker, Tracker, log_last_pass

log = logging.getLogger(__name__)

TRAIN, FINETUNE = "train", "finetune"


class Diverged(Exception):
    """The loss is not finite: a result, not an error."""


def run(config: Config, folder: RunFolder, requests: Requests | None = None) -> dict:
    """Train, or continue, one run to its end and return its summary ({"diverged": step} for a diverged one).

    Where `requests` says that the process was asked to stop, the run writes a checkpoint and raises Stopped.
    """
    device = choose_device(config.device)
    reset_peak_memory(device)
    torch.backends.cudnn.allow_tf32 = False  # fp32 means fp32, as it does for matmul by default
    name, threads = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu", torch.get_num_threads()
    folder.update_run(device=name, threads=threads, world_size=process_group.world_size())
    trainer = Trainer(config, folder, device, requests)
    sizes = trainer.progress["world_sizes"]
    folder.update_run(kernel_backend=trainer.kernels, data=trainer.data.fingerprint, world_sizes=sizes)
    try:
        prepare_training(trainer.model, trainer.recipe, device, trainer.no_bar)  # not in a step, nor in its time
        with trainer.requests.deferred():
            trainer.fit()
    except RuntimeError as error:
        if told := told_of_workers(error, config.dataset):
            raise UserError(told) from None
        raise
    except Diverged as diverged:
        folder.update_run(status="diverged", end=now(), diverged_at_step=trainer.progress["step"])
        log.warning("%s", diverged)
        return {"diverged": trainer.progress["step"]}
    finally:
        trainer.tracker.close()
        trainer.profiler.close()
    summary = trainer.summarize()
    folder.update_run(status="finished", end=now())
    folder.write_json(SUMMARY, summary)
    return summary


class Trainer:
    """One run: everything built from its config, and its position in the training."""

    def __init__(self, config: Config, folder: RunFolder, device: torch.device, requests: Requests | None = None):
        self.config, self.folder, self.device, self.requests = config, folder, device, requests or Requests()
        self.data = build_dataset(config.dataset)
        refuse_changed_data(folder, self.data.fingerprint)
        self.recipe = Recipe.from_config(config.quant)
        self.kernels = gemms.describe(device.type, self.recipe.forms)
        self.model = setup.build(config, self.recipe, self.data, device)
        self.optimizer = build_optimizer(self.model, config.schedule)
        self.batches = batches_per_epoch(self.data, config.dataset)
        self.steps_per_epoch = self.batches // config.schedule.accumulate
        if self.steps_per_epoch == 0:
            wanted = f"schedule.accumulate={config.schedule.accumulate}"
            raise UserError(f"{wanted} is too large; it must be at most the {self.batches} batches of an epoch")
        # batch: micro-batches done in this epoch; sums: loss, correct and images of the epoch so far.
        self.progress = {
            "epoch": 0, "batch": 0, "step": 0, "sums": [0.0, 0.0, 0.0], "best": -1.0,
            **throughput.START, "evaluations": [], "world_sizes": [],
        }  # fmt: skip
        self.no_bar = None if folder.writes else True  # None: where there is a terminal
        own = self._resume()
        self.speed, sizes = throughput.Speed(self.progress, config.compile), self.progress["world_sizes"]
        if sizes[-1:] != [process_group.world_size()]:
            sizes.append(process_group.world_size())
        self.network = setup.wrap(self.model, config, device)
        left = self.total_epochs * self.steps_per_epoch - self.progress["step"]
        profiled = config.tracking.profile_steps if folder.writes else 0
        self.profiler = StepProfiler(folder.path, profiled, left, device)
        after = self.progress.get("latest", 0.0) if own else 0.0
        self.tracker = Tracker(config, folder, self.progress["step"], after) if folder.writes else NoTracker()
        log.info("%s", self.data.told())
        quantized = [name for name, _ in quantized_layers(self.model)]
        log.info("%s on %s, quant=%s: %s", config.model.name, config.dataset.name, config.quant.name, self.recipe)
        if quantized:
            skipped = ", ".join(config.quant.skip) or "none"
            log.info("%d quantized layers, %s to %s (skip: %s)", len(quantized), quantized[0], quantized[-1], skipped)
        log.info("device %s, precision %s, kernels: %s", device, config.precision, self.kernels)

    def _resume(self) -> bool:
        """Continue where `resume` and the folder say; whether from a checkpoint of this run's own."""
        start = process_group.from_first(lambda: find_start(self.config, self.folder, self.data.fingerprint))
        if start is None:
            self.folder.rewind({})
            return False
        self.model.load_state_dict(start.content["model"])
        self.optimizer.load_state_dict(start.content["optimizer"])
        self.progress = start.content["progress"]
        self.folder.rewind(self.progress if start.own else {})
        log.info("continuing from %s: epoch %d, step %d", start.path, self.progress["epoch"] + 1, self.progress["step"])
        return start.own

    @property
    def total_epochs(self) -> int:
        return self.config.schedule.epochs + self.config.finetune.epochs

    def phase(self, epoch: int) -> str:
        """train for the epochs of the schedule, finetune after them."""
        return TRAIN if epoch < self.config.schedule.epochs else FINETUNE

    def learning_rate(self, step: int) -> float:
        """The rate of an optimizer step, counted over both phases."""
        schedule, finetune = self.config.schedule, self.config.finetune
        main = schedule.epochs * self.steps_per_epoch
        if step < main:
            return learning_rate(schedule, step, self.steps_per_epoch)
        last = learning_rate(schedule, main - 1, self.steps_per_epoch)
        return finetune_learning_rate(step - main, finetune.epochs * self.steps_per_epoch, last, finetune.lr_base)

    def fit(self) -> None:
        """All epochs that are left. Raises Diverged."""
        for epoch in range(self.progress["epoch"], self.total_epochs):
            set_finetune(self.model, self.phase(epoch) == FINETUNE)
            self.train_epoch(epoch)
            metrics = {**self._train_metrics(), **self.evaluate()}
            if not math.isfinite(metrics["val/loss"]):
                self._report_divergence("validation loss", metrics["val/loss"])
            self.progress["evaluations"].append({"phase": self.phase(epoch), "epoch": epoch + 1, **metrics})
            self.tracker.row("epoch", epoch + 1, self.progress["step"], self.phase(epoch), metrics)
            shown = [metrics[name] for name in ("train/loss", "train/top1", "val/loss", "val/top1")]
            log.info(
                "epoch %d/%d (%s): train loss %.3f, top-1 %.2f; val loss %.3f, top-1 %.2f",
                *(epoch + 1, self.total_epochs, self.phase(epoch), *shown),
            )
            best = max(metrics["val/top1"], self.progress["best"])
            is_best = best > self.progress["best"]
            self.progress.update(epoch=epoch + 1, batch=0, sums=[0.0] * 3, best=best)
            if is_best:  # before last.pt: a run killed in between does this epoch again, and its best once more
                self.save_checkpoint(checkpoint.BEST)
            self.save_checkpoint()

    def train_epoch(self, epoch: int) -> None:
        """The micro-batches of one epoch that are left, `accumulate` of them a step."""
        accumulate, tracking, progress = self.config.schedule.accumulate, self.config.tracking, self.progress
        self.model.train()
        loader = train_loader(
            *(self.data, self.config.dataset, self.config.seed, epoch),
            *(progress["batch"], process_group.rank(), process_group.world_size()),
        )
        usable = self.steps_per_epoch * accumulate
        title = f"epoch {epoch + 1}/{self.total_epochs} {self.phase(epoch)}"
        bar = tqdm(total=usable, initial=progress["batch"], desc=title, unit="batch", disable=self.no_bar, leave=False)
        with bar, closing(iter(loader)) as batches:
            while progress["batch"] < usable:
                started = time.perf_counter()
                with record_function(DATA), self.requests.reading(self.save_checkpoint):
                    micro_batches = [next(batches) for _ in range(accumulate)]
                loss, images = self.train_step(micro_batches)
                self.profiler.step()
                self.speed.count(time.perf_counter() - started, images)
                progress["batch"] += accumulate
                progress["step"] += 1
                bar.update(accumulate)
                step = progress["step"]
                top1 = self._train_metrics()["train/top1"]
                shown = f"loss {loss:.3f}, top-1 {top1:.1f}, {self.speed.mean():.0f} img/s"
                bar.set_postfix_str(shown, refresh=False)
                if tracking.log_every and step % tracking.log_every == 0:
                    rate, lately = self.learning_rate(step - 1), self.speed.lately()
                    row = {"loss": loss, "lr": rate, "images_per_second": lately}
                    self.tracker.row("step", epoch + 1, step, self.phase(epoch), row)
                self._stop_if_asked()
                if tracking.checkpoint_every and step % tracking.checkpoint_every == 0 and progress["batch"] < usable:
                    self.save_checkpoint()

    def train_step(self, micro_batches: list[tuple[Tensor, Tensor]]) -> tuple[float, int]:
        """One optimizer step; returns its mean loss and the number of images. Raises Diverged."""
        step, config = self.progress["step"], self.config
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(step)
        examine, histograms = self._due(config.tracking.health_every), self._due(config.tracking.histogram_every)
        put_back = remember_ranges(self.model)
        loss, correct, images = self.accumulate_gradients(micro_batches, examine or histograms)
        if not math.isfinite(loss):
            put_back()
            self.accumulate_gradients(micro_batches, True, until_it_fails=True)  # once more, to see what each layer saw
            self._report_divergence("loss", loss)
        if config.schedule.clip_grad_norm is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), config.schedule.clip_grad_norm)
        self.optimizer.step()
        if examine or histograms:
            self.tracker.health(step + 1, self.model, histograms)
            self._examine(False)
        sums = self.progress["sums"]
        sums[0], sums[1], sums[2] = sums[0] + loss * images, sums[1] + correct, sums[2] + images
        return loss, images

    def accumulate_gradients(
        self, micro_batches: list[tuple[Tensor, Tensor]], examine: bool, until_it_fails: bool = False
    ) -> tuple[float, int, int]:
        """Forward and backward passes of one step, which can be repeated exactly: (mean loss, correct, images).

        examine: let this process' quantized layers record the health of the last pass; with until_it_fails, which is
        for all processes alike, the last is the first whose loss is not finite.
        """
        step = self.progress["step"]
        seed = mix(self.config.seed, DROPOUT, step, process_group.rank())[0]
        torch.manual_seed(int(seed) & 0xFFFFFFFF)  # the CPU's generator takes 32 bits
        set_step(self.model, step)
        self._examine(examine)
        self.optimizer.zero_grad(set_to_none=True)
        passes, count = [], 0
        with setup.eager(self.config.compile and examine):  # what a layer records, a compiled one cannot
            for number, (images, labels) in enumerate(micro_batches, 1):
                with setup.synchronizing(self.network, number == len(micro_batches)):
                    passes.append(self._forward_and_backward(images, labels, len(micro_batches)))
                count += len(labels)
                if until_it_fails and not math.isfinite(self._total(passes[-1:], 0)[0]):
                    break
        loss, correct, count = self._total(passes, count)
        return loss / len(micro_batches), int(correct), int(count)

    def _total(self, passes: list[Tensor], images: int) -> tuple[float, float, float]:
        """(sum of the mean losses, correct, images) over micro-batches and processes: the only wait for a GPU."""
        losses, hits = zip(*torch.stack(passes).tolist(), strict=True)
        loss, correct, count = process_group.add_up([sum(losses), sum(hits), images])
        return loss / process_group.world_size(), correct, count

    def _forward_and_backward(self, images: Tensor, labels: Tensor, parts: int) -> Tensor:
        """Add the gradients of a micro-batch, one of `parts`; returns its mean loss and correct, float64 (2,)."""
        images, labels = self._to_device(images, labels)
        with self._autocast():
            logits = self.network(images)
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=self.config.schedule.label_smoothing)
        (loss / parts).backward()
        return torch.stack([loss.detach().double(), (logits.detach().argmax(1) == labels).sum().double()])

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """val/loss, val/top1 and val/top5 (per cent), with the recipe's weights and activations whatever the phase."""
        self.model.eval()
        setup.share_buffers(self.model)
        sums, count = torch.zeros(3, dtype=torch.float64), 0
        loader = val_loader(self.data, self.config.dataset, process_group.rank(), process_group.world_size())
        everywhere = math.ceil(len(self.data.val) / self.config.dataset.batch_size) // process_group.world_size()
        with closing(iter(loader)) as batches:
            for number in tqdm(range(len(loader)), "evaluation", disable=self.no_bar, leave=False):
                with self.requests.reading(self.save_checkpoint):
                    images, labels = next(batches)
                if number < everywhere:  # in what every process has
                    self._stop_if_asked()  # it is done again from the start
                images, labels = self._to_device(images, labels)
                with self._autocast():
                    logits = self.network(images).float()
                best = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
                loss = F.cross_entropy(logits, labels, reduction="sum")
                sums += torch.stack([loss.double(), best[:, 0].sum().double(), best.sum().double()]).cpu()
                count += len(labels)
        *sums, count = process_group.add_up([*sums.tolist(), count])
        loss, top1, top5 = (total / count for total in sums)
        return {"val/loss": loss, "val/top1": 100 * top1, "val/top5": 100 * top5}

    def _stop_if_asked(self) -> None:
        number = self.requests.check()
        asked = int(process_group.largest(-1 if number is None else ASKING.index(number)))
        if asked >= 0:
            self.save_checkpoint()
            raise Stopped(ASKING[asked])

    def save_checkpoint(self, name: str = checkpoint.LAST) -> None:
        """Write a checkpoint of where the run is."""
        if not self.folder.writes:
            return
        self.tracker.flush()
        self.progress.update(self.folder.written(), latest=self.tracker.latest)
        model, optimizer = self.model.state_dict(), self.optimizer.state_dict()
        path = self.folder.checkpoints / name
        checkpoint.save(path, self.config, self.data.fingerprint, model, optimizer, self.progress)

    def summarize(self) -> dict:
        """The content of summary.json."""
        evaluations, epochs = self.progress["evaluations"], self.config.schedule.epochs
        shown = ("val/top1", "val/top5", "val/loss")
        return {
            **{name: evaluations[-1][name] for name in shown},
            "before_finetune": {name: evaluations[epochs - 1][name] for name in shown},
            "finetune": [{name: row[name] for name in ("epoch", *shown)} for row in evaluations[epochs:]],
            "best_top1": self.progress["best"],
            "train_seconds": self.progress["seconds"],
            "images_per_second": self.speed.mean(),
            "peak_memory_bytes": peak_memory(self.device),
        }

    def _train_metrics(self) -> dict[str, float]:
        loss, correct, images = self.progress["sums"]
        metrics = {"train/loss": loss / images, "train/top1": 100 * correct / images}
        return {**metrics, "mean_images_per_second": self.speed.mean()}

    def _report_divergence(self, what: str, value: float) -> None:
        """Log what is known of each layer's last pass, and raise Diverged."""
        log_last_pass(self.model)
        step, epoch = self.progress["step"], self.progress["epoch"] + 1
        raise Diverged(f"diverged: the {what} is {value} at step {step} (epoch {epoch})")

    def _due(self, every: int) -> bool:
        return every > 0 and self.progress["step"] % every == 0 and self.folder.writes

    def _examine(self, on: bool) -> None:
        for _, layer in quantized_layers(self.model):
            layer.health = {} if on else None

    def _to_device(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        images = images.to(self.device, memory_format=torch.channels_last, non_blocking=True)
        return images, labels.to(self.device, non_blocking=True)

    def _autocast(self):
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.config.precision == "bf16")
