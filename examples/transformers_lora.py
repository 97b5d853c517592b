"""A vision transformer of transformers: LoRA and head tuned, an image forgotten and remembered."""

import fastntk
from fastntk.inputs.libraries import transformers  # beside a CPU-only torch, "import transformers" finds no torchvision
from fastntk.inputs.packaged import digits

config = transformers().ViTConfig(
    image_size=32, patch_size=8, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
    num_labels=10,
)  # fmt: skip
model = fastntk.Logits(transformers().ViTForImageClassification(config))  # .from_pretrained(FOLDER) in practice
train = digits(fastntk.Preprocessing(32, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)), 0, 6)
fastntk.tune(model, "lora:2", "head")
fitted = fastntk.fit(model, train, epochs=3)

memory = fastntk.prepare(model, train, fitted.initial, form="dual")
print(memory.forget([7]).certificate.explanation)
print(memory.remember([7]).certificate.explanation)
