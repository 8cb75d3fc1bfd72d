"""The command line as a whole: what Hydra would obey by halves, or drop, is refused or told in one line."""

import json
import os
import re
import shlex

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from overriding import command
from running import TINY

from luqrun import tasks
from luqrun.cli.overrides import in_quotes, shell_words, unreadable, with_companions
from luqrun.config import COMPANIONS, conf_dir
from luqrun.tasks.classification.data import NAMES as IMAGE_SETS

BASIC = "_target_: hydra._internal.core_plugins.basic_launcher.BasicLauncher\n"


@pytest.fixture
def luqrun(tmp_path, cache):
    """luqrun(*arguments): the command in tmp_path, whose runs only say that they diverged."""
    return lambda *arguments: command(tmp_path, cache, *arguments, work=lambda *_: {"diverged": 0})


@pytest.fixture
def own(tmp_path):
    """own(**files): the options of a folder of one's own with these files, slashes for double underscores."""

    def write(**files):
        for name, text in files.items():
            path = (tmp_path / "own" / name.replace("__", "/")).with_suffix(".yaml")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return "--config-dir", str(tmp_path / "own")

    return write


def assert_refused(answer, *words):
    assert (answer.code, answer.out) == (1, ""), answer
    assert len(answer.lines) == 1, answer
    assert [word for word in words if word not in answer.lines[0]] == [], answer.lines


@pytest.mark.parametrize(
    "given",
    [
        "hydra/launcher=site",
        "hydra/sweeper=site",
        "hydra.sweeper.max_batch_size=2",
        "++hydra.launcher.partition=x",
        "hydra.sweep.dir=there",
        "+experiment=site",
    ],
)
def test_what_only_a_sweep_reads_is_refused_without_m(luqrun, own, tmp_path, given):
    sweeper = (
        BASIC.replace("launcher", "sweeper").replace("Launcher", "Sweeper") + "max_batch_size: null\nparams: null\n"
    )
    experiment = "# @package _global_\ndefaults:\n  - override /hydra/launcher: site\n"
    folder = own(hydra__launcher__site=BASIC, hydra__sweeper__site=sweeper, experiment__site=experiment)
    named = "hydra/launcher=site" if "experiment" in given else given
    assert_refused(luqrun(*folder, given), named, "-m")
    assert os.listdir(tmp_path) == ["own"]
    assert luqrun(*folder, "hydra/launcher=basic", "hydra/sweeper=basic").code == 0


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("defaults:\n  - override /hydra/launcher: site\n", "hydra/launcher=site"),
        ("hydra:\n  sweeper:\n    params:\n      seed: 0,1\n", "hydra.sweeper"),
    ],
)
def test_a_swept_experiment_cannot_set_what_is_read_before_the_sweep(luqrun, own, text, named):
    folder = own(
        hydra__launcher__site=BASIC,
        experiment__sets="# @package _global_\n" + text,
        experiment__plain="# @package _global_\nseed: 4\n",
    )
    assert_refused(luqrun(*folder, "-m", "+experiment=plain,sets"), "+experiment=sets", named, "one command for each")
    alone = luqrun(*folder, "-m", "+experiment=sets")
    assert alone.code == 0
    assert alone.err.count("job 1 of") == 1


def test_the_folder_of_one_run_is_refused_for_a_sweep(luqrun):
    assert_refused(luqrun("-m", "hydra.run.dir=there", "seed=0,1"), "hydra.run.dir=there", "hydra.sweep.dir")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (("seed=range(3,3)",), ("seed=range(3,3)", "no value")),
        (("quant=glob(lug*)",), ("quant=glob(lug*)", "luq_smp2")),
        (("seed=range(2,2)", "hydra.sweeper.max_batch_size=2"), ("seed=range(2,2)",)),
        (("hydra.sweeper.max_batch_size=0", "seed=0,1"), ("hydra.sweeper.max_batch_size=0", "1 or more")),
    ],
)
def test_a_sweep_without_a_job_is_refused(luqrun, tmp_path, given, words):
    assert_refused(luqrun("-m", *given), *words)
    assert os.listdir(tmp_path) == []


def test_a_key_that_is_swept_over_and_given_again_is_refused(luqrun):
    assert_refused(luqrun("-m", "seed=0,1", "seed=2,3"), "seed=0,1", "seed=2,3", "twice")
    assert_refused(luqrun("-m", "seed=0,1", "++seed=2"), "seed=0,1", "++seed=2")


def test_a_key_given_twice_is_told_of(luqrun):
    told = "seed is given more than once, the last one counts: "
    assert luqrun("seed=1", "seed=2").err.splitlines()[0] == told + "seed=2"
    assert luqrun("-m", "seed=1", "seed=2,3").err.splitlines().count(told + "seed=2,3") == 1
    assert told not in luqrun("seed=1", "seed=1", "cell.row=seed").err


def test_a_list_of_options_is_told_of(luqrun):
    told = "quant=[luq,fp32] is one run, with these options merged; -m quant=luq,fp32 runs each"
    assert luqrun("quant=[luq,fp32]").err.splitlines()[0] == told
    assert "merged" not in luqrun("quant=[luq]", "quant.skip=[first,last]").err


@pytest.mark.parametrize(
    ("given", "advice"),
    [("study=a", "study=NAME"), ("hydra.run.dir=mine", "a folder of its own (hydra.run.dir, hydra.sweep.subdir)")],
)
def test_where_a_run_that_has_ended_can_be_run_again_is_told(luqrun, tmp_path, given, advice):
    luqrun(given)
    (path,) = tmp_path.rglob("run.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "status": "diverged", "diverged_at_step": 0}))
    again = luqrun(given, "tracking.profile_steps=1")
    assert f"would again; {advice} runs it again elsewhere" in again.err, again
    assert f"nothing is profiled, as nothing is trained; with reuse=false {advice} trains it" in again.err


def test_an_option_without_its_value_is_told_in_one_line(luqrun):
    for option in ("--config-dir", "--cfg"):
        assert_refused(luqrun(option), f"argument {option}", "expected one argument", "--help")


def test_what_only_a_search_takes_is_refused_in_a_sweep(luqrun):
    assert_refused(luqrun("-m", "schedule.lr=interval(0.1,0.3)"), "interval()", "hydra/sweeper=optuna")


def test_an_option_that_is_no_name_is_refused(luqrun):
    assert_refused(luqrun("quant=3"), "quant=3: an option of quant is a name", "--help")
    assert_refused(luqrun("quant=[3]"), "quant=[3]: an option of quant is a name")
    assert_refused(luqrun("+experiment=null"), "an option of experiment is a name")
    assert_refused(luqrun("=3"), "=3 has no key", "key=value")


@pytest.mark.parametrize("sweep", [(), ("-m",)])
def test_interpolations_of_hydra_are_obeyed(luqrun, tmp_path, sweep):
    answer = luqrun(*sweep, "study=${hydra:job.name}/n${hydra:job.num}", "cell.row=${hydra:runtime.cwd}", "seed=3")
    assert answer.code == 0, answer
    assert answer.config["cell"]["row"] == str(tmp_path)
    (run,) = tmp_path.rglob("run.json")
    assert run.relative_to(tmp_path).parts[:3] == ("outputs", "luqrun", "n0")
    if sweep:
        row, took = answer.out.rpartition("\nstatus ")[2].splitlines()[1:]
        assert re.fullmatch(r"1 job in \d+ (s|min)", took)
        assert row.startswith("running ") or row.startswith("killed ")  # its work is not done here
        assert row.endswith(str(run.parent.relative_to(tmp_path)))
        assert "not run" not in answer.out


@pytest.mark.parametrize("sweep", [(), ("-m",)])
def test_the_name_of_the_run_folder_cannot_be_a_setting(luqrun, sweep):
    assert_refused(luqrun(*sweep, "cell.row=${hydra:run.dir}"), "run_id", "cell.row")


def test_a_colon_is_asked_for_in_interpolations_of_hydra(luqrun):
    assert_refused(luqrun("study=${hydra.job.name}"), "study", "${hydra:job.name}")


@pytest.mark.parametrize(
    "value",
    [
        "a=b/c=d",
        "/data/é",
        "it's",
        "~/x",
        "f(x)",
        "a#b",
        "x!",
        "a[0]",
        "{x",
        '"',
        'a"b',
        "\\'",
        "o'clock=\\",
        "中",
        "a,b=c",
    ],
)
def test_a_value_that_needs_quotes_is_shown_in_them(value):
    shown = in_quotes(f"cell.row={value}")
    (given,) = shlex.split(shown)  # what a shell makes of it
    assert OverridesParser.create().parse_override(given).value() == value
    assert unreadable(f"cell.row={value}", "").endswith(f"in quotes: {shown}")


def test_quotes_are_offered_where_an_override_cannot_be_read(luqrun):
    assert_refused(luqrun("resume=runs/epoch=3/last.pt"), "in quotes", """ 'resume="runs/epoch=3/last.pt"' """.strip())
    assert_refused(luqrun("resume=/a,b/last.pt"), "needs -m", """ 'resume="/a,b/last.pt"' """.strip())
    assert_refused(luqrun("a b"), "key=value")
    assert_refused(luqrun("-m", "seed=choice()"), "seed=choice()", "empty choice")


def test_a_sweeps_escapes_are_not_shown():
    assert shell_words(["seed=$\\{hydra\\:job.num\\}", "study=a"]) == "'seed=${hydra:job.num}' study=a"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("+seed=1", ("seed is there already", "seed=VALUE")),
        ("experiment=table2/embedded", ("write +experiment=table2/embedded",)),
        ("~seed", ("~seed", "none can be left out")),
        ("~tracking", ("~tracking", "none can be left out")),
        ("~nosuch", ("nosuch", "does not exist")),
        ("quant.weigth.format=int8", ("quant.weigth.format is not a key", "did you mean quant.weight.format?")),
        ("qant.weight.fromat=int8", ("did you mean quant.weight.format?",)),
        ("dataset.glyph.noise=1", ("did you mean dataset.glyphs.noise?",)),
        ("quantt=luq", ("did you mean quant?",)),
        ("+experimnt=x", ("did you mean +experiment?",)),
        ("hydra.lancher.x=1", ("did you mean hydra.launcher.x?",)),
        ("hydra.job.nam=x", ("did you mean hydra.job.name",)),
        ("hydra.sweeper.n_trials=3", ("hydra.sweeper.n_trials", "hydra/sweeper=NAME")),
        ("SEED=1", ("did you mean seed?",)),
        ("lr=0.1", ("did you mean schedule.lr?",)),
    ],
)
def test_a_slip_in_a_key_gets_a_hint(luqrun, given, words):
    assert_refused(luqrun(given), *words)


@pytest.mark.parametrize("sweep", [(), ("-m",)])
def test_a_link_to_nowhere_and_a_file_in_the_place_of_a_folder(luqrun, tmp_path, sweep):
    (tmp_path / "outputs").symlink_to("gone")
    assert_refused(luqrun(*sweep, "seed=1"), "outputs is a link to gone, which is not there")
    (tmp_path / "outputs").unlink()
    (tmp_path / "outputs").write_text("")
    assert_refused(luqrun(*sweep, "seed=1"), "outputs is a file where a folder is needed")


def test_settings_that_the_data_set_does_not_read_are_refused(luqrun):
    assert_refused(luqrun("dataset.root=/data"), "dataset.root=/data", "dataset=glyphs", "it reads image_size")
    folder = ("dataset=folder", "dataset.root=/data")
    assert_refused(luqrun(*folder, "++dataset.glyphs={noise: 0.1, train_images: 5, val_images: 5}"), "dataset.glyphs")


def test_a_jobs_log_has_its_own_announcement_alone(luqrun, tmp_path):
    answer = luqrun("-m", *TINY, "seed=4,5")
    announced = [line for line in answer.lines if line.startswith("job ")]
    assert [line.partition(":")[0] for line in announced] == ["job 1 of 2", "job 2 of 2"]
    assert [line.rpartition(" ")[2] for line in announced] == ["seed=4", "seed=5"]
    assert "#1 :" not in answer.err
    for seed, line in zip((4, 5), announced, strict=True):
        (log,) = tmp_path.glob(f"outputs/default/*seed{seed}-*/run.log")
        assert [each.partition(": ")[2] for each in log.read_text().splitlines() if "job " in each] == [line]


def test_a_storage_of_optuna_is_made_ready_or_refused(luqrun, tmp_path):
    optuna = pytest.importorskip("optuna", reason="the extra sweep is not installed")
    search = ("-m", "hydra/sweeper=optuna_lr", "hydra.sweeper.n_trials=2", "hydra.sweeper.study_name=lr")
    url = "sqlite:///search.db"
    assert luqrun(*search, f"hydra.sweeper.storage={url}").code == 0
    stored = optuna.load_study(study_name="lr", storage=f"sqlite:///{tmp_path / 'search.db'}")
    assert [trial.value for trial in stored.trials] == [0.0, 0.0]  # diverged
    refused = luqrun(*search, "hydra.sweeper.storage='nosuch://me:secret@host/x'")
    assert_refused(refused, "hydra.sweeper.storage=nosuch://***@host/x", "sqlite:///")
    assert "secret" not in refused.err


@pytest.mark.parametrize(
    ("given", "added"),
    [
        (["dataset=sentences"], ["model=transformer_tiny", "schedule=sentences"]),
        (["dataset=squad", "model=bert", "quant=luq"], ["schedule=squad"]),
        (["-m", "dataset=multi30k", "schedule=wmt14", "seed=0,1"], ["model=transformer_tiny"]),
        (["dataset=glyphs"], []),
        (["quant=luq"], []),
        (["+experiment=table2/small_translation", "dataset=multi30k"], []),
        (["dataset=glyphs,sentences"], []),
    ],
)
def test_a_data_set_of_text_brings_its_network_and_schedule(given, added):
    assert with_companions(given) == [*given, *added]


def test_every_companion_is_a_file():
    assert COMPANIONS.keys() == tasks.MODULES.keys() - set(IMAGE_SETS)
    for dataset, companions in COMPANIONS.items():
        for group, option in {"dataset": dataset, **companions}.items():
            assert (conf_dir() / group / f"{option}.yaml").is_file()
