"""For the fuzzing of the command line: overrides of every kind, and the command in this process, one step long."""

import contextlib
import functools
import io
import logging
import os
import re
import signal
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from unittest import mock

import yaml
from fuzzing import at_most
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import strategies as st
from omegaconf import BooleanNode
from running import tiny

from luqrun.cli import command as cli
from luqrun.cli import sweeps
from luqrun.cli.messages import dotted_keys
from luqrun.config import Config, conf_dir
from luqrun.train import trainer

TOLD = "is given more than once|with these options merged"  # beside what became of it
_PARSER = OverridesParser.create()
KEYS = dotted_keys(Config)
GROUPS = ["model", "dataset", "quant", "schedule", "finetune", "experiment"]
PARTS = [*GROUPS[:5], "tracking", "cell", "dataset.glyphs", "quant.weight", "quant.activation", "quant.gradient"]
HYDRAS = ["hydra.verbose", "hydra.job.chdir", "hydra.job.name", "hydra.mode", "hydra.run", "hydra/launcher", "hydra.x"]
# What Hydra, OmegaConf, YAML or Python may take for something else than it looks like.
WORDS = [
    "", "null", "true", "Off", "nan", "inf", "-inf", "1e999", "1e-400", "1e308", "4e38", "1e-45", "-0.0", "0x10", "007",
    "1_000", "1.", "+1", "-1", "0", "1", "2", "0.5", "2147483648", "9" * 25, "9" * 400, "9" * 5000, "a" * 300,
    "a/" * 60, "~", "???", "${seed}", "a${seed}b", "${oc.env:HOME}", "${oc.env:NO_SUCH}", "${run_id:}", "${no.key}",
    "${", "${seed", "\\${seed}", "'\\${'", "~nobody/x", "}", "${hydra:run.dir}",
    "${hydra.run.dir}", "${quant}", "${quant.gradient}", "${.}", "${..}",
    "${oc.decode:1}", "${oc.create:[1]}", "${study}", "${schedule.lr}", "${no_resolver:1}", "${dataset.${model.name}}",
    "1,2", "range(1,3)", "choice(1,2)", "interval(1,2)", "glob(*)", "sort(3,1)", "int(1)", "float('nan')", "f(x)",
    "[]", "{}", "[null]", "[[1]]", "{a:1}", "{name:1}", "[1,2", "{a", "'", '"', "''", "a=b", "=", " ", "a b", "\t",
    ".", "..", "~", "/", "/etc/passwd", "@", "*", "[first]", "[first,last]", "[nothing*]", "['[']", "conv*", "first",
    "auto", "base", "cpu", "cuda", "bf16", "resnet8", "vit_tiny", "luq", "fp32", "int4", "int8", "e3m0", "e3m0_radix4",
    "sawb", "hindsight", "nearest", "stochastic", "flush", "both", "adamw", "cosine", "fig2", "fig2/embedded", "glyphs",
]  # fmt: skip
ODD = st.text(
    st.sampled_from("aZ09 _-./\\'\"${}[]():,=+~@#%&*?!<>|;^`\t\n\x1b\x85é中\U0001f600\u2028\udcff"), max_size=8
)


def quoted(text: str) -> str:
    return "'" + text.replace("\\'", "\\\\'").replace("'", "\\'") + "'"


def written(value) -> str:
    """A value in Hydra's grammar."""
    if isinstance(value, str):
        return quoted(value)
    if isinstance(value, list):
        return "[" + ",".join(map(written, value)) + "]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{quoted(key)}:{written(each)}" for key, each in value.items()) + "}"
    return "null" if value is None else str(value)


_names = st.one_of(st.sampled_from(sorted({key.rpartition(".")[2] for key in KEYS})), ODD)
_words = st.sampled_from(WORDS)
_scalars = st.one_of(st.none(), st.booleans(), st.integers(-2, 70), st.integers(), st.floats(), ODD, _words)
_nested = st.one_of(st.lists(_scalars, max_size=3), st.dictionaries(_names, _scalars, max_size=2))
_values = st.one_of(_scalars, _scalars, st.one_of(_nested, st.lists(_nested, max_size=2)))
_FITTING = {
    bool: st.booleans(),
    int: st.one_of(st.integers(-1, 6), st.integers(0, 100), st.integers(0, 2**33)),
    float: st.one_of(st.floats(0, 1), st.floats(0), st.floats()),
    str: st.one_of(_words.map(quoted), ODD.map(quoted)),
    list: st.lists(st.one_of(_words, st.integers(1, 100)), max_size=3),
    NoneType: st.one_of(st.integers(0, 100), st.floats(0), _words, ODD),
}
_TINY = tiny()
_TYPES = {key: type(functools.reduce(getattr, key.split("."), _TINY)) for key in KEYS}
_near = st.builds(
    str.format,
    st.sampled_from(["{}x", "{}.x", "x.{}", "{}@a", "{}@", ".{}", "{}.", "hydra.{}", "{}[0]", "{}.0", "{} ", "/{}"]),
    st.sampled_from(KEYS + PARTS),
)
_keys = st.one_of(*[st.sampled_from(KEYS)] * 4, st.sampled_from(PARTS + GROUPS), st.sampled_from(HYDRAS), _near, ODD)
_prefixes = st.sampled_from([""] * 6 + ["+", "++", "~"])
_fitting = st.sampled_from(KEYS).flatmap(lambda key: _FITTING[_TYPES[key]].map(lambda value: f"{key}={written(value)}"))
_choices = st.sampled_from(GROUPS).flatmap(
    lambda group: st.sampled_from(
        sorted(path.stem for path in (conf_dir() / group).glob("*.yaml")) or ["fig2/embedded"]
    ).map(lambda name: f"{'+' * (group == 'experiment')}{group}={name}")
)
_any = st.one_of(
    *[st.builds("{}{}={}".format, _prefixes, _keys, st.one_of(_values.map(written), _words, ODD))] * 4,
    st.builds("~{}".format, _keys),
    ODD,
)
one = st.one_of(_fitting, _any).filter(lambda text: not text.startswith("-"))  # an option
overrides = st.one_of(
    st.lists(one, min_size=1, max_size=1), st.lists(st.one_of(_fitting, _choices), min_size=2, max_size=3)
)


@dataclass
class Answer:
    """code: of the exit, or the traceback. config: what config.yaml in the run folder says, None without one."""

    code: int | str
    out: str
    err: str
    config: dict | None

    @property
    def lines(self) -> list[str]:
        """Of err, without what is said of a key given twice: what is tried stands beside other settings."""
        return [line for line in self.err.splitlines() if line.strip() and not re.search(TOLD, line)]


def command(folder: Path, cache: Path, *arguments: str, work=None) -> Answer:
    """`luqrun ARGUMENTS` in `folder` with `work` for the training; by default one step, or none if it takes long."""
    out, err, code, before = io.StringIO(), io.StringIO(), 0, os.getcwd()
    root = logging.getLogger()
    kept = root.handlers[:], root.level, logging.raiseExceptions
    os.chdir(folder)
    try:
        with (
            mock.patch.object(sys, "argv", ["luqrun", *arguments]),
            mock.patch.object(cli, "work", work or _one_step),
            mock.patch.object(sweeps, "jobs", []),
            mock.patch.dict(os.environ, XDG_CACHE_HOME=str(cache)),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            at_most(60),
        ):
            cli.main()
    except SystemExit as end:
        code = end.code
    except BaseException:
        code = traceback.format_exc()
    finally:
        os.chdir(before)
        for handler in set(root.handlers) - set(kept[0]):
            handler.close()
        root.handlers[:], level, logging.raiseExceptions = kept[0], kept[1], kept[2]
        root.setLevel(level)
    found = [path for path in folder.rglob("config.yaml") if path.is_file()]
    config = yaml.safe_load(found[0].read_text()) if len(found) == 1 and code in (0, 143) else None
    return Answer(code, out.getvalue(), err.getvalue(), config)


def _one_step(config: Config, folder, requests) -> dict:
    """Train a step and stop as if asked to; only name the end where that step would not be a small one."""
    data, quant = config.dataset, config.quant
    images = data.glyphs.train_images + data.glyphs.val_images if data.glyphs else 14000
    samples = quant.gradient.samples if quant.gradient else 1
    small = images <= 1000 and data.image_size <= 64 and samples <= 4 and data.workers <= 1
    large = config.model.name in ("resnet18", "resnet50", "resnext50_32x4d", "mobilenet_v2", "vit_b_16")
    if config.job != "train" or config.compile or large or not small:
        return {"diverged": 0}
    requests.received = signal.SIGTERM
    return trainer.run(config, folder, requests)


def complaint(texts: list[str], answer: Answer) -> str | None:
    """What is wrong with an answer to these overrides; None for a clear one."""
    if isinstance(answer.code, str):
        return answer.code
    if answer.code == 1:
        if len(answer.lines) != 1 or "Traceback" in answer.err:
            return f"not one line: {answer.err}"
        return None if any(_named(text, answer.err) for text in texts) else f"names no override: {answer.err}"
    if answer.code not in (0, 128 + signal.SIGTERM):
        return f"exit code {answer.code}: {answer.err}"
    parsed = [(text, _PARSER.parse_override(text)) for text in texts if not text.startswith("~")]
    settings = [(text, each) for text, each in parsed if each.key_or_group in KEYS + PARTS]
    for text, each in settings:
        later = [other.key_or_group for _, other in settings[settings.index((text, each)) + 1 :]]
        option = each.key_or_group in GROUPS and not isinstance(each.value(), dict)
        if option or any(key.startswith(each.key_or_group) or each.key_or_group.startswith(key) for key in later):
            continue
        if answer.config is None:
            return f"accepted, but there is no config.yaml: {answer.err}"
        found = functools.reduce(
            lambda part, name: (part or {}).get(name, "?"), each.key_or_group.split("."), answer.config
        )
        if not _holds(found, each.value()):
            return f"accepted, but {text} became {found!r}"
    return None


def _named(text: str, line: str) -> bool:
    """Whether the line names the override's key, a part of its key, or all of it."""
    key = re.match(r"[+~]*([^=@]*)", text)[1].strip()
    parts = [part for part in re.split(r"[./\[]", key) if part]
    return not parts or any(part in line for part in parts) or any(form in line for form in (text, repr(text)[1:-1]))


def _holds(found, given) -> bool:
    """Whether a setting is what was given: converted to its type, and resolved."""
    if isinstance(given, str) and "${" in given:
        return True
    if isinstance(given, dict) and isinstance(found, dict):  # merged
        return all(key in found and _holds(found[key], value) for key, value in given.items())
    if isinstance(given, list) and isinstance(found, list):
        return len(found) == len(given) and all(map(_holds, found, given))
    if found is None or given is None or isinstance(found, dict | list):
        return found is given
    if isinstance(found, bool):
        return found == BooleanNode(given)
    return found == type(found)(given)
