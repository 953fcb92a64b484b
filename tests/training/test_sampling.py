"""Sampling beyond the paper: two guidances apart, solvers, guidance by the gradient, best of N."""

import json
import math
from dataclasses import asdict, replace
from unittest.mock import patch

import pytest
import torch
from diffusers import DDIMScheduler
from PIL import Image

from featinv_nodes.core.errors import FeatInvError
from featinv_nodes.core.feature_map import FeatureMap
from featinv_nodes.core.prediction import predicted_clean, prediction_of
from featinv_nodes.core.sampling import SOLVERS, Sampling, set_timesteps, starting_noise
from featinv_nodes.core.weights import read_info
from featinv_nodes.worlds import model_file
from featinv_nodes.worlds.drawn.scenes import draw
from training import evaluate, fit_scope, reconstruct, visualize_concepts
from training.cli import model_parser, pipeline_from
from training.evaluation.suites.cost import choose, drawing_gmac
from training.models.flops import gmac_of
from training.models.pipeline import ATTEMPT, load_pipeline
from training.models.sampling import sample, solver_of

APART = Sampling(steps=4, guidance=3.0, negative="features", text_guidance=1.5)


@pytest.fixture(scope="module")
def pipeline():
    return load_pipeline("tiny_cnn_last")


@pytest.fixture(scope="module")
def features(pipeline):
    return pipeline.features(pipeline.backbone.preprocess(draw(0, torch.arange(2), "held-out").image))


def latents(pipeline, features, sampling):
    return sample(
        pipeline.base,
        pipeline.model,
        features,
        pipeline.noise([0, 1]),
        sampling,
        pipeline.info.prompt,
        pipeline.backbone,
    )


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def test_equal_guidances_are_the_joint_one(pipeline, features):
    equal = replace(APART, text_guidance=3.0)
    assert torch.equal(
        latents(pipeline, features, equal), latents(pipeline, features, replace(APART, text_guidance=None))
    )
    assert not torch.allclose(latents(pipeline, features, APART), latents(pipeline, features, equal), rtol=0.01)


@pytest.mark.parametrize("solver", SOLVERS)
def test_every_number_of_steps_is_taken_from_the_first_timestep_to_none_below_zero(pipeline, solver):
    for steps in (*range(1, 130), 998, 1000):
        made = solver_of(pipeline.base, Sampling(steps=steps, solver=solver))
        set_timesteps(made, steps)
        assert len(made.timesteps) == steps and made.timesteps[0] == 999 and made.timesteps.min() >= 0, steps
        if solver != "ddim":
            assert len(made.sigmas) == steps + 1 and made.sigmas[-1] == 0
    with pytest.raises(FeatInvError, match="steps 1001: the base model has 1000 timesteps"):
        set_timesteps(made, 1001)


def test_a_number_of_steps_that_does_not_divide_the_timesteps_draws_as_its_neighbours_do(pipeline, features):
    scores = [
        pipeline.score(
            features, pipeline.draw(features, pipeline.recommended(steps=n, gradient=0.0), pipeline.noise([0, 1]))
        ).mean()
        for n in (60, 61)
    ]
    assert abs(scores[0] - scores[1]) < 0.02 and scores[1] > 0.9


@pytest.mark.parametrize(
    ("guidance", "text", "evaluations"), [(3.0, 1.5, 3), (3.0, 0.0, 2), (1.0, 2.0, 2), (0.0, 2.0, 3), (1.0, 1.0, 1)]
)
def test_two_guidances_follow_their_formula(pipeline, features, guidance, text, evaluations):
    """Against a loop that evaluates all three one after another (Brooks et al. 2023, Eq. 3); what has no share is left
    out."""
    sampling, base, model = replace(APART, guidance=guidance, text_guidance=text), pipeline.base, pipeline.model
    x, scheduler = pipeline.noise([0, 1]), DDIMScheduler.from_config(pipeline.base.scheduler.config)
    scheduler.set_timesteps(sampling.steps)
    with torch.inference_mode():
        for t in scheduler.timesteps:
            one = lambda values, prompt: model(base.unet, x, t, base.text[prompt].expand(2, -1, -1), values)  # noqa: B023, E731
            none, cond, both = (
                one(features.values * 0, ""),
                one(features.values, ""),
                one(features.values, pipeline.info.prompt),
            )
            x = scheduler.step(none + guidance * (cond - none) + text * (both - cond), t, x).prev_sample
    assert relative(latents(pipeline, features, sampling), x) < 1e-4  # float32, batches of another size
    assert len(sampling.weights()) == evaluations and sampling.evaluations == 4 * evaluations


def test_without_a_model_only_the_texts_guidance_is_left(pipeline):
    start = pipeline.noise([0])
    apart = sample(pipeline.base, None, None, start, APART, pipeline.info.prompt)
    joint = sample(pipeline.base, None, None, start, Sampling(steps=4, guidance=1.5), pipeline.info.prompt)
    assert relative(apart, joint) < 1e-4


def test_solvers_agree_where_steps_are_many_and_are_nearer_where_they_are_few(pipeline, features):
    """All solve the same equation. The reference is DDIM of 100 steps, itself of first order: the tolerance is about
    half of what ten steps are off (0.07 to 0.09)."""
    one = features.select(slice(0, 1))

    def drawn(solver, steps):
        return sample(
            pipeline.base,
            pipeline.model,
            one,
            pipeline.noise([0]),
            Sampling(steps, guidance=1.0, solver=solver),
            pipeline.info.prompt,
        )

    reference = drawn("ddim", 100)
    errors = {solver: relative(drawn(solver, 10), reference) for solver in SOLVERS}
    assert max(errors["dpmpp_2m"], errors["unipc"]) < errors["ddim"]
    unipc = solver_of(pipeline.base, Sampling(solver="unipc")).config
    assert (unipc.solver_order, unipc.solver_type) == (2, "bh2")  # as sampling.SOLVERS says
    assert relative(drawn("dpmpp_2m", 40), reference) < 0.05


def test_dpmpp_2m_is_the_hosts_formula(pipeline, features):
    """Against k-diffusion's loop over sigma = sqrt((1 - a) / a) at KSampler's scheduler "simple"."""
    sampling = Sampling(steps=10, guidance=1.0, solver="dpmpp_2m")
    base, alpha_bar = pipeline.base, pipeline.base.scheduler.alphas_cumprod
    times = [999 - int(k * 1000 / sampling.steps) for k in range(sampling.steps)]
    sigmas = [((1 - alpha_bar[t]) / alpha_bar[t]).sqrt() for t in times] + [torch.tensor(0.0)]
    x, old = pipeline.noise([0, 1]) / alpha_bar[times[0]].sqrt(), None
    with torch.inference_mode():
        for i, t in enumerate(times):
            noisy = x * alpha_bar[t].sqrt()
            result = pipeline.model(
                base.unet, noisy, torch.tensor(t), base.text[pipeline.info.prompt].expand(2, -1, -1), features.values
            )
            clean = predicted_clean(base.scheduler, noisy, result, torch.tensor(t))
            if old is None or sigmas[i + 1] == 0:
                mixed = clean
            else:
                h, last = (sigmas[i] / sigmas[i + 1]).log(), (sigmas[i - 1] / sigmas[i]).log()
                mixed = clean + (clean - old) * h / (2 * last)
            ratio = sigmas[i + 1] / sigmas[i]
            x, old = ratio * x + (1 - ratio) * mixed, clean
    assert relative(latents(pipeline, features, sampling), x) < 1e-4  # float32, in other units


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_solver_remembers_nothing_between_calls(pipeline, features, solver):
    sampling = Sampling(steps=4, guidance=1.0, solver=solver)
    before = dict(pipeline.base.scheduler.config), pipeline.base.scheduler.timesteps.clone()
    first = latents(pipeline, features, sampling)
    held = solver_of(pipeline.base, sampling)
    set_timesteps(held, 4)
    latents(pipeline, features, replace(sampling, steps=3))
    assert len(held.timesteps) == 4  # one that is at work is not disturbed
    assert torch.equal(latents(pipeline, features, sampling), first)
    assert dict(pipeline.base.scheduler.config) == before[0] and torch.equal(
        pipeline.base.scheduler.timesteps, before[1]
    )


@pytest.mark.parametrize("kind", ["v_prediction", "epsilon"])
def test_clean_latents_and_prediction_are_each_others_inverse(pipeline, kind):
    base = replace(
        pipeline.base, scheduler=DDIMScheduler.from_config(pipeline.base.scheduler.config, prediction_type=kind)
    )
    clean, noise, t = torch.randn(2, 24, 8, 8), torch.randn(2, 24, 8, 8), torch.tensor(300)
    noisy = base.scheduler.add_noise(clean, noise, t)
    result = base.scheduler.get_velocity(clean, noise, t[None]) if kind == "v_prediction" else noise
    assert (
        prediction_of(base.scheduler, noisy, clean, t) - result
    ).abs().max() < 1e-4  # float32; the noise's share is above a half
    assert (predicted_clean(base.scheduler, noisy, result, t) - clean).abs().max() < 1e-4


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_gradient_raises_the_cosine_and_leaves_no_gradients(pipeline, features, solver):
    sampling = Sampling(steps=6, guidance=1.0, solver=solver, gradient_steps=2)
    start = pipeline.noise([0, 1])
    plain, guided = (pipeline.draw(features, replace(sampling, gradient=step), start) for step in (0.0, 0.05))
    assert (pipeline.score(features, guided) > pipeline.score(features, plain)).all()
    parts = pipeline.base.unet, pipeline.base.vae, pipeline.model, pipeline.backbone
    assert all(p.grad is None and not p.requires_grad for part in parts for p in part.parameters())
    assert torch.equal(pipeline.draw(features, replace(sampling, gradient=0.05, gradient_steps=0), start), plain)
    with pytest.raises(FeatInvError, match="needs the backbone"):
        sample(pipeline.base, pipeline.model, features, start, replace(sampling, gradient=0.05), pipeline.info.prompt)


def test_best_of_n_is_never_worse_and_one_is_a_plain_draw(pipeline, features):
    sampling, maps = Sampling(steps=2, guidance=1.0), features.repeat(2)

    def start_of(attempt):
        return pipeline.noise([n + ATTEMPT * attempt for n in range(4)])

    plain = pipeline.draw(maps, sampling, start_of(0))
    one, first = pipeline.best(maps, sampling, start_of)
    assert torch.equal(one, plain) and first.tolist() == [0] * 4
    best, attempts = pipeline.best(maps, replace(sampling, best_of=3), start_of, batch=2)
    drawn = torch.stack([pipeline.draw(maps, sampling, start_of(k)) for k in range(3)])
    scores = torch.stack([pipeline.score(maps, x) for x in drawn])
    assert torch.allclose(pipeline.score(maps, best), scores.max(0).values, atol=1e-5) and attempts.max() > 0
    for row, attempt in enumerate(attempts):
        assert torch.allclose(best[row], drawn[attempt, row], atol=1e-4)  # batches of another size
    assert replace(sampling, best_of=3).evaluations == 6
    told = iter(torch.tensor([[0.1, 0.5, 0.3, 0.2], [0.9, 0.5, 0.2, 0.2], [0.5, 0.6, 0.4, 0.1]]))
    with patch.object(type(pipeline), "score", lambda *_: next(told)):
        best, attempts = pipeline.best(maps, replace(sampling, best_of=3), start_of)
    assert attempts.tolist() == [1, 2, 2, 0]  # the highest of all, and of equals the first
    assert torch.equal(best, drawn[attempts, torch.arange(4)])


def test_the_whole_of_a_drawn_picture_is_scored(pipeline, features):
    """Pictures alike in the middle, which the backbone's own evaluation would cut out, and different to its sides."""
    wide = torch.rand(1, 3, 64, 128, generator=torch.Generator().manual_seed(0)).repeat(2, 1, 1, 1)
    wide[1, :, :, :32] = 0
    scores = pipeline.score(features, wide)
    alone = pipeline.score(features.select(slice(1, 2)), wide[1:])
    assert abs(scores[1] - alone[0]) < 1e-4  # float32, batches of another size
    assert abs(pipeline.score(features.select(0).repeat(2), wide).diff()) > 1e-3


def test_reconstruct_keeps_the_best_and_says_so(pipeline, tmp_path):

    from training.report import save_image, to_image

    save_image(to_image(draw(0, torch.arange(1), "held-out").image[0]), tmp_path / "scene.png")
    result = {}
    for count in ("1", "3"):
        reconstruct.main(
            [
                "--image",
                str(tmp_path / "scene.png"),
                "--out",
                str(tmp_path / count),
                "--steps",
                "2",
                "--device",
                "cpu",
                "--best-of",
                count,
            ]
        )
        result[count] = json.loads((tmp_path / count / "results.json").read_text())
    assert result["3"]["pictures"][0]["cosine"] >= result["1"]["pictures"][0]["cosine"] - 1e-6  # of its own attempt 0
    assert (
        result["3"]["sampling"]["best_of"] == 3
        and "among 3" in result["3"]["note"]
        and "among" not in result["1"]["note"]
    )


def test_a_program_that_draws_once_refuses_best_of():
    with pytest.raises(FeatInvError, match="samples each image once"):
        pipeline_from(model_parser("").parse_args(["--best-of", "4"]))


def test_options_reach_the_sampling(pipeline):
    args = model_parser("").parse_args(
        "--solver unipc --text-guidance 0.5 --negative features --gradient 0.1 --gradient-steps 3 --device cpu".split()
    )
    _, sampling = pipeline_from(args)
    assert (sampling.solver, sampling.text_guidance, sampling.negative, sampling.gradient, sampling.gradient_steps) == (
        "unipc",
        0.5,
        "features",
        0.1,
        3,
    )
    assert sampling.steps == pipeline.info.recommended["steps"]


def test_edited_maps_are_drawn_without_the_gradient_that_the_files_recommend(pipeline):
    assert (
        pipeline.recommended().gradient > 0
        and pipeline_from(model_parser("").parse_args([]))[1] == pipeline.recommended()
    )
    for program in (visualize_concepts.arguments(), fit_scope.arguments()):
        expected = [
            word for action in program._actions if action.required for word in (action.option_strings[0], "drawn")
        ]
        assert pipeline_from(program.parse_args(expected))[1] == pipeline.recommended(gradient=0.0)


def test_settings_that_make_no_sense_are_refused():
    with pytest.raises(FeatInvError, match="set negative to 'features'"):
        Sampling(negative="text", text_guidance=1.0)
    nan = float("nan")
    for wrong, message in (
        ({"solver": "euler"}, "solver 'euler'"),
        ({"text_guidance": -1.0, "negative": "features"}, "text guidance -1.0"),
        ({"text_guidance": nan, "negative": "features"}, "text guidance nan"),
        ({"guidance": math.inf}, "^guidance inf: expected a finite"),
        ({"gradient": -0.1}, "^gradient -0.1: expected a finite"),
        ({"gradient": nan}, "^gradient nan"),
        ({"gradient_steps": -1}, "^gradient steps -1: expected at least 0"),
        ({"best_of": 0}, "^best of 0: expected at least 1"),
        ({"steps": 0}, "^steps 0: expected at least 1"),
        ({"guidance": nan}, "^guidance nan: expected a finite"),
        ({"strength": nan}, "^strength nan: expected a finite"),
        ({"start": 0.9, "end": 0.1}, "start 0.9 to end 0.1"),
    ):
        with pytest.raises(FeatInvError, match=message):
            Sampling(**wrong)
    assert Sampling(gradient_steps=0).gradient_steps == 0
    for seed in (2**64, -(2**63) - 1):
        with pytest.raises(FeatInvError, match=f"^seed {seed}: expected"):
            starting_noise((1,), seed)
    assert starting_noise((1,), 2**64 - 1).isfinite().all() and starting_noise((1,), -(2**63)).isfinite().all()
    recommended = {"negative": "features", "text_guidance": 2.0, "guidance": 3.0}
    assert Sampling.chosen(recommended, {"negative": "text", "steps": None}) == Sampling(guidance=3.0)
    assert Sampling.chosen(recommended, {"guidance": 4.0}).text_guidance == 2.0


def test_the_cheapest_within_the_interval_of_the_best_is_chosen():
    scores = {
        "long": {"value": 0.90, "low": 0.88},
        "short": {"value": 0.885, "low": 0.8},
        "other": {"value": 0.89, "low": 0.8},
        "poor": {"value": 0.5, "low": 0.4},
    }
    assert choose(scores, {"long": 50, "short": 20, "other": 20, "poor": 5}) == ("long", "other")


def test_the_cost_of_a_drawing_is_that_of_all_its_steps(pipeline):
    sampling = Sampling(4, guidance=3.0, gradient=0.05, gradient_steps=2)
    blank = FeatureMap(torch.zeros(1, 128, 8, 8), pipeline.info.source)
    whole = gmac_of(lambda: pipeline.draw(blank, sampling, pipeline.noise([0])))
    assert drawing_gmac(pipeline, sampling) == pytest.approx(whole, rel=1e-9)


def test_the_cost_suite_tries_steps_and_the_gradient_and_writes_the_cheapest_good_one(tmp_path):
    """Guidance by the gradient beats one step without it, wherever three scenes' intervals lie."""
    file = tmp_path / "copy.safetensors"
    file.write_bytes(model_file("tiny_cnn_last").read_bytes())
    evaluate.main(
        [
            *"--suite cost --count 3 --solver-steps 1 --gradient-last 2 --write-back --device cpu --model".split(),
            str(file),
            "--out",
            str(tmp_path / "out"),
        ]
    )
    result = json.loads((tmp_path / "out" / "results.json").read_text())
    guided, plain = "ddim, 10 steps, gradient in the last 2", "ddim, 1 steps"
    assert (
        result[guided]["cosine"]["value"]
        > result["ddim, 10 steps"]["cosine"]["value"]
        > result[plain]["cosine"]["value"]
    )
    assert (
        result["costs"][plain]["gmac"]
        < result["costs"]["ddim, 10 steps"]["gmac"]
        < result["costs"][guided]["gmac"]
        < result["costs"]["the paper's sampling"]["gmac"]
    )
    assert Image.open(tmp_path / "out" / "cost.png").width > 600
    sampling, chosen = read_info(file).recommended, result["settings"]["sampling"][result["recommended"]]
    assert {name: sampling.get(name, asdict(Sampling())[name]) for name in chosen} == chosen
