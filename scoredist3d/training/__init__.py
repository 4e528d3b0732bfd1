"""Training runs: folders, checkpoints, metrics, callbacks and the functions behind the command line.

Lightning takes seconds to import. Only :mod:`scoredist3d.training.lightning_module`, ``lightning_plugins`` and
``callbacks`` import it, and they are imported when a run starts.
"""
