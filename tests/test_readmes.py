"""The texts: their links lead somewhere, and their commands name files and keys that exist."""

import re
import shlex
import tomllib
from pathlib import Path

import pytest
from running import composed

from luqrun.cli.overrides import with_companions
from luqrun.cli.validation import to_config, validate

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("", "conf", "luqrun", "scripts", "tests", "outputs/published")
TEXTS = [str(path.relative_to(ROOT)) for folder in FOLDERS for path in sorted((ROOT / folder).glob("*.md"))]


def blocks(name) -> list[str]:
    return re.findall(r"^```\w*\n(.*?)^```", (ROOT / name).read_text(), re.M | re.S)


def headings(path) -> set[str]:
    """What `#` may be followed by in a link to this text, as GitHub names its headings."""
    titles = re.findall(r"^#+ (.*)$", path.read_text(), re.M)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


IGNORED = ("job=plan", "&")  # what the command line takes away, and the shell


def first_value(override: str) -> str:
    """Of a sweep over values with commas between them, which may be lists."""
    return re.sub(r",(?![^\[{\"]*[\]}\"]).*", "", override)


COMMANDS = [
    (name, line.partition(" #")[0].rstrip())
    for name in TEXTS
    if name.endswith(("README.md", "command_line.md"))
    for block in blocks(name)
    for line in block.splitlines()
    if re.match(r"(\w+=\S* )*(luqrun[ -]|torchrun |(\S+/)?python3? )", line)
]


@pytest.mark.parametrize("name", TEXTS)
def test_links_lead_somewhere(name):
    for link in re.findall(r"\]\(([^)\s]+)\)", (ROOT / name).read_text()):
        if link.startswith("https://"):
            continue
        path, _, heading = link.partition("#")
        target = (ROOT / name).parent / path if path else ROOT / name
        assert target.exists(), f"{name}: {link}"
        assert not heading or heading in headings(target), f"{name}: {link}"


@pytest.mark.parametrize(("name", "command"), COMMANDS, ids=[line for _, line in COMMANDS])
def test_commands_name_what_exists(name, command):
    words = shlex.split(command)
    scripts = [word for word in words if word.endswith(".py")]
    assert all((ROOT / script).is_file() for script in scripts)
    if words[0].startswith("luqrun"):
        assert words[0] in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    if "luqrun" not in words:
        return
    overrides = [
        word for word in words[words.index("luqrun") + 1 :] if not word.startswith("-") and word not in IGNORED
    ]
    if any(word.startswith("hydra/") for word in overrides):
        pytest.importorskip("hydra_plugins.hydra_submitit_launcher", reason="the extras slurm and sweep are missing")
    validate(to_config(composed(*with_companions([first_value(word) for word in overrides]))))


def test_commands_are_found():
    assert {name for name, _ in COMMANDS} >= {"README.md", "conf/README.md", "outputs/published/README.md"}


@pytest.mark.parametrize(("file", "keys"), [("run.json", ("parent", "reused")), ("summary.json", ("evaluated",))])
def test_what_a_run_folder_says_of_other_runs_is_described(file, keys):
    text = (ROOT / "conf" / "README.md").read_text()
    rows = " ".join(line for line in text.splitlines() if line.startswith(f"| `{file}` |"))
    assert [key for key in keys if f"`{key}`" not in rows] == []
