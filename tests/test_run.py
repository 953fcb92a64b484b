"""The first command a newcomer types: it names the step that failed and installs nothing twice."""

import hashlib
import sys

import pytest

import run


def test_a_failed_step_is_named(capfd):
    with pytest.raises(SystemExit, match="failed: install the moon") as stopped:
        run.step("install the moon", [sys.executable, "-c", "raise SystemExit(3)"])
    assert "-c" in str(stopped.value) and "install the moon" in capfd.readouterr().out


def test_the_running_python_is_used_when_asked():
    assert run.environment(["requirements.txt"], use_running=True) == sys.executable


def test_an_environment_with_the_same_requirements_is_reused(tmp_path, monkeypatch):
    (tmp_path / "requirements.txt").write_text("pillow\n")
    python = tmp_path / ".venv" / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    python.parent.mkdir(parents=True)
    python.touch()
    (tmp_path / ".venv" / "installed-1").write_text(hashlib.sha256(b"pillow\n").hexdigest())
    ran = []
    monkeypatch.setattr(run, "ROOT", tmp_path)
    monkeypatch.setattr(run, "step", lambda what, command: ran.append(what))
    assert run.environment(["requirements.txt"], use_running=False) == str(python) and not ran
    (tmp_path / "requirements.txt").write_text("pillow\nnumpy\n")
    run.environment(["requirements.txt"], use_running=False)
    assert len(ran) == 2


def test_comfy_links_the_pack_and_a_first_workflow(tmp_path, monkeypatch, capfd):
    checkout = tmp_path / "ComfyUI"
    (checkout / "custom_nodes").mkdir(parents=True)
    monkeypatch.setenv("COMFYUI_PATH", str(checkout))
    monkeypatch.setenv("COMFYUI_PYTHON", sys.executable)
    with pytest.raises(SystemExit, match="no ComfyUI at"):
        run.start_comfy([])
    (checkout / "main.py").write_text("import sys; print('started', *sys.argv[1:])")
    for _ in range(2):  # it can be repeated
        assert run.start_comfy(["--cpu"]) == 0
    assert "started --cpu" in capfd.readouterr().out
    assert (checkout / "custom_nodes" / "ComfyUI-FeatInv" / "run.py").is_file()
    assert (checkout / "user" / "default" / "workflows" / "featinv_reconstruct.json").is_file()


def test_files_are_fetched_into_the_comfyui_that_is_there(tmp_path, monkeypatch):
    called = []
    monkeypatch.setattr(run.subprocess, "call", lambda command: called.append(command[1:]) or 0)
    monkeypatch.setattr(sys, "argv", ["run.py", "--no-venv", "download", "tiny_cnn_last", "--base", "owner/name"])
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path))
    program, given = str(run.ROOT / "training" / "download.py"), ["tiny_cnn_last", "--base", "owner/name"]
    assert run.main() == 0 and called.pop() == [program, "--to", str(run.ROOT / "models"), *given]
    (tmp_path / "main.py").touch()
    assert run.main() == 0 and called.pop() == [program, "--to", str(tmp_path / "models"), *given]


def test_the_demo_is_given_the_users_pictures(monkeypatch):
    called = []
    monkeypatch.setattr(run.subprocess, "call", lambda command: called.append(command) or 0)
    monkeypatch.setattr(sys, "argv", ["run.py", "--no-venv", "demo", "--image", "a photo.jpg", "--world", "drawn"])
    assert run.main() == 0
    assert called == [
        [sys.executable, str(run.ROOT / "training" / "demo.py"), "--image", "a photo.jpg", "--world", "drawn"]
    ]
