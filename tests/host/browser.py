"""The host's real frontend in a browser: node with playwright-core (PLAYWRIGHT_CORE) and Chromium (CHROMIUM)."""

import json
import os
import shutil
import subprocess
from pathlib import Path

from hosts import Host, Server

HERE = Path(__file__).parent
FOLDER = HERE.parents[1] / "workflows"
CORE = os.environ.get("PLAYWRIGHT_CORE", str(Path.home() / "pw" / "node_modules" / "playwright-core"))
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
#: files that the workflows of real models name; empty, so that the frontend finds them
PLACEHOLDERS = {
    "models/checkpoints": [
        "miniSD.safetensors",
        "v1-5-pruned-emaonly-fp16.safetensors",
        "sd_xl_base_1.0.safetensors",
    ],
    "models/backbones": [
        "resnet50.tv_in1k.safetensors",
        "convnext_base.fb_in22k_ft_in1k.safetensors",
        "swinv2_base_window12to24_192to384.ms_in22k_ft_in1k.safetensors",
        "vit_base_patch14_reg4_dinov2.lvd142m/model.safetensors",
    ],
    "models/featinv_decoders": ["RAE-dinov2-wReg-base-ViTXL-n08/config.json"],
    "models/featinv": ["convnext_last.safetensors", "swinv2_last.safetensors"],
    "models/featinv_concepts": ["convnext_last_concepts.safetensors"],
}
AVAILABLE = bool(shutil.which("node") and Path(CORE).is_dir() and CHROMIUM)


def look(host: Host, base: Path) -> dict[str, dict]:
    """What browser.mjs reports of every workflow, and of every picture that carries one; and of those that it ran, the
    outputs by node id."""
    for folder, names in PLACEHOLDERS.items():
        for name in names:
            (base / folder / name).parent.mkdir(parents=True, exist_ok=True)
            (base / folder / name).touch()
    server = Server(host, base)
    try:
        files = [*sorted(FOLDER.glob("*.json")), *sorted(FOLDER.glob("*.png"))]
        command = ["node", str(HERE / "browser.mjs"), server.url, str(base / "shots"), *map(str, files)]
        environment = os.environ | {"PLAYWRIGHT_CORE": CORE, "CHROMIUM": CHROMIUM}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr[-3000:]
        seen = json.loads(done.stdout.strip().splitlines()[-1])
        for state in seen.values():
            if prompt := state.get("ran", {}).get("prompt"):
                state["outputs"] = server.result(prompt)["outputs"]
        return seen
    finally:
        server.stop()
