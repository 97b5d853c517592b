"""The linear problem over a set of samples, solved, in forms that samples can leave and join.

In: a linearised network over n samples. Out: a ``Solution``: the step to the optimum of those samples, its ridge, and
what leaving or joining would change. ``gram`` and ``solution`` are the contracts, ``forms`` the table.
"""
