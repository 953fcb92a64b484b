"""Every test here runs against each ComfyUI checkout that find_hosts finds, and is skipped where there is none."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # the helpers beside the tests

import browser
import hosts
from graph import to_prompt
from make_workflows import EMBEDDED

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


@pytest.fixture(scope="session")
def info(server):
    """The schemas of all nodes."""
    return server.get("/object_info")


@pytest.fixture(scope="session")
def seen(host, tmp_path_factory):
    """What the browser reports of every workflow."""
    return browser.look(host, tmp_path_factory.mktemp(f"browser-{host.version}"))


@pytest.fixture(scope="session")
def outputs(host, request):
    """name -> what each node of a workflow that needs no download gave, by its number."""
    if browser.AVAILABLE:
        seen = request.getfixturevalue("seen")
        return {Path(file).stem: state["outputs"] for file, state in seen.items() if "outputs" in state}
    server = request.getfixturevalue("server")
    info = request.getfixturevalue("info")
    files = [file for file in browser.FOLDER.glob("*.json") if file.stem.startswith(EMBEDDED)]
    return {file.stem: server.run(to_prompt(json.loads(file.read_text()), info)) for file in files}
