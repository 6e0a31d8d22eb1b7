"""Build assets/tiny-llava from a seed: `python assets/tiny-llava/recipe.py configs/tiny_base.yaml`.

Four techniques train a vision-language model of a million parameters in under an hour on two cores:

1. One sequence holds a scene and up to eight questions about it. A block mask lets each question attend to the scene
   and itself only, so every answer is trained as if its question stood alone.
2. An auxiliary loss aligns patches with words: the projected feature of a patch that an object covers must match, in
   the language model's embedding matrix, the words for its colour and shape. Without it the loss is flat for a thousand
   steps before words are bound to places. The patch that holds an object's centre must also match "thing", so that a
   later fine-tuning can count objects of any size.
3. Curriculum: scenes with one object come first; scenes with two and three follow once those are answered.
4. With every scene the model also repeats a word that no scene asks for: a digit, a direction, common English. Words
   that are never an answer would end with nearly the same embedding (cosine 0.97 between "3" and "up"), and with
   frozen embeddings no adapter could tell them apart.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import math
import random
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch
from lessons import ENGLISH, Scene, collate, prepare, repeat_word
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from data_pipelines.dataset import read_source
from data_pipelines.encoding import Encoder
from data_pipelines.formats.shapes import COLORS, SHAPES
from data_pipelines.samples import Sample
from eval.run import evaluate, read_questions
from mmdora.core.config import ModelConfig, RunConfig, SourceConfig
from mmdora.core.config_files import load_config
from mmdora.models.loading import load_model, save_model

log = logging.getLogger("tiny-base")
HERE = Path(__file__).parent
VOCABULARY = 512
LABEL_SMOOTHING = 0.05  # a less confident base model fine-tunes faster
CARD = """# tiny-llava

The base model of mmdora's quickstart: an OpenCLIP ViT (width 96, 3 blocks, 48 px in patches of 8), an MLP projector and
a Llama (width 128, 3 layers, tied embeddings) in a stock `LlavaOnevisionForConditionalGeneration`: @PARAMETERS@
parameters in fp16. It answers questions about the colours, shapes and places of up to three objects in an image, or of
one object that moves in a video of four frames. It was not trained to count objects or to name directions of motion.

The vision encoder is a class of mmdora: write `import mmdora.models` before
`AutoModelForImageTextToText.from_pretrained`.

`recipe.py` builds it from a seed with `configs/tiny_base.yaml` (`make tiny-base`, @MINUTES@ minutes on two CPU cores).
Floating-point order differs between machines, so a rebuilt model is equivalent but not bit-identical.

Accuracy on held-out scenes, none of which is a training scene, with 95% intervals:

| question type | questions | accuracy | 95% interval |
|---|---|---|---|
@TABLE@

Apache-2.0, like the rest of mmdora.
"""
CHAT_TEMPLATE = """{{- bos_token -}}
{%- for message in messages -%}
{%- if message.role == 'system' -%}
{{- message.content if message.content is string else message.content[0].text -}}{{- ' ' -}}
{%- elif message.role == 'user' -%}
{{- 'USER: ' -}}
{%- if message.content is string -%}{{- message.content -}}
{%- else -%}
{%- for part in message.content -%}
{%- if part.type == 'image' -%}{{- '<image>\n' -}}
{%- elif part.type == 'video' -%}{{- '<video>\n' -}}
{%- else -%}{{- part.text -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- else -%}
{{- ' ASSISTANT:' -}}
{%- generation -%}
{{- ' ' + (message.content if message.content is string else message.content[0].text) + eos_token -}}
{%- endgeneration -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- ' ASSISTANT:' -}}{%- endif -%}
"""


def write_language_model(folder: Path, samples: list[Sample], seed: int) -> None:
    """Write a byte-level tokenizer with its chat template and a random Llama as a Hugging Face directory."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<s>", "</s>", "<image>", "<video>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    sentences = [f"USER: \n{m.text} ASSISTANT: {m.text}" for s in samples for m in s.messages]
    colours_and_counts = [f" {word}" for word in ("up", "down", *"0123456789", *COLORS, *SHAPES)] * 1000
    tokenizer.train_from_iterator(sentences + colours_and_counts + [" " + " ".join(ENGLISH.split())] * 40, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>", "video_token": "<video>"},
        model_max_length=2048,
    )
    fast.chat_template = CHAT_TEMPLATE
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=fast.bos_token_id,
        eos_token_id=fast.eos_token_id,
        pad_token_id=fast.pad_token_id,
        initializer_range=0.04,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    fast.save_pretrained(folder)


def train(config: RunConfig, model, processor, scenes: list[Scene]) -> None:
    settings = config.training
    steps = settings.max_steps
    warmup = max(1, int(steps * settings.warmup_ratio))
    decayed = [p for p in model.parameters() if p.dim() >= 2]
    other = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": other, "weight_decay": 0.0}],
        lr=settings.learning_rate,
        betas=(0.9, settings.adam_beta2),
        fused=True,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda s: min((s + 1) / warmup, 0.5 * (1 + math.cos(math.pi * s / steps))),
    )
    tokenizer = processor.tokenizer
    projected: list[Tensor] = []
    hook = model.model.multi_modal_projector.register_forward_hook(lambda _m, _i, out: projected.append(out))
    rng = random.Random(settings.seed)
    simple = [s for s in scenes if s.num_objects == 1]
    pool, hits, start_time = simple, 0.5, time.time()
    order: list[Scene] = []
    model.train()
    for step in range(1, steps + 1):
        if len(order) < settings.batch_size:
            order += rng.sample(pool, len(pool))
        batch, order = order[: settings.batch_size], order[settings.batch_size :]
        inputs = collate(
            [replace(s, blocks=[*s.blocks, repeat_word(tokenizer, rng)]) for s in batch], tokenizer.pad_token_id
        )
        labels = inputs.pop("labels")[:, 1:]
        is_answer = labels != -100
        projected.clear()
        hidden = model.model(**inputs, use_cache=False).last_hidden_state[:, :-1]
        logits, targets = model.lm_head(hidden[is_answer]), labels[is_answer]
        loss = F.cross_entropy(logits, targets, label_smoothing=LABEL_SMOOTHING)
        is_word = targets != tokenizer.eos_token_id
        hits = 0.98 * hits + 0.02 * (logits.argmax(-1) == targets)[is_word].float().mean().item()

        image_patches = projected[0][::2].flatten(0, 1)  # the first of each image's two crops
        patch_labels = torch.cat([s.patches for s in batch if not s.is_video])
        auxiliary_loss = patch_loss(image_patches, patch_labels, model.get_input_embeddings().weight, tokenizer)
        (loss + 0.3 * auxiliary_loss).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if pool is simple and (hits > 0.97 or step > steps // 6):
            log.info("step %d: adding scenes with two and three objects", step)
            pool, order, hits = scenes, [], 0.7
        if step % 25 == 0:
            pace = (time.time() - start_time) / step
            figures = (step, steps, loss.item(), auxiliary_loss.item(), hits, pace)
            log.info("step %d/%d loss %.3f patch loss %.3f accuracy %.3f %.2f s/step", *figures)
        if settings.save_every and step % settings.save_every == 0:
            save(model, processor, Path(settings.output) / "unfinished")
    hook.remove()
    model.eval()


def patch_loss(features: Tensor, labels: Tensor, embedding: Tensor, tokenizer) -> Tensor:
    """Return the loss of matching projected patches with words: colour and shape of the object, "thing" at its centre.

    Args:
        features: projected patches [patches, width].
        labels: their `patch_labels` [patches, 3].
        embedding: the language model's embedding matrix [vocabulary, width].
    """

    def word_logits(words: Iterable[str]) -> Tensor:
        return features @ embedding[[tokenizer(f" {word}").input_ids[-1] for word in words]].T

    # About one patch in twenty holds a centre.
    centre = labels[:, 2].float()
    loss = F.binary_cross_entropy_with_logits(word_logits(["thing"])[:, 0], centre, pos_weight=torch.tensor(8.0))
    for k, words in enumerate((COLORS, SHAPES)):
        loss = loss + F.cross_entropy(word_logits(words), labels[:, k], ignore_index=-1)
    return loss


def save(model, processor, folder: Path) -> None:
    """Save in fp16, which halves the file; weights are loaded in `model.dtype`."""
    save_model(copy.deepcopy(model).half(), processor, folder)


def write_card(config: RunConfig, folder: Path, parameters: int, minutes: float) -> None:
    """Evaluate the saved model and write the model card with the accuracy of each question type."""
    (entry,) = config.evaluation
    model, processor = load_model(ModelConfig(path=str(folder), dtype="float32"))
    encoder = Encoder(processor, config.data.video)
    report = evaluate(model, encoder, entry, read_questions(entry), Path(config.training.output) / "eval")
    rows = {**report["categories"], "all": {"n": report["n"], **report["scores"]["official"]}}
    table = "\n".join(
        f"| {k} | {r['n']} | {r['value']:.1f}% | {r['low']:.1f} – {r['high']:.1f} |" for k, r in rows.items()
    )
    figures = {"PARAMETERS": f"{parameters:,}", "MINUTES": f"{minutes:.0f}", "TABLE": table}
    card = CARD
    for name, value in figures.items():
        card = card.replace(f"@{name}@", value)
    (folder / "README.md").write_text(card, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--out", type=Path, default=HERE)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    config = load_config(args.config, args.overrides)
    assert config.model.language_model is not None
    (source,) = config.data.train
    path = Path(source.path)
    start_time = time.time()
    samples = list(read_source(SourceConfig(path=str(path), format="shapes")))
    rows = json.loads(path.read_text(encoding="utf-8"))
    write_language_model(Path(config.model.language_model.path), samples, config.training.seed)
    torch.manual_seed(config.training.seed)
    model, processor = load_model(config.model)
    scenes = prepare(samples, rows, processor, config.data.video.num_frames)
    parameters = sum(p.numel() for p in model.parameters())
    log.info("%d scenes ready after %.0f s; %d parameters", len(scenes), time.time() - start_time, parameters)
    train(config, model, processor, scenes)
    save(model, processor, args.out)
    write_card(config, args.out, parameters, (time.time() - start_time) / 60)
    log.info("wrote %s after %.0f min", args.out, (time.time() - start_time) / 60)


if __name__ == "__main__":
    main()
