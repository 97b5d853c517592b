"""A vision transformer of torchvision: prompts and head tuned, a class forgotten, the prompts taken off again."""

import fastntk
from fastntk.inputs.batches import labels_of
from fastntk.inputs.libraries import torchvision
from fastntk.inputs.packaged import digits

preprocessing = fastntk.Preprocessing(32, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
model = torchvision().models.VisionTransformer(
    image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=64, num_classes=10
)  # torchvision.models.vit_b_32(weights=...) with a new head in practice
train = digits(preprocessing, 0, 6)
fastntk.tune(model, "prompt:5", "head")  # "deep-prompt:5": five of its own in every block
fitted = fastntk.fit(model, train, epochs=3)

memory = fastntk.prepare(model, train, fitted.initial)
threes = (labels_of(train) == 3).nonzero()[:, 0].tolist()
answer = memory.forget(threes)
print(answer.certificate.explanation)

model.load_state_dict(answer.parameters, strict=False)
print("prompts:", tuple(model.prompts.tokens[0].shape))
fastntk.remove_prompts(model)  # the backbone is bit for bit what it was
