"""One process of a job that prepares memories or fits: python -m torch.distributed.run ... job.py OUT FORMS [KILL].

With KILL, the process of that number kills itself when it has completed its first shard. FORMS are parted by commas;
"fit" fits a model, "exact" one that forgets exactly, "run" a run folder of such a one.
"""

import os
import signal
import sys
from pathlib import Path

import numpy as np
import torch
from cases import CASES
from memories import moved

import fastntk
from fastntk.common import distributed
from fastntk.common.distributed import PeerLost, leave
from fastntk.common.launch import launched
from fastntk.solve import collect as collection

out, forms = Path(sys.argv[1]), sys.argv[2].split(",")
victim = int(sys.argv[3]) if len(sys.argv) > 3 else None
torch.set_num_threads(1)
collection.SHARD = 3
write = collection.Checkpoint.write


def killed(self, sums, shards):
    write(self, sums, shards)
    if distributed.rank() == victim:
        os.kill(os.getpid(), signal.SIGKILL)


def result(form):
    """Tensors that are the same whatever the number of processes."""
    case = CASES["bn+head"]
    model, data = case.model(), case.data(20)
    if form == "fit":
        done = fastntk.fit(model, data, epochs=3, batch_size=7, learning_rate=0.05)
        return {"losses": torch.tensor(done.losses)}, model.state_dict()
    if form == "exact":
        recipe = fastntk.Recipe(epochs=3, batch_size=7, learning_rate=0.05)
        memory = fastntk.fit_exact(model, data, range(5), recipe)
        noisy = fastntk.fit_exact(model, data, range(5), recipe, fitted=True, removal=fastntk.Removal(1.0, 1e-5))
        return memory.anchor, memory.preview([7, 17]).parameters, {"noise": noisy.state.displacement}
    if form == "run":
        return result_of_run()
    memory = fastntk.prepare(model, data, moved(model), form=form, ridge=0.5, checkpoint=out / "partial")
    answer = memory.preview([3, 17])
    return {**memory.state.solution.tensors(), "residuals": memory.state.fingerprints}, answer.parameters


def result_of_run():
    """Of a run that is fitted to a core and prepared in one go, as ``fastntk fit --core`` does it."""
    from runs import NETWORK

    from fastntk.cli.run import Run
    from fastntk.cli.settings import Given

    own, data = out / "own.py", out / "data.npz"
    if not distributed.rank():
        own.write_text(NETWORK)
        generator = np.random.default_rng(0)
        x, y = generator.integers(0, 255, (20, 8, 8, 3), dtype=np.uint8), np.arange(20) % 2
        np.savez(data, x_train=x, y_train=y)
    distributed.wait()
    run = Run(out / "run")
    run.fit(Given(f"{own}:small", str(data), None, ["bn", "head"], None, core="[0-4]"), fastntk.Recipe(epochs=1))
    memory = run.prepare("auto", "auto", "auto", 0, fastntk.Numerics())
    return {"core": memory.state.core}, memory.parameters


collection.Checkpoint.write = killed
try:
    with distributed.session(torch.device("cpu")):
        for form in forms:
            torch.save(result(form), out / f"{form}-{distributed.rank()}.pt")
except PeerLost as error:
    sys.exit(str(error))
if launched():
    leave()
