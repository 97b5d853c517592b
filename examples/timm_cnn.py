"""A CNN of timm: batch norms and head tuned, two images forgotten, the answer saved as a plain state dict."""

from pathlib import Path
from tempfile import mkdtemp

import torch

import fastntk
from fastntk.inputs.packaged import digits

model, preprocessing = fastntk.load_model("mobilenetv3_small_050", classes=10, size=32)  # or weights="mobilenet.pt"
train = digits(preprocessing, 0, 6)  # 60 MNIST digits; any map-style dataset of (image, label) will do
fastntk.tune(model, "bn", "head")
fitted = fastntk.fit(model, train, epochs=3)

memory = fastntk.prepare(model, train, fitted.initial)
folder = Path(mkdtemp())
memory.save(folder / "memory")  # from here on every answer is durable when it is given
answer = memory.forget([17, 42])
memory.purge()
print(answer.certificate.explanation)

model.load_state_dict(answer.parameters, strict=False)
torch.save(model.state_dict(), folder / "unlearned.pt")
