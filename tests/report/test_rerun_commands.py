"""Which commands make the runs of a table again: with their options, of one experiment each, and as few as do it."""

import json
import shlex

import pytest
from report_runs import write_run

from luqrun.report.records import read_folders
from luqrun.report.rerun_commands import split, whole_commands


class Run:
    """What was overridden, and with which options."""

    def __init__(self, overrides: str, options: str = ""):
        self.overrides, self.options = shlex.split(overrides), tuple(shlex.split(options))


def product(first: str, recipes: str, seeds: str = "0,1", options: str = "") -> list[Run]:
    return [Run(f"{first} quant={q} seed={s}", options) for q in recipes.split(",") for s in seeds.split(",")]


@pytest.mark.parametrize(
    ("arguments", "options", "others"),
    [
        ("-m quant=luq seed=0", "", "quant=luq seed=0"),
        ("--config-dir own -m seed=0", "--config-dir own", "seed=0"),
        ("--config-dir=/my/own seed=0 --multirun", "--config-dir /my/own", "seed=0"),
        ("-cd own -cn mine seed=0", "--config-name mine --config-dir own", "seed=0"),
        ("--config-p=own --config-d more seed=0", "--config-path own --config-dir more", "seed=0"),
        ("--config-dir 'my own' --config-dir other", "--config-dir other", ""),
    ],
)
def test_options_say_where_the_files_are(arguments, options, others):
    assert split(shlex.split(arguments)) == (tuple(shlex.split(options)), others.split())


def test_an_option_without_its_value_is_refused():
    with pytest.raises(ValueError, match="config-dir"):
        split(["seed=0", "--config-dir"])


@pytest.mark.parametrize("command", ["luqrun", None, ["luqrun", 3], ["luqrun", "--config-dir"]])
def test_a_command_that_is_none_is_damage(tmp_path, command):
    path = write_run(tmp_path) / "run.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "command": command}))
    records, (left_out,) = read_folders(tmp_path)
    assert records == []
    assert left_out.reason.startswith("run.json is damaged (command")


def test_an_experiment_of_ones_own_stands_alone():
    runs = product("+experiment=ours", "fp32,mine", options="--config-dir own")
    (command,) = whole_commands("fig2", "embedded", runs)
    assert command == "luqrun --config-dir own -m +experiment=ours quant=fp32,mine seed=0,1"


def test_a_single_run_is_no_sweep():
    runs = [Run("+experiment=ours 'quant.skip=[first, last]'", "--config-dir 'my own'")]
    assert whole_commands("fig2", "embedded", runs) == [
        "luqrun --config-dir 'my own' +experiment=ours 'quant.skip=[first, last]'"
    ]


def test_two_experiments_are_two_commands():
    runs = [*product("+experiment=ours", "mine"), *product("+experiment=fig2/embedded", "luq")]
    runs += product("+experiment=theirs", "fp32")
    assert whole_commands("fig2", "embedded", runs) == [
        "luqrun -m +experiment=ours quant=mine seed=0,1",
        "luqrun -m +experiment=theirs quant=fp32 seed=0,1",
        "luqrun -m +experiment=fig2/embedded",
    ]


def test_folders_of_recipes_are_commands_of_their_own():
    runs = [*product("+experiment=ours", "a", options="--config-dir one"), *product("+experiment=ours", "b")]
    assert whole_commands("fig2", "embedded", runs) == [
        "luqrun --config-dir one -m +experiment=ours quant=a seed=0,1",
        "luqrun -m +experiment=ours quant=b seed=0,1",
    ]


def test_what_is_not_each_with_each_is_several_sweeps():
    runs = [*product("+experiment=ours", "a,b,c", "0"), *product("+experiment=ours", "a", "1")]
    commands = whole_commands("fig2", "embedded", runs)
    assert commands == [
        "luqrun -m +experiment=ours quant=a,b,c seed=0",
        "luqrun +experiment=ours quant=a seed=1",
    ]


def test_runs_with_other_keys_are_other_sweeps():
    runs = [*product("+experiment=ours", "a"), *product("+experiment=ours schedule.lr=1", "b")]
    assert len(whole_commands("fig2", "embedded", runs)) == 2


def test_a_recipe_of_ones_own_joins_those_of_the_shipped_experiment():
    runs = product("+experiment=fig2/embedded", "luq,mine", options="--config-dir own")
    (command,) = whole_commands("fig2", "embedded", runs)
    start, _, recipes = command.partition(" quant=")
    assert start == "luqrun --config-dir own -m +experiment=fig2/embedded"
    assert recipes.split(",")[-1] == "mine"
    assert {"fp32", "luq", "biased_log"} < set(recipes.split(","))


def test_runs_without_an_experiment_get_the_shipped_one():
    runs = [Run("quant=luq cell.table=fig2 schedule.epochs=1")]
    assert whole_commands("fig2", "embedded", runs) == [
        "luqrun -m +experiment=fig2/embedded cell.table=fig2 schedule.epochs=1"
    ]
    assert whole_commands("fig2", "nowhere", runs) == []
