"""The folder of a memory: ``folder`` and ``ledger`` keep it whole at any moment, ``packing`` makes a state of its
tensors and back, and ``format`` has its versions."""
