"""LoRA on a vision transformer, fitted by transformers' own Trainer with label smoothing."""

import tempfile

import torch

import fastntk
from fastntk.inputs.libraries import transformers  # beside a CPU-only torch, "import transformers" finds no torchvision
from fastntk.inputs.packaged import digits

config = transformers().ViTConfig(
    image_size=32, patch_size=8, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
    num_labels=10,
)  # fmt: skip
inner = transformers().ViTForImageClassification(config)  # .from_pretrained(FOLDER) in practice
model = fastntk.Logits(inner)
train = digits(fastntk.Preprocessing(32, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)), 0, 6)
initial = fastntk.snapshot(fastntk.tune(model, "lora:2", "head"))

with tempfile.TemporaryDirectory() as folder:
    settings = transformers().TrainingArguments(
        folder, num_train_epochs=2, per_device_train_batch_size=16, learning_rate=1e-3, weight_decay=0.0,
        label_smoothing_factor=0.1, save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True,
    )  # fmt: skip

    def batch(samples: list) -> dict[str, torch.Tensor]:
        """What the Trainer feeds to the model."""
        images, labels = zip(*samples, strict=True)
        return {"pixel_values": torch.stack(images), "labels": torch.tensor(labels)}

    trainer = transformers().Trainer(inner, settings, data_collator=batch, train_dataset=train)
    trainer.train()
model.eval()  # dropout while fitting is like augmentation: the network is linearised without it

memory = fastntk.prepare(model, train, initial, loss=fastntk.CrossEntropy(smoothing=0.1))
print(memory.forget([7]).certificate.explanation)
