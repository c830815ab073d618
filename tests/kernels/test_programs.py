"""Compiled programs of starts: kept, and not too many of them."""

import gc
import weakref
from collections import OrderedDict

import jax.numpy as jnp

from numpyro_rtk._numpyro import _programs
from numpyro_rtk._numpyro._programs import Programs


def test_the_program_that_was_not_used_for_longest_is_forgotten(monkeypatch):
    monkeypatch.setattr(_programs, "MAX_PROGRAMS", 2)
    monkeypatch.setattr(_programs, "_RECENT", OrderedDict())
    traces, owner = [], object()

    def function(name, x):
        traces.append(name)
        return x + 1

    first, second = Programs(), Programs()
    for programs, name in ((first, "a"), (second, "b"), (first, "a"), (second, "c")):
        assert programs(name, owner, function, name, jnp.ones(2))[0] == 2
    assert traces == ["a", "b", "c"]
    first("a", owner, function, "a", jnp.ones(2))
    assert traces == ["a", "b", "c"]
    second("b", owner, function, "b", jnp.ones(2))
    assert traces == ["a", "b", "c", "b"]


def test_programs_go_with_their_kernel():
    programs = Programs()
    programs("name", object(), lambda x: x, jnp.ones(2))
    gone = weakref.ref(programs)
    del programs
    gc.collect()
    assert gone() is None
