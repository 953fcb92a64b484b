"""How the tests are shared out where several processes run them (pytest -n N)."""

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


def together(test: str) -> str:
    """A name that is the same for all tests that run in one process, one after the other."""
    file = Path(test.partition("::")[0])
    version = re.search(r"\[(\d+\.\d+\.\d+)", test)
    if file.parent.name == "host" and version:
        return f"{STARTED.get(file.stem, 'server')} of {version[1]}"
    return str(file)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    from xdist.scheduler import LoadScopeScheduling

    class Scheduler(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return together(nodeid)

    config.option.loadscopereorder = False  # the longest tests are not those of the largest files
    return Scheduler(config, log)
