"""How long runs take, in words."""

import pytest

from luqrun.runs.durations import in_words


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.2, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min"),
        (3569, "59 min"),
        (3571, "1 h 0 min"),
        (5430, "1 h 30 min"),
        (86369, "23 h 59 min"),
        (86371, "1 d 0 h"),
        (190000, "2 d 5 h"),
    ],
)
def test_a_duration_has_its_two_largest_units(seconds, words):
    assert in_words(seconds) == words
