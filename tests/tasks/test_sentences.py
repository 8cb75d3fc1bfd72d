"""The generated sentences: their grammar, and that no evaluated one is in the training set."""

import pytest

from luqrun.tasks.translation.sentences import EVALUATED, generate

TEXTS = generate(3000)
ENGLISH_TO_GERMAN = dict(zip(*TEXTS["train"], strict=True))


def test_they_are_the_same_each_time_and_more_of_them_begin_alike():
    again = generate(5000)
    assert again["val"].source[: len(TEXTS["val"].source)] == TEXTS["val"].source
    assert again["train"].source[:3000] == TEXTS["train"].source


def test_no_sentence_of_validation_or_test_is_trained_on_or_comes_twice():
    texts = generate(8000)
    evaluated = [*texts["val"].source, *texts["test"].source]
    assert len(evaluated) == len(set(evaluated)) == sum(EVALUATED.values())
    assert not set(evaluated) & set(texts["train"].source)
    assert [len(generate(50)[split].source) for split in ("train", "val", "test")] == [50, 20, 20]


def test_a_sentence_has_one_translation():
    assert len(ENGLISH_TO_GERMAN) == len(set(zip(*TEXTS["train"], strict=True)))


def test_german_verbs_stand_where_they_belong():
    for english, german in ENGLISH_TO_GERMAN.items():
        main, _, weil = german.rstrip(".").partition(", weil ")
        assert bool(weil) == (" because " in english)
        if english.startswith(("Today", "Here", "Now")):
            assert main.split()[1] in {*verbs(0), *verbs(1), "kann", "können", "will", "wollen"}
        if weil:
            assert weil.split()[-1] in {*verbs(0), *verbs(1), "kann", "können", "will", "wollen"}
        if " wants to " in main or " can " in english.partition(" because ")[0]:
            assert main.split()[-1] in verbs(1)


def verbs(which) -> set[str]:
    return {each[which] for each in (("sieht", "sehen"), ("kauft", "kaufen"), ("findet", "finden"),
                                     ("zeichnet", "zeichnen"), ("sucht", "suchen"), ("trägt", "tragen"))}  # fmt: skip


@pytest.mark.parametrize(
    ("wrong", "why"),
    [("den klein ", "weak"), ("der klein ", "weak"), ("ein kleine ", "strong"), ("die kleine Hunde", "plural")],
)
def test_adjectives_agree(wrong, why):
    assert not [german for german in ENGLISH_TO_GERMAN.values() if wrong in german], why


def test_the_other_direction_is_the_same_pairs():
    turned = generate(3000, ("de", "en"))
    assert (turned["val"].target, turned["val"].source) == tuple(TEXTS["val"])
