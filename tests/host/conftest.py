"""Every test here runs against each ComfyUI checkout that find_hosts finds, and is skipped where there is none."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # the helpers beside the tests

import hosts

FOUND = hosts.find_hosts()


def pytest_generate_tests(metafunc):
    if "host" in metafunc.fixturenames:
        none = [pytest.param(None, marks=pytest.mark.skip("no ComfyUI: name a checkout in COMFYUI_PATH"))]
        metafunc.parametrize(
            "host", FOUND or none, ids=lambda h: h.version if h else "none", scope="session", indirect=True
        )


@pytest.fixture(scope="session")
def host(request):
    return request.param


@pytest.fixture(scope="session")
def measured(host, tmp_path_factory):
    """What inside.py measured in the host's own process."""
    return host.run_inside(Path(__file__).with_name("inside.py"), hosts.PACK, tmp_path_factory.mktemp("inside"))


@pytest.fixture(scope="session")
def server(host, tmp_path_factory):
    running = hosts.Server(host, tmp_path_factory.mktemp(f"base-{host.version}"))
    yield running
    running.stop()
