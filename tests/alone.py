"""A process that has timm and no fastntk: what stands beside an export must load there."""

import subprocess
import sys

_BEFORE = """
import sys
sys.modules['fastntk'] = None
import torch
try:
    import torchvision
except RuntimeError:  # beside a torch that it was not made for
    for name in [name for name in sys.modules if name.startswith('torchvision')]:
        del sys.modules[name]
    library = torch.library.Library('torchvision', 'DEF')
    for operator in ('nms', 'qnms'):
        library.define(f'{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor')
import timm
"""


def alone(code, *arguments):
    """What some code prints there."""
    words = [sys.executable, "-c", _BEFORE + code, *map(str, arguments)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout
