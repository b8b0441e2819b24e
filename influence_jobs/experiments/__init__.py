"""Designs and statistics of the experiments that test scores."""
