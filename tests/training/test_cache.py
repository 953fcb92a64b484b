"""A cache holds exactly the crops that training sees, says what it is of, and is whole or made whole."""

import json
from types import SimpleNamespace

import killed
import pytest
import torch
from PIL import Image, ImageOps
from test_never_loses_work import photographs as photographs

from featinv_nodes.core.errors import FeatInvError
from featinv_nodes.worlds import open_backbone
from training import cache
from training.checksum import is_whole
from training.config import DEFAULT, read_config
from training.data import latent_cache
from training.data.latent_cache import open_pictures
from training.data.loader import loader
from training.loop.objective import observe
from training.loop.training import check, train
from training.models.base_model import load_base

PROMPT = "a drawing of the small world"


@pytest.fixture(scope="module")
def parts():
    return load_base("tiny", PROMPT), open_backbone("tiny-cnn")


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(latent_cache, "SHARD", 5)
    monkeypatch.setattr(cache, "SHARD", 5)
    latent_cache._opened.cache_clear()


def config(folder, **changes):
    values = (
        killed.SMALL
        | {"cache": str(folder), "views": "2", "flips": "both", "seed": "3", "max_images": "24", "batch": "8"}
        | changes
    )
    return read_config(DEFAULT, {k: "null" if v is None else str(v) for k, v in values.items()})


def files(folder):
    return {f.relative_to(folder).as_posix(): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def test_batches_from_the_cache_are_those_without_it(parts, photographs, tmp_path):
    broken = photographs / "04.png"
    broken.write_bytes(broken.read_bytes()[:300])
    both = config(tmp_path, data=photographs, cache_features="true")
    cache.fill(both)
    plain = config(tmp_path, data=photographs, cache=None)
    latents = config(tmp_path, data=photographs)
    sources = [open_pictures(c, *parts, "cpu", 0, 1) for c in (plain, latents, both)]
    assert set(loader(sources[2], 0, 1, 0, 1, 0).__next__().tensors) == {"moments", "features"}  # no picture is opened
    batches = [loader(source, 0, 30, 0, 1, 0) for source in sources]
    for _ in range(2):  # five epochs of twelve pictures
        first, *others = [next(b) for b in batches]
        expected = observe(*parts, first.tensors, plain)
        for other in others:
            assert {name for name, _ in other.skipped} == {name for name, _ in first.skipped} == {"04.png"}
            for a, b in zip(expected, observe(*parts, other.tensors, plain)):
                finite = a.isfinite()  # the embedded autoencoder's log-variance is -inf
                assert torch.equal(finite, b.isfinite()) and torch.allclose(
                    a[finite], b[finite], rtol=2**-10, atol=2**-10
                )  # fp16 has eleven bits


def test_a_cache_serves_training_in_bfloat16_with_standardised_features(photographs, tmp_path, capsys):
    own = config(tmp_path / "cache", data=photographs, precision="bf16", standardise="true")
    cache.fill(own)
    check(own, tmp_path / "run")
    assert "checked: nothing was written\n" in capsys.readouterr().out and not (tmp_path / "run").exists()


def test_training_from_the_cache_equals_training_without_it(photographs, tmp_path):
    both = config(tmp_path / "cache", data=photographs, cache_features="true", batch=2, max_images=40, save_every=1000)
    cache.fill(both)
    train(both, tmp_path / "one")
    both.cache, both.cache_features = None, False
    train(both, tmp_path / "two")
    a, b = (json.loads((tmp_path / name / "stats.jsonl").read_text())["loss"] for name in ("one", "two"))
    assert a == pytest.approx(b, rel=1e-3)


def test_the_embedded_world_can_be_cached(parts, tmp_path):
    with pytest.raises(FeatInvError, match="--images"):
        cache.fill(config(tmp_path))
    some = config(tmp_path, images=7, cache_features="true")
    cache.fill(some)
    result = next(loader(open_pictures(some, *parts, "cpu", 0, 1), 3, 8, 0, 1, 0)).tensors
    plain = config(tmp_path, images=7, cache=None)
    expected = observe(*parts, next(loader(open_pictures(plain, *parts, "cpu", 0, 1), 3, 8, 0, 1, 0)).tensors, plain)
    assert torch.allclose(result["features"].float(), expected[1], rtol=2**-10, atol=2**-10)


def test_a_stopped_or_damaged_cache_is_completed_to_the_same_files(parts, photographs, tmp_path, monkeypatch, capsys):
    cache.fill(config(tmp_path / "straight", data=photographs))
    expected = files(tmp_path / "straight")
    assert len(expected) == 1 + 2 * 3  # twelve pictures in shards of five, twice

    class Stopped(Exception):
        pass

    real = latent_cache.write_checksummed

    def interrupted(folder, stem, *rest):
        if stem.startswith("view0001"):
            (folder / f"{stem}.safetensors.part").write_bytes(b"cut off")
            raise Stopped
        return real(folder, stem, *rest)

    some = config(tmp_path / "cache", data=photographs)
    monkeypatch.setattr(latent_cache, "write_checksummed", interrupted)
    with pytest.raises(Stopped):
        cache.fill(some)
    with pytest.raises(FeatInvError, match="not complete: view 1, images from 0 on is missing.*cache.py"):
        open_pictures(some, *parts, "cpu", 0, 1)
    monkeypatch.undo()
    monkeypatch.setattr(latent_cache, "SHARD", 5)
    monkeypatch.setattr(cache, "SHARD", 5)
    cache.fill(some)
    assert files(tmp_path / "cache") == expected
    shard = sorted((tmp_path / "cache" / "latents").glob("view*"))[2]
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(FeatInvError, match=f"{shard.name} is damaged.*cache.py"):
        open_pictures(some, *parts, "cpu", 0, 1)
    capsys.readouterr()
    cache.fill(some)
    said = capsys.readouterr().out
    assert f"{shard.name} is damaged and made again" in said and "1 of this process's 6 shards" in said
    assert files(tmp_path / "cache") == expected and all(
        is_whole(f) for f in (tmp_path / "cache" / "latents").glob("view*")
    )


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"seed": 4}, "seed: 3 there, 4 wanted"),
        ({"flips": "none"}, "flips: both there, none wanted"),
        ({"images": 11}, "pictures: 12 there, 11 wanted"),
    ],
)
def test_a_cache_of_other_crops_is_refused(parts, photographs, tmp_path, changes, message):
    cache.fill(config(tmp_path, data=photographs, views=1))
    with pytest.raises(FeatInvError, match=message):
        open_pictures(config(tmp_path, data=photographs, **changes), *parts, "cpu", 0, 1)


@pytest.mark.parametrize("packed", [False, True])
def test_a_cache_of_pictures_that_were_replaced_under_their_names_is_refused(parts, photographs, tmp_path, packed):
    """Old latents would pair with new features, in silence."""
    library = pytest.importorskip("datasets") if packed else None

    def data():
        if not packed:
            return photographs
        rows = [str(file) for file in sorted(photographs.iterdir())]
        kinds = library.Features({"image": library.Image()})
        library.Dataset.from_dict({"image": rows}, features=kinds).save_to_disk(tmp_path / "set")
        return f"hf:{tmp_path / 'set'}"

    made = config(tmp_path / "cache", data=data(), views=1)
    cache.fill(made)
    assert len(open_pictures(made, *parts, "cpu", 0, 1).source) == 12
    for file in photographs.iterdir():
        ImageOps.flip(Image.open(file)).save(file)
    data()
    for refusing in (lambda: open_pictures(made, *parts, "cpu", 0, 1), lambda: cache.fill(made)):
        with pytest.raises(FeatInvError, match="made from other images than those that are there now, by their"):
            refusing()


def test_a_cache_of_another_model_or_fewer_views_is_refused(parts, photographs, tmp_path):
    cache.fill(config(tmp_path, data=photographs, views=1, cache_features="true"))
    base, backbone = parts
    other = load_base("tiny", PROMPT)
    next(other.vae.parameters()).data.mul_(2)
    with pytest.raises(FeatInvError, match="autoencoder: "):
        open_pictures(config(tmp_path, data=photographs, views=1), other, backbone, "cpu", 0, 1)
    larger = SimpleNamespace(resolution=128, vae=base.vae)  # Stable Diffusion beside MiniSD: one autoencoder
    with pytest.raises(FeatInvError, match="resolution: 64 there, 128 wanted"):
        open_pictures(config(tmp_path, data=photographs, views=1), larger, backbone, "cpu", 0, 1)
    with pytest.raises(FeatInvError, match="view 1, images from 0 on is missing"):
        open_pictures(config(tmp_path, data=photographs), base, backbone, "cpu", 0, 1)
    with pytest.raises(FeatInvError, match="no cache in .*features-resnet10t.tiny_world-layer2"):
        open_pictures(
            config(tmp_path, data=photographs, views=1, cache_features="true", layer="layer2"),
            base,
            backbone,
            "cpu",
            0,
            1,
        )
    before = files(tmp_path / "latents")
    cache.fill(config(tmp_path, data=photographs, views=2))  # further views are added, those there are kept
    assert before.items() <= files(tmp_path / "latents").items()


def test_a_cache_needs_a_number_of_views(tmp_path):
    with pytest.raises(FeatInvError, match="--views"):
        config(tmp_path, data="photographs", views=0)
