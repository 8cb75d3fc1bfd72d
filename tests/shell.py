"""For the tests of the command line: processes of `python -m luqrun` without two seconds of imports each.

Run as a script it imports what the job needs and then forks once for each line of JSON on its standard input. The
child is what `python -m luqrun ARGUMENTS` is: the same main, its own file descriptors, and a real exit code.
"""

import json
import os
import subprocess
import sys
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


class Shell:
    """luqrun(*arguments): run a command in the folder `cwd`."""

    def __init__(self, cache):
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment(cache),
        )  # fmt: skip

    def luqrun(self, cwd, *arguments, **variables) -> Result:
        print(json.dumps([str(cwd), arguments, variables]), file=self.process.stdin, flush=True)
        return Result(**json.loads(self.process.stdout.readline()))

    def close(self):
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


def _child(cwd, arguments, variables, out, err):
    import runpy

    os.dup2(out, 1)
    os.dup2(err, 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.chdir(cwd)
    os.environ.update(variables)
    sys.argv = ["luqrun", *arguments]
    runpy.run_module("luqrun", run_name="__main__", alter_sys=True)


def _serve():
    import tempfile

    import luqrun.cli
    import luqrun.kernels.cpu
    import luqrun.trainer  # noqa: F401

    for line in sys.stdin:
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
            process = os.fork()
            if process == 0:
                _child(*json.loads(line), out.fileno(), err.fileno())
                sys.exit()
            code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
            texts = {}
            for name, file in (("out", out), ("err", err)):
                file.seek(0)
                texts[name] = file.read()
            print(json.dumps({"code": code, **texts}), flush=True)


if __name__ == "__main__":
    _serve()
