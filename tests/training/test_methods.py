"""The suite methods: the same maps for every method, and what each costs."""

import json
from unittest.mock import patch

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from featinv_nodes import feature_decoders as decoders
from featinv_nodes.core.errors import FeatInvError
from featinv_nodes.core.prediction import controlled_prediction
from featinv_nodes.core.sampling import Sampling
from featinv_nodes.core.universal_guidance import COSTS
from training import evaluate
from training.evaluation.context import EvalContext, ModelSpec
from training.evaluation.methods import MethodsOfModel
from training.evaluation.sources import open_source
from training.experiments.page_tables import TABLES
from training.models.flops import gmac_of
from training.models.pipeline import load_pipeline
from training.models.untrained import UntrainedPipeline, UntrainedSampling

SPEC = ModelSpec("tiny_cnn_last")


@pytest.fixture(scope="module")
def pipeline():
    return load_pipeline("tiny_cnn_last")


@pytest.fixture(scope="module")
def alone(pipeline):
    return UntrainedPipeline(pipeline.base, pipeline.backbone, pipeline.info.prompt)


def stand_in(source):
    """A decoder that answers with one grey value per picture, and what it was asked."""
    made = nn.Linear(1, 1)
    made.source, made.picture_size, made.asked = source, (32, 32), []

    def decode(maps, batch=16):
        made.asked.append(len(maps))
        maps.source.require(source, "the feature map", "the decoder")
        return F.interpolate(maps.values.mean((1, 2, 3), keepdim=True).sigmoid(), 32).expand(-1, 3, -1, -1)

    made.decode = decode
    return made


@pytest.fixture
def decoder(pipeline):
    made = stand_in(pipeline.source)
    with patch.object(decoders, "open_feature_decoder", lambda *_, **__: made):
        yield made


def run(out, *options, count=2):
    evaluate.main([*f"--suite methods --count {count} --steps 2 --device cpu --out {out}".split(), *options])
    return json.loads((out / "results.json").read_text()), (out / "report.md").read_text()


def test_every_method_draws_the_same_maps_and_says_what_it_costs(tmp_path, decoder):
    with patch.dict(COSTS, {"quick": 16}):  # four steps of four moves
        result, text = run(tmp_path, "--decoder", "stand-in", "--costs", "quick", "--gradient-steps", "1")
    names = ["trained", "trained, gradient", "guidance alone, 16 gradients", "feature decoder", "decoder, then trained"]
    names += ["decoder, then trained, gradient", "decoder, then guidance alone", "unconditional", "round trip"]
    assert list(result["costs"]) == names
    for name in names:
        assert result[name]["cosine"]["n"] == result[name]["independent: cosine"]["n"] == 2
        assert result["costs"][name]["seconds"] > 0 and result["costs"][name]["gmac"] >= 0
        assert "seconds" not in result[name] and f"\n| {name} | " in text
    assert [result["costs"][name]["gradients"] for name in names] == [0, 1, 16, 0, 0, 1, 8, 0, 0]
    assert result["sampling"]["decoder, then guidance alone"]["share"] == 0.5
    gmac = {name: cost["gmac"] for name, cost in result["costs"].items()}
    assert gmac["feature decoder"] == 0 < gmac["decoder, then trained"] < gmac["trained"] < gmac["trained, gradient"]
    assert (tmp_path / "panel.png").exists() and (tmp_path / "index.html").exists()
    assert "A KID of 2 images says little" in text and "are left out" not in text
    drawn = result["trained, gradient"]
    evaluate.main(
        f"--count 2 --steps 2 --gradient-steps 1 --device cpu --out {tmp_path}/quality".split()
    )  # the same pictures as the suite quality's
    other = json.loads((tmp_path / "quality" / "results.json").read_text())["reconstruction"]
    assert drawn["cosine"] == other["cosine"] and drawn["top1_match"] == other["top1_match"]
    lines = TABLES["methods"](result)
    assert len([line for line in lines if line.startswith(tuple(f"| {name} |" for name in names))]) == len(names)


def test_the_embedded_decoder_of_the_models_maps_is_the_default(pipeline, decoder):
    with (
        patch.object(decoders, "DECODERS", ["embedded"]),
        patch.object(decoders, "find_decoder", lambda name: name),
        patch.object(decoders, "_source", lambda *_: decoder.source),
    ):
        assert decoders.decoder_of(pipeline.source, pipeline.backbone) is decoder
        assert decoders.decoder_of(pipeline.backbone.source("layer2"), pipeline.backbone) is None


def test_without_a_decoder_its_rows_are_left_out_with_a_sentence(tmp_path):
    result, text = run(tmp_path, "--model", "tiny_cnn_pooled", "--costs", count=1)
    assert list(result["costs"]) == ["trained", "trained, gradient", "unconditional", "round trip"]
    assert "Rows of a feature decoder are left out: no decoder of resnet10t.tiny_world" in text


def test_a_decoder_of_other_maps_is_refused_before_any_work(tmp_path, decoder):
    with pytest.raises(FeatInvError, match=r"the feature decoder stand-in .* do not fit together. layer: last against"):
        run(tmp_path, "--decoder", "stand-in", "--model", "tiny_cnn_stage")
    with pytest.raises(FeatInvError, match="--start-share 0: expected"):
        run(tmp_path, "--decoder", "stand-in", "--start-share", "0")
    assert not decoder.asked and not (tmp_path / "records").exists()


def test_the_arithmetic_is_that_of_what_is_run(pipeline, alone, decoder):
    """By hand: the last 2 of 4 steps, each of ControlNet and U-Net for two branches, between the encoding of the
    decoder's picture and the decoding; and guidance alone on a whole picture."""
    made = MethodsOfModel(EvalContext(open_source("drawn", 1)), SPEC, decoder, 0.5)
    base, model, blank = pipeline.base, pipeline.model, made._blank()
    x, text = torch.zeros(2, *pipeline.noise([0]).shape[1:]), base.text[""].expand(2, -1, -1)
    with torch.inference_mode():
        hint = model.hint(blank.values.repeat(2, 1, 1, 1), x.shape[2:])
        parts = {
            "hints": gmac_of(lambda: model.hint(blank.values.repeat(2, 1, 1, 1), x.shape[2:])),
            "step": gmac_of(lambda: controlled_prediction(base.unet, model.controlnet, x, torch.tensor(0), text, hint)),
            "encoding": gmac_of(lambda: base.encode(torch.zeros(1, 3, 64, 64))),
            "decoding": gmac_of(lambda: base.decode(x[:1])),
        }
    by_hand = sum(parts.values()) + parts["step"]
    counted = made.trained(Sampling(4, guidance=1.5, negative="features"), from_decoder=True).gmac()
    assert counted == pytest.approx(by_hand, rel=1e-9) and min(parts.values()) > 0
    sampling = UntrainedSampling(2, 0.1, 2, end=0.5, steps=3)
    whole = gmac_of(lambda: alone.draw_each(blank, sampling, [0]))
    assert made.guided(sampling).gmac() == pytest.approx(whole, rel=1e-9)


def test_the_page_tells_the_kid_of_the_independent_backbone_from_the_other():
    """Both are named after their backbones, in no order that means anything."""

    def entry(value):
        return {"value": value, "low": value, "high": value, "n": 32}

    paired = {"kid_paired (a.x, pooled)": entry(0.1), "kid_paired (b.y, pooled)": entry(0.2)}
    own = {"cosine": entry(0.9), "independent: cosine": entry(0.8), **paired}
    costs = {"unconditional": {"gradients": 0, "gmac": 1234.5, "seconds": 0.0123}}
    lines = {
        name: TABLES["methods"]({"unconditional": own, "costs": costs, "independent": name}) for name in ("a.x", "")
    }
    head, _, row = lines["a.x"]
    assert (
        head == "| method | gradients | GMAC | seconds | cosine | independent | paired KID | independent: paired KID |"
    )
    assert row.startswith("| unconditional | 0 | 1230 | 0.012 | 0.900") and row.index("0.2000") < row.index("0.1000")
    assert "independent: paired KID" not in lines[""][0]
