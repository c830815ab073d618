"""How findings are said: a wrong sign raises, all else warns, once, at the user's line."""

import warnings

import pytest

from numpyro_rtk._diagnosis._report import Finding, say


FINDING = Finding("score", 3, 0.7, "level 3 is off")


def test_a_wrong_sign_is_an_error():
    with pytest.raises(ValueError, match="sign"):
        say([Finding("sign", 0, -1.0, "the wrong sign")], lambda x, t: x)


def test_a_warning_comes_once_for_a_score_and_points_to_the_caller():
    def score(x, t):
        return x

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        say([FINDING, FINDING], score)
        say([FINDING], score)
        assert len(caught) == 1
        assert caught[0].filename == __file__
        say([FINDING._replace(message="another")], score)
        say([FINDING], lambda x, t: x)
    assert [str(warning.message) for warning in caught] == ["level 3 is off", "another", "level 3 is off"]


def test_a_score_that_cannot_be_remembered_is_warned_of():
    with pytest.warns(UserWarning, match="off"):
        say([FINDING], [1, 2])


def test_nothing_is_said_of_nothing():
    say([], None)
