"""The benchmark's record as Markdown: the numbers to reach first, then every ratio, then the times."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass

from luqrun.bench.contenders import BLOCKS
from luqrun.bench.sections import SCHEMES
from luqrun.train.profiling import kinds_table

NOT_MEASURED = "not measured"
RESIDENT = (
    "Resident, on a CPU: by how much the memory of a process of its own grew, everybody's allocations included and "
    "what allocators hold in reserve; the median of several such peaks. Given back: with MALLOC_MMAP_THRESHOLD_=262144 "
    "in the environment, so that glibc keeps no freed block of a tensor. Kept: as the command line keeps memory."
)


@dataclass(frozen=True)
class Requirement:
    """A ratio that has to be reached: at most `required` (at_least: at least), and better `aim`.

    device, section, case, name, against: where the ratio is found in a record.
    """

    device: str
    what: str
    section: str
    case: str
    name: str
    against: str
    required: float
    aim: float
    at_least: bool = False

    def found(self, record: dict) -> dict | None:
        """Its ratio in a record, or None where it was not measured."""
        if record["machine"]["device"] != self.device:
            return None
        wanted = (self.section, self.case, self.name, self.against)
        same = (r for r in record["ratios"] if (r["section"], r["case"], r["what"], r["against"]) == wanted)
        return next(same, None)

    def reached(self, ratio: dict) -> bool:
        return ratio["median"] >= self.required if self.at_least else ratio["median"] <= self.required

    def limit(self, value: float) -> str:
        return f"{'≥' if self.at_least else '≤'} {value:g}"


def _cpu(*arguments, **options) -> Requirement:
    return Requirement("cpu", *arguments, **options)


def _gpu(*arguments, **options) -> Requirement:
    return Requirement("cuda", *arguments, **options)


def _bandwidth(what: str) -> Requirement:
    text = f"{what} encode, bf16: share of a device copy's bandwidth, bytes counted"
    name = what.partition(" ")[0].lower()
    return _gpu(text, "encode", "bf16", f"{name}, bytes/s", "copy, bytes/s", 0.8, 0.9, at_least=True)


def _steps(precision: str, against: str, required: float, aim: float, *models: str) -> list[Requirement]:
    """Of LUQ's step in a precision against the plain one's in another."""
    pair = f"luq {precision}", against
    text = f"step, LUQ {precision} against {against}"
    return [_cpu(f"{model} {text}", "step", model, *pair, required, aim) for model in models]


WHERE = {"cpu": "2 CPU cores", "cuda": "one H100 / H200"}
REQUIREMENTS = (
    _cpu(
        "E3M0 stochastic encode with its absolute maximum, against a clone", "encode", "fp32", "e3m0", "clone", 2.2, 1.5
    ),
    _cpu("SAWB INT4 encode, against a clone", "encode", "fp32", "int4", "clone", 1.4, 1.2),
    _cpu(
        *("the formulas in torch operations against E3M0 encode", "encode", "fp32", "e3m0 formulas", "e3m0"),
        *(40, 80, True),
    ),
    *_steps("fp32", "fp32", 1.0, 0.8, "resnet8", "resnext8", "mobilenet_tiny"),
    *_steps("fp32", "fp32", 0.5, 0.35, "resnet18"),
    *_steps("fp32", "fp32", 1.0, 0.7, "vit_tiny", "transformer_tiny", "minilm"),
    *_steps("bf16", "fp32", 0.8, 0.6, "resnet18"),
    *_steps("bf16", "bf16", 1.15, 1.0, "resnet8"),
    *_steps("bf16", "bf16", 1.0, 0.8, "resnet18"),
    *_steps("bf16", "bf16", 1.25, 1.0, "transformer_tiny", "minilm"),
    *(
        _cpu(f"resnet18 step, {scheme} fp32 against fp32", "formats", "resnet18", scheme, "fp32", 1.6, 1.0)
        for scheme in SCHEMES
        if scheme != "luq"
    ),
    *(_cpu(f"{name} encode, against a clone", "formats", "encode", name, "clone", 6, 4) for name in BLOCKS),
    *(
        _cpu(
            *(f"bytes kept for the backward pass by quantized layers, {precision}: per element", "memory", "resnet18"),
            *(f"luq {precision}, bytes kept by layers", "element", 0.55, 0.5),
        )
        for precision in ("fp32", "bf16")
    ),
    _cpu(
        *("peak memory of the resnet18 step, LUQ fp32 against fp32", "memory", "resnet18"),
        *("luq fp32, peak", "fp32, peak", 0.85, 0.6),
    ),
    *(_bandwidth(what) for what in ("E3M0 stochastic", "INT4 SAWB")),
    *(
        _gpu(
            *(f"{model} step, compiled, LUQ bf16 against bf16", "step", model),
            *("luq bf16 compiled", "bf16 compiled", required, 1.0),
        )
        for model, required in (("resnet50", 1.25), ("vit_b_16", 1.15))
    ),
    *(
        _gpu(
            *(f"{model} step, the formulas in torch operations against LUQ bf16, compiled", "step", model),
            *("formulas bf16", "luq bf16 compiled", 4, 8, True),
        )
        for model in ("resnet50", "vit_b_16")
    ),
    *(
        _gpu(
            *(f"peak memory of the {model} step, compiled, LUQ bf16 against bf16", "memory", model),
            *("luq bf16 compiled, peak", "bf16 compiled, peak", 0.9, 0.6),
        )
        for model in ("resnet50", "vit_b_16")
    ),
)


def requirements(record: dict) -> list[dict]:
    """A row for each requirement: device, what, required, aim, measured (median, quartiles and min) and reached, both
    None where it was not measured."""
    rows = []
    for each in REQUIREMENTS:
        found = each.found(record)
        measured = found and {key: found[key] for key in ("median", "quartiles", "min")}
        limits = {"required": each.limit(each.required), "aim": each.limit(each.aim)}
        reached = each.reached(found) if found else None
        rows.append({"device": each.device, "what": each.what, **limits, "measured": measured, "reached": reached})
    return rows


def markdown(record: dict, picture: str | None = None) -> str:
    """The whole report; picture: the file name of the step's breakdown."""
    parts = [f"# Benchmark\n\n{_heading(record)}", f"## Numbers to reach\n\n{_requirement_table(record)}"]
    parts.append(f"## All ratios\n\n{_ratio_table(record)}")
    if "step" in record["sections"]:
        parts.append(f"## Where a step's time goes\n\n{_kinds(record, picture)}")
    parts.append(f"## Times\n\n{_time_tables(record)}")
    if "memory" in record["sections"]:
        parts.append(f"## Memory\n\n{_memory_tables(record)}")
    return "\n".join(part.rstrip() + "\n" for part in parts)


def _heading(record: dict) -> str:
    machine, versions = record["machine"], record["versions"]
    commit = record["git_commit"] or "unknown"
    commit += " with changes" if record["git_dirty"] else ""
    lines = [
        f"{machine['name']} ({machine['isa']}), {machine['threads']} threads, kernels: {machine['kernels']}.",
        ", ".join(f"{name} {version}" for name, version in versions.items()) + ".",
        f"Commit {commit}, {record['date']}.",
        "",
        f"Encoders write codes {_codes(machine['codes'])}; in that type GEMMs take them.",
        "",
        "Contenders take turns within a run. A ratio is the median over rounds of the ratio within a round; in "
        "brackets are the quartiles of that ratio over the rounds, and the ratio of the shortest times.",
    ]
    if record["quick"]:
        lines += ["", "**A quick run: the sizes are too small for the numbers to say anything.**"]
    return "\n".join(lines)


def _codes(codes: dict[str, tuple[str, int]]) -> str:
    """Such as: of fp32 and bf16 as int8, 1 byte an element."""
    texts = {name: f"as {dtype}, {size} byte{'s' * (size > 1)} an element" for name, (dtype, size) in codes.items()}
    alike = {text: [name for name in texts if texts[name] == text] for text in texts.values()}
    return "; ".join(f"of {' and '.join(names)} {text}" for text, names in alike.items())


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _ratio(ratio: dict) -> str:
    median, low, high, shortest = (f"{each:.3g}" for each in (ratio["median"], *ratio["quartiles"], ratio["min"]))
    return median if {median} == {low, high, shortest} else f"{median} ({low} to {high}; shortest {shortest})"


def _requirement_table(record: dict) -> str:
    rows = []
    for row in requirements(record):
        measured = _ratio(row["measured"]) if row["measured"] else NOT_MEASURED
        reached = {True: "yes", False: "no", None: ""}[row["reached"]]
        rows.append([WHERE[row["device"]], row["what"], row["required"], row["aim"], measured, reached])
    return _table(["where", "what", "required", "aim", "measured", "reached"], rows)


def _ratio_table(record: dict) -> str:
    rows = [[r["section"], r["case"], r["what"], r["against"], _ratio(r)] for r in record["ratios"]]
    return _table(["section", "case", "what", "against", "ratio"], rows)


def _kinds(record: dict, picture: str | None) -> str:
    parts = ["Milliseconds a step under the profiler: medians over turns of some steps, contender after contender.\n"]
    if picture:
        parts.insert(0, f"![A step's time by kind]({picture})\n")
    for model, case in record["sections"]["step"].items():
        parts.append(f"{model}:\n\n{kinds_table(case['seconds_by_kind'])}")
    return "\n".join(parts)


def _time_tables(record: dict) -> str:
    cases = [
        (f"{section}, {name}", case)
        for section, cases in record["sections"].items()
        if section != "memory"
        for name, case in cases.items()
    ]
    return "\n".join(_time_table(name, case) for name, case in cases)


def _time_table(name: str, case: dict) -> str:
    """What a case measured: of encoders with their speed, of GEMMs with whether they are exact."""
    moved, exact = case.get("bytes"), case.get("exact")
    more = ["GB/s"] * (moved is not None) + ["exact"] * (exact is not None)
    rows = []
    for contender, median in case["median"].items():
        cells = [contender, f"{1e3 * median:.3f}", f"{1e3 * case['min'][contender]:.3f}"]
        if moved is not None:
            cells.append(f"{moved[contender] / median / 1e9:.1f}" if contender in moved else "")
        if exact is not None:
            cells.append({True: "yes", False: "no", None: ""}[exact.get(contender)])
        rows.append([*cells, str(sum(seconds is not None for seconds in case["rounds"][contender]))])
    rows += [[contender, why, *[""] * (2 + len(more))] for contender, why in case["left_out"].items()]
    return _table([name, "median, ms", "min, ms", *more, "rounds"], rows)


def _memory_tables(record: dict) -> str:
    parts = []
    for model, case in record["sections"]["memory"].items():
        rows = []
        for name, peak in case["peak"].items():
            kept = case["kept"].get(name)
            grown = [found.get(name) for found in case["resident"].values()]
            resident = [f"{statistics.median(each) / 1e6:.1f}" if each else NOT_MEASURED for each in grown]
            rows.append([name, f"{peak / 1e6:.1f}", *resident, f"{kept['bytes'] / 1e6:.1f}" if kept else ""])
        rows += [[name, why, *[""] * (1 + len(case["resident"]))] for name, why in case["left_out"].items()]
        names = "allocated at most", *case["resident"], "kept for the backward pass"
        head = [model, *(f"{name}, MB" for name in names)]
        parts.append(f"Allocated: {case['how']}. {RESIDENT}\n\n{_table(head, rows)}")
    return "\n".join(parts)
