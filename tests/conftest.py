"""Nothing in the tests may reach the network; the tiny models of all architectures are built once a file."""

import os

# Read when the libraries are imported, so before that.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import zoo


@pytest.fixture(scope="module", params=zoo.ARCHITECTURES, ids=lambda architecture: architecture.__name__)
def tiny(request: pytest.FixtureRequest) -> zoo.Tiny:
    return zoo.build(request.param)
