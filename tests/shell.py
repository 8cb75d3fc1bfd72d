"""For the tests of the command line: processes of `python -m luqrun` without two seconds of imports each.

Run as a script it imports what the job needs and then forks for each command on its standard input, a line of JSON. The
child is what `python -m luqrun ARGUMENTS` is: the same main, its own file descriptors, and a real exit code. Scripts in
tests/ run in the same way.
"""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Result:
    code: int
    out: str
    err: str


def environment(cache, **variables) -> dict[str, str]:
    """One thread, no GPU, the glyphs cached in `cache`."""
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "NUMBA_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "XDG_CACHE_HOME": str(cache),
        "PYTHONPATH": str(ROOT),
        **variables,
    }


@dataclass
class Process:
    """A command that runs. Its `pid` is its own until `wait` has seen its end."""

    shell: "Shell"
    pid: int

    def wait(self, timeout=None) -> Result | None:
        """Its end, or None if it still runs after `timeout` seconds."""
        result = self.shell.ask({"wait": self.pid, "timeout": timeout})
        return result and Result(**result)

    def kill(self):
        os.kill(self.pid, signal.SIGKILL)


class Shell:
    """luqrun(*arguments): run a command in the folder `cwd` to its end; start: do not wait for it."""

    def __init__(self, cache):
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment(cache),
        )  # fmt: skip

    def luqrun(self, cwd, *arguments, **variables) -> Result:
        return self.start(cwd, *arguments, **variables).wait()

    def start(self, cwd, *arguments, script=None, file_size=None, **variables) -> Process:
        """script: of tests/, to run in place of luqrun. file_size: bytes that the process may write to one file
        (ulimit -f). variables: of its environment.
        """
        return Process(self, self.ask({"start": [str(cwd), script, arguments, variables, file_size]}))

    def ask(self, request):
        print(json.dumps(request), file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())

    def close(self):
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


def _child(cwd, script, arguments, variables, file_size, out, err):
    import resource
    import runpy

    if file_size is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
    os.dup2(out, 1)
    os.dup2(err, 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.chdir(cwd)
    os.environ.update(variables)
    sys.argv = [script or "luqrun", *arguments]
    if script is None:
        runpy.run_module("luqrun", run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(str(ROOT / "tests" / script), run_name="__main__")


def _serve():
    import tempfile

    from hydra.core.plugins import Plugins

    import luqrun.cli.command  # noqa: F401
    from luqrun.quant.kernels import own_process

    own_process()
    from running import train

    # A run, for what is loaded only at its first use: kernels, their compiler, the writer of curves.
    Plugins.instance()
    with tempfile.TemporaryDirectory() as folder:
        train(Path(folder) / "run", "quant=luq", "finetune=fnt1")
    running = {}
    for line in sys.stdin:
        request = json.loads(line)
        if "start" in request:
            out, err = (tempfile.TemporaryFile("w+") for _ in range(2))  # noqa: SIM115
            process = os.fork()
            if process == 0:
                _child(*request["start"], out.fileno(), err.fileno())
                sys.exit()
            running[process] = out, err
            answer = process
        else:
            process = request["wait"]
            code = _end(process, request["timeout"])
            answer = None if code is None else {"code": code, **_texts(*running.pop(process))}
        print(json.dumps(answer), flush=True)


def _end(process, timeout) -> int | None:
    if timeout is None:
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    deadline = time.monotonic() + timeout
    while True:
        found, status = os.waitpid(process, os.WNOHANG)
        left = deadline - time.monotonic()
        if found or left <= 0:
            return os.waitstatus_to_exitcode(status) if found else None
        time.sleep(min(left, 0.005))


def _texts(out, err) -> dict[str, str]:
    texts = {}
    for name, file in (("out", out), ("err", err)):
        with file:
            file.seek(0)
            texts[name] = file.read()
    return texts


if __name__ == "__main__":
    _serve()
