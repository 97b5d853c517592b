"""Models and labelled images.

In: names, files and folders. Out: a model with a new head and its preprocessing (``models``), images with labels and
ids as that model wants them (``sources``), and batches of them (``batches``).
"""
