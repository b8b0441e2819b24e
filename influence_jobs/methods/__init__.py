"""Scores of every (query, training sample), computed from activations, norms, losses and pixels."""
