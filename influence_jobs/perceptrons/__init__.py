"""Faster paths for multilayer perceptrons: blocks of LiSSA's steps and blocks of SGD's steps.

Nothing here changes a result by more than rounding. General code asks at two places, which import
late because this package imports theirs:

- `curvature.lissa_steps.lissa_steps` asks `perceptrons.lissa`;
- `training.ensemble.EnsembleTrainer` asks `perceptrons.ensemble`.

Each is an import and an `if`. Without those lines and this folder the library gives the same
numbers, slower. The import contracts in pyproject.toml keep it so.
"""
