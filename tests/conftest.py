"""Every shape annotation of the package is checked while the tests run."""

import torch
from jaxtyping import install_import_hook

install_import_hook("fastntk", "beartype.beartype")
torch.set_num_threads(2)
torch.set_flush_denormal(True)
