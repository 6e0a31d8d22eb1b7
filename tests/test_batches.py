"""The order of training: every sample once, the same for any number of workers and after a restart."""

from __future__ import annotations

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
from mmdora.core.config_files import load_config
from mmdora.core.errors import UserError
from mmdora.training.arguments import training_arguments
from mmdora.training.batches import (
    Batching,
    MicroBatches,
    balanced,
    check_budgets,
    cost,
    micro_batches_of,
    runs,
    step_samples,
)
from mmdora.training.trainer import AdapterTrainer
from tests.test_encoding import assistant, user


@st.composite
def batchings(draw) -> Batching:
    world, micro, accumulation = draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.integers(1, 3))
    samples = draw(st.integers(1, 80))
    lengths = np.array(draw(st.lists(st.integers(1, 500), min_size=samples, max_size=samples)))
    kinds = np.array(draw(st.lists(st.integers(0, 3), min_size=samples, max_size=samples)), np.uint8)
    return Batching(
        samples,
        world * micro * accumulation,
        micro,
        world,
        seed=draw(st.integers(0, 9)),
        group_by=draw(st.sampled_from([None, "length", "modality"])),
        max_tokens=draw(st.sampled_from([None, 500 * micro * 4])),
        packed=draw(st.booleans()),
        lengths=lengths,
        kinds=kinds,
    )


def ranks(batching: Batching, epoch: int = 0) -> list[list[list[int]]]:
    found = []
    for rank in range(batching.world):
        sampler = MicroBatches(batching, rank)
        sampler.set_epoch(epoch)
        found.append(list(sampler))
        assert len(sampler) == len(found[-1])
    return found


@settings(max_examples=150, deadline=None, derandomize=True)
@given(batchings(), st.integers(0, 3))
def test_every_sample_once_and_each_process_as_many_micro_batches(batching, epoch):
    found = ranks(batching, epoch)
    assert len({len(batches) for batches in found}) == 1
    seen = sorted(index for batches in found for batch in batches for index in batch)
    last = (batching.samples - 1) % batching.batch_size + 1
    repeated = max(0, batching.groups(last) - last)
    assert repeated < batching.world
    assert set(seen) == set(range(batching.samples))
    assert len(seen) == batching.samples + repeated
    assert all(batch for batches in found for batch in batches)
    if batching.max_tokens is None:
        assert all(len(batch) <= batching.micro_batch_size for batches in found for batch in batches)
    assert found == ranks(batching, epoch)
    # A full step takes the samples of the plain order, however they are grouped.
    plain = [
        set(step.tolist())
        for step in step_samples(Batching(batching.samples, batching.batch_size, 1, 1, batching.seed), epoch)
    ]
    each = batching.groups(batching.batch_size) // batching.world
    for place in range(batching.samples // batching.batch_size):
        step = [b for batches in found for b in batches[place * each : (place + 1) * each]]
        assert {index for batch in step for index in batch} == plain[place]


def test_epochs_and_seeds_differ_and_the_order_is_the_seeds():
    first = ranks(Batching(50, 10, 5))[0]
    assert first != ranks(Batching(50, 10, 5), epoch=1)[0]
    assert first != ranks(Batching(50, 10, 5, seed=1))[0]
    order = torch.randperm(50, generator=torch.Generator().manual_seed(0)).tolist()
    assert [i for batch in first for i in batch] == order


def padding(batching: Batching) -> int:
    assert batching.lengths is not None
    lengths = batching.lengths
    return sum(cost(lengths[b].tolist(), False) - int(lengths[b].sum()) for b in ranks(batching)[0])


def test_grouping_by_length_saves_padding_and_by_modality_keeps_kinds_apart():
    rng = np.random.default_rng(0)
    described = {"lengths": rng.integers(1, 1000, 640), "kinds": rng.integers(0, 4, 640).astype(np.uint8)}
    plain, length, modality = (Batching(640, 64, 8, group_by=g, **described) for g in (None, "length", "modality"))
    assert padding(length) < 0.3 * padding(plain)
    mixed = [sum(len(set(described["kinds"][b])) > 1 for b in ranks(x)[0]) for x in (plain, length, modality)]
    assert mixed[2] <= 3 * 10 < mixed[0]  # at most where one kind of a step ends and the next begins
    assert padding(length) < padding(modality) < padding(plain)


def test_a_budget_holds_in_every_micro_batch_and_the_step_stays():
    rng = np.random.default_rng(0)
    described = {"lengths": rng.integers(1, 400, 330), "kinds": np.zeros(330, np.uint8)}
    for packed, group_by in ((False, "length"), (True, None), (False, None)):
        settings = {"group_by": group_by, "max_tokens": 3200, "packed": packed, **described}
        batching = Batching(330, 32, 8 if group_by or packed else 4, 1, **settings)
        batches = ranks(batching)[0]
        assert all(cost(described["lengths"][b].tolist(), packed) <= 3200 for b in batches)
        assert len({len(batch) for batch in batches}) > 1
        assert sorted(i for b in batches for i in b) == list(range(330))


def test_a_budget_that_cannot_be_held_is_an_error_before_the_first_step():
    lengths = np.full(64, 100)
    settings = {"lengths": lengths, "kinds": np.zeros(64, np.uint8)}
    with pytest.raises(UserError, match=r"max_tokens 300: the 32 samples of a step need 11 .* there are 4; raise it"):
        check_budgets(Batching(64, 32, 8, max_tokens=300, **settings), 1)
    with pytest.raises(UserError, match=r"max_tokens 90: one sample alone takes about 100 .*data.max_length"):
        check_budgets(Batching(64, 32, 8, max_tokens=90, **settings), 1)
    # Only in the second epoch do the two long ones meet: it is known at the start.
    lengths = np.ones(8, np.int64)
    order = [s.tolist() for s in step_samples(Batching(8, 4, 4), 1)]
    apart = [s.tolist() for s in step_samples(Batching(8, 4, 4), 0)]
    pair = next([a, b] for a in order[0] for b in order[0] if a in apart[0] and b in apart[1])
    lengths[pair] = 50
    unlucky = Batching(8, 4, 4, max_tokens=60, packed=True, lengths=lengths, kinds=np.zeros(8, np.uint8))
    check_budgets(unlucky, epochs=1)
    with pytest.raises(UserError, match="max_tokens 60"):
        check_budgets(unlucky, epochs=2)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=12), st.integers(1, 5), st.booleans())
def test_balanced_runs_are_the_best(lengths, groups, packed):
    groups = min(groups, len(lengths))
    starts = balanced(lengths, groups, packed)
    assert len(starts) == groups
    assert starts == sorted(set(starts))
    spans = zip(starts, [*starts[1:], len(lengths)], strict=True)
    worst = max(cost(lengths[low:high], packed) for low, high in spans)
    less = runs(lengths, worst - 1, packed)
    assert less is None or len(less) > groups


@given(st.lists(st.integers(1, 60), min_size=1, max_size=30))
def test_first_fit_loses_nothing_and_fills_no_row_over_its_length(lengths):
    rows = first_fit(lengths, 40)
    assert sorted(place for row in rows for place in row) == list(range(len(lengths)))
    assert all(len(row) == 1 or sum(lengths[place] for place in row) <= 40 for row in rows)
    assert rows == first_fit(lengths, 40)


@pytest.fixture(autouse=True)
def one_thread():
    """The steps are tiny, and threads would only wait for the loaders' processes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Numbered(Dataset[Encoded]):
    """Short conversations of different lengths, each with a number."""

    def __init__(self, processor, size: int):
        encoder = Encoder(processor)
        said = [(user(f"Say {i}." + " and" * (i % 5)), assistant(str(i))) for i in range(size)]
        self.rows = [encoder.encode(Sample(str(i), turns, "t")) for i, turns in enumerate(said)]
        self.lengths = np.array([row["input_ids"].shape[1] for row in self.rows])
        self.kinds = np.zeros(size, np.uint8)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Encoded:
        return self.rows[index]


class Recorder(AdapterTrainer):
    """Writes down every micro-batch that it trains on."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        self.seen = [*getattr(self, "seen", []), inputs["input_ids"].tolist()]
        return super().compute_loss(model, inputs, *args, **kwargs)


def train(tiny, output, *overrides: str, resume: str | None = None) -> Recorder:
    from mmdora.core.config import ModelConfig
    from mmdora.models.loading import load_model

    model, processor = load_model(ModelConfig(path="assets/tiny-llava", dtype="float32"))
    settings = [
        "training.max_steps=null",
        "training.epochs=2",
        "training.batch_size=6",
        "training.micro_batch_size=2",
        "training.save_every=1",
        "training.keep=9",
        "data.max_length=60",
        "parts={language: {method: lora, rank: 2}}",
    ]
    config = load_config("quickstart", [*settings, *overrides])
    torch.manual_seed(0)
    mmdora.inject_adapters(model, config.parts)
    pack = config.data.max_length if config.data.packing else None
    collator = Collator(processor.tokenizer.pad_token_id, pack=pack)
    dataset = Numbered(processor, 22)
    arguments = training_arguments(config, output)
    trainer = Recorder(config, model=model, args=arguments, train_dataset=dataset, data_collator=collator)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


PLANS = {
    "plain": ["data.group_by=null"],
    "grouped": ["data.group_by=length", "data.max_tokens=200"],
    "packed": ["data.packing=true", "data.max_tokens=200"],
}


@pytest.mark.parametrize("plan", PLANS)
def test_a_run_is_the_same_with_workers_and_after_a_restart_in_mid_epoch(tiny, tmp_path, plan):
    whole = train(tiny, tmp_path / "whole", *PLANS[plan])
    assert len(whole.seen) == 2 * (3 * 3 + 2)  # three full steps and one of four samples, an epoch
    assert whole.state.global_step == 8
    assert whole.seen[:11] != whole.seen[11:]
    for workers in (2, 4) if plan == "packed" else (2,):
        assert train(tiny, tmp_path / f"{workers}", *PLANS[plan], f"data.num_workers={workers}").seen == whole.seen
    for step, done in ((2, 6), (4, 11), (6, 17)):  # in the first epoch, at its end, in the second
        checkpoint = tmp_path / "whole" / "checkpoints" / f"checkpoint-{step}"
        again = train(tiny, tmp_path / "again", *PLANS[plan], resume=str(checkpoint))
        assert again.seen == whole.seen[done:]
        assert again.state.global_step == 8
    ours, theirs = ({n: p for n, p in t.model.named_parameters() if p.requires_grad} for t in (again, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_grouping_and_packing_do_not_change_what_a_step_learns(tiny, tmp_path):
    """The same samples a step, every token weighed alike: the first steps' losses are equal."""
    losses = []
    for plan in PLANS.values():
        trainer = train(tiny, tmp_path / plan[0], *plan, "training.epochs=1", "training.save_every=null")
        losses.append([line["loss"] for line in trainer.state.log_history if "loss" in line])
        assert len(losses[-1]) == 4
    for other in losses[1:]:
        torch.testing.assert_close(torch.tensor(other), torch.tensor(losses[0]), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.packing=true"], "'packing' needs 'max_length'"),
        (["data.packing=true", "data.max_length=9", "data.group_by=length"], "'group_by: length' saves padding"),
        (["data.max_tokens=8", "data.max_length=9"], "'max_tokens' 8 is less than 'max_length' 9"),
    ],
)
def test_settings_that_mean_nothing_together_are_errors(overrides, message):
    with pytest.raises(UserError, match=message):
        load_config("quickstart", overrides)


def test_one_step_by_hand():
    described = {"lengths": np.array([5, 1, 4, 2, 3, 6]), "kinds": np.array([1, 0, 1, 0, 0, 1], np.uint8)}
    step = np.arange(6)
    by_length = micro_batches_of(Batching(6, 6, 2, group_by="length", **described), step)
    assert [group.tolist() for group in by_length] == [[1, 3], [4, 2], [0, 5]]
    by_kind = micro_batches_of(Batching(6, 6, 3, group_by="modality", **described), step)
    assert [group.tolist() for group in by_kind] == [[1, 3, 4], [2, 0, 5]]
    budget = micro_batches_of(Batching(6, 6, 2, group_by="length", max_tokens=12, **described), step)
    assert [group.tolist() for group in budget] == [[1, 3, 4], [2, 0], [5]]
