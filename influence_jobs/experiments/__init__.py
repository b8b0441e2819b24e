"""Experiments that put scores to the test: designs and statistics, arrays in, numbers out."""
