"""Methods against retraining over a grid of data, models, requests and seeds: ``fastntk bench CONFIG.yaml``.

config.py    what a configuration says: the settings (a fitted model each) and their requests
grid.py      runs what is not in the results yet
choosing.py  settings for every method, by the same score on requests that nobody asks for
stored.py    fits and answers that are kept, so that a run that was cut off goes on
results.py   an SQLite file a configuration: the measures of every method, and the logits on the forgotten images
summary.py   figures over requests, from the results alone; tables.py, plots.py, drawing.py: the same to read
"""
