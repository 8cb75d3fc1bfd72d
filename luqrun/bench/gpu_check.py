"""Check a GPU line by line, each in a process of its own: the way through scripts/gpu_check.py."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch

from luqrun.bench.report import NOT_MEASURED
from luqrun.errors import UserError
from luqrun.internals.of_torch import allow_recompilations
from luqrun.quant.kernels import own_process
from luqrun.runs.folder import now, write_atomically

RECORD, REPORT = "gpu_check.json", "gpu_check.md"
RUNNING, DONE = "running", "done"
NO_TIME, STOPPED = "not run: no time left", "stopped: no time left"
SHORTEST = 2.0  # seconds without which a line is not begun


class Row(NamedTuple):
    """What a line found. right: whether it is as it has to be, None for what has no right or wrong; numbers: for the
    JSON alone."""

    what: str
    found: str
    right: bool | None = None
    numbers: dict[str, Any] = {}  # noqa: RUF012 (nothing writes to it)


@dataclass(frozen=True)
class Line:
    """A check. rows(device, sizes, seconds) yields its rows, for which it has so many seconds; share: of the whole
    time, which what earlier lines leave is added to; skip: why it is not run."""

    name: str
    rows: Callable[[torch.device, Any, float], Iterator[Row]]
    share: float
    skip: str = ""


@dataclass
class Result:
    """Of a line, as the JSON has it."""

    name: str
    status: str = NOT_MEASURED
    seconds: float = 0.0
    rows: list[Row] = field(default_factory=list)

    @property
    def right(self) -> bool | None:
        """False where the line failed or found something wrong, True where it ended and something was right."""
        verdicts = {row.right for row in self.rows}
        if self.status.startswith("failed") or False in verdicts:
            return False
        return True if self.status == DONE and True in verdicts else None

    def as_record(self) -> dict:
        rows = [row._asdict() for row in self.rows]
        return {"name": self.name, "status": self.status, "seconds": self.seconds, "right": self.right, "rows": rows}


class LineError(Exception):
    """Its text is the status of a line that failed."""


class TimeUp(Exception):
    """A line used up its time."""


def apart(line: Line, device: torch.device, sizes: Any, seconds: float) -> Iterator[Row]:
    """The line's rows from a process of its own, which is stopped after so many seconds with all that it started.

    What ends the process, or leaves the GPU unusable to it, ends no other line. Raises TimeUp, and LineError.
    """
    until = time.monotonic() + seconds
    context = get_context("spawn")
    receiving, sending = context.Pipe(duplex=False)
    child = context.Process(target=_work, args=(line.rows, device, sizes, seconds, sending))
    child.start()
    sending.close()  # the child alone holds it now: its end is the end of what is received
    try:
        while receiving.poll(max(until - time.monotonic(), 0)):
            said = receiving.recv()
            if said is None:
                return
            if isinstance(said, str):
                raise LineError(said)
            yield said
        raise TimeUp
    except EOFError:
        child.join(10)
        code = child.exitcode
        how = signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"
        raise LineError(f"its process ended by itself: {how}") from None
    finally:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)  # the compiler's workers, too
        child.kill()
        child.join()


def here(line: Line, device: torch.device, sizes: Any, seconds: float) -> Iterator[Row]:
    """As `apart`, in this process: the time is looked at between rows, and a crash ends all."""
    until = time.monotonic() + seconds
    try:
        for row in line.rows(device, sizes, seconds):
            yield row
            if time.monotonic() > until:
                raise TimeUp
    except TimeUp:
        raise
    except Exception as error:
        raise LineError(first_line(error)) from error


def _work(rows: Callable, device: torch.device, sizes: Any, seconds: float, results: Connection) -> None:
    """In the process of a line: send its rows, and then None or the first line of the error."""
    os.setsid()
    torch.backends.cudnn.allow_tf32 = False  # as the trainer does
    own_process()
    allow_recompilations(64)  # networks share their code
    torch.manual_seed(0)
    try:
        for row in rows(device, sizes, seconds):
            results.send(row)
        results.send(None)
    except Exception as error:
        traceback.print_exc()
        results.send(first_line(error))


def first_line(error: BaseException) -> str:
    """Such as "OutOfMemoryError: CUDA out of memory."."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200]}" if text else type(error).__name__


def run(
    out: Path,
    lines: Sequence[Line],
    sizes: Any,
    device: torch.device,
    minutes: float,
    *,
    way: Callable[[Line, torch.device, Any, float], Iterator[Row]] = apart,
    log: Callable[[str], object] = lambda text: print(text, file=sys.stderr, flush=True),
) -> list[Result]:
    """Run the lines in their order within so many minutes; `out` holds the JSON and the table after every row.

    A line may take its share of the time and what earlier ones left of theirs. way: `apart` or `here`. UserError where
    `out` is no folder.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"out={out} is not a folder")
    out.mkdir(parents=True, exist_ok=True)
    results, started, shares = [Result(line.name) for line in lines], time.monotonic(), 0.0
    head = {"device": device.type, "minutes": minutes, "date": now()}
    for line, result in zip(lines, results, strict=True):
        shares += line.share
        begun = time.monotonic()
        left = started + shares * 60 * minutes - begun
        if line.skip or left < SHORTEST:
            result.status = line.skip or NO_TIME
        else:
            result.status = RUNNING
            write(out, head, results)
            try:
                for row in way(line, device, sizes, left):
                    result.rows.append(row)
                    write(out, head, results)
                result.status = DONE
            except TimeUp:
                result.status = STOPPED
            except LineError as error:
                result.status = f"failed: {error}"
            result.seconds = round(time.monotonic() - begun, 1)
        log(f"{line.name}: {result.status}, {result.seconds:.0f} s")
        write(out, head, results)
    return results


def write(out: Path, head: dict, results: Sequence[Result]) -> None:
    record = {**head, "lines": [result.as_record() for result in results]}
    write_atomically(out / RECORD, (json.dumps(record, indent=1) + "\n").encode())
    write_atomically(out / REPORT, markdown(head, results).encode())


def markdown(head: dict, results: Sequence[Result]) -> str:
    """One table: each line with its rows."""
    rows = [("line", "what", "found", "right"), ("---",) * 4]
    for result in results:
        took = f", {result.seconds:.0f} s" if result.seconds else ""
        rows.append((f"**{result.name}**", "", f"{result.status}{took}", _verdict(result.right)))
        rows += [("", row.what, row.found, _verdict(row.right)) for row in result.rows]
    cells = ((cell.replace("|", "\\|").replace("\n", " ") for cell in row) for row in rows)
    table = "\n".join(f"| {' | '.join(row)} |" for row in cells)
    on_cpu = "\n\n**On a CPU, of sizes too small for the numbers to say anything.**" if head["device"] == "cpu" else ""
    return f"# A GPU, checked\n\n{head['date']}, {head['minutes']:g} minutes at most.{on_cpu}\n\n{table}\n"


def _verdict(right: bool | None) -> str:
    return {True: "yes", False: "**no**", None: ""}[right]
