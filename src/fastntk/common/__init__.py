"""What every part needs.

In: nothing of the package. Out: the exception for a caller's mistake, files that are written whole or not at all,
documents with a format version, the devices and processes that work is done on, and progress.
"""
