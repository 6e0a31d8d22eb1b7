"""Batches: every sample once per epoch, in the same order for any number of workers and after resuming."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import Dataset

import mmdora
from data_pipelines.collator import Collator, first_fit
from data_pipelines.encoding import Encoded, Encoder
from data_pipelines.samples import Sample
from mmdora.core.config import ModelConfig
from mmdora.core.config_files import load_config
from mmdora.core.errors import UserError
from mmdora.models.loading import load_model
from mmdora.training.arguments import training_arguments
from mmdora.training.batches import (
    BatchSpec,
    MicroBatches,
    check_budgets,
    num_tokens,
    split_evenly,
    split_greedily,
    split_step,
    step_samples,
)
from mmdora.training.trainer import AdapterTrainer
from tests.test_encoding import assistant, user


@st.composite
def batch_specs(draw) -> BatchSpec:
    world_size, micro, accumulation = draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.integers(1, 3))
    samples = draw(st.integers(1, 80))
    lengths = np.array(draw(st.lists(st.integers(1, 500), min_size=samples, max_size=samples)))
    kinds = np.array(draw(st.lists(st.integers(0, 3), min_size=samples, max_size=samples)), np.uint8)
    return BatchSpec(
        samples,
        world_size * micro * accumulation,
        micro,
        world_size,
        seed=draw(st.integers(0, 9)),
        group_by=draw(st.sampled_from([None, "length", "modality"])),
        max_tokens=draw(st.sampled_from([None, 500 * micro * 4])),
        packed=draw(st.booleans()),
        lengths=lengths,
        kinds=kinds,
    )


def batches_by_rank(spec: BatchSpec, epoch: int = 0) -> list[list[list[int]]]:
    by_rank = []
    for rank in range(spec.world_size):
        sampler = MicroBatches(spec, rank)
        sampler.set_epoch(epoch)
        by_rank.append(list(sampler))
        assert len(sampler) == len(by_rank[-1])
    return by_rank


@settings(max_examples=150, deadline=None, derandomize=True)
@given(batch_specs(), st.integers(0, 3))
def test_every_sample_comes_once_and_ranks_have_equally_many_micro_batches(spec, epoch):
    by_rank = batches_by_rank(spec, epoch)
    assert len({len(batches) for batches in by_rank}) == 1
    indices = sorted(index for batches in by_rank for batch in batches for index in batch)
    last = (spec.samples - 1) % spec.batch_size + 1
    repeated = max(0, spec.num_micro_batches(last) - last)
    assert repeated < spec.world_size
    assert set(indices) == set(range(spec.samples))
    assert len(indices) == spec.samples + repeated
    assert all(batch for batches in by_rank for batch in batches)
    if spec.max_tokens is None:
        assert all(len(batch) <= spec.micro_batch_size for batches in by_rank for batch in batches)
    assert by_rank == batches_by_rank(spec, epoch)
    # A full step takes the samples of the plain order, however they are grouped.
    plain_spec = BatchSpec(spec.samples, spec.batch_size, 1, 1, spec.seed)
    plain = [set(step.tolist()) for step in step_samples(plain_spec, epoch)]
    per_rank = spec.num_micro_batches(spec.batch_size) // spec.world_size
    for place in range(spec.samples // spec.batch_size):
        step = [b for batches in by_rank for b in batches[place * per_rank : (place + 1) * per_rank]]
        assert {index for batch in step for index in batch} == plain[place]


def test_the_order_depends_on_seed_and_epoch():
    first = batches_by_rank(BatchSpec(50, 10, 5))[0]
    assert first != batches_by_rank(BatchSpec(50, 10, 5), epoch=1)[0]
    assert first != batches_by_rank(BatchSpec(50, 10, 5, seed=1))[0]
    order = torch.randperm(50, generator=torch.Generator().manual_seed(0)).tolist()
    assert [i for batch in first for i in batch] == order


def padding(spec: BatchSpec) -> int:
    assert spec.lengths is not None
    lengths = spec.lengths
    return sum(num_tokens(lengths[b].tolist(), False) - int(lengths[b].sum()) for b in batches_by_rank(spec)[0])


def test_grouping_by_length_saves_padding_and_by_modality_keeps_kinds_apart():
    rng = np.random.default_rng(0)
    estimates = {"lengths": rng.integers(1, 1000, 640), "kinds": rng.integers(0, 4, 640).astype(np.uint8)}
    plain, length, modality = (BatchSpec(640, 64, 8, group_by=g, **estimates) for g in (None, "length", "modality"))
    assert padding(length) < 0.3 * padding(plain)
    mixed = [sum(len(set(estimates["kinds"][b])) > 1 for b in batches_by_rank(x)[0]) for x in (plain, length, modality)]
    assert mixed[2] <= 3 * 10 < mixed[0]  # at most one per change of kind within a step
    assert padding(length) < padding(modality) < padding(plain)


def test_a_token_budget_holds_in_every_micro_batch():
    rng = np.random.default_rng(0)
    estimates = {"lengths": rng.integers(1, 400, 330), "kinds": np.zeros(330, np.uint8)}
    for packed, group_by in ((False, "length"), (True, None), (False, None)):
        settings = {"group_by": group_by, "max_tokens": 3200, "packed": packed, **estimates}
        batches = batches_by_rank(BatchSpec(330, 32, 8 if group_by or packed else 4, 1, **settings))[0]
        assert all(num_tokens(estimates["lengths"][b].tolist(), packed) <= 3200 for b in batches)
        assert len({len(batch) for batch in batches}) > 1
        assert sorted(i for b in batches for i in b) == list(range(330))


def test_a_token_budget_that_is_too_small_is_an_error_before_the_first_step():
    lengths = np.full(64, 100)
    settings = {"lengths": lengths, "kinds": np.zeros(64, np.uint8)}
    with pytest.raises(
        UserError, match=r"max_tokens 300: the 32 samples of a step need 11 .* a step has 4; raise max_tokens"
    ):
        check_budgets(BatchSpec(64, 32, 8, max_tokens=300, **settings), 1)
    with pytest.raises(UserError, match=r"max_tokens 90: a single sample has about 100 .*data.max_length"):
        check_budgets(BatchSpec(64, 32, 8, max_tokens=90, **settings), 1)
    # The two long samples meet only in the second epoch; the error still comes first.
    lengths = np.ones(8, np.int64)
    order = [s.tolist() for s in step_samples(BatchSpec(8, 4, 4), 1)]
    apart = [s.tolist() for s in step_samples(BatchSpec(8, 4, 4), 0)]
    pair = next([a, b] for a in order[0] for b in order[0] if a in apart[0] and b in apart[1])
    lengths[pair] = 50
    unlucky = BatchSpec(8, 4, 4, max_tokens=60, packed=True, lengths=lengths, kinds=np.zeros(8, np.uint8))
    check_budgets(unlucky, epochs=1)
    with pytest.raises(UserError, match="max_tokens 60"):
        check_budgets(unlucky, epochs=2)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=12), st.integers(1, 5), st.booleans())
def test_splitting_evenly_minimizes_the_largest_micro_batch(lengths, count, packed):
    count = min(count, len(lengths))
    starts = split_evenly(lengths, count, packed)
    assert len(starts) == count
    assert starts == sorted(set(starts))
    spans = zip(starts, [*starts[1:], len(lengths)], strict=True)
    largest = max(num_tokens(lengths[low:high], packed) for low, high in spans)
    smaller = split_greedily(lengths, largest - 1, packed)
    assert smaller is None or len(smaller) > count


@given(st.lists(st.integers(1, 60), min_size=1, max_size=30))
def test_first_fit_keeps_every_sample_and_the_row_length(lengths):
    rows = first_fit(lengths, 40)
    assert sorted(place for row in rows for place in row) == list(range(len(lengths)))
    assert all(len(row) == 1 or sum(lengths[place] for place in row) <= 40 for row in rows)
    assert rows == first_fit(lengths, 40)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The steps are tiny; more threads would only compete with the data loading workers."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Numbered(Dataset[Encoded]):
    """Short conversations of different lengths, each with a number."""

    def __init__(self, processor, size: int):
        encoder = Encoder(processor)
        turns = [(user(f"Say {i}." + " and" * (i % 5)), assistant(str(i))) for i in range(size)]
        self.rows = [encoder.encode(Sample(str(i), messages, "t")) for i, messages in enumerate(turns)]
        self.lengths = np.array([row["input_ids"].shape[1] for row in self.rows])
        self.kinds = np.zeros(size, np.uint8)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Encoded:
        return self.rows[index]


class Recorder(AdapterTrainer):
    """Records the token ids of every micro-batch that it trains on."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        self.seen = [*getattr(self, "seen", []), inputs["input_ids"].tolist()]
        return super().compute_loss(model, inputs, *args, **kwargs)


PLANS = {
    "plain": ["data.group_by=null"],
    "grouped": ["data.group_by=length", "data.max_tokens=200"],
    "packed": ["data.packing=true", "data.max_tokens=200"],
}
Train = Callable[..., Recorder]


@pytest.fixture(scope="module")
def train() -> Train:
    """A function that trains two epochs of four steps: three full ones, and one of four samples."""
    base, processor = load_model(ModelConfig(path="assets/tiny-llava", dtype="float32"))
    dataset = Numbered(processor, 22)

    def run(plan: str, output: Path, *overrides: str, resume: Path | None = None) -> Recorder:
        settings = [
            "training.max_steps=null",
            "training.epochs=2",
            "training.batch_size=6",
            "training.micro_batch_size=2",
            "training.save_every=2",
            "training.keep=9",
            "data.max_length=60",
            "data.num_workers=0",
            "parts={language: {method: lora, rank: 2}}",
        ]
        config = load_config("quickstart", [*settings, *PLANS[plan], *overrides])
        model = copy.deepcopy(base)
        torch.manual_seed(0)
        mmdora.inject_adapters(model, config.parts)
        collator = Collator(
            processor.tokenizer.pad_token_id, pack=config.data.max_length if config.data.packing else None
        )
        arguments = training_arguments(config, output)
        trainer = Recorder(config, model=model, args=arguments, train_dataset=dataset, data_collator=collator)
        trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
        trainer.end_workers()
        return trainer

    return run


@pytest.fixture(scope="module")
def whole_runs(train, tmp_path_factory) -> dict[str, Recorder]:
    """A run of each plan, with its checkpoints."""
    return {plan: train(plan, tmp_path_factory.mktemp(plan)) for plan in PLANS}


@pytest.mark.parametrize(
    ("plan", "step", "done"),
    [("plain", 6, 17), ("grouped", 6, 17), ("packed", 2, 6), ("packed", 4, 11), ("packed", 6, 17)],
)
def test_a_resumed_run_continues_with_the_next_micro_batch(train, whole_runs, tmp_path, plan, step, done):
    """Within the first epoch, at its end, and within the second epoch; the weights end the same."""
    whole = whole_runs[plan]
    assert len(whole.seen) == 2 * (3 * 3 + 2)
    assert whole.state.global_step == 8
    assert whole.seen[:11] != whole.seen[11:]
    again = train(plan, tmp_path, resume=Path(whole.args.output_dir) / f"checkpoint-{step}")
    assert again.seen == whole.seen[done:]
    assert again.state.global_step == 8
    weights = [{n: p for n, p in trainer.model.named_parameters() if p.requires_grad} for trainer in (again, whole)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])


@pytest.mark.parametrize("workers", [2, 4])
def test_the_number_of_workers_does_not_change_the_order(train, whole_runs, tmp_path, workers):
    overrides = [f"data.num_workers={workers}", "training.save_every=null"]
    assert train("packed", tmp_path, *overrides).seen == whole_runs["packed"].seen


def test_grouping_and_packing_do_not_change_the_losses(whole_runs):
    """A step has the same samples, and every token has the same weight."""
    losses = [
        torch.tensor([line["loss"] for line in trainer.state.log_history if "loss" in line][:4])
        for trainer in whole_runs.values()
    ]
    for other in losses[1:]:
        torch.testing.assert_close(other, losses[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.packing=true"], "'packing' needs 'max_length'"),
        (["data.packing=true", "data.max_length=9", "data.group_by=length"], "'group_by: length' reduces padding"),
        (["data.max_tokens=8", "data.max_length=9"], "'max_tokens' 8 is less than 'max_length' 9"),
    ],
)
def test_settings_that_contradict_each_other_are_errors(overrides, message):
    with pytest.raises(UserError, match=message):
        load_config("quickstart", overrides)


def test_one_step_computed_by_hand():
    estimates = {"lengths": np.array([5, 1, 4, 2, 3, 6]), "kinds": np.array([1, 0, 1, 0, 0, 1], np.uint8)}
    step = np.arange(6)
    by_length = split_step(BatchSpec(6, 6, 2, group_by="length", **estimates), step)
    assert [group.tolist() for group in by_length] == [[1, 3], [4, 2], [0, 5]]
    by_kind = split_step(BatchSpec(6, 6, 3, group_by="modality", **estimates), step)
    assert [group.tolist() for group in by_kind] == [[1, 3, 4], [2, 0, 5]]
    budget = split_step(BatchSpec(6, 6, 2, group_by="length", max_tokens=12, **estimates), step)
    assert [group.tolist() for group in budget] == [[1, 3, 4], [2, 0], [5]]
