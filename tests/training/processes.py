"""Processes of a test's own, forked from one that has imported what they run."""

import multiprocessing
import os
import socket
import sys

import pytest

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["killed", "training.evaluate"])


def exit_codes(target, *arguments) -> list[int]:
    """Runs a function in as many processes at once as there are tuples of arguments; waits for all."""
    processes = [_CONTEXT.Process(target=target, args=each) for each in arguments]
    with pytest.MonkeyPatch.context() as patch:
        # before 3.13, the process that forks starts without this one's sys.path, and then quietly imports nothing
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        for process in processes:
            process.start()
    for process in processes:
        process.join()
    return [process.exitcode for process in processes]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
