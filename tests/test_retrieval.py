"""Retrieval by features: equal to plain transformers and open_clip, resumed, and scored from files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as hf
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as PILImage
from tokenizers.processors import TemplateProcessing

import mmdora
from data_pipelines.samples import Message, Sample, Text
from data_pipelines.video import load_video
from eval.benchmarks import BENCHMARKS, Question
from eval.dual_encoders import load_dual_encoder
from eval.features import FRAMES
from eval.retrieval import rank_figures, sentence_ranks, tied_ranks
from eval.run import read_questions
from mmdora.apps.evaluate import run as evaluate
from mmdora.apps.evaluation_request import Request
from mmdora.cli.score import score
from mmdora.core.config import EvaluationConfig
from mmdora.core.errors import UserError
from tests.media import write_video
from tests.tiny_parts import tokenizer

SENTENCES = ["a person, who sings", "two dogs run", 'a man says "hello"', "a red car"]
TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    """A tiny CLIP as transformers saves it."""
    folder, words = tmp_path_factory.mktemp("clip"), tokenizer()
    ends = (words.eos_token, words.eos_token_id)  # CLIP reads the text's feature at this token
    words.backend_tokenizer.post_processor = TemplateProcessing(single=f"$A {ends[0]}", special_tokens=[ends])
    torch.manual_seed(0)
    text = TOWER | {"vocab_size": len(words), "max_position_embeddings": 16, "eos_token_id": words.eos_token_id}
    config = hf.CLIPConfig(
        text_config=text, vision_config=TOWER | {"image_size": 16, "patch_size": 4}, projection_dim=24
    )
    hf.CLIPModel(config).save_pretrained(folder)
    size = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    hf.CLIPProcessor(hf.CLIPImageProcessor(**size), words).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def open_clip(tmp_path_factory) -> Path:
    """A tiny OpenCLIP as open_clip saves it."""
    from open_clip.model import CLIP
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("open_clip")
    torch.manual_seed(0)
    vision = {"image_size": 16, "layers": 2, "width": 32, "head_width": 8, "patch_size": 4}
    text = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    config = {"embed_dim": 24, "vision_cfg": vision, "text_cfg": text}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    save_file(CLIP(**config).state_dict(), folder / "open_clip_model.safetensors")
    return folder


@pytest.fixture
def data(tmp_path) -> Path:
    """MSR-VTT 1k-A with four videos."""
    folder = tmp_path / "msrvtt"
    (folder / "MSRVTT_Videos").mkdir(parents=True)
    lines = ["key,vid_key,video_id,sentence"]
    for i, sentence in enumerate(SENTENCES):
        name = f"video{9770 + i}"
        write_video(folder / "MSRVTT_Videos" / f"{name}.mp4", frames=6 + 3 * i, size=(64, 32 + 16 * i), rate=3)
        quoted = '"' + sentence.replace('"', '""') + '"' if set(sentence) & set(',"') else sentence
        lines.append(f"ret{i},msr{9770 + i},{name},{quoted}")
    (folder / "MSRVTT_JSFUSION_test.csv").write_text("\n".join(lines) + "\n")
    return folder


def run(model: Path | str, data: Path, out: Path, **options) -> dict:
    evaluate(Request(str(model), benchmark="msrvtt_retrieval", data=str(data), out=out, **options), False)
    return json.loads((out / "msrvtt_retrieval" / "report.json").read_text())


def by_hand(model: hf.CLIPModel, processor, data: Path) -> np.ndarray:
    """Return the cosines of every sentence with every video's mean frame."""
    with torch.no_grad():
        tokens = processor.tokenizer(SENTENCES, padding=True, truncation=True, max_length=16, return_tensors="pt")
        tokens.pop("token_type_ids", None)
        texts = model.text_projection(model.text_model(**tokens).pooler_output)
        videos = []
        for path in sorted((data / "MSRVTT_Videos").iterdir()):
            images = [PILImage.fromarray(frame) for frame in load_video(path, FRAMES).frames]
            pixels = processor.image_processor(images=images, return_tensors="pt")["pixel_values"]
            frames = model.visual_projection(model.vision_model(pixels).pooler_output)
            videos.append((frames / frames.norm(dim=-1, keepdim=True)).mean(0))
    texts, pooled = texts / texts.norm(dim=-1, keepdim=True), torch.stack(videos)
    return (texts @ (pooled / pooled.norm(dim=-1, keepdim=True)).T).numpy()


def test_clip_is_evaluated_from_files_to_report(clip, data, tmp_path, capsys):
    report = run(clip, data, tmp_path / "out")
    folder = tmp_path / "out" / "msrvtt_retrieval"
    expected = by_hand(hf.CLIPModel.from_pretrained(clip), hf.CLIPProcessor.from_pretrained(clip), data)
    found = np.load(folder / "similarity.npy")
    assert found == pytest.approx(expected, abs=1e-5)
    assert len(np.unique(found)) == 16  # all sentences and videos have different features
    ranks = tied_ranks(found)
    assert report["scores"]["official"]["value"] == rank_figures([rank for row in ranks for rank in row])["R1"]
    assert report["n"] == 4
    assert report["scores"]["strict"] is report["unparsed_rate"] is None
    assert set(report["metrics"]) == {
        f"{way}_{name}"
        for way in ("text_to_video", "video_to_text")
        for name in ("R1", "R5", "R10", "MedianR", "MeanR")
    }
    assert report["receipt"]["frames"].startswith("1 per second, at most 12")
    capsys.readouterr()
    for name in ("similarity.npy", "similarity.json"):
        if name.endswith("json"):
            (folder / name).write_text(json.dumps(found.tolist()))
        table = data / "MSRVTT_JSFUSION_test.csv"
        score("msrvtt_retrieval", folder / name, str(table), None, True, None, False)
        assert json.loads(capsys.readouterr().out)["scores"] == report["scores"]


def test_features_are_reused_until_the_model_or_media_change(clip, data, tmp_path):
    out = tmp_path / "out"
    run(clip, data, out)
    kept = out / "msrvtt_retrieval" / "features"
    before = {path.name: path.stat().st_mtime_ns for path in kept.iterdir()}
    assert len(before) == 8  # four sentences and four videos
    run(clip, data, out)  # finished: returned unchanged
    with pytest.raises(UserError, match="holds a finished result with other limit"):
        run(clip, data, out, limit=3)
    (kept / min(before)).unlink()
    assert run(clip, data, out, limit=3, overwrite=True)["n"] == 3
    run(clip, data, out, overwrite=True)
    after = {path.name: path.stat().st_mtime_ns for path in kept.iterdir()}
    assert [name for name in after if after[name] != before.get(name)] == [min(before)]
    write_video(data / "MSRVTT_Videos" / "video9770.mp4", frames=9, size=(48, 48))
    run(clip, data, out, overwrite=True)
    assert len(list(kept.iterdir())) == 9  # only the changed video is embedded again


def test_an_adapter_on_clip_is_scored(clip, data, tmp_path):
    model = hf.CLIPModel.from_pretrained(clip)
    mmdora.inject_adapters(model, {"": {"method": "dora", "rank": 2, "targets": ["q_proj", "v_proj"]}})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    mmdora.save_adapter(model, tmp_path / "adapter")
    run(tmp_path / "adapter", data, tmp_path / "out")
    found = np.load(tmp_path / "out" / "msrvtt_retrieval" / "similarity.npy")
    assert found == pytest.approx(by_hand(model, hf.CLIPProcessor.from_pretrained(clip), data), abs=1e-5)
    run(clip, data, tmp_path / "base")
    assert np.abs(found - np.load(tmp_path / "base" / "msrvtt_retrieval" / "similarity.npy")).max() > 1e-3


def test_an_open_clip_model_is_scored(open_clip, data, tmp_path):
    from open_clip import add_model_config, create_model_from_pretrained, get_tokenizer

    run(open_clip, data, tmp_path / "out")
    found = np.load(tmp_path / "out" / "msrvtt_retrieval" / "similarity.npy")
    model, preprocess = create_model_from_pretrained(f"local-dir:{open_clip}")
    frames = load_video(data / "MSRVTT_Videos" / "video9771.mp4", FRAMES).frames
    with torch.no_grad():
        text = model.encode_text(get_tokenizer(f"local-dir:{open_clip}")(SENTENCES[:1]), normalize=True)
        pixels = torch.stack([preprocess(PILImage.fromarray(frame)) for frame in frames])
        mean = model.encode_image(pixels, normalize=True).mean(0)
    assert found[0, 1] == pytest.approx(float(text[0] @ mean / mean.norm()), abs=1e-5)

    described = json.loads((open_clip / "open_clip_config.json").read_text())["model_cfg"]
    (tmp_path / "of-my-own.json").write_text(json.dumps(described))
    add_model_config(tmp_path / "of-my-own.json")
    run(f"open_clip:of-my-own/{open_clip / 'open_clip_model.safetensors'}", data, tmp_path / "named")
    assert np.load(tmp_path / "named" / "msrvtt_retrieval" / "similarity.npy") == pytest.approx(found, abs=1e-5)


def test_models_and_questions_that_cannot_be_compared_are_refused(data, tmp_path):
    with pytest.raises(UserError, match="has no text and image features to compare"):
        load_dual_encoder("assets/tiny-llava")
    with pytest.raises(UserError, match="cannot load 'open_clip:ViT-B-32/nothing'"):
        load_dual_encoder("open_clip:ViT-B-32/nothing")
    config = EvaluationConfig(name="m", benchmark="msrvtt_retrieval", data=str(data), prompt="a video: {question}")
    with pytest.raises(UserError, match="compares embeddings and needs no generated text"):
        read_questions(config)  # as in a run, whose model generates text
    questions = read_questions(config, by_features=True)
    assert [q.sample.messages[0].text for q in questions] == [f"a video: {sentence}" for sentence in SENTENCES]
    (data / "MSRVTT_Videos" / "video9772.mp4").unlink()
    with pytest.raises(UserError, match=r"1 of 4 media files are missing, such as .*video9772\.mp4"):
        read_questions(config, by_features=True)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([[1, 2], [3, 4]], r"expected 4 sentences x 4 videos, found the shape \(2, 2\)"),
        ([["a"] * 4] * 4, "expected a list of lists of numbers"),
        (np.full((4, 4), np.nan), "16 similarities are not finite numbers"),
    ],
)
def test_invalid_similarities_are_named(values, message, data, tmp_path):
    path = tmp_path / ("s.npy" if isinstance(values, np.ndarray) else "s.json")
    if isinstance(values, np.ndarray):
        np.save(path, values)
    else:
        path.write_text(json.dumps(values))
    with pytest.raises(UserError, match=message):
        score("msrvtt_retrieval", path, str(data), None, True, None, False)


@given(st.text() | st.recursive(st.integers() | st.text(), st.lists).map(lambda x: json.dumps({"text_to_video": x})))
def test_no_answer_breaks_the_scorer(answer):
    question = Question("q", Sample("q", (Message("user", (Text("?"),)),), "t"), ("q",), "q")
    assert 0 <= BENCHMARKS["msrvtt_retrieval"]().score(answer, question).official <= 1


@given(st.lists(st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=4, max_size=4), min_size=4, max_size=4))
def test_tied_sentences_are_ordered_as_torch_sorts_them(rows):
    similarity = np.asarray(rows).reshape(4, 1, 4)
    order = torch.argsort(torch.tensor(similarity).permute(1, 0, 2), dim=-1, descending=True)
    places = torch.argsort(order, dim=-1)
    assert sentence_ranks(similarity).tolist() == torch.diagonal(places, dim1=1, dim2=2).flatten().tolist()
