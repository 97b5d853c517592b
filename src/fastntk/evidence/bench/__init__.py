"""Methods against retraining over a grid of data, models, requests and seeds: ``fastntk bench CONFIG.yaml``.

config.py    what a configuration says: the settings (a fitted model each) and their requests
grid.py      runs what is not in the results yet
stored.py    fits and answers that are kept, so that a run that was cut off goes on
results.py   one SQLite file: the measures of every method, and the logits that they were computed from
tables.py    tables and a summary, from the results alone; plots.py and drawing.py, the same as a page
"""
