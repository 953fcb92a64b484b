"""run.py download against a small hub on this machine: what it fetches, resumes, checks and refuses."""

import errno
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import timm
import torch
from huggingface_hub import constants
from rae import backbone_of, trained
from safetensors.torch import load_file, save

from featinv_nodes.core.backbone_opening import load_backbone
from featinv_nodes.core.errors import FeatInvError
from featinv_nodes.core.model_folder import INDEX, STEM, WHOLE
from featinv_nodes.feature_decoders import BACKBONES, open_feature_decoder
from training import download
from training.models import hub
from training.models.base_model import load_base

ROOT = Path(__file__).resolve().parents[2]
BACKBONE, BASE = "test_convnext.r160_in1k", "somebody/small-SD"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
CONFIG = "name: mine\nbackbone: {backbone}\nbase: {base}\ndata: drawn\nprompt: a photo\nmax_images: 1\n"


class Answer(BaseHTTPRequestHandler):
    """Speaks the hub's protocol: the list of a repository with checksums, and files, the large ones from a store."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.server.asked.append((self.path, self.headers.get("Range"), self.headers.get("Authorization")))
        _, *parts = self.path.partition("?")[0].split("/")
        if parts[:2] == ["api", "models"]:
            return self.listing("/".join(parts[2:4]))
        repository = "/".join(parts[:2])
        if repository not in self.server.repositories:
            return self.send(404, b"")
        if parts[2:4] != ["resolve", COMMIT]:  # the store: /owner/name/store/FILE
            return self.content(self.server.repositories[repository]["/".join(parts[3:])])
        name = "/".join(parts[4:])
        if self.server.status_of_files:
            return self.send(self.server.status_of_files, b"")
        if is_large(name):  # as on the real hub, on another host
            return self.send(302, b"", Location=f"http://localhost:{self.server.server_port}/{repository}/store/{name}")
        self.content(self.server.repositories[repository][name])

    def listing(self, repository):
        if repository not in self.server.repositories:
            return self.send(self.server.status_of_unknown, b'{"error": "no"}')
        siblings = []
        for name, data in self.server.repositories[repository].items():
            lfs = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
            blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
            siblings.append(
                {"rfilename": name, "size": len(data), "blobId": blob, **({"lfs": lfs} if is_large(name) else {})}
            )
        self.send(200, json.dumps({"id": repository, "sha": COMMIT, "siblings": siblings}).encode())

    def content(self, data):
        first = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").rstrip("-"))
        if self.server.corrupt:
            data = bytes([data[0] ^ 1]) + data[1:]
        extra = {"Content-Range": f"bytes {first}-{len(data) - 1}/{len(data)}"} if first else {}
        cut = self.server.cut
        if cut:  # the connection drops once
            self.server.cut, self.server.status_of_files = None, self.server.status_after_cut
        self.send(206 if first else 200, data[first:], cut, **extra)

    def send(self, status, data, cut=None, **headers):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data[:cut])
        self.close_connection = cut is not None

    def log_message(self, *args):
        pass


def is_large(name):
    return name.endswith((".safetensors", ".bin", ".ckpt"))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The backbone's repository with a real small model at random weights, and a base model's with random bytes."""
    folder = tmp_path_factory.mktemp("timm")
    torch.manual_seed(0)
    timm.models.save_for_hf(timm.create_model(BACKBONE), folder, safe_serialization=True)
    backbone = {f.name: f.read_bytes() for f in folder.iterdir()} | {"README.md": b"not needed"}
    names = [
        "model_index.json",
        "scheduler/scheduler_config.json",
        "tokenizer/vocab.json",
        "tokenizer/merges.txt",
        "safety_checker/model.safetensors",
    ]
    names += [f"{part}/config.json" for part in download.MODEL_PARTS] + ["v1.ckpt", "text_encoder/pytorch_model.bin"]
    names += [
        f"{part}/diffusion_pytorch_model{kind}"
        for part in ("unet", "vae")
        for kind in (".safetensors", ".bin", ".fp16.safetensors")
    ]
    base = {name: random.Random(name).randbytes(50_000 if is_large(name) else 200) for name in names}
    return {f"timm/{BACKBONE}": backbone, BASE: base}


@pytest.fixture
def server(files, monkeypatch):
    """A running hub, set as the endpoint of this process as HF_ENDPOINT sets it where huggingface_hub is imported."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    server.repositories, server.asked = dict(files), []
    server.cut, server.corrupt, server.status_of_files, server.status_after_cut, server.status_of_unknown = (
        None,
        False,
        None,
        None,
        404,
    )
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    server.url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    for name, value in {"HF_TOKEN": "secret", "NO_PROXY": "*", "HF_HUB_DISABLE_TELEMETRY": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 10_000)  # what is written to the disk at once
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # huggingface_hub waits before it tries again
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def fetch(tmp_path):
    """Runs the program in this process: fetch(base, backbone) -> the models folder."""

    def run(base=BASE, backbone="tiny-cnn"):
        file = tmp_path / "mine.yaml"
        file.write_text(CONFIG.format(backbone=backbone, base=base))
        download.main([str(file), "--to", str(tmp_path / "models")])
        return tmp_path / "models"

    return run


def on_disk(folder):
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def fetched(server):
    return [(path, range_) for path, range_, _ in server.asked if not path.startswith("/api/")]


def test_the_command_brings_the_files_and_a_second_run_nothing(server, files, tmp_path, fetch, capsys):
    config = tmp_path / "mine.yaml"
    config.write_text(CONFIG.format(backbone=BACKBONE, base=BASE))
    command = [sys.executable, str(ROOT / "run.py"), "download", str(config), "--no-venv", "--to", "models"]
    done = subprocess.run(
        command, cwd=tmp_path, env=os.environ | {"HF_ENDPOINT": server.url}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    models = tmp_path / "models"
    base = files[BASE]
    kept = [
        "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/pytorch_model.bin",
    ]
    kept += [name for name in base if not is_large(name)]
    expected = {f"diffusers/small-SD/{name}": base[name] for name in kept}
    expected |= {
        f"backbones/{BACKBONE}/{name}": files[f"timm/{BACKBONE}"][name] for name in ("config.json", "model.safetensors")
    }
    assert on_disk(models) == expected
    assert f"--backbone {models / 'backbones' / BACKBONE} --base {models / 'diffusers' / 'small-SD'}" in done.stdout
    assert f"{BACKBONE}/model.safetensors" in done.stdout and "DiffusersLoader: small-SD" in done.stdout
    opened = load_backbone(str(models / "backbones" / BACKBONE))
    assert opened.name == BACKBONE and opened.source().channels > 0
    # the hub gets the token, the store it sends us to does not
    assert {sent for path, _, sent in server.asked if "/resolve/" in path or "/models/" in path} == {"Bearer secret"}
    assert {sent for path, _, sent in server.asked if "/store/" in path} == {None}

    server.asked.clear()
    fetch(backbone=BACKBONE)
    assert not fetched(server) and capsys.readouterr().out.count("already there") == len(expected)


def test_an_interrupted_download_goes_on(server, files, fetch, tmp_path):
    server.cut, server.status_after_cut = 20_000, 503
    with pytest.raises(FeatInvError, match="503.*try again, what has arrived is kept"):
        fetch(f"{BASE}/v1.ckpt")
    (part,) = (tmp_path / "models" / "checkpoints").iterdir()
    assert part.suffix == ".part" and part.read_bytes() == files[BASE]["v1.ckpt"][:20_000]
    server.asked.clear()
    server.status_of_files = None
    assert on_disk(fetch(f"{BASE}/v1.ckpt")) == {"checkpoints/v1.ckpt": files[BASE]["v1.ckpt"]}
    assert {range_ for _, range_ in fetched(server)} == {"bytes=20000-"}


def test_a_dropped_connection_is_taken_up_in_the_same_run(server, files, fetch):
    server.cut = 20_000
    assert on_disk(fetch(f"{BASE}/v1.ckpt")) == {"checkpoints/v1.ckpt": files[BASE]["v1.ckpt"]}
    assert "bytes=20000-" in {range_ for _, range_ in fetched(server)}


def test_a_corrupted_file_is_refused(server, fetch, tmp_path):
    server.corrupt = True
    for base in (f"{BASE}/v1.ckpt", BASE):  # checked by sha256, and a small file by git's own checksum
        with pytest.raises(FeatInvError, match="another checksum than the hub states; it was deleted"):
            fetch(base)
    assert not on_disk(tmp_path / "models")
    server.corrupt = False
    fetch()


def test_a_file_of_another_content_is_never_replaced(server, fetch, tmp_path):
    own = tmp_path / "models" / "checkpoints" / "v1.ckpt"
    own.parent.mkdir(parents=True)
    own.write_bytes(b"my own model")
    with pytest.raises(FeatInvError, match="is not the file that somebody/small-SD has; move it away"):
        fetch(f"{BASE}/v1.ckpt")
    assert own.read_bytes() == b"my own model" and not fetched(server)


def test_offline_mode_asks_nobody(server, fetch, monkeypatch, capsys):
    folder = fetch() / "diffusers" / "small-SD"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    server.asked.clear()
    fetch()
    assert "everything is there; not checked" in capsys.readouterr().out
    (folder / "vae" / "config.json").unlink()
    with pytest.raises(FeatInvError, match="offline mode: unset HF_HUB_OFFLINE .*no vae/config.json"):
        fetch()
    assert not server.asked


def test_no_network(server, fetch, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(
        FeatInvError, match="http://127.0.0.1:1 gave no usable answer .*: check the network or HF_ENDPOINT"
    ):
        fetch()


@pytest.mark.parametrize(
    "status, hint", [(404, "not there .*check the name"), (401, "set HF_TOKEN"), (403, "set HF_TOKEN")]
)
def test_a_repository_that_is_unknown_or_closed(server, fetch, status, hint):
    server.status_of_unknown = status
    with pytest.raises(FeatInvError, match=f"{server.url}/no/such.*{hint}") as error:
        fetch("no/such")
    assert "\n" not in str(error.value)
    server.status_of_files = status  # a gated repository lists its files to everyone
    with pytest.raises(FeatInvError, match=hint):
        fetch()


def test_a_feature_decoder_comes_with_its_backbone_into_the_folders_of_the_nodes(server, tmp_path, monkeypatch, capsys):
    """One file or shards; and the folders open."""
    made = trained("dinov2", tmp_path / "rae")
    backbone_of(made, tmp_path / "timm", made.transformers)
    monkeypatch.setitem(download.DECODERS, "rae-dinov2-small", ("somebody/RAE-small", BACKBONE))
    (repository, name), tensors = download.DECODERS["rae-dinov2-small"], load_file(made.folder / WHOLE)
    files = {file.name: file.read_bytes() for file in made.folder.iterdir()}
    server.repositories[repository] = files | {"README.md": b"not needed"}
    server.repositories[f"timm/{name}"] = {file.name: file.read_bytes() for file in (tmp_path / "timm").iterdir()}
    folders = tmp_path / "models" / "featinv_decoders" / "RAE-small", tmp_path / "models" / "backbones" / name
    download.main(["rae-dinov2-small", "--to", str(tmp_path / "models")])
    said = capsys.readouterr().out
    assert f"reconstruct.py --decoder {folders[0]} --backbone {folders[1]}" in said
    assert f"weights: {name}/model.safetensors, input_size: 224" in said and "decoder: RAE-small" in said
    assert set(on_disk(folders[0])) == {"config.json", WHOLE}
    assert open_feature_decoder(folders[0], load_backbone(str(folders[1]), input_size=224)).picture_size == (256, 256)

    shutil.rmtree(folders[0])
    shards = {f"{STEM}-{n:05}-of-00002.safetensors": sorted(tensors)[n - 1 :: 2] for n in (1, 2)}
    index = {"weight_map": {key: file for file, keys in shards.items() for key in keys}}
    files = {"config.json": files["config.json"], INDEX: json.dumps(index).encode()}
    files |= {file: save({key: tensors[key] for key in keys}) for file, keys in shards.items()}
    server.repositories[repository] = dict(files)
    download.main(["rae-dinov2-small", "--to", str(tmp_path / "models")])
    assert on_disk(folders[0]) == files and open_feature_decoder(folders[0], load_backbone(str(folders[1]), None, 224))
    del server.repositories[repository][f"{STEM}-00002-of-00002.safetensors"]
    with pytest.raises(FeatInvError, match=f"somebody/RAE-small has no {STEM}-00002-of-00002.safetensors"):
        download.main(["rae-dinov2-small", "--to", str(tmp_path / "models")])


def test_the_released_decoders_go_with_the_backbones_that_open_them():
    """timm has weights of each on the hub; those that the decoder's folder will ask for."""
    for name, (repository, backbone) in download.DECODERS.items():
        assert timm.get_pretrained_cfg(backbone).hf_hub_id and repository.startswith("nyu-visionx/RAE-")
        assert backbone in BACKBONES.values() and name.split("-")[1] in repository and name.split("-")[2] in backbone


def test_inceptions_weights_come_checked_and_an_interrupted_fetch_goes_on(server, tmp_path, monkeypatch, capsys):
    data = random.Random(0).randbytes(50_000)
    name = f"weights-inception-{hashlib.sha256(data).hexdigest()[:8]}.pth"
    server.repositories["somebody/releases"] = {name: data}
    monkeypatch.setattr(download, "URL", f"{server.url}/somebody/releases/store/{name}")
    command, target = ["inception", "--to", str(tmp_path)], tmp_path / "inception" / name
    server.corrupt = True
    with pytest.raises(FeatInvError, match="another checksum than its name states; it was deleted"):
        download.main(command)
    assert not on_disk(tmp_path)
    server.corrupt, server.cut = False, 20_000
    download.main(command)
    assert target.read_bytes() == data and f"--inception {target}" in capsys.readouterr().out
    assert (f"/somebody/releases/store/{name}", "bytes=20000-") in fetched(server)
    assert {sent for _, _, sent in server.asked} == {None}  # the hub's token is not for others

    server.asked.clear()
    download.main(command)
    assert "already there" in capsys.readouterr().out and not server.asked
    target.write_bytes(b"my own file")
    with pytest.raises(FeatInvError, match="move it away"):
        download.main(command)
    assert target.read_bytes() == b"my own file"
    monkeypatch.setattr(download, "URL", f"http://127.0.0.1:1/other-{'0' * 8}.pth")
    with pytest.raises(FeatInvError, match="127.0.0.1:1/other.* could not be fetched .*check the network"):
        download.main(command)


def test_a_full_disk(server, fetch, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(2e9, 2e9, 0))
        with pytest.raises(FeatInvError, match="0.0 GB free.*make room"):
            fetch()
    assert not fetched(server)

    def fail(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(hub, "http_get", fail)
    with pytest.raises(FeatInvError, match="the disk is full; make room and try again"):
        fetch()


def test_one_weights_file_for_each_part(files):
    names = set(files[BASE])
    assert "unet/diffusion_pytorch_model.safetensors" in download.choose_base(names)
    names -= {"unet/diffusion_pytorch_model.safetensors"}
    assert "unet/diffusion_pytorch_model.bin" in download.choose_base(names)
    names -= {"unet/diffusion_pytorch_model.bin"}
    # programs look for the plain name
    assert (
        download.choose_base(names)["unet/diffusion_pytorch_model.fp16.safetensors"]
        == "unet/diffusion_pytorch_model.safetensors"
    )
    names -= {"unet/diffusion_pytorch_model.fp16.safetensors", "tokenizer/vocab.json"}
    with pytest.raises(
        FeatInvError,
        match="no tokenizer/vocab.json, unet/diffusion_pytorch_model.safetensors; expected Stable Diffusion",
    ):
        download.choose_base(names)


def test_a_repository_without_the_files(server, fetch):
    server.repositories[BASE] = {"README.md": b"a picture book"}
    with pytest.raises(FeatInvError, match="somebody/small-SD has no scheduler/scheduler_config.json"):
        fetch()
    with pytest.raises(FeatInvError, match="somebody/small-SD has no v1.ckpt"):
        fetch(f"{BASE}/v1.ckpt")


def test_names_that_cannot_be_fetched(server, fetch):
    with pytest.raises(FeatInvError, match="test_convnxt.*similar names: test_convnext"):
        fetch(backbone="test_convnxt.r160_in1k")
    with pytest.raises(FeatInvError, match="resnet50.none"):
        fetch(backbone="resnet50.none")
    for name in ("/not/there", "../not-there", "one", "a/b/c"):
        with pytest.raises(FeatInvError, match="neither a folder here nor a hub repository; expected owner/name"):
            fetch(name)
    assert not server.asked


def test_what_is_here_already_needs_nothing(server, fetch, tmp_path, capsys):
    fetch("tiny")
    fetch(str(tmp_path), backbone=str(ROOT / "featinv_nodes" / "worlds" / "drawn" / "backbone_cnn"))
    download.main(["tiny_vit_last"])
    assert capsys.readouterr().out.count("needs no files") == 3 and not server.asked
    with pytest.raises(FeatInvError, match="tiny_cnn_last.yaml"):
        download.main(["tiny_dog_last"])


def test_who_lacks_a_file_is_told_the_command(tmp_path):
    for open_it in (
        lambda: load_backbone("resnet50"),
        lambda: load_backbone("resnet50", tmp_path / "no.safetensors"),
        lambda: load_base(tmp_path, ""),
    ):
        with pytest.raises(FeatInvError, match="python3 run.py download CONFIG"):
            open_it()


def test_a_mistake_is_one_line_and_exit_status_2():
    done = subprocess.run(
        [sys.executable, str(ROOT / "training" / "download.py"), "tiny_dog_last"], capture_output=True, text=True
    )
    assert (
        done.returncode == 2 and done.stderr.startswith("download.py: configuration") and done.stderr.count("\n") == 1
    )
