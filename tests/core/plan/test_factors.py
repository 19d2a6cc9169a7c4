"""The factors record: what it accepts, what it refuses, and its file."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from helpers.tiny import tiny_dit
from stepgraph.compiler.lowrank.factorize import factorize
from stepgraph.errors import PlanError
from stepgraph.plan.factors import Factors, place_of

FF = "transformer_blocks.0.ff.net.2"


@pytest.fixture(scope="module")
def factors(dit) -> Factors:
    made = factorize(dit, method="svd", rank=4)
    return replace(made, errors={FF: 0.25}, affine={"transformer_blocks.0.ff/1": torch.ones(2, 32)})


def test_round_trip(factors, tmp_path):
    path = tmp_path / "factors.safetensors"
    factors.save(path)
    read = Factors.load(path)
    for name in ("model", "fingerprint", "dtype", "method", "arguments", "errors", "digest", "ranks", "bytes"):
        assert getattr(read, name) == getattr(factors, name), name
    assert list(read.maps) == list(factors.maps)
    for name, pair in factors.maps.items():
        assert all(torch.equal(own, other) for own, other in zip(pair, read.maps[name], strict=True))
    assert torch.equal(read.affine["transformer_blocks.0.ff/1"], torch.ones(2, 32))


def test_the_digest_covers_what_matters(factors):
    assert len(factors.digest) == 16
    a, b = factors.maps[FF]
    others = [
        replace(factors, maps=dict(factors.maps) | {FF: (a + 1e-3, b)}),
        replace(factors, maps={name: pair for name, pair in factors.maps.items() if name != FF}, errors={}),
        replace(factors, method="ca"),
        replace(factors, fingerprint="0/0"),
        factors.with_affine({}),
    ]
    assert len({factors.digest, *(other.digest for other in others)}) == 6
    # How they came about does not.
    assert replace(factors, arguments={}, errors={}).digest == factors.digest


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        (
            (torch.ones(4, 2), torch.ones(3, 4)),
            r"are float32 \[4, 2\] and float32 \[3, 4\]; expected \[C_out, r\] and \[r, C_in\]",
        ),
        ((torch.ones(4), torch.ones(3, 4)), r"expected \[C_out, r\]"),
        ((torch.ones(4, 0), torch.ones(0, 4)), "r >= 1"),
        ((torch.ones(2, 3), torch.ones(3, 4)), r"have rank 3, more than the map \[2, 4\] can have"),
        ((torch.ones(4, 2).double(), torch.ones(2, 4)), "expected float32"),
        ((torch.ones(4, 2), torch.full((2, 4), torch.inf)), "hold NaN or infinite values"),
    ],
)
def test_refuses_maps_that_are_none(pair, message):
    with pytest.raises(PlanError, match=message):
        Factors("M", "a/b", "float32", "svd", {}, {"x": pair})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "pca"}, "unknown method 'pca' of factors; known: svd, ca, cd, cov, whole"),
        ({"dtype": "int8"}, "a model of dtype 'int8'"),
        ({"affine": {"a/1": torch.ones(3, 4)}}, r"affine a/1 is float32 \[3, 4\]; expected"),
        ({"errors": {"y": 0.1}}, "an error is given for 'y', which has no map"),
    ],
)
def test_refuses_what_is_not_valid(changes, message):
    fields = {"method": "svd", "dtype": "float32", "affine": {}, "errors": {}} | changes
    with pytest.raises(PlanError, match=message):
        Factors(model="M", fingerprint="a/b", arguments={}, maps={}, **fields)


def test_refuses_other_models(dit, factors):
    factors.refuse_other(dit)
    with pytest.raises(
        PlanError, match=r"the factors are of other weights of DiTTransformer2DModel \(hash \w+, this model's \w+\)"
    ):
        factors.refuse_other(tiny_dit(seed=1))
    with pytest.raises(PlanError, match="the factors are of a float32 model; this one is float16; convert"):
        factors.refuse_other(tiny_dit().half())
    with pytest.raises(PlanError, match="the factors are of another DiTTransformer2DModel: its configuration"):
        factors.refuse_other(tiny_dit(num_layers=1))
    with pytest.raises(PlanError, match="the factors are of a DiTTransformer2DModel; this model is a Linear"):
        factors.refuse_other(torch.nn.Linear(2, 2))
    a, b = factors.maps[FF]
    for path, pair, message in (
        ("transformer_blocks.9.ff", (a, b), "a map of 'transformer_blocks.9.ff', which this model does not have"),
        ("proj_out_1", (a, b), r"are for a map \[32, 128\]; this model's is \[64, 32\]"),
    ):
        with pytest.raises(PlanError, match=message):
            replace(factors, maps={path: pair}, errors={}).refuse_other(dit)


def test_merge_joins_maps_of_one_model(dit):
    attn, ff = (factorize(dit, method="svd", rank=rank, kinds=[kind]) for kind, rank in (("attn", 4), ("ff", 8)))
    both = attn.merge(ff)
    assert set(both.ranks.values()) == {4, 8}
    assert set(both.maps) == set(attn.maps) | set(ff.maps)
    assert [entry["rank"] for entry in both.arguments["merged"]] == [4, 8]
    with pytest.raises(PlanError, match=r"both factors have 'transformer_blocks\.0\.attn1\.to_k'"):
        both.merge(attn)
    with pytest.raises(PlanError, match="different models cannot be merged: fingerprint is"):
        attn.merge(replace(ff, fingerprint="0/0"))
    with pytest.raises(PlanError, match="'svd' and 'whole' factors cannot be merged"):
        attn.merge(replace(ff, method="whole"))


def test_the_order_of_a_merge_makes_no_difference(dit):
    attn, ff = (factorize(dit, method="svd", rank=4, kinds=[kind]) for kind in ("attn", "ff"))
    table = {"stack_residual/1": torch.ones(2, 32)}
    affine = Factors(attn.model, attn.fingerprint, attn.dtype, "affine", {}, {}, table)
    whole = replace(ff, method="whole")
    other = replace(ff, method="ca")
    for one, two, method in (
        (attn, ff, "svd"), (affine, attn, "svd"), (affine, whole, "whole"), (attn, other, "mixed"),
        (affine, replace(affine, affine={"hidden/1": torch.ones(2, 32)}), "affine"),
    ):  # fmt: skip
        both, turned = one.merge(two), two.merge(one)
        assert both.method == turned.method == method
        assert both.digest == turned.digest
        assert set(both.affine) == {*one.affine, *two.affine}
    # What is mixed stays a set of linear maps.
    with pytest.raises(PlanError, match="'mixed' and 'whole' factors cannot be merged"):
        attn.merge(other).merge(replace(whole, maps={"x": whole.maps[FF]}, errors={}))


def test_refuses_damaged_files(factors, tmp_path):
    path = tmp_path / "factors.safetensors"
    with pytest.raises(PlanError, match=r"no file at .*; make factors with `stepgraph factors make`"):
        Factors.load(path)
    factors.save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(PlanError, match="not a complete stepgraph-factors file"):
        Factors.load(path)
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(PlanError, match="expected stepgraph-factors version 1; got None None"):
        Factors.load(path)
    path.write_bytes(whole)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    del tensors[f"maps/{FF}/b"]
    save_file(tensors, path, metadata)
    with pytest.raises(PlanError, match=rf"factors\.safetensors: the tensor 'maps/{FF}/b' is missing"):
        Factors.load(path)
    tensors[f"maps/{FF}/b"] = torch.full((4, 128), torch.nan)
    save_file(tensors, path, metadata)
    with pytest.raises(PlanError, match=r"factors\.safetensors: the factors of .* hold NaN"):
        Factors.load(path)


def changed(path, **changes) -> None:
    """Write a record anew with some of its metadata changed."""
    with safe_open(path, framework="pt") as file:
        described = json.loads(file.metadata()["stepgraph"])
    save_file(load_file(path), path, {"stepgraph": json.dumps(described | changes)})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"errors": {FF: "0.25"}}, rf"errors\['{FF}'\] is '0\.25'; expected a number"),
        ({"errors": {FF: True}}, "is True; expected a number"),
        ({"errors": {FF: -1.0}}, r"is -1\.0; expected a finite number of at least 0"),
        ({"errors": {FF: float("nan")}}, "is nan; expected a finite number"),
        ({"errors": []}, "in its metadata errors is list; expected a dict; make factors with"),
        ({"maps": [1, FF]}, r"and \[1, .*\]; expected texts"),
        ({"version": "1"}, "expected stepgraph-factors version 1; got stepgraph-factors '1'"),
        ({"version": True}, "expected stepgraph-factors version 1; got stepgraph-factors True"),
        ({"digest": None}, "its metadata says None; the file is damaged or was changed: make factors with"),
        ({"fingerprint": "0/0"}, "its contents have the digest .*, its metadata says"),
    ],
)
def test_refuses_changed_metadata(factors, tmp_path, changes, message):
    path = tmp_path / "factors.safetensors"
    factors.save(path)
    changed(path, **changes)
    with pytest.raises(PlanError, match=r"factors\.safetensors: .*" + message):
        Factors.load(path)


@pytest.mark.parametrize("which", ["a", "b"])
def test_a_flipped_bit_is_noticed(factors, tmp_path, which):
    path = tmp_path / "factors.safetensors"
    factors.save(path)
    size = len(path.read_bytes())
    flat = (factors.maps[FF][0] if which == "a" else factors.maps[FF][1]).numpy().tobytes()
    at = path.read_bytes().index(flat)
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)
    assert len(data) == size
    with pytest.raises(PlanError, match=rf"its contents have the digest \w+, its metadata says '{factors.digest}'"):
        Factors.load(path)


def test_places_are_paths_without_numbers():
    assert place_of("transformer_blocks.11.attn1.to_out.0") == "transformer_blocks.*.attn1.to_out.0"
    assert place_of("transformer_blocks.3.ff") == "transformer_blocks.*.ff"
