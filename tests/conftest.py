"""Nothing in the tests may reach the network; the fixtures of all tests are in ``support.fixtures``."""

import gc
import os

# Read when the libraries are imported, so before that.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "PYTEST_XDIST_WORKER" in os.environ:
    # As many processes as cores, so one thread each.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from hypothesis import settings

# Of tests over random examples: some by default, many in CI (--hypothesis-profile=ci).
settings.register_profile("default", max_examples=25, deadline=None)
settings.register_profile("ci", max_examples=100, deadline=None)
settings.load_profile("default")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-snapshots", action="store_true", help="store the texts of golden tests anew")


def pytest_configure(config: pytest.Config) -> None:
    """Import the fixtures, which import torch and transformers, but not where xdist only hands out tests."""
    hands_out = bool(config.getoption("tx", None)) and not config.option.collectonly
    if "PYTEST_XDIST_WORKER" in os.environ or not hands_out:
        config.pluginmanager.import_plugin("support.fixtures")


def pytest_collection_finish() -> None:
    """Leave what is imported out of later collections: the harness collects after each evaluation, for a second."""
    gc.collect()
    gc.freeze()
