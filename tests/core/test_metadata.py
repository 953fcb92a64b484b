"""Whatever a file says of itself, a reader opens it or names the file and what is wrong with it; nothing else is
raised."""

import json
from copy import deepcopy
from dataclasses import asdict, fields

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from featinv_nodes.core.concepts import Concepts, SparseEncoder, load_concepts, save_concepts
from featinv_nodes.core.encoders import ConvEncoder, PerceiverEncoder
from featinv_nodes.core.errors import FeatInvError
from featinv_nodes.core.feature_files import load_features, save_features
from featinv_nodes.core.feature_map import FeatureMap, FeatureSource
from featinv_nodes.core.files import write_safetensors
from featinv_nodes.core.linear_map_files import load_linear_map, save_linear_map
from featinv_nodes.core.linear_maps import Pairs
from featinv_nodes.core.metadata import Inversion, Recommended, Source
from featinv_nodes.core.sampling import Sampling
from featinv_nodes.core.scope import fit_scope
from featinv_nodes.core.weights import InversionInfo, load_inversion, load_scope, read_info, save_inversion, save_scope

SOURCE = FeatureSource("net.tag", "last", False, 6, (3, 4), (96, 128), (0.5, 0.5, 0.5), (0.2, 0.2, 0.2))
WRONG = [None, True, -1, 2.5, 10**30, "", [], ["a", "b", "c"], {"a": 1}, float("nan")]
MAPS = FeatureMap(torch.randn(200, 6, 3, 4, generator=torch.Generator().manual_seed(0)), SOURCE)


def weights(file, encoder=None):
    encoder = encoder or ConvEncoder(6, 8, width=10)
    base = {"name": "b", "width": 8, "context": 4, "latent_channels": 4, "heads": 2}
    recommended = {"strength": 1.0, "guidance": 2.0, "negative": "features", "steps": 10, "gradient": 0.1}
    info = InversionInfo(SOURCE, encoder.settings, base, "a prompt", recommended, 7, {"seed": 0}, {"cosine": 0.5})
    save_inversion(file, info, {"conv_in.weight": torch.randn(3, 3)}, encoder)


def concepts(file):
    rows = torch.nn.functional.normalize(torch.randn(2, 6))
    encoder = SparseEncoder(torch.randn(2, 6), torch.randn(2), 1)
    save_concepts(file, Concepts(list(rows[:, None]), ["a", "b"], SOURCE, torch.randn(6), "sae", {"seed": 1}, encoder))


def features(file):
    save_features(file, FeatureMap(torch.randn(2, 6, 3, 4), SOURCE, torch.randn(2, 1, 6)))


def linear_map(file):
    maps = FeatureMap(torch.randn(6, 6, 3, 4), SOURCE)
    pairs = Pairs()
    pairs.add(maps, maps.with_values(maps.values.roll(1, 1)))
    save_linear_map(file, pairs.fit("affine", change="rolled"))


def perceiver(file):
    weights(file, PerceiverEncoder(6, 8, width=4, tokens=(3, 4), queries=(4, 4), heads=2))


#: writer, reader, and the entry in the metadata
KINDS = {
    "weights": (weights, load_inversion, "featinv"),
    "perceiver": (perceiver, load_inversion, "featinv"),
    "concepts": (concepts, load_concepts, "featinv_concepts"),
    "features": (features, load_features, "featinv_features"),
    "linear map": (linear_map, load_linear_map, "featinv_linear_map"),
}
each_kind = pytest.mark.parametrize("kind", KINDS)


def written(tmp_path, kind):
    """(file, reader, its fields, its tensors, function that writes it with other fields or tensors)."""
    write, read, key = KINDS[kind]
    file = tmp_path / "the file.safetensors"
    torch.manual_seed(0)
    write(file)
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    about, tensors = json.loads(metadata[key]), load_file(file)

    def rewrite(fields=about, own=tensors, key=key):
        text = fields if isinstance(fields, str) else json.dumps(fields)
        write_safetensors(file, own, metadata | {key: text})

    return file, read, about, tensors, rewrite


def places(fields, path=()):
    """The path to every field and entry, however deep."""
    for key, value in fields.items() if isinstance(fields, dict) else enumerate(fields):
        yield (*path, key)
        if isinstance(value, (dict, list)):
            yield from places(value, (*path, key))


def changed(fields, path, *value):
    """A copy with another value at a path, or without that entry."""
    copy = deepcopy(fields)
    place = copy
    for key in path[:-1]:
        place = place[key]
    if value:
        place[path[-1]] = value[0]
    else:
        del place[path[-1]]
    return copy


@each_kind
def test_any_wrong_or_missing_field_is_named_with_its_file(tmp_path, kind):
    file, read, about, _, rewrite = written(tmp_path, kind)
    refused = 0
    for path in places(about):
        for value in [(), *((value,) for value in WRONG)]:
            rewrite(changed(about, path, *value))
            try:
                read(file)
            except FeatInvError as error:
                refused += 1
                assert str(file) in str(error), (path, value, error)
    assert refused > 100
    rewrite()
    read(file)


@each_kind
@pytest.mark.parametrize("text", ["[]", "3", "null", "{}", "", "no JSON", '{"format": ' + "[" * 100_000, "[" * 5000])
def test_text_that_is_no_object_or_nested_without_end_is_refused(tmp_path, kind, text):
    file, read, _, _, rewrite = written(tmp_path, kind)
    rewrite(text)
    with pytest.raises(FeatInvError, match=f"{file}.* cannot be read: "):
        read(file)


def test_what_is_wrong_is_said_of_each_field(tmp_path):
    file, read, about, _, rewrite = written(tmp_path, "weights")
    for path, value, words in (
        (("source", "channels"), ("6",), r"field source\.channels should be a valid integer, not '6'"),
        (("source", "grid"), ([3],), r"field source\.grid\.1 is missing"),
        (("base", "heads"), (), r"field base\.heads is missing"),
        (
            ("encoder", "kind"),
            ("magic",),
            r"encoder is of kind 'magic'; known: 'conv', 'conv_at_map', 'perceiver'",
        ),
        (("recommended", "steps"), (0,), r"field recommended: .*steps 0: expected at least 1"),
        (("source",), ([1, 2],), r"field source should be "),
        (("encoder", "channels"), (7,), r"encoder\.channels is 7, but net\.tag, layer last, 6 channels"),
    ):
        rewrite(changed(about, path, *value))
        with pytest.raises(FeatInvError, match=words):
            read(file)


@each_kind
def test_a_later_release_s_file_opens_unless_it_says_that_it_cannot_be_read(tmp_path, kind):
    file, read, about, tensors, rewrite = written(tmp_path, kind)
    before = read_info(file) if kind in ("weights", "perceiver") else None
    later = about | {"licence": ["MIT"]}
    for part in ("source", "encoder", "base", "recommended"):
        if part in about:
            later = later | {part: about[part] | {"new": {"deep": [1, None]}}}
    rewrite(later)
    read(file)
    assert before is None or read_info(file) == before
    rewrite({"format": 2, "everything": "else"})
    with pytest.raises(FeatInvError, match="format version 2, which a later release wrote.*reads version 1.*Update"):
        read(file)


def test_settings_that_every_program_relies_on_are_filled_in(tmp_path):
    file, _, about, _, rewrite = written(tmp_path, "weights")
    rewrite(changed(changed(about, ("recommended", "steps")), ("recommended", "negative")))
    assert read_info(file).recommended == {
        "strength": 1.0,
        "guidance": 2.0,
        "negative": "text",
        "steps": 50,
        "gradient": 0.1,
    }
    rewrite({name: about[name] for name in ("format", "source", "encoder", "base", "prompt")})
    assert read_info(file).recommended["steps"] == 50 and read_info(file).config == {}


OTHERS = {
    "missing": None,
    "no shape": lambda x: x.flatten()[0],
    "flat": lambda x: x.flatten(),
    "more": lambda x: torch.cat([x, x]) if x.ndim else x[None],
    "empty": lambda x: x.flatten()[:0],
    "bool": lambda x: x.bool(),
    "complex": lambda x: x.to(torch.complex64),
    "int": lambda x: x.int(),
    "8 bits": lambda x: x.to(torch.int8),
    "NaN": lambda x: x * torch.nan,
    "double": lambda x: x.double(),
    "fp8": lambda x: x.to(torch.float8_e4m3fn),
}
#: what is read as float32, in any kind of file
READ = ("double", "fp8")


@each_kind
@pytest.mark.parametrize("case", OTHERS)
def test_any_wrong_tensor_is_refused_with_its_file_and_any_floating_point_is_read(tmp_path, kind, case):
    file, read, _, tensors, rewrite = written(tmp_path, kind)
    for name, value in tensors.items():
        if not value.is_floating_point() or name == "conv_in.weight":  # the ControlNet is its users' to check
            continue
        other = {k: v for k, v in tensors.items() if k != name}
        rewrite(own=other if case == "missing" else other | {name: OTHERS[case](value).contiguous()})
        if case in READ:
            read(file)
        elif not (case == "missing" and name in ("prefix", "mean", "encoder.weight")):  # files without these are whole
            if case == "flat" and value.ndim == 1:
                continue
            with pytest.raises(FeatInvError, match=str(file)):
                read(file)


def test_the_size_that_a_file_states_is_not_built(tmp_path):
    """Settings of a damaged file must not fill the memory before its tensors are looked at."""
    file, read, about, _, rewrite = written(tmp_path, "weights")
    rewrite(changed(about, ("encoder", "width"), 2**31 - 1))
    with pytest.raises(FeatInvError, match="tensors do not fit its settings"):
        read(file)


def test_a_scope_that_cannot_be_used_leaves_the_rest_of_the_file(tmp_path, caplog):
    file = tmp_path / "m.safetensors"
    weights(file)
    save_scope(file, fit_scope(MAPS, centres=8))
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    about, tensors = json.loads(metadata["featinv_scope"]), load_file(file)

    def scope_of(fields, own=tensors):
        caplog.clear()
        text = fields if isinstance(fields, str) else json.dumps(fields)
        write_safetensors(file, own, metadata | {"featinv_scope": text})
        assert load_inversion(file)[0].prompt == "a prompt"
        scope = load_scope(file)
        if scope is None:
            assert f"{file} is opened without its scope statistics: " in caplog.text
        else:
            assert scope.evaluate(MAPS.select(0)).lines()
        return scope

    assert scope_of(about | {"new": 1}, tensors | {"scope.new": torch.zeros(2)}) is not None and not caplog.text
    for text in ("[]", "{}", "[" * 5000, about | {"levels": [0.5]}, about | {"scale": 0}):
        assert scope_of(text) is None
    for path in (("levels",), ("scale",), ("maps",), ("quantiles",), ("quantiles", "score"), ("quantiles", "score", 0)):
        assert scope_of(changed(about, path)) is None
        for value in (None, 10**400, "x", ["a"], {"a": 1}, float("nan")):
            assert scope_of(changed(about, path, value)) is None
    for name in (name for name in tensors if name.startswith("scope.")):
        for case, change in OTHERS.items():
            other = {k: v for k, v in tensors.items() if k != name}
            scope = scope_of(about, other if change is None else other | {name: change(tensors[name]).contiguous()})
            assert (scope is not None) == (case in (*READ, *(["flat"] if tensors[name].ndim == 1 else []))) or (
                name == "scope.bank" and case == "more"
            ), (name, case)


def test_no_field_that_is_written_is_left_out_of_what_is_read():
    assert Source.model_fields.keys() == {field.name for field in fields(FeatureSource)}
    assert Recommended.model_fields.keys() == {field.name for field in fields(Sampling)}
    assert Inversion.model_fields.keys() == {field.name for field in fields(InversionInfo)}


def test_a_file_comes_back_as_it_was(tmp_path):
    for kind in ("weights", "perceiver"):
        file, _, about, _, _ = written(tmp_path, kind)
        assert json.loads(json.dumps(asdict(read_info(file)))) == about
