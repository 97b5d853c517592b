"""The fitted network, linearised.

In: a fitted model, its tuned parameters, a training set. Out: ``Linearised``, the Jacobian and residual of any of its
samples by one forward and C backward passes, and ``products`` with Jacobians that are never formed.
"""
