"""The HTML report, the viewer, and results in Python. They read the store and pictures only."""
