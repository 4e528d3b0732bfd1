"""The training run: folders, checkpoints, metrics, callbacks and the functions behind the command line.

Only :mod:`scoredist3d.training.lightning_module`, ``callbacks`` and ``distributed`` import Lightning (seconds); ``run``
imports them when a run starts.
"""
