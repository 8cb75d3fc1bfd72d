"""Generated English sentences with their German translations: the embedded data set of translation.

Few words, but what makes translation more than a dictionary: gender, case and number in articles and adjectives, the
verb in second place after an adverb, at the end of its clause after a modal verb and after `weil`.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from luqrun.tasks.translation.parallel_text import Pairs

DIRECTIONS = (("en", "de"), ("de", "en"))
EVALUATED = {"val": 500, "test": 500}  # sentences, none of which is in the training set; beside few of these, fewer
SEED = 1017

# English singular and plural, gender, German singular and plural
PERSONS = (
    ("dog", "dogs", "m", "Hund", "Hunde"), ("cat", "cats", "f", "Katze", "Katzen"),
    ("child", "children", "n", "Kind", "Kinder"), ("woman", "women", "f", "Frau", "Frauen"),
    ("man", "men", "m", "Mann", "Männer"), ("horse", "horses", "n", "Pferd", "Pferde"),
    ("teacher", "teachers", "m", "Lehrer", "Lehrer"), ("sister", "sisters", "f", "Schwester", "Schwestern"),
)  # fmt: skip
THINGS = (
    ("book", "books", "n", "Buch", "Bücher"), ("apple", "apples", "m", "Apfel", "Äpfel"),
    ("house", "houses", "n", "Haus", "Häuser"), ("car", "cars", "n", "Auto", "Autos"),
    ("letter", "letters", "m", "Brief", "Briefe"), ("flower", "flowers", "f", "Blume", "Blumen"),
    ("lamp", "lamps", "f", "Lampe", "Lampen"), ("table", "tables", "m", "Tisch", "Tische"),
)  # fmt: skip
ADJECTIVES = (("small", "klein"), ("old", "alt"), ("red", "rot"), ("new", "neu"), ("white", "weiß"), ("blue", "blau"))
NUMBERS = (("two", "zwei"), ("three", "drei"), ("four", "vier"), ("five", "fünf"), ("seven", "sieben"))
# English as of one and of many, German as of one and of many; the last is the infinitive too
VERBS = (
    ("sees", "see", "sieht", "sehen"), ("buys", "buy", "kauft", "kaufen"), ("finds", "find", "findet", "finden"),
    ("draws", "draw", "zeichnet", "zeichnen"), ("seeks", "seek", "sucht", "suchen"),
    ("carries", "carry", "trägt", "tragen"),
)  # fmt: skip
MODALS = (("can", "can", "kann", "können"), ("wants to", "want to", "will", "wollen"))
ADVERBS = (("today", "heute"), ("here", "hier"), ("now", "jetzt"))

ARTICLES = {"nominative": {"m": "der", "f": "die", "n": "das"}, "accusative": {"m": "den", "f": "die", "n": "das"}}
INDEFINITE = {
    "nominative": {"m": "ein", "f": "eine", "n": "ein"},
    "accusative": {"m": "einen", "f": "eine", "n": "ein"},
}
STRONG = {"nominative": {"m": "er", "f": "e", "n": "es"}, "accusative": {"m": "en", "f": "e", "n": "es"}}


class _Phrase(NamedTuple):
    english: str
    german: str
    many: bool = False


class _Writer:
    """Writes sentences from random choices."""

    def __init__(self, rng: np.random.Generator):
        self.rng = rng

    def choose(self, among):
        return among[self.rng.integers(len(among))]

    def nouns(self, among, case: str) -> _Phrase:
        """A noun with its article or number, and mostly an adjective, in a case."""
        one, several, gender, eine, viele = self.choose(among)
        kind = self.choose(("the", "a", "all", "number"))
        english, german = self.choose(ADJECTIVES) if self.rng.random() < 0.7 else ("", "")
        weak = "en" if case == "accusative" and gender == "m" else "e"
        if kind == "number":
            article, artikel = self.choose(NUMBERS)
            return _phrase((article, english, several), (artikel, german and german + "e", viele), True)
        if kind == "all":
            return _phrase(("the", english, several), ("die", german and german + "en", viele), True)
        if kind == "the":
            return _phrase(("the", english, one), (ARTICLES[case][gender], german and german + weak, eine))
        article = "an" if (english or one)[0] in "aeiou" else "a"
        ending = STRONG[case][gender]
        return _phrase((article, english, one), (INDEFINITE[case][gender], german and german + ending, eine))

    def clause(self, last: bool) -> tuple[str, str]:
        """Subject, verb and object; last: the German verb stands at the end."""
        subject, thing = self.nouns(PERSONS, "nominative"), self.nouns(THINGS, "accusative")
        verb, many = self.choose(VERBS), subject.many
        english, german = verb[many], verb[2 + many]
        if self.rng.random() < 0.4:
            modal = self.choose(MODALS)
            english, end, second = f"{modal[many]} {verb[1]}", verb[3], modal[2 + many]
        else:
            end, second = "", german
        words = f"{subject.english} {english} {thing.english}"
        if last:
            return words, f"{subject.german} {thing.german} {end} {second}"
        if self.rng.random() < 0.4:
            early, früh = self.choose(ADVERBS)
            return f"{early} {words}", f"{früh} {second} {subject.german} {thing.german} {end}"
        return words, f"{subject.german} {second} {thing.german} {end}"

    def sentence(self) -> tuple[str, str]:
        english, german = self.clause(last=False)
        if self.rng.random() < 0.4:
            because, weil = self.clause(last=True)
            english, german = f"{english} because {because}", f"{german.rstrip()}, weil {weil}"
        return _written(english), _written(german)


def _phrase(english: tuple[str, ...], german: tuple[str, ...], many: bool = False) -> _Phrase:
    return _Phrase(" ".join(filter(None, english)), " ".join(filter(None, german)), many)


def _written(words: str) -> str:
    words = " ".join(words.split())
    return f"{words[0].upper()}{words[1:]}."


def generate(count: int, languages: tuple[str, str] = DIRECTIONS[0]) -> dict[str, Pairs]:
    """`count` training pairs, and those of validation and test, the same in each run; by split.

    Validation and test have a tenth of `count`, at least 20 and at most what EVALUATED says.
    """
    writer = _Writer(np.random.Generator(np.random.Philox(SEED)))
    seen, found = set(), {}
    for split, wanted in {**EVALUATED, "train": count}.items():
        pairs = []
        while len(pairs) < wanted:
            pair = writer.sentence()
            if split != "train" and pair not in seen:
                seen.add(pair)
                pairs.append(pair)
            elif split == "train" and pair not in seen:
                pairs.append(pair)
        if split in EVALUATED:
            pairs = pairs[: max(20, count // 10)]
        english, german = (list(side) for side in zip(*pairs, strict=True))
        found[split] = Pairs(english, german) if languages == DIRECTIONS[0] else Pairs(german, english)
    return found
