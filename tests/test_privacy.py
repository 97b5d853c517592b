"""What the folder alone tells of a sample that has left: all of its share after a purge, nothing after a refresh."""

import pytest
import torch
from memories import prepared, reopened, saved

import fastntk

GONE = 4


def share(memory):
    """From what is stored: ``d(D) = theta* + d(R) - theta``, and ``(G_R + ridge)(d(D) - d(R)) = J'e`` of who left."""
    state, solution = memory.state, memory.state.solution
    anchor = state.layout.flatten(state.anchor)
    change = anchor + solution.step - state.vector - solution.step
    gram = solution.sums.gram() if memory.form == "primal" else solution.rows.jacobian.dense().flatten(0, 1)
    image = gram @ change if memory.form == "primal" else gram.T @ (gram @ change)
    return image + solution.ridge * change


@pytest.mark.parametrize("form", ["primal", "dual"])
def test_a_refresh_takes_what_a_purge_leaves(form, tmp_path):
    memory = saved(tmp_path / "m", form)
    rows = prepared(form=form).state.rows(torch.tensor([GONE])).jacobian.dense()[0]
    memory.forget([GONE])
    memory.purge()
    found = share(reopened(memory, tmp_path / "m"))
    explained = rows.T @ torch.linalg.lstsq(rows.T, found[:, None]).solution[:, 0]
    torch.testing.assert_close(explained, found, rtol=1e-7, atol=1e-9)  # it lies in the span of the sample's own rows
    assert [each.state for each in memory.requests()] == ["purged"]
    fastntk.refresh(memory)
    again = reopened(memory, tmp_path / "m")
    assert float(share(again).norm()) <= 1e-12 * float(found.norm())
    assert [each.state for each in again.requests()] == ["re-anchored", "purged"]
