"""Faster LiSSA and faster SGD for perceptrons, both in blocks of steps.

Nothing here changes a result by more than rounding. General code uses this package in two places.
They import it late, because it imports their packages:

- `curvature.lissa_steps.lissa_steps` uses `perceptrons.lissa`;
- `training.ensemble.EnsembleTrainer` uses `perceptrons.ensemble`.

Each place is an import and an `if`. Without these lines and this folder the library computes the
same numbers, only more slowly. The import contracts in pyproject.toml ensure that there are no
other uses.
"""
