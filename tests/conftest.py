"""How the tests are shared out where several processes run them (pytest -n N)."""

import gc
import re
from pathlib import Path

import pytest

#: what the tests of a file in tests/host start in a host; the others use its server. All take long to start.
STARTED = {"test_browser": "browser", "test_runs": "browser"} | dict.fromkeys(
    (
        "test_checkpoints",
        "test_controlling",
        "test_decoding",
        "test_inside",
        "test_mapping",
        "test_photo",
        "test_provenance",
        "test_raw",
    ),
    "inside",
)
FORKING = ("test_evaluate", "test_never_loses_work", "test_options")  # files whose processes come from one that waits
#: what takes longest, in this order
LONGEST = ("browser", "inside", "server", "forking", "test_make_world", "test_train", "test_programs")


def together(test: str) -> str:
    """A name that is the same for all tests that run in one process, one after the other."""
    file = Path(test.partition("::")[0])
    version = re.search(r"\[(\d+\.\d+\.\d+)", test)
    if file.parent.name == "host" and version:
        return f"{STARTED.get(file.stem, 'server')} of {version[1]}"
    return "forking" if file.stem in FORKING else str(file)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    from xdist.scheduler import LoadScopeScheduling

    class Scheduler(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return together(nodeid)

    config.option.loadscopereorder = False  # what takes longest is not what has the most tests
    return Scheduler(config, log)


def pytest_collection_modifyitems(items):
    """What takes long comes first, so that no process waits for another at the end."""
    rank = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(Path(together(item.nodeid).partition(" of ")[0]).stem, len(rank)))


def pytest_collection_finish():
    gc.freeze()  # what all the imports made stays, and need not be looked through again and again
