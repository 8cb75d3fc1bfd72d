"""Translation as a task: its loss, its scores and predictions, its network and which of its layers are 4-bit."""

import gzip
import re

import numpy as np
import pytest
import sacrebleu
import torch
import torch.nn.functional as F
from running import composed, quiet_machine

from luqrun.cli.validation import to_config
from luqrun.errors import UserError
from luqrun.quant.convert import quantize_model, quantized_layers
from luqrun.quant.quantizer import Quantizer
from luqrun.tasks import build_task, validate_task
from luqrun.tasks.translation.sentences import generate
from luqrun.tasks.translation.subwords import END, PADDING

SENTENCES = (
    *("dataset=sentences", "model=transformer_tiny", "schedule=sentences", "dataset.examples=60"),
    *("dataset.batch_tokens=200", "dataset.vocabulary=150", "dataset.max_length=24", "dataset.batch_size=8"),
)


def config(*overrides):
    return to_config(composed(*SENTENCES, *overrides))


@pytest.fixture(scope="module")
def task():
    with quiet_machine():
        yield build_task(config())


@pytest.fixture(scope="module")
def network(task):
    torch.manual_seed(0)
    return task.network()


def batches(examples):
    return [examples.batch(indices, None) for indices in np.array_split(np.arange(len(examples)), 3)]


def test_the_loss_is_that_of_each_subword_from_those_before_it(task, network):
    network.eval()
    batch = task.data.train.batch(np.arange(5), None)
    with torch.no_grad():
        loss, shown = task.loss(network, batch)
        found = []
        for source, target in zip(batch["source"], batch["target"], strict=True):
            source, target = source[source != PADDING][None], target[target != PADDING]
            for length in range(len(target)):
                before = torch.cat([torch.tensor([PADDING]), target[:length]])[None]
                logits = network(input_ids=source, decoder_input_ids=before).logits[0, -1]
                found.append(F.cross_entropy(logits, target[length], label_smoothing=0.1).item())
    assert loss.item() == pytest.approx(np.mean(found), rel=1e-4)
    assert (task.weight(batch), shown) == (len(found), {})


def test_padding_changes_neither_loss_nor_translations(task, network):
    network.eval()
    batch = task.data.val.batch(np.arange(4), None)
    wider = {name: F.pad(ids, (0, 3), value=PADDING) for name, ids in batch.items()}
    with torch.no_grad():
        plain, padded = (task.loss(network, each)[0].item() for each in (batch, wider))
    assert padded == pytest.approx(plain, rel=1e-5)


def test_scores_and_files_are_those_of_the_sentences_in_their_order(task, network):
    references = task.data.references["val"]
    order = task.data.order["val"]
    lengths = task.data.subwords.encode(generate(60)["val"].source).lengths
    assert task.data.val.source.lengths.tolist() == sorted(np.minimum(lengths, 24))
    exact = [task.data.subwords.encode([references[place]])[0].tolist() for place in order]
    predictions = [(exact[:7], 3.0, 10), (exact[7:], 5.0, 6)]
    assert task.score(predictions) == {"val/bleu": pytest.approx(100), "val/loss": 0.5}
    assert task.files(predictions) == {"val.hyp.txt": "".join(f"{line}\n" for line in references)}
    wrong = [exact[0]] * len(exact)
    found = task.score([(wrong, 1.0, 1)], "test")
    hypotheses = task.files([(wrong, 1.0, 1)], "test")["test.hyp.txt"].splitlines()
    expected = sacrebleu.corpus_bleu(hypotheses, [task.data.references["test"]]).score
    assert found == {"test/bleu": expected, "test/loss": 1.0}
    assert 0 < expected < 50


def test_beam_search_gives_a_line_a_sentence_and_the_sum_of_losses(task, network):
    network.eval()
    with torch.no_grad():
        predictions = [task.predict(network, batch) for batch in batches(task.data.val)]
        whole = [task.loss(network, batch)[0].item() for batch in batches(task.data.val)]
    assert sum(len(lines) for lines, _, _ in predictions) == len(task.data.val)
    assert len(task.files(predictions)["val.hyp.txt"].splitlines()) == len(task.data.val)
    means = [loss / weight for _, loss, weight in predictions]
    assert all(mean != smoothed for mean, smoothed in zip(means, whole, strict=True))  # without smoothing


def test_an_evaluation_compiles_nothing(task, network):
    compiled = torch.compile(network.eval(), backend=lambda graph, inputs: pytest.fail("it compiles"))
    batch = task.data.val.batch(np.arange(3), None)
    with torch.no_grad():
        assert task.predict(compiled, batch) == task.predict(network, batch)


def test_the_signature_says_which_bleu_it_is(task):
    assert re.fullmatch(
        r"nrefs:1\|case:mixed\|eff:no\|tok:13a\|smooth:exp\|version:[\d.]+", task.notes["bleu_signature"]
    )


def test_the_network_is_a_transformer_with_one_table_of_embeddings(network, task):
    assert network.lm_head.weight is network.model.shared.weight
    assert network.model.decoder.embed_tokens.weight is network.model.shared.weight
    assert network.config.vocab_size == len(task.data.subwords)
    assert network.config.dropout == 0.1
    assert network.model.shared.weight.std().item() == pytest.approx(128**-0.5, rel=0.05)
    assert build_task(config("model.dropout=0.25")).network().config.dropout == 0.25


PARTS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "fc1", "fc2")
ACROSS = tuple(name.replace("self_attn", "encoder_attn") for name in PARTS[:4])


def test_projections_and_feed_forward_layers_are_4_bit_and_nothing_else(task, recwarn):
    import luqrun

    model = quantize_model(task.network(), luqrun.recipe("luq"), example=task.example())
    expected = {f"model.encoder.layers.{n}.{part}" for n in range(4) for part in PARTS}
    expected |= {f"model.decoder.layers.{n}.{part}" for n in range(4) for part in (*PARTS, *ACROSS)}
    assert {name for name, _ in quantized_layers(model)} == expected
    task.loss(model, task.data.train.batch(np.arange(3), None))[0].backward()
    assert [str(each.message) for each in recwarn if issubclass(each.category, UserWarning)] == []
    task.predict(model.eval(), task.data.val.batch(np.arange(3), None))  # beam search takes it


def test_queries_keys_and_values_quantize_their_input_once(task, monkeypatch):
    import luqrun

    torch.manual_seed(0)
    model = quantize_model(task.network(), luqrun.recipe("luq"), example=task.example()).eval()
    seen, run = [], Quantizer.run
    monkeypatch.setattr(Quantizer, "run", lambda self, x, *rest: seen.append(x.dim()) or run(self, x, *rest))
    with torch.no_grad():
        task.loss(model, task.data.val.batch(np.arange(3), None))
    # Of a block: what queries, keys and values share, and the inputs of the output and of two layers; of the decoder's
    # other attention two more, as its queries are of another input, and its output's.
    assert seen.count(3) == 4 * (1 + 1 + 2) + 4 * (1 + 1 + 2 + 2 + 1)
    assert seen.count(2) == 64  # weights


WRONG = {
    "dataset.source=fr": r"dataset=sentences has en to de or de to en, not fr to de",
    "dataset.target=en": r"dataset\.source and dataset\.target are both en",
    "dataset.source=../en": r"dataset\.source=\.\./en must be how the files end",
    "dataset.vocabulary=5": r"dataset\.vocabulary=5 is too small; it must be at least 100",
    "dataset.max_length=3": r"dataset\.max_length=3",
    "dataset.batch_tokens=20": r"dataset\.batch_tokens=20 is too small; it must be at least dataset\.max_length=24",
    "dataset.batch_tokens=null": r"dataset\.batch_tokens is not given, and dataset=sentences needs it",
    "dataset.examples=0": r"dataset\.examples=0",
    "dataset.examples=1000000000": r"dataset\.examples=1000000000 is too large",
    "schedule=onecycle": r"schedule\.optimizer=sgd is for images; dataset=sentences goes with schedule=sentences",
    "dataset.root=/here": r"dataset\.root=/here is not read by dataset=sentences",
    "dataset.workers=-1": r"dataset\.workers=-1",
    "model=resnet8": r"model\.name=resnet8 does not translate, as dataset=sentences asks; allowed: transformer_base",
    "model.dropout=1.0": r"model\.dropout=1\.0",
    "model.stem=small": r"model\.stem=small is of networks for images",
    "model.new_head=true": r"model\.new_head=true: a network for translation has no head",
}


@pytest.mark.parametrize(("override", "said"), WRONG.items())
def test_a_wrong_setting_is_one_line_that_names_it(override, said):
    with pytest.raises(UserError, match=said) as mistake:
        validate_task(config(override))
    assert "\n" not in str(mistake.value)


def test_settings_of_text_are_refused_for_images():
    for override in ("+dataset.source=en", "+dataset.batch_tokens=5"):
        with pytest.raises(UserError, match=r"dataset\.\w+=\w+ is not read by dataset=glyphs; it reads image_size"):
            validate_task(to_config(composed(override)))


@pytest.fixture
def files(tmp_path):
    """Parallel text as Multi30k has it, one sentence longer than the others."""
    for stem, count in (("train", 40), ("val", 4), ("test_2016_flickr", 4)):
        for language, word in (("en", "dog"), ("de", "Hund")):
            lines = [f"{word} {number} {'and so on ' * (number == 3) * 20}".strip() for number in range(count)]
            (tmp_path / f"{stem}.{language}.gz").write_bytes(gzip.compress("\n".join(lines).encode() + b"\n"))
    return tmp_path


def multi30k(root, *overrides):
    own = ("dataset=multi30k", f"dataset.root={root}", *SENTENCES[1:3], "dataset.vocabulary=120")
    return to_config(composed(*own, "dataset.max_length=30", "dataset.batch_tokens=300", *overrides))


def test_sentences_that_are_too_long_are_counted_and_said(files):
    data = build_task(multi30k(files)).data
    assert len(data.train) == 39
    said = data.describe()
    assert "39 of 40 training, 4 validation and 4 test sentences, en to de" in said
    assert "left out: 1 training pairs of more than 30 subwords" in said
    assert "cut to 30 subwords: 1 val sentences" in said
    assert data.val.source.lengths.max() == 30
    for language in ("en", "de"):
        (files / f"train.{language}.gz").write_bytes(gzip.compress(b"and so on and on and on and on\n" * 3))
    with pytest.raises(UserError, match=r"no training sentence has at most dataset\.max_length=8 subwords"):
        build_task(multi30k(files, "dataset.max_length=8", "dataset.limit=1"))


def test_a_language_may_have_a_region(files):
    for path in list(files.glob("*.de.gz")):
        path.rename(path.with_name(path.name.replace(".de.", ".pt-BR.")))
    assert build_task(multi30k(files, "dataset.target=pt-BR")).data.languages == ("en", "pt-BR")


def test_a_limit_keeps_a_fixed_part(files):
    first, again = (build_task(multi30k(files, "dataset.limit=10")).data.train.source.flat for _ in range(2))
    assert np.array_equal(first, again)
    assert len(build_task(multi30k(files, "dataset.limit=10")).data.train) <= 10
    with pytest.raises(UserError, match=r"dataset\.limit=41 is more than the 40"):
        build_task(multi30k(files, "dataset.limit=41"))


def test_without_the_extra_one_line_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sacrebleu", None)
    with pytest.raises(UserError, match=r"pip install 'luqrun\[text\]'"):
        validate_task(config())


def test_an_end_ends_each_sentence(task):
    batch = task.data.train.batch(np.arange(10), None)
    for ids in (*batch["source"], *batch["target"]):
        assert ids[ids != PADDING][-1] == END
