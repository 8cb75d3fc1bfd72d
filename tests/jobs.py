"""Jobs of several processes, under torchrun or forked from a warm one. For test_distributed.py, test_process_group.py
and scripts/rank_death.py.
"""

import os
import signal
import subprocess
import sys
import time

from running import TINY, metrics
from shell import environment
from torch.distributed import TCPStore

from luqrun.runs.folder import RunFolder

LIMIT = 400  # seconds for what takes ten, before a job counts as hanging
# 10 steps an epoch; 24 images a step are shared by one, two or three processes.
RUN = (*TINY, "dataset.batch_size=24", "finetune=fnt1", "quant=luq_hindsight", "tracking.checkpoint_every=3")
STEPS = 20


class Ranks:
    """The processes that `torchrun --nproc-per-node=processes` starts, without its seconds of imports for each.

    They have torchrun's variables and, as under it, a store that another process serves. Nobody ends them where one
    dies: they find out by themselves.
    """

    def __init__(self, shell, cwd, processes, *arguments, script=None, **variables):
        self.store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # 0: a port that is free
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": self.store.port, "TORCHELASTIC_USE_AGENT_STORE": True}
        shared |= {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, **variables}
        self.ranks = []
        for rank in range(processes):
            own = {name: str(value) for name, value in {**shared, "RANK": rank, "LOCAL_RANK": rank}.items()}
            self.ranks.append(shell.start(cwd, *map(str, arguments), script=script, **own))

    def finish(self) -> tuple[int, str]:
        """(exit code, console) at the end of all: the code of the first that failed, what each said after the other."""
        deadline, results = time.monotonic() + LIMIT, []
        for rank in self.ranks:
            result = rank.wait(max(deadline - time.monotonic(), 1))
            if result is None:
                rank.kill()
                result = rank.wait()
            results.append(result)
        codes = [result.code for result in results if result.code]
        return codes[0] if codes else 0, "".join(result.out + result.err for result in results)


def start(cwd, processes, *overrides, options=()):
    """A job under torchrun in the folder `cwd`; its output goes to the file `console` there."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", *options]
    with (cwd / "console").open("w") as console:
        return subprocess.Popen(
            [*command, "-m", "luqrun", *RUN, *overrides],
            cwd=cwd, env=environment(cwd / "cache"), stdout=console, stderr=console, start_new_session=True,
        )  # fmt: skip


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
    raise AssertionError(f"step {step} was not reached in {LIMIT} s in {cwd}")


def processes_of(job) -> list[int]:
    """The process ids of the ranks."""
    children = subprocess.run(["ps", "--ppid", str(job.pid), "-o", "pid="], capture_output=True, text=True, check=True)
    return [int(pid) for pid in children.stdout.split()]
