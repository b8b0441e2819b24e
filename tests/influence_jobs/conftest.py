from pathlib import Path

import pytest

from influence_jobs.datasets.mnist import default_data_dir, fetch_mnist
from influence_jobs.errors import DataError


@pytest.fixture(scope="session")
def mnist_dir() -> Path:
    """A data folder with the real MNIST, downloaded if it is missing."""
    data_dir = default_data_dir()
    try:
        fetch_mnist(data_dir, say=print)
    except DataError as error:
        pytest.skip(str(error))
    return data_dir
