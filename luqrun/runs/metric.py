"""What a run is judged by: it is recorded in run.json, and all who show a run take it from there."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """What an evaluation reports. name: as in files, such as val/top1; label: as in tables, such as top-1 %."""

    name: str
    label: str
    higher_is_better: bool

    @property
    def short(self) -> str:
        """Without saying that it is of the validation set: top1. Of test data that is said: test/bleu."""
        return self.name.removeprefix("val/")

    @property
    def of_test(self) -> Metric:
        """The same of test data: test/bleu, which tables call test BLEU."""
        return Metric(f"test/{self.short}", f"test {self.label}", self.higher_is_better)

    @property
    def title(self) -> str:
        """The label without its unit: top-1."""
        return self.label.removesuffix(" %")

    @property
    def worst(self) -> float:
        """What a run that diverged counts as: a metric of which more is better begins at 0."""
        return 0.0 if self.higher_is_better else float("inf")

    def improves(self, value: float, best: float | None) -> bool:
        """Whether `value` is better than `best`; None: there is no value yet."""
        return best is None or (value > best if self.higher_is_better else value < best)

    def allows(self, value: object) -> bool:
        """Whether it is a finite number, and of a percentage one from 0 to 100."""
        return is_number(value) and (not self.label.endswith("%") or 0 <= value <= 100)


TOP1 = Metric("val/top1", "top-1 %", True)  # of runs from before a run recorded its metric


def is_number(value: object) -> bool:
    """Whether it is an int or float, finite, and not so large that a sum of some is not."""
    return type(value) in (int, float) and abs(value) <= 1e300
