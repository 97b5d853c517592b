"""Answers beside models that were truly retrained.

In: a memory, a recipe, test images. Out: audits, reports of every measure, other methods on the same request, and
grids of all of them, as tables and pages.
"""
