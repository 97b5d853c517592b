"""Faults at some operations of every command that writes (all: ``python benchmarks/faults.py``)."""

import pytest
import torch
from faults import FAULTS
from trials import TRIALS, Place, tried

EVERY = 13


@pytest.fixture
def one_thread():
    """Forks of a process whose threads have worked would wait for them for ever."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("number", range(len(TRIALS)), ids=[trial.name for trial in TRIALS])
def test_a_run_is_as_before_or_as_after_and_the_command_can_be_repeated(number, tmp_path, one_thread):
    found = list(tried(Place(tmp_path), TRIALS[number], lambda operation: operation % EVERY == number % EVERY))
    assert len({each.fault for each in found}) == len(FAULTS)
    assert not [each for each in found if each.wrong]
