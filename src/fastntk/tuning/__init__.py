"""Which parameters are tuned, and fitting them.

In: a model, selectors, images. Out: the tuned parameters (``selectors``, ``prompts``, ``lora``), the loss, and a
fitted model with the parameters from before (``fitting``).
"""
