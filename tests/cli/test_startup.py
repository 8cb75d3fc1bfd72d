"""The command line starts soon and does not let other libraries talk."""

import contextlib
import gc
import io
import logging
import subprocess
import sys

import pytest
from hydra._internal.config_loader_impl import ConfigLoaderImpl

from luqrun.cli import command as cli
from luqrun.cli import startup

HEAVY = ("torch", "torchvision", "triton", "numba", "transformers", "tensorboard", "matplotlib")


def left_by(code: str, modules) -> tuple[set[str], str]:
    """Which of these modules a fresh interpreter has after this code, and what it printed."""
    ending = f"import atexit, sys; atexit.register(lambda: print('LOADED', *(set({modules}) & set(sys.modules))))\n"
    result = subprocess.run([sys.executable, "-c", ending + code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    printed, _, loaded = result.stdout.rpartition("LOADED")
    return set(loaded.split()), printed


def test_importing_luqrun_loads_nothing():
    assert left_by("import luqrun", (*HEAVY, "hydra", "omegaconf", "numpy"))[0] == set()


def test_a_recipe_loads_torch_alone():
    assert left_by("import luqrun; luqrun.recipe('luq', samples=2)", (*HEAVY, "hydra"))[0] == {"torch"}


def test_ctrl_c_while_the_command_loads_is_answered_in_one_line():
    code = (
        "import os, signal, sys; from luqrun.__main__ import main\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # which a background job inherits as ignored
        "class Interrupting:\n"
        "    def find_spec(self, name, *more):\n"
        "        if name == 'hydra': os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Interrupting()); main()"
    )
    result = subprocess.run([sys.executable, "-c", code, "--help"], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (130, "")
    assert result.stderr == "luqrun: interrupted before the run began\n"


def shown(monkeypatch, *arguments) -> str:
    monkeypatch.setattr(sys, "argv", ["luqrun", *arguments])
    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code in (0, None)
    return out.getvalue()


def test_help_is_what_hydra_makes_of_it(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own" / "quant").mkdir(parents=True)
    (tmp_path / "own" / "quant" / "mine.yaml").write_text("defaults: [luq, _self_]\nname: mine\n")
    command = "--config-dir", "own", "model=vit_tiny", "seed=3", "--help"
    ours = shown(monkeypatch, *command)
    monkeypatch.setattr(cli, "quick_start", contextlib.nullcontext)
    assert ours == shown(monkeypatch, *command)
    assert "mine, mxfp4" in ours


def test_help_loads_nothing_heavy():
    code = "sys.argv = ['luqrun', '--help']; from luqrun.__main__ import main; main()"
    loaded, text = left_by(code, HEAVY)
    assert loaded == set()
    assert "== Groups" in text


def test_the_quick_start_ends():
    before = ConfigLoaderImpl.get_group_options
    with startup.quick_start():
        assert not gc.isenabled()
        assert ConfigLoaderImpl.get_group_options is not before
    assert gc.isenabled()
    assert ConfigLoaderImpl.get_group_options is before


@pytest.fixture
def levels():
    """Levels of loggers are given back."""
    loggers = [logging.getLogger(name) for name in (None, "luqrun", "hydra")]
    before = [logger.level for logger in loggers]
    logging.getLogger().setLevel(logging.DEBUG)  # what hydra.verbose=true does
    yield
    for logger, level in zip(loggers, before, strict=True):
        logger.setLevel(level)


def test_verbose_means_luqrun_and_hydra(levels):
    startup.quieten_libraries(True)
    assert not logging.getLogger("numba.core.byteflow").isEnabledFor(logging.DEBUG)
    assert logging.getLogger("numba.core.byteflow").isEnabledFor(logging.INFO)
    assert logging.getLogger("luqrun.quant.convert").isEnabledFor(logging.DEBUG)
    assert logging.getLogger("hydra.core").isEnabledFor(logging.DEBUG)


@pytest.mark.parametrize("verbose", [False, ["numba"], "numba"])
def test_whoever_names_loggers_is_obeyed(levels, verbose):
    startup.quieten_libraries(verbose)
    assert logging.getLogger("numba.core.byteflow").isEnabledFor(logging.DEBUG)
