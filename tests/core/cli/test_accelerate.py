"""`stepgraph accelerate`, on folders that pipelines were saved to."""

import json
from pathlib import Path

import pytest
from PIL import Image

from helpers.any_pipes import wan_of_words
from helpers.command_line import error_of, invoke
from helpers.distance import SAME_RUN
from helpers.pipes import tiny_pipe
from helpers.tiny import tiny_dit


@pytest.fixture(autouse=True)
def kept(tmp_path, monkeypatch):
    monkeypatch.setenv("STEPGRAPH_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """A class-conditional pipeline's folder."""
    folder = tmp_path_factory.mktemp("dit")
    tiny_pipe(tiny_dit()).save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_a_video_of_a_prompt(tmp_path: Path):
    wan_of_words().save_pretrained(tmp_path / "wan")
    sizes = [word for name in ("height=16", "width=16", "num_frames=5", "max_sequence_length=8") for word in ("--call", name)]
    common = ("accelerate", tmp_path / "wan", "--prompt", "a red fox", *sizes, "--steps", 4, "--backend", "eager")
    facts = json.loads(invoke(*common, "--policy", "full", "--compare", "--out", tmp_path, "--json"))
    assert facts["relative_l2"] < SAME_RUN
    assert (facts["steps"], facts["calls_a_step"], facts["ideal_speedup"]) == (4, 2, 1.0)
    video = Image.open(facts["written"][0])
    assert (video.size, video.n_frames) == ((16, 16), 5)
    assert json.loads(invoke(*common, "-a", "every=2", "--out", tmp_path, "--json"))["ideal_speedup"] > 1.5


def test_an_image_of_a_class(images: Path, tmp_path: Path):
    facts = json.loads(
        invoke(
            *("accelerate", images, "--call", "class_labels=[1,2]", "--steps", 4, "--backend", "eager", "--compare"),
            *("--out", tmp_path, "--json", "-a", "every=2"),
        )
    )
    assert 0 < facts["relative_l2"] < 1
    assert [Path(path).name for path in facts["written"]] == ["accelerated-0.png", "accelerated-1.png"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nowhere",), "no pipeline at 'nowhere': expected a folder with a model_index.json, or a hub id"),
        (("{empty}",), "has no model_index.json; expected a folder that a pipeline's save_pretrained wrote"),
        (("{broken}",), "is no complete pipeline: "),
        (("{images}", "--call", "class_labels=[1]", "--policy", "nose"), "unknown policy 'nose'"),
        (("{images}", "--call", "output_type=latent"), "--call output_type=... is said by another option"),
        (("{images}", "--steps", "4", "--call", "num_inference_steps=8"), "--call num_inference_steps=... is said by another"),
        (("{images}", "--call", "nose=1"), "DiTPipeline cannot be called with nose, output_type: missing a required argument"),
        (("{images}",), "DiTPipeline cannot be called with output_type: missing a required argument: 'class_labels'"),
        (
            ("{images}", "--call", "class_labels=[1]", "--policy", "smoothcache"),
            "measures the model on sampling runs, which call=",
        ),
    ],
    ids=["nowhere", "empty", "broken", "policy", "reserved", "twice", "argument", "nothing to draw", "measures"],
)
def test_what_cannot_be_run_is_said(images: Path, tmp_path: Path, arguments, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "model_index.json").write_text('{"_class_name": "DiTPipeline", "transformer": ["diffusers", "X"]}')
    places = {"images": images, "empty": tmp_path / "empty", "broken": tmp_path / "broken"}
    said = error_of("accelerate", *(word.format(**places) for word in arguments), "--out", tmp_path)
    assert message in said
