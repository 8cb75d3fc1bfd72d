"""The loop: train in 4 bits, fine-tune with a part in high precision, evaluate, and leave a run folder behind.

Read it from `run` down. Nothing random is carried from step to step: data order, augmentation, dropout and
quantizer draws are functions of (seed, epoch or step), so a checkpoint holds weights, optimizer and a position.
"""

from __future__ import annotations

import logging
import math
import time
from contextlib import closing
from dataclasses import asdict

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from luqrun.config import Config
from luqrun.errors import UserError
from luqrun.internals.of_torch import compilations
from luqrun.quant import gemms
from luqrun.quant.convert import quantized_layers, remember_ranges, set_finetune, set_step_of
from luqrun.quant.recipe import Recipe
from luqrun.runs import checkpoint
from luqrun.runs.folder import RunFolder, now
from luqrun.runs.identity import refuse_changed_data
from luqrun.runs.reading import SUMMARY
from luqrun.runs.start import find_start
from luqrun.runtime import process_group
from luqrun.runtime.devices import choose_device, peak_memory, reset_peak_memory, to_device
from luqrun.runtime.seeds import DROPOUT, mix, seed_torch
from luqrun.runtime.signals import ASKING, Requests, Stopped
from luqrun.tasks import build_task
from luqrun.tasks.loader import batches_per_epoch, explain_dead_worker, is_batched, train_loader
from luqrun.tasks.task import Batch
from luqrun.train import setup, throughput
from luqrun.train.averaging import average_weights
from luqrun.train.evaluation import TEST, evaluate
from luqrun.train.kernel_compilation import KernelCompilation, training_kernels
from luqrun.train.profiling import DATA, StepProfiler
from luqrun.train.progress import Progress, describe
from luqrun.train.schedules import build_optimizer, rate_of_step
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
    progress, data = trainer.progress, trainer.data.fingerprint
    kept = {name: progress[name] for name in ("metric", "world_sizes")}
    folder.update_run(kernel_backend=trainer.kernels, data=data, **kept)
    try:
        how = config, trainer.model, trainer.recipe, device, trainer.no_bar, trainer.stop_if_asked
        trainer.compilation = training_kernels(*how)
        with trainer.compilation, trainer.requests.deferred():
            trainer.fit()
    except RuntimeError as error:
        if explanation := explain_dead_worker(error, config.dataset):
            raise UserError(explanation) from None
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
        self.task = build_task(config)
        self.data, self.metric = self.task.data, self.task.metrics[0]
        refuse_changed_data(folder, self.data.fingerprint)
        for name, text in self.task.artifacts().items():
            folder.keep(name, text)
        self.recipe = Recipe.from_config(config.quant)
        self.kernels = gemms.describe(device.type, self.recipe.encodings)
        self.model = setup.build(config, self.recipe, self.task, device)
        self.layers = [layer for _, layer in quantized_layers(self.model)]
        self.optimizer = build_optimizer(self.model, config.schedule)
        self.batches = batches_per_epoch(self.data, config.dataset)
        self.steps_per_epoch = self.batches // config.schedule.accumulate
        if self.steps_per_epoch == 0:
            wanted = f"schedule.accumulate={config.schedule.accumulate}"
            raise UserError(f"{wanted} is too large; it must be at most the {self.batches} batches of an epoch")
        self.total_epochs = config.schedule.epochs + config.finetune.epochs
        self.total_steps = self.total_epochs * self.steps_per_epoch
        # batch: micro-batches done in this epoch; sums, weight: of what is shown of this epoch's training so far.
        self.progress = {
            "epoch": 0, "batch": 0, "step": 0, "sums": {}, "weight": 0, "best": None, "average": None, "averaged": None,
            "evaluation_seconds": 0.0,
            **throughput.START, "evaluations": [], "metric": asdict(self.metric), "world_sizes": [],
        }  # fmt: skip
        self.on_test: dict[str, float] = {}
        self.compilation = KernelCompilation()
        self.no_bar = None if folder.writes else True  # None: where there is a terminal
        own = self._resume()
        self.throughput, sizes = throughput.Throughput(self.progress), self.progress["world_sizes"]
        if sizes[-1:] != [process_group.world_size()]:
            sizes.append(process_group.world_size())
        self.network = setup.wrap(self.model, config, device, any_size=is_batched(self.data))
        left = self.total_steps - self.progress["step"]
        profiled = config.tracking.profile_steps if folder.writes else 0
        self.profiler = StepProfiler(folder.path, profiled, left, device)
        after = self.progress.get("latest", 0.0) if own else 0.0
        self.shown, done = [metric.name for metric in self.task.metrics], self.progress["step"]
        of_test = [metric.of_test.name for metric in self.task.metrics if self.data.test is not None]
        self.tracker = Tracker(config, folder, [*self.shown, *of_test], done, after) if folder.writes else NoTracker()
        log.info("%s", self.data.describe())
        setup.log_model(self.model, config, self.recipe, config.schedule.epochs * self.steps_per_epoch)
        log.info("device %s, precision %s, kernels: %s", device, config.precision, self.kernels)

    def _resume(self) -> bool:
        """Continue where `resume` and the folder say; whether from a checkpoint of this run's own."""
        start = process_group.run_on_first(lambda: find_start(self.config, self.folder, self.data.fingerprint))
        if start is None:
            self.folder.rewind({})
            return False
        self.model.load_state_dict(start.content["model"])
        self.optimizer.load_state_dict(start.content["optimizer"])
        self.progress |= start.content["progress"]
        self.folder.rewind(self.progress if start.own else {})
        log.info("continuing from %s: epoch %d, step %d", start.path, self.progress["epoch"] + 1, self.progress["step"])
        return start.own

    def phase(self, epoch: int) -> str:
        """train for the epochs of the schedule, finetune after them."""
        return TRAIN if epoch < self.config.schedule.epochs else FINETUNE

    def learning_rate(self, step: int) -> float:
        """The rate of an optimizer step, counted over both phases."""
        return rate_of_step(self.config.schedule, self.config.finetune, step, self.steps_per_epoch)

    def fit(self) -> None:
        """All epochs that are left. Raises Diverged."""
        if not self.config.schedule.epochs and not self.progress["evaluations"]:  # what the fine-tune starts from
            self.progress["evaluations"].append({"phase": TRAIN, "epoch": 0, **self.evaluate()})
        for epoch in range(self.progress["epoch"], self.total_epochs):
            set_finetune(self.model, self.phase(epoch) == FINETUNE and asdict(self.config.finetune.high_precision))
            self.train_epoch(epoch)
            if self.phase(epoch) == TRAIN and self.progress["averaged"] != epoch:  # else it stopped in the evaluation
                sums = average_weights(self.model, self.progress["average"], self.config.schedule, epoch)
                self.progress.update(average=sums, averaged=epoch)
            metrics = {**self._train_metrics(), **self.evaluate()}
            if not math.isfinite(metrics["val/loss"]):
                self._report_divergence("validation loss", metrics["val/loss"])
            self.progress["evaluations"].append({"phase": self.phase(epoch), "epoch": epoch + 1, **metrics})
            self.tracker.row("epoch", epoch + 1, self.progress["step"], self.phase(epoch), metrics)
            shown = [describe(part, metrics, self.metric) for part in ("train", "val")]
            where = epoch + 1, self.total_epochs, self.phase(epoch)
            log.info("epoch %d/%d (%s): %s; %s; %s", *where, *shown, self._pace(self.total_epochs - epoch - 1))
            value = metrics[self.metric.name]
            is_best = self.metric.improves(value, self.progress["best"])
            best = value if is_best else self.progress["best"]
            self.progress.update(epoch=epoch + 1, batch=0, sums={}, weight=0, best=best)
            if is_best:  # before last.pt: a run killed in between does this epoch again, and its best once more
                self.save_checkpoint(checkpoint.BEST)
            self.save_checkpoint()
        if self.data.test is not None:
            self.on_test = self.evaluate(TEST)
            step, epoch = self.progress["step"], self.total_epochs
            self.tracker.row("test", epoch, step, self.phase(epoch - 1), self.on_test)

    def evaluate(self, *split: str) -> dict[str, float]:
        return self.compilation.run(self.model, evaluate, self, *split)

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
        bar = Progress(title, usable, "batches", self.no_bar, progress["batch"])
        with bar, closing(iter(loader)) as batches:
            while progress["batch"] < usable:
                started, compiled, slow = time.perf_counter(), compilations(), self.compilation.goes_on
                with record_function(DATA), self.requests.reading(self.save_checkpoint):
                    micro_batches = [next(batches) for _ in range(accumulate)]
                loss, weight = self.train_step(micro_batches)
                self.profiler.step()
                self.throughput.count(time.perf_counter() - started, weight, slow or compilations() > compiled)
                progress["batch"] += accumulate
                progress["step"] += 1
                step, metrics = progress["step"], {**self._train_metrics(), "train/loss": loss}
                shown = f"{describe('train', metrics, self.metric)}, {self._pace(self.total_epochs - epoch)}"
                bar.update(accumulate, shown, f"step {step} of {self.total_steps}")
                if tracking.log_every and step % tracking.log_every == 0:
                    row = {"loss": loss, "lr": self.learning_rate(step - 1)}
                    row[f"{self.task.unit}_per_second"] = self.throughput.take_recent()
                    self.tracker.row("step", epoch + 1, step, self.phase(epoch), row)
                self.stop_if_asked()
                if tracking.checkpoint_every and step % tracking.checkpoint_every == 0 and progress["batch"] < usable:
                    self.save_checkpoint()

    def train_step(self, micro_batches: list[Batch]) -> tuple[float, int]:
        """One optimizer step; returns its mean loss and its weight: of how many examples or tokens. Raises Diverged."""
        step, config = self.progress["step"], self.config
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(step)
        health, histograms = self._due(config.tracking.health_every), self._due(config.tracking.histogram_every)
        put_back = remember_ranges(self.layers)
        sums, weight = self.compilation.run(self.model, self.accumulate_gradients, micro_batches, health or histograms)
        loss = sums["loss"] / weight
        if not math.isfinite(loss):
            put_back()
            self.accumulate_gradients(micro_batches, True, until_it_fails=True)  # once more, to see what each layer saw
            self._report_divergence("loss", loss)
        if config.schedule.clip_grad_norm is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), config.schedule.clip_grad_norm)
        self.optimizer.step()
        if health or histograms:
            self.tracker.health(step + 1, self.model, histograms)
            self._record_health(False)
        epoch_sums = self.progress["sums"]
        for name, value in {**sums, "loss": loss * weight}.items():
            epoch_sums[name] = epoch_sums.get(name, 0.0) + value
        self.progress["weight"] += weight
        return loss, weight

    def accumulate_gradients(
        self, micro_batches: list[Batch], record_health: bool, until_it_fails: bool = False
    ) -> tuple[dict[str, float], int]:
        """Forward and backward passes of one step, which can be repeated exactly.

        The gradient is that of the sum of all losses over the sum of all weights, of micro-batches and processes.
        Returns these sums, "loss" and what else the task shows, and the weight. record_health: let this process'
        quantized layers record the health of the last pass; with until_it_fails, which is for all processes alike, the
        last is the first whose loss is not finite.
        """
        step = self.progress["step"]
        seed_torch(self.device, mix(self.config.seed, DROPOUT, step, process_group.rank())[0])
        set_step_of(self.layers, step)
        self._record_health(record_health)
        self.optimizer.zero_grad(set_to_none=True)
        weights = [self.task.weight(batch) for batch in micro_batches]
        total = self._total_weight(sum(weights))
        passes, once = [], setup.unchanging(self.model, self.config.compile or len(micro_batches) == 1)
        with once, setup.eager(self.config.compile and record_health):  # what a layer records, a compiled one cannot
            for number, (batch, weight) in enumerate(zip(micro_batches, weights, strict=True), 1):
                with setup.synchronizing(self.network, number == len(micro_batches)):
                    passes.append(self._forward_and_backward(batch, weight, total))
                if until_it_fails and not math.isfinite(self._add_up(passes[-1:])["loss"]):
                    break
        return self._add_up(passes), total

    def _total_weight(self, weight: int) -> int:
        """The weight of a step in all processes, of which this one has `weight`."""
        if self.task.equal_weights:
            return weight * process_group.world_size()
        return int(process_group.all_reduce_sum([weight])[0])

    def _add_up(self, passes: list[dict[str, Tensor]]) -> dict[str, float]:
        """Sums over micro-batches and processes: the only wait for a GPU."""
        values = torch.stack([torch.stack(list(each.values())) for each in passes]).tolist()
        return dict(zip(passes[0], process_group.all_reduce_sum(map(sum, zip(*values, strict=True))), strict=True))

    def _forward_and_backward(self, batch: Batch, weight: int, total: int) -> dict[str, Tensor]:
        """Add the gradients of a micro-batch, the part weight / total of the step; returns its sums, float64 ()."""
        with self.autocast():
            loss, sums = self.task.loss(self.network, to_device(batch, self.device))
        # DDP takes the mean gradient of the processes. Equal weights make this the number of micro-batches, exactly.
        (loss / (total / (weight * process_group.world_size()))).backward()
        return {"loss": loss.detach().double() * weight, **sums}

    def stop_if_asked(self) -> None:
        """Raise Stopped, with a checkpoint, in all processes where one was asked to stop."""
        number = self.requests.check()
        asked = int(process_group.all_reduce_max(-1 if number is None else ASKING.index(number)))
        if asked >= 0:
            self.save_checkpoint()
            raise Stopped(ASKING[asked])

    def save_checkpoint(self, name: str = checkpoint.LAST) -> None:
        """Write a checkpoint of where the run is."""
        if not self.folder.writes:
            return
        self.tracker.flush()
        self.progress.update(self.folder.written(), latest=self.tracker.latest)
        content = self.model.state_dict(), self.optimizer.state_dict(), self.progress, self.data.sizes
        checkpoint.save(self.folder.checkpoints / name, self.config, self.data.fingerprint, *content)

    def summarize(self) -> dict:
        """The content of summary.json."""
        evaluations, epochs = self.progress["evaluations"], max(self.config.schedule.epochs, 1)
        return {
            **{name: evaluations[-1][name] for name in self.shown},
            **self.on_test,
            **self.task.notes,
            "before_finetune": {name: evaluations[epochs - 1][name] for name in self.shown},
            "finetune": [{name: row[name] for name in ("epoch", *self.shown)} for row in evaluations[epochs:]],
            "best_metric": self.progress["best"],
            "train_seconds": self.progress["seconds"],
            "evaluation_seconds": self.progress["evaluation_seconds"],
            f"{self.task.unit}_per_second": self.throughput.mean(),
            "peak_memory_bytes": peak_memory(self.device),
        }

    def _train_metrics(self) -> dict[str, float]:
        sums, weight = self.progress["sums"], self.progress["weight"]
        means = {f"train/{name}": value / weight for name, value in sums.items()}
        return {**means, f"mean_{self.task.unit}_per_second": self.throughput.mean()}

    def _pace(self, evaluations: int) -> str:
        """Such as "812 images/s, 12 min left", with that many evaluations to come."""
        return self.throughput.describe(self.task.unit, self.total_steps - self.progress["step"], evaluations)

    def _report_divergence(self, what: str, value: float) -> None:
        """Log what is known of each layer's last pass, and raise Diverged."""
        log_last_pass(self.model)
        step, epoch = self.progress["step"], self.progress["epoch"] + 1
        raise Diverged(f"diverged: the {what} is {value} at step {step} (epoch {epoch})")

    def _due(self, every: int) -> bool:
        return every > 0 and self.progress["step"] % every == 0 and self.folder.writes

    def _record_health(self, on: bool) -> None:
        for layer in self.layers:
            layer.health = {} if on else None

    def autocast(self):
        return setup.autocast(self.config, self.device)
