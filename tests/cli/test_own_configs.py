"""YAML files of one's own: one that a shipped file hides is refused, and a mistake has its file, line and key."""

import pytest
from overriding import command

SCHEDULE = "name: onecycle\nlr: 0.1\n"


@pytest.fixture
def luqrun(tmp_path, cache):
    """luqrun(*arguments): the command in tmp_path with --config-dir own, whose runs only say that they diverged."""
    (tmp_path / "own").mkdir()
    return lambda *arguments: command(
        tmp_path, cache, "--config-dir", "own", *arguments, work=lambda *_: {"diverged": 0}
    )


def write(tmp_path, name, content):
    path = tmp_path / "own" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def assert_refused(answer, *words):
    assert (answer.code, answer.out) == (1, ""), answer
    assert len(answer.lines) == 1, answer
    assert [word for word in words if word not in answer.lines[0]] == [], answer.lines


@pytest.mark.parametrize(
    "name", ["quant/luq.yaml", "experiment/table2/embedded.yaml", "config.yaml", "model/resnet8.yaml"]
)
def test_a_file_that_a_shipped_one_hides_is_refused(luqrun, tmp_path, name):
    write(tmp_path, name, "name: mine\n")
    for more in ((), ("-m", "seed=0,1"), ("--cfg", "job")):
        assert_refused(luqrun(*more), f"own/{name}", f"conf/{name}", "rename")


def test_so_is_one_that_hydras_own_hides_and_one_in_the_searchpath(luqrun, tmp_path, cache):
    write(tmp_path, "hydra/job_logging/stdout.yaml", "version: 1\n")
    assert_refused(luqrun("seed=1"), "own/hydra/job_logging/stdout.yaml")
    (tmp_path / "own" / "hydra" / "job_logging" / "stdout.yaml").unlink()
    write(tmp_path, "quant/luq.yaml", "name: mine\n")
    answer = command(tmp_path, cache, f"hydra.searchpath=[file://{tmp_path}/own]", "seed=1")
    assert_refused(answer, "own/quant/luq.yaml")


def test_files_of_other_names_are_used(luqrun, tmp_path):
    write(tmp_path, "schedule/mine.yaml", SCHEDULE)
    answer = luqrun("schedule=mine", "schedule.epochs=2")
    assert answer.code == 0
    assert answer.config["schedule"]["lr"] == 0.1


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("name: onecycle\nepochs:\n\tlr: 3\n", ("line 3", "tab")),
        ("name: onecycle\nlr: 1\nlr: 2\n", ("line 3", "duplicate key lr")),
        (b"name: onecycle\nlr: 1\n# \xfcber\n", ("line 3", "0xfc", "UTF-8")),
        ("name: onecycle\n".encode("utf-16"), ("line 1", "UTF-8")),
        ("name: onecycle\nlr: 0.1\x07\n", ("line 2", "'\\x07'")),
        ("", ("is empty",)),
        ("# nothing yet\n", ("is empty",)),
        ("- name\n- lr\n", ("key: value",)),
        ("7\n", ("key: value",)),
        ("name: onecycle\nlr:0.1\n", ("line 2", "a space after the colon")),
        ("name: 'onecycle\nlr: 0.1\n", ("line 1", "quoted scalar")),
        ("name: onecycle\nmilestones: [1, 2\n", ("line 2", "flow sequence")),
        ("name: onecycle\nlr: @x\n", ("line 2", "'@'")),
        (SCHEDULE + "epochs: 2.5\n", ("line 3", "schedule.epochs", "2.5", "Integer")),
        (SCHEDULE + "epochs: [1]\n", ("line 3", "schedule.epochs")),
        (SCHEDULE + "epochs:\n", ("line 3", "schedule.epochs", "None")),
        (SCHEDULE + "milestones: 3\n", ("line 3", "schedule.milestones", "must be a list")),
        (SCHEDULE + "epoch: 3\n", ("line 3", "schedule.epoch is not a key", "schedule.epochs")),
        (SCHEDULE + "epochs: 0\n", ("line 3", "schedule.epochs=0", "at least 1")),
        (SCHEDULE + "epochs: ${no.such}\n", ("line 3", "schedule.epochs", "no.such")),
        (SCHEDULE + "epochs: ${no\n", ("line 3", "epochs", "${no")),
        ("lr: 0.1\n", ("not set: schedule.name",)),
        ("defaults:\n  - onecycle\n  - nothing\n", ("line 3", "schedule/nothing", "not there")),
        ("defaults:\n  onecycle: 1\n", ("line 1", "defaults must be a list")),
        ("defaults:\n  - 3\n", ("line 1", "defaults")),
        ("# @package\nname: x\n", ("line 1", "@package")),
        ("name: onecycle\n lr: 0.1\n", ("line 2", "same column")),
        (SCHEDULE + "epochs:2\n", ("line 3", "a space after the colon")),
        ("epochs:2\n", ("line 1", "key: value")),
        ("lr:0.1:\n", ("line 1", "lr:0.1 is no setting", "a space after the colon")),
    ],
)
def test_a_mistake_is_told_with_file_line_and_key(luqrun, tmp_path, content, words):
    write(tmp_path, "schedule/mine.yaml", content)
    assert_refused(luqrun("schedule=mine"), "own/schedule/mine.yaml", *words)
    assert [path.name for path in tmp_path.iterdir()] == ["own"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("quant:\n  name: x\n", ("line 1", "# @package _global_")),
        ("# @package _global_\nschedule:\n  epochs: many\n", ("line 3", "schedule.epochs")),
        ("# @package _global_\nhydra:\n  swep:\n    dir: x\n", ("line 3", "hydra.swep", "hydra.sweep")),
        ("# @package _global_\ndefaults:\n  - override /quant: lug\n", ("line 3", "quant=lug", "luq_smp2")),
        ("# @package _global_\ndefaults:\n  - override /quantt: luq\n", ("line 3", "quantt")),
        ("# @package _global_\ndefaults:\n  - override quant: luq\n", ("line 3", "override /quant")),
        ("# @package _global_\ndefaults:\n  - /quant: luq\n", ("line 3", "override /quant")),
        ("", ("is empty",)),
        ("# @package _global_\nquant: luq\n", ("line 2", "quant: must hold", "override /quant: OPTION")),
        ("# @package _global_\nseed: 1\ntracking: 3\n", ("line 3", "tracking: must hold")),
        ("# @package _global_\n\n- seed\n", ("line 3", "key: value")),
        ("# @package _global_\nseed:\n1\n", ("line 3",)),
        ("\ufeff# @package _global_\nseed: 1\n", ("line 1", "byte order mark")),
    ],
)
def test_so_are_those_of_an_experiment(luqrun, tmp_path, content, words):
    write(tmp_path, "experiment/mine.yaml", content)
    assert_refused(luqrun("+experiment=mine"), "own/experiment/mine.yaml", *words)


def test_a_list_in_the_place_of_settings_has_its_key(luqrun, tmp_path):
    write(tmp_path, "quant/mine.yaml", "name: mine\nweight: [int4]\n")
    assert_refused(luqrun("quant=mine"), "own/quant/mine.yaml, line 2: quant.weight: must hold", "key: value")
    write(tmp_path, "quant/mine.yaml", "name: mine\nweight: int4\n")
    assert_refused(luqrun("quant=mine"), "own/quant/mine.yaml, line 2: quant.weight")
    write(tmp_path, "quant/mine.yaml", "name: mine\nweight: null\ngradient: 3\n")
    assert_refused(luqrun("quant=mine"), "own/quant/mine.yaml, line 3: quant.gradient: must hold")


def test_a_file_of_a_sweep_is_named_too(luqrun, tmp_path):
    write(tmp_path, "schedule/mine.yaml", SCHEDULE + "epochs: many\n")
    write(tmp_path, "schedule/other.yaml", SCHEDULE)
    assert_refused(luqrun("-m", "schedule=other,mine"), "own/schedule/mine.yaml, line 3", "schedule.epochs")
    write(tmp_path, "schedule/mine.yaml", "")
    assert_refused(luqrun("-m", "schedule=other,mine"), "own/schedule/mine.yaml", "is empty")
    write(tmp_path, "schedule/mine.yaml", SCHEDULE + "epochs: 0\n")
    assert "own/schedule/mine.yaml, line 3" in luqrun("-m", "schedule=other,mine").lines[-1]


def test_the_ending_of_a_file_is_asked_for(luqrun, tmp_path):
    write(tmp_path, "quant/mine.yml", "name: mine\n")
    assert_refused(luqrun("quant=mine"), "own/quant/mine.yml", "mine.yaml")
