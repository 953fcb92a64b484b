"""Where the ComfyUI checkouts are, and how to run something in one."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

HANG = 900  # seconds that only a host or a browser that hangs can take
PACK = Path(__file__).resolve().parents[2]
sys.path.append(str(PACK))

from run import comfy_checkouts, comfy_python


@dataclass(frozen=True)
class Host:
    """A checkout and the Python that runs it."""

    root: Path

    @property
    def python(self) -> str:
        return comfy_python(self.root)

    @property
    def version(self) -> str:
        text = (self.root / "comfyui_version.py").read_text()
        return text.split('"')[1]

    def run_inside(self, program: Path, *arguments: str | Path) -> dict:
        """Runs a program in the host's environment; returns the JSON on the last line that it prints."""
        command = [self.python, str(program), str(self.root), *map(str, arguments)]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=HANG, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
        if done.returncode:
            raise RuntimeError(
                f"{program.name} failed in ComfyUI {self.version}:\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
            )
        return json.loads(done.stdout.strip().splitlines()[-1])


def find_hosts() -> list[Host]:
    """The checkouts of run.py's rule that are there."""
    return [Host(p) for p in comfy_checkouts() if (p / "comfyui_version.py").is_file()]


class Server:
    """A host started over a temporary base directory, with the pack linked in under an unusual name."""

    def __init__(self, host: Host, base: Path, pack: Path = PACK, name: str = "FeatInv-copy.2") -> None:
        for folder in ("custom_nodes", "models", "input", "output", "temp", "user"):
            (base / folder).mkdir(parents=True, exist_ok=True)
        (base / "custom_nodes" / name).symlink_to(pack, target_is_directory=True)
        shutil.copy(host.root / "input" / "example.png", base / "input")  # what every checkout has
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.base, self.log_file = base, base / "log.txt"
        command = [
            host.python,
            str(host.root / "main.py"),
            "--cpu",
            "--listen",
            "127.0.0.1",
            "--port",
            str(self.port),
            "--base-directory",
            str(base),
            "--disable-auto-launch",
            "--disable-api-nodes",
            "--database-url",
            f"sqlite:///{base}/user/c.db",
        ]
        with open(self.log_file, "w") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, cwd=base, env=os.environ | {"OMP_NUM_THREADS": "1"}
            )
        self.wait(lambda: self.get("/system_stats"), "start")
        self.log_of_start = self.log

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def log(self) -> str:
        return self.log_file.read_text(errors="replace")

    def get(self, path: str) -> dict:
        with urllib.request.urlopen(self.url + path, timeout=HANG) as answer:
            return json.loads(answer.read())

    def file(self, path: str) -> bytes:
        with urllib.request.urlopen(self.url + path, timeout=HANG) as answer:
            return answer.read()

    def post(self, path: str, body: dict) -> tuple[int, dict]:
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=HANG) as answer:
                return answer.status, json.loads(answer.read() or b"{}")
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())

    def submit(self, prompt: dict) -> str:
        status, answer = self.post("/prompt", {"prompt": prompt})
        assert status == 200, json.dumps(answer, indent=1)
        return answer["prompt_id"]

    def result(self, prompt_id: str) -> dict:
        """The history of a prompt once it has ended, well or not."""
        return self.wait(lambda: self.get(f"/history/{prompt_id}")[prompt_id], f"finish {prompt_id}")

    def run(self, prompt: dict) -> dict:
        """Outputs by node id of a prompt that succeeds."""
        result = self.result(self.submit(prompt))
        assert result["status"]["status_str"] == "success", json.dumps(result["status"]["messages"], indent=1)[-3000:]
        return result["outputs"]

    def failure(self, prompt: dict) -> str:
        """The message of a prompt that fails while it runs."""
        result = self.result(self.submit(prompt))
        errors = [m[1]["exception_message"] for m in result["status"]["messages"] if m[0] == "execution_error"]
        assert errors, "the prompt did not fail"
        return errors[0].strip()

    def wait(self, ask, what: str) -> dict:
        """Asks until there is an answer, or the host has ended."""
        end = time.monotonic() + HANG
        while time.monotonic() < end:
            try:
                return ask()
            except (urllib.error.URLError, KeyError, ConnectionError, TimeoutError):
                if self.process.poll() is not None:
                    raise RuntimeError(f"the host ended:\n{self.log[-4000:]}") from None
                time.sleep(0.2)  # polls another process; nothing is timed by it
        raise TimeoutError(f"the host did not {what} in {HANG} s:\n{self.log[-4000:]}")

    def resident(self) -> int:
        """Bytes of memory that the host's process holds, from its own count of what is free where there is no /proc."""
        status = Path(f"/proc/{self.process.pid}/statm")
        if status.exists():
            return int(status.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        system = self.get("/system_stats")["system"]
        return system["ram_total"] - system["ram_free"]

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(HANG)
