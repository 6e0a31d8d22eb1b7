"""Language models alone: every command takes them as it takes multimodal models, and refuses media for them by name."""

from __future__ import annotations

import io
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file

import mmdora
from data_pipelines.encoding import IGNORED, Encoder
from data_pipelines.samples import Message, Sample, Text
from eval.benchmarks.commonsense import TASKS, official_prompt
from mmdora.apps.load_target import load_target
from mmdora.core.config import ModelConfig
from mmdora.core.errors import UserError
from mmdora.models.architectures import architecture_of
from mmdora.models.language_models import TextProcessor, is_language_model
from mmdora.models.loading import load_model, load_shape
from mmdora.training.packing import SUPPORTED_LANGUAGE_MODELS, check_packing
from tests.grid import deepspeed_file, run_in_two_processes
from tests.media import write_image
from tests.test_packing import check_equal
from tests.test_runs import command
from tests.tiny_language_models import FAMILIES, build
from tests.tiny_models import write_tokenizer

CHATML = (
    "{%- for m in messages -%}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)
ANSWERS = {"boolq": "true", "piqa": "solution1", "hellaswag": "ending2", "winogrande": "option1"}


def write_model(folder: Path, family: str = "llama", chat_template: str | None = None, **special: str) -> Path:
    """Write a tiny language model with a byte-level tokenizer; without a chat template by default."""
    folder.mkdir(parents=True, exist_ok=True)
    build(family).save_pretrained(folder)
    write_tokenizer(folder, chat_template, **special)
    return folder


def write_data(folder: Path) -> Path:
    """Write alpaca.json, and the official files of the commonsense tasks."""
    rows = [{"instruction": f"Is {i} even?", "input": "", "output": "the correct answer is true"} for i in range(16)]
    (folder / "alpaca.json").write_text(json.dumps(rows))
    for name, task in TASKS.items():
        (folder / task.folder).mkdir()
        answer = ANSWERS.get(name, "answer1")
        tests = [{"instruction": f"{name} {i}?", "input": "", "answer": answer} for i in range(2)]
        (folder / task.folder / "test.json").write_text(json.dumps(tests))
    return folder


def config(folder: Path, model: Path, *overrides: str) -> list[str]:
    """Write a run's YAML, and return the arguments of a command on it."""
    (folder / "run.yaml").write_text(
        f"""
model: {{path: {model}, dtype: float32}}
parts: {{language: {{method: dora, rank: 4, alpha: 8, targets: [q_proj, k_proj, v_proj, up_proj, down_proj]}}}}
data: {{train: [{{path: {folder}/alpaca.json}}]}}
training:
  {{output: {folder}/run, max_steps: 4, batch_size: 4, micro_batch_size: 2, save_every: 2, warmup_ratio: 0,
   learning_rate: 0.01}}
evaluation:
  - {{name: commonsense, benchmark: commonsense, data: {folder}, batch_size: 16, max_new_tokens: 4, before: true}}
"""
    )
    return [str(folder / "run.yaml"), *overrides]


def sample(*turns: str) -> Sample:
    roles = ("user", "assistant")
    return Sample("s", tuple(Message(roles[i % 2], (Text(turn),)) for i, turn in enumerate(turns)), "a test")


def rows(*lengths: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    samples = []
    for length in lengths:
        ids = torch.randint(2, 300, (1, length), generator=generator)
        labels = torch.where(torch.arange(length) < length // 2, IGNORED, ids)
        samples.append({"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)})
    return samples


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_the_same_parts(family):
    model = build(family)
    assert is_language_model(model.config)
    parts = architecture_of(model).resolve(model)
    assert set(parts) == {"language", "lm_head"}
    assert model.get_submodule(parts["language"].path) is model.base_model
    assert model.get_submodule(parts["lm_head"].path) is model.get_output_embeddings()
    report = mmdora.inject_adapters(model, {"language": {"method": "dora", "rank": 2}})
    layers = [path for path in report.parts[0].skipped if "experts" not in path]
    assert layers == []  # `all-linear` adapts every linear layer of the blocks
    table = model.get_input_embeddings()
    report = mmdora.inject_adapters(build(family), {"embeddings": {"method": "full"}})
    assert report.trainable == table.weight.numel()


@pytest.mark.parametrize("family", [family for family in FAMILIES if family in SUPPORTED_LANGUAGE_MODELS])
def test_packed_rows_equal_single_samples(family):
    model = build(family)
    check_packing(model.config)
    check_equal(model, rows(20, 33, 11, 27), 60, 1)


@pytest.mark.parametrize("family", ["bloom", "mpt", "opt"])
def test_packing_a_family_whose_positions_come_from_the_mask_is_an_error(family):
    with pytest.raises(UserError, match=rf"data\.packing: {family} has not been tested"):
        check_packing(build(family).config)


def test_a_model_type_that_is_both_is_an_image_text_to_text_model():
    assert is_language_model(hf.Gemma3TextConfig())
    assert not is_language_model(hf.Gemma3Config())
    assert not is_language_model(hf.LlavaConfig())


@pytest.mark.parametrize(
    ("model_config", "reason"),
    [
        (hf.BertConfig(num_hidden_layers=1), "is an encoder, whose tokens attend in both directions"),
        (hf.BartConfig(encoder_layers=1, decoder_layers=1), "is an encoder-decoder"),
        (hf.ViTConfig(num_hidden_layers=1), "a model of type 'vit' is neither"),
    ],
    ids=lambda value: getattr(value, "model_type", None),
)
def test_a_model_that_is_not_a_decoder_is_refused(model_config, reason, tmp_path):
    model_config.save_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    with pytest.raises(UserError, match=rf"model\.path: .*{reason}"):
        load_model(ModelConfig(path=str(tmp_path)))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_tokenizer_without_a_chat_template_gets_the_papers_prompt(family, tmp_path, caplog):
    """Training and the commonsense benchmarks give a question the same ids, up to the answer's first token."""
    processor = load_shape(ModelConfig(path=str(write_model(tmp_path, family))))[1]
    assert "has no chat template; prompts get the form of Alpaca (assets/alpaca.jinja)" in caplog.text
    encoder = Encoder(processor)
    encoded = encoder.encode(sample("Is 2 even?", "the correct answer is true"))
    prompt = encoder.encode_prompt(sample("Is 2 even?"))["input_ids"][0].tolist()
    ids, supervised = encoded["input_ids"][0].tolist(), (encoded["labels"][0] != IGNORED).tolist()
    assert ids[: supervised.index(True)] == prompt
    assert processor.tokenizer.decode(ids[len(prompt) :]) == "the correct answer is true</s>"
    assert encoder.encode_prompt(sample(official_prompt("Is 2 even?")))["input_ids"][0].tolist() == prompt
    assert encoder.render(sample("Is 2 even?")) == official_prompt("Is 2 even?").rstrip() + "\n"


def test_the_plain_prompt_has_turns_and_a_system_message(tmp_path):
    encoder = Encoder(load_shape(ModelConfig(path=str(write_model(tmp_path))))[1])
    turns = sample("One?", "First.", "Two?", "Second.").messages
    text = encoder.render(Sample("s", (Message("system", (Text("Be kind."),)), *turns), "t"))
    assert text.startswith("Be kind.\n\nBelow is an instruction")
    assert re.findall(r"Response:\n(.*?)</s>", text) == ["First.", "Second."]
    labels = encoder.encode(sample("One?", "First.", "Two?", "Second."))["labels"][0]
    assert encoder.processor.tokenizer.decode(labels[labels != IGNORED]) == "First.</s>Second.</s>"


def test_templates_get_strings_or_parts_as_they_need(tmp_path):
    """Most templates of language models concatenate the content; some iterate over its parts."""
    special = {"eos_token": "<|im_end|>"}
    processor = load_shape(ModelConfig(path=str(write_model(tmp_path, chat_template=CHATML, **special))))[1]
    expected = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n"
    assert Encoder(processor).render(sample("Hi", "Hello")) == expected
    processor.chat_template = CHATML.replace("m.content", "m.content[0].text")
    assert Encoder(processor).render(sample("Hi", "Hello")) == expected


def test_generation_markers_of_a_language_models_template_are_used(tmp_path):
    answer = "{%- generation -%}{{- m.content + '<|im_end|>' -}}{%- endgeneration -%}{{- '\n' -}}"
    marked = CHATML.replace(
        "{{- '<|im_start|>' + m.role",
        "{%- if m.role == 'assistant' -%}{{- '<|im_start|>assistant\n' -}}"
        + answer
        + "{%- else -%}{{- '<|im_start|>' + m.role",
    )
    marked = marked.replace("{%- endfor -%}", "{%- endif -%}{%- endfor -%}")
    special = {"eos_token": "<|im_end|>"}
    encoder = Encoder(load_shape(ModelConfig(path=str(write_model(tmp_path, chat_template=marked, **special))))[1])
    labels = encoder.encode(sample("Hi", "Hello", "And?", "Bye"))["labels"][0]
    assert encoder.processor.tokenizer.decode(labels[labels != IGNORED]) == "Hello<|im_end|>Bye<|im_end|>"


def test_a_tokenizer_without_an_end_token_is_an_error(tmp_path):
    write_model(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**settings, "eos_token": None}))
    with pytest.raises(UserError, match=r"model\.path: .*its tokenizer has no eos_token"):
        load_model(ModelConfig(path=str(tmp_path)))


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder with a model, data and a finished run of four steps."""
    folder = write_data(tmp_path_factory.mktemp("language"))
    write_model(folder / "model")
    assert command("train", *config(folder, folder / "model")) == 0
    return folder


def test_a_run_trains_and_is_scored_on_the_commonsense_tasks(trained):
    losses = [json.loads(line)["loss"] for line in (trained / "run" / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0] - 0.5
    for folder in ("eval/before/commonsense", "eval/commonsense"):
        report = json.loads((trained / "run" / folder / "report.json").read_text())
        assert report["n"] == 16
        assert report["receipt"]["prompt"] == official_prompt("boolq 0?").rstrip() + "\n"
    names = {path.name for path in (trained / "run" / "processor").iterdir()}
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} <= names


def test_resume_is_bit_exact(trained, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained / "run", run)
    for name in ("adapter", "checkpoints/checkpoint-4"):
        shutil.rmtree(run / name)
    arguments = config(trained, trained / "model", f"training.output={run}")
    assert command("train", *arguments, "--resume") == 0
    first, again = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (trained / "run", run))
    assert all(torch.equal(first[key], again[key]) for key in first)


def test_eval_chat_and_merge_of_a_run(trained, tmp_path, capsys, monkeypatch):
    out = tmp_path / "merged"
    assert command("merge", str(trained / "run"), str(out)) == 0
    printed = capsys.readouterr().out
    assert f"{out} loads with AutoModelForCausalLM and AutoTokenizer, without mmdora" in printed.replace("\n", "")
    assert float(printed.split("difference")[1].split()[0]) < 1e-4
    card = (out / "README.md").read_text()
    assert "pipeline_tag: text-generation" in card
    assert 'tokenizer = AutoTokenizer.from_pretrained("merged")' in card
    assert type(hf.AutoModelForCausalLM.from_pretrained(out)) is hf.LlamaForCausalLM
    text = hf.AutoTokenizer.from_pretrained(out).apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False
    )
    assert "### Instruction:" in text

    scores = []
    for target in (trained / "run", out):  # with the benchmark's own 32 tokens
        results = tmp_path / f"of-{target.name}"
        arguments = ("--benchmark", "commonsense", "--data", str(trained), "--limit", "4", "--out", str(results))
        assert command("eval", str(target), *arguments) == 0
        scores.append((results / "commonsense" / "responses.jsonl").read_text().splitlines())
    responses = [{(row := json.loads(line))["id"]: row["response"] for line in lines} for lines in scores]
    assert responses[0] == responses[1]

    monkeypatch.setattr("sys.stdin", io.StringIO("Is 3 even?\nAnd 4?\n"))
    capsys.readouterr()
    assert command("chat", str(trained / "run"), "--max-new-tokens", "3") == 0
    assert capsys.readouterr().out.strip()


def test_doctor_and_plan(trained, tmp_path, capsys):
    arguments = config(trained, trained / "model", f"training.output={tmp_path}/run")
    assert command("doctor", *arguments) == 0
    assert "### Instruction:" in capsys.readouterr().out
    assert command("plan", *arguments, "--gpus", "2", "--gpu-memory", "1") == 0
    assert "Fits: training.deepspeed=zero2" in capsys.readouterr().out
    missing = ("data.train.0.path=missing.json", "data.max_length=512", "evaluation=[]")
    assert command("plan", *arguments, *missing, "--gpus", "1", "--gpu-memory", "1") == 0


def test_packing_and_new_tokens(trained, tmp_path):
    arguments = config(trained, trained / "model", f"training.output={tmp_path}/run", "evaluation=[]")
    settings = ("data.packing=true", "data.max_length=400", "model.new_tokens=[<yes>, <no>]")
    assert command("train", *arguments, *settings) == 0
    tensors = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert len([key for key in tensors if "token_adapter" in key]) == 2
    out = tmp_path / "merged"
    assert command("merge", str(tmp_path / "run"), str(out)) == 0
    assert hf.AutoTokenizer.from_pretrained(out).convert_tokens_to_ids(["<yes>", "<no>"]) == [281, 282]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="DeepSpeed is installed on Linux only")
@pytest.mark.parametrize("stage", [None, 2, 3])
def test_two_processes_train_like_one(stage, trained, tmp_path):
    engine = [f"training.deepspeed={deepspeed_file(tmp_path, 'engine', stage)}"] if stage else []
    arguments = config(trained, trained / "model", f"training.output={tmp_path}/run", "evaluation=[]", *engine)
    run_in_two_processes(arguments, tmp_path / "run")
    losses = [
        [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
        for run in (trained / "run", tmp_path / "run")
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    tensors = [load_file(run / "adapter" / "adapter_model.safetensors") for run in (trained / "run", tmp_path / "run")]
    for key, expected in tensors[0].items():
        assert (tensors[1][key] - expected).norm() <= 1e-2 * expected.norm() + 1e-6


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_a_quantized_language_model(bits, trained, tmp_path):
    bnb = pytest.importorskip("bitsandbytes")
    arguments = config(trained, trained / "model", f"training.output={tmp_path}/run", "evaluation=[]")
    assert command("train", *arguments, f"model.quantization={bits}", "training.max_steps=2") == 0
    model = load_target(str(tmp_path / "run")).model
    kind = bnb.nn.Linear4bit if bits == "4bit" else bnb.nn.Linear8bitLt
    assert sum(isinstance(module, kind) for module in model.modules()) == 14
    assert type(model.lm_head) is torch.nn.Linear


def test_every_part_trains(trained, tmp_path):
    parts = "parts={language: {method: dora, rank: 2}, lm_head: {method: lora, rank: 2}, embeddings: {method: full}}"
    arguments = config(trained, trained / "model", f"training.output={tmp_path}/run", "evaluation=[]", parts)
    assert command("train", *arguments, "training.learning_rate=0.1") == 0
    tensors = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.lora_B.weight"):
        assert f"base_model.model.{name}" in tensors
    assert tensors["base_model.model.lm_head.lora_B.weight"].abs().max() > 0


def test_media_is_refused_by_name(trained, tmp_path, capsys):
    image = write_image(tmp_path / "red.png")
    turns = [{"from": "human", "value": "What is 1?"}, {"from": "gpt", "value": "a dog"}]
    shown = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "a dog"}]
    data = [{"id": "a", "conversations": turns}] * 3 + [{"id": "seen", "image": "red.png", "conversations": shown}]
    (tmp_path / "mixed.json").write_text(json.dumps(data))
    arguments = config(trained, trained / "model", f"training.output={tmp_path}/run")
    message = f"sample 'seen' of {tmp_path}/mixed.json has an image ({image}), and the model is a language model alone"
    with_media = f"data.train=[{tmp_path}/mixed.json]"
    assert command("train", *arguments, with_media) == 2
    assert f"data.train.0: {message}" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert command("doctor", *arguments, with_media) == 1
    assert "is a language model alone" in capsys.readouterr().out.replace("\n", " ").replace("  ", " ")
    asked = f"evaluation=[{{name: seen, benchmark: vqa, data: {tmp_path}/mixed.json}}]"
    assert command("train", *arguments, asked) == 2
    assert f"evaluation.0: {message}" in capsys.readouterr().err
    benchmark = ("--benchmark", "vqa", "--data", f"{tmp_path}/mixed.json", "--out", f"{tmp_path}/out")
    assert command("eval", str(trained / "model"), *benchmark) == 2
    assert message in capsys.readouterr().err
    assert command("chat", str(trained / "run"), "--image", str(image)) == 2
    assert "is a language model alone; leave --image and --video out" in capsys.readouterr().err


def test_a_language_model_has_no_vision_encoder(trained, tmp_path, capsys):
    arguments = config(trained, trained / "model", f"training.output={tmp_path}/run")
    assert command("train", *arguments, "parts={vision: {method: dora}}") == 2
    assert "parts.vision: LlamaForCausalLM has no such part" in capsys.readouterr().err


def test_a_saved_processor_is_the_tokenizer(tmp_path):
    processor = load_shape(ModelConfig(path=str(write_model(tmp_path / "model"))))[1]
    assert isinstance(processor, TextProcessor)
    processor.save_pretrained(tmp_path / "saved")
    again = TextProcessor.from_pretrained(str(tmp_path / "saved"))
    assert again.chat_template == processor.chat_template
    assert again.tokenizer.get_vocab() == processor.tokenizer.get_vocab()
