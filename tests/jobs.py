"""Jobs of several processes: `python -m luqrun` under torchrun. For test_distributed.py and scripts/rank_death.py."""

import os
import signal
import subprocess
import sys
import time

from running import TINY, metrics
from shell import environment

from luqrun.runs.folder import RunFolder

LIMIT = 400  # seconds for what takes ten, before a job counts as hanging
# 10 steps an epoch; 24 images a step are shared by one, two or three processes.
RUN = (*TINY, "dataset.batch_size=24", "finetune=fnt1", "quant=luq_hindsight", "tracking.checkpoint_every=3")
STEPS = 20


def torchrun(cache, processes, *arguments, **variables):
    """The command that starts that many processes, and its environment (shell.environment)."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return {"args": [*command, *map(str, arguments)], "env": environment(cache, **variables), "text": True}


def start(cwd, processes, *overrides, options=(), **variables):
    """A job in the folder `cwd`; its output goes to the file `console` there."""
    command = torchrun(cwd / "cache", processes, "-m", "luqrun", *RUN, *overrides, **variables)
    command["args"][3:3] = options
    with (cwd / "console").open("w") as console:
        return subprocess.Popen(**command, cwd=cwd, stdout=console, stderr=console, start_new_session=True)


def finish(job, cwd):
    """(exit code, console) at the end of the job; nothing of it is left behind."""
    try:
        code = job.wait(LIMIT)
    finally:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
    return code, (cwd / "console").read_text()


def run_folder(cwd) -> RunFolder:
    (path,) = (cwd / "outputs" / "default").iterdir()
    return RunFolder(path)


def reached(cwd, step):
    """Wait until the job has logged this step."""
    deadline = time.monotonic() + LIMIT
    while time.monotonic() < deadline:
        logged = list((cwd / "outputs" / "default").glob("*/metrics.jsonl"))
        if logged and any(line["step"] >= step for line in metrics(RunFolder(logged[0].parent))):
            return
        time.sleep(0.05)
    raise AssertionError((cwd / "console").read_text())


def processes_of(job) -> list[int]:
    """The process ids of the ranks."""
    children = subprocess.run(["ps", "--ppid", str(job.pid), "-o", "pid="], capture_output=True, text=True, check=True)
    return [int(pid) for pid in children.stdout.split()]
