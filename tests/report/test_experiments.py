"""Which cells a table has, as Hydra composes them, and what the paper says of each."""

import functools
import shlex

import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from running import composed

from luqrun.cli.validation import to_config, validate
from luqrun.config import conf_dir
from luqrun.errors import UserError
from luqrun.report.experiments import (
    BASELINES,
    PARTS,
    ROUNDING_TABLES,
    TITLES,
    check_tables,
    expected,
    expected_of,
    experiments_of,
)
from luqrun.report.paper import BERT, MODELS, REPLICATIONS, TRANSFORMER, published, replications

CONF = conf_dir()
EXPERIMENTS = [
    (path.parent.name, path.stem)
    for path in sorted(CONF.glob("experiment/*/*.yaml"))
    if {"hydra", "cell"} <= yaml.safe_load(path.read_text()).keys()
]
SEEDS = {"fig2": 5, "table3": 5, "table2": 3, "table6": 5, "fig1b": 5, "fig1c": 5, "fig5": 5, "options": 6}


def overrides(command: str) -> list[str]:
    name, *given = shlex.split(command.replace("=DIR", "=/data"))
    assert name == "luqrun"
    return given


def scale_of(experiment: str) -> str:
    """The scale of the cells that an experiment fills: that of small_translation is small."""
    for part in filter(None, PARTS):
        experiment = experiment.removesuffix(part)
    return experiment


def test_every_table_has_its_experiments():
    assert {table for table, _ in EXPERIMENTS} == set(TITLES) == {*BASELINES, *ROUNDING_TABLES}
    more = {"table2": {"small"}, "table3": {"small"}}
    ours = {"formats": {"embedded", "cifar"}, "replications": {"embedded"}, "phases": {"embedded"}}  # not the paper's
    ours["post_training"] = {"embedded", "cifar"}
    for table in BASELINES:
        scales = {scale_of(name) for each, name in EXPERIMENTS if each == table}
        assert scales == ours.get(table, {"cifar", "cifar100", "embedded", "paper"} | more.get(table, set()))
    for table, name in EXPERIMENTS:
        assert f"{table}/{name}" in experiments_of(table, scale_of(name))


def test_the_rows_of_a_table_may_be_of_several_experiments():
    texts = ["table2/small_translation", "table2/small_question_answering"]
    assert experiments_of("table2", "small") == texts
    assert [(wish.row, wish.experiment) for wish in expected("table2", "small")] == [
        (row, name) for row, name in zip(("transformer_tiny", "bert"), texts, strict=True) for _ in range(4 * 3)
    ]
    assert experiments_of("table2", "paper") == [f"table2/paper{part}" for part in PARTS]
    assert experiments_of("table3", "small") == ["table3/small"]
    assert experiments_of("table2", "resnet50_luq") == experiments_of("table2", "mars") == []


def test_a_command_names_each_folder_that_it_needs_and_was_not_given():
    name = "table2/small_question_answering"
    assert expected_of(name)[0].command == (
        f"luqrun +experiment={name} model=bert seed=0 quant=fp32 dataset.root=DIR model.weights=DIR"
    )
    shared = ("dataset.root=/data", "schedule.epochs=1")
    assert expected_of(name, shared)[0].command.endswith("quant=fp32 model.weights=DIR")
    assert "DIR" not in expected_of(name, (*shared, "model.weights=/w"))[0].command


@pytest.mark.parametrize(("table", "scale"), EXPERIMENTS)
def test_expected_is_what_hydra_composes(table, scale):
    wishes = expected_of(f"{table}/{scale}")
    params = yaml.safe_load((CONF / "experiment" / table / f"{scale}.yaml").read_text())["hydra"]["sweeper"]["params"]
    count = 1
    for values in params.values():
        count *= len(str(values).split(","))
    assert len({(wish.row, wish.column, wish.seed) for wish in wishes}) == len(wishes) == count
    chosen = wishes[7 * EXPERIMENTS.index((table, scale)) % len(wishes)]  # one of each: composing takes its time
    config = to_config(composed(*overrides(chosen.command)))
    validate(config)
    cell = config.cell
    assert (cell.table, cell.scale, cell.row, cell.column) == (table, scale_of(scale), chosen.row, chosen.column)
    assert (config.seed, config.study) == (chosen.seed, f"{scale_of(scale)}/{table}")
    assert config.reuse


@functools.cache
def parse(override: str):
    (parsed,) = OverridesParser.create().parse_overrides([override])
    return parsed


@pytest.mark.parametrize(("table", "scale"), EXPERIMENTS)
def test_every_command_parses_and_names_options_that_exist(table, scale):
    needs_root = scale not in ("embedded", "measured")
    needs_weights = scale.endswith("_question_answering")
    for wish in expected_of(f"{table}/{scale}"):
        first, *others = [parse(override) for override in overrides(wish.command)]
        assert first.is_add()
        assert (first.key_or_group, first.value()) == ("experiment", f"{table}/{scale}")
        values = {each.key_or_group: each.value() for each in others}
        assert not any(each.is_sweep_override() for each in others)
        assert values.pop("dataset.root", None) == ("/data" if needs_root else None)
        assert values.pop("model.weights", None) == ("/data" if needs_weights else None)
        assert values.pop("seed") == wish.seed
        assert values.pop("cell.row", wish.row) == wish.row
        assert "quant" in values
        for group, option in values.items():
            assert (CONF / group / f"{option}.yaml").is_file()


@pytest.mark.parametrize("table", sorted(SEEDS))
def test_the_glyph_scale_has_enough_seeds(table):
    wishes = expected(table, "embedded")
    for cell in {(wish.row, wish.column) for wish in wishes}:
        assert [wish.seed for wish in wishes if (wish.row, wish.column) == cell] == list(range(SEEDS[table]))


def test_the_order_is_the_experiment_s():
    rows = list(dict.fromkeys(wish.row for wish in expected("fig2", "embedded")))
    assert rows == ["fp32", "biased_log", "fp4_sr", "fp4_su", "uniform_sr", "luq"]
    first = expected("table3", "cifar")[0]
    assert (first.row, first.column, first.seed) == (first.row, "fp32_none", 0)
    assert first.command == f"luqrun +experiment=table3/cifar model={first.row} seed=0 quant=fp32 finetune=none" + (
        " dataset.root=DIR"
    )


@pytest.mark.parametrize("scale", ["", "mars", "resnet50_luq"])
def test_a_scale_without_an_experiment_expects_nothing(scale):
    assert expected("table2", scale) == []


def test_unknown_tables_are_refused_with_the_known_ones():
    check_tables([])
    check_tables(list(TITLES))
    with pytest.raises(UserError, match=r"^table fig3 is not known; allowed: table1, fig1a, .*, post_training$"):
        check_tables(["fig2", "fig3"])


@pytest.mark.parametrize(("table", "scale"), [each for each in EXPERIMENTS if each[0] in BASELINES])
def test_every_cell_has_a_baseline_in_its_table(table, scale):
    row, column = BASELINES[table]
    cells = {(wish.row, wish.column) for wish in expected(table, scale_of(scale))}
    assert {(row or own_row, column or own_column) for own_row, own_column in cells} <= cells


# As printed in the paper: baseline, Ultra-low, LUQ, LUQ + SMP.
TABLE_2 = {
    "ResNet-18": (69.7, 68.27, 69.09, 69.24),
    "ResNet-50": (76.5, 74.01, 75.42, 75.63),
    "MobileNet-V2": (71.9, 68.85, 69.55, 69.7),
    "ResNeXt-50": (77.6, None, 76.02, 76.12),
    TRANSFORMER: (27.5, 25.4, 27.17, 27.25),
    BERT: (87.03, None, 85.75, 85.9),
    "ViT-B": (76.2, None, 73.7, 74.1),
}
# Baseline, LUQ + SMP, and after 1, 2 and 3 epochs of fine-tuning.
TABLE_3 = {
    "ResNet-18": (69.7, 69.24, 69.7, None, None),
    "ResNet-50": (76.5, 75.63, 75.89, 76.0, 76.18),
    "MobileNet-V2": (71.9, 69.7, 70.1, 70.3, 70.3),
    "ResNeXt-50": (77.6, 76.12, 76.25, 76.33, 76.7),
    TRANSFORMER: (27.5, None, None, None, None),
    BERT: (87.03, None, None, None, None),
    "ViT-B": (76.2, None, None, None, None),
}
COLUMNS_2 = ("fp32", "radix4_tpr", "luq", "luq_smp2")
COLUMNS_3 = ("fp32_none", "luq_smp2_none", "luq_smp2_fnt1", "luq_smp2_fnt2", "luq_smp2_fnt3")


@pytest.mark.parametrize(("row", "model"), MODELS.items())
def test_the_numbers_of_tables_2_and_3(row, model):
    for table, columns, printed in (("table2", COLUMNS_2, TABLE_2), ("table3", COLUMNS_3, TABLE_3)):
        for column, value in zip(columns, printed[model], strict=True):
            of = f"{model}, Ultra-low" if column == "radix4_tpr" else model  # ours is no Ultra-low
            assert published(table, row, column) == (None if value is None else (value, of)), (table, column)


def test_every_model_of_an_experiment_stands_for_one_of_the_paper():
    for table in ("table2", "table3"):
        for scale in ("cifar", "cifar100", "embedded", "small", "paper"):
            assert {wish.row for wish in expected(table, scale)} <= set(MODELS)
    at_scale = {wish.row: MODELS[wish.row] for wish in expected("table2", "paper")}
    assert sorted(at_scale.values()) == sorted(TABLE_2)
    assert at_scale["resnext50_32x4d"] == "ResNeXt-50"


@pytest.mark.parametrize(
    ("table", "row", "column", "says"),
    [
        ("fig2", "fp32", "top1", (76.5, "ResNet-50")),
        ("fig2", "luq", "top1", (75.42, "ResNet-50")),
        ("fig2", "biased_log", "top1", (None, "diverges")),
        ("fig2", "uniform_sr", "top1", (None, "diverges")),
        ("fig2", "fp4_sr", "top1", (None, "large loss")),
        ("fig2", "fp4_su", "top1", (None, "large loss")),
        ("fig1b", "forward_only", "top1", (None, "RDN wins")),
        ("fig1c", "backward_only", "top1", (None, "SR wins")),
        ("fig5", "fp2_both16", "top1", (None, "about full precision")),
        ("table6", "resnet8", "backward_only", (None, "the more sensitive")),
        ("options", "luq_pow2", "top1", (None, "small cost")),
    ],
)
def test_numbers_and_words_of_the_figures(table, row, column, says):
    assert published(table, row, column) == says


@pytest.mark.parametrize(
    ("table", "row", "column"),
    [
        ("fig2", "int4_nearest", "top1"),
        ("table2", "resnet8", "int4_nearest"),
        ("table2", "lenet", "luq"),
        ("table3", "resnet8", "fp32_fnt3"),  # the paper fine-tunes LUQ + SMP alone
        ("table3", "resnet8", "luq_none"),
        ("table6", "resnet8", "luq"),
        ("fig1a", "forward_sr", "rounding"),
    ],
)
def test_the_paper_says_nothing_of_other_cells(table, row, column):
    assert published(table, row, column) is None


def test_words_and_numbers_belong_to_cells_that_exist():
    from luqrun.report import paper

    for table, words in {**paper.OUTCOMES, "fig2": paper.FIG2}.items():
        wishes = expected(table, "embedded")
        cells = {wish.column if table == "table6" else wish.row for wish in wishes}
        assert set(words) <= cells, table
    assert set(paper.TABLE2) < {wish.column for wish in expected("table2", "embedded")}


def test_what_others_measured_stands_beside_luq_alone():
    assert [f"{each.difference:.2f}" for each in replications("table2", "bert", "luq")] == ["-2.57"]
    assert [f"{each.difference:.2f}" for each in replications("table2", "vit_tiny", "luq")] == ["-3.14", "-4.63"]
    assert "quoted" in REPLICATIONS[BERT][0].what  # it is the paper's number to the digit
    assert replications("table2", "transformer_base", "luq") == ()  # theirs is the paper's, and said to be
    assert replications("table2", "bert", "luq_smp2") == replications("table3", "bert", "luq") == ()
