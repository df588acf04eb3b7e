"""Trainings that stop and go on: their states, the files of these, and what says that it is a part."""

import itertools
import math
import pickle
import re
import warnings
from pathlib import Path

import pytest
import torch
from conftest import HAS_HOOKED, seeded

import fvlens
from fvlens.files import read_tensors, write_tensors
from fvlens.training import (
    Settings,
    Task,
    TrainableVector,
    Training,
    TrainingState,
    VectorSet,
    _loop,
    _prepared,
    finetune,
    finetune_many,
    lora,
    soft_prompt,
)
from fvlens.training._lora import LORA_FORMAT
from fvlens.training._soft_prompt import SOFT_PROMPT_FORMAT
from training.plain_loops import MORE, SHORT, TRAIN, VALID, curves_of, distributed, split_of, vector_change, vector_of


def interrupted(monkeypatch, at_epoch, *args, train=finetune, **settings):
    """A training in which Ctrl-C comes in the middle of an epoch."""
    own = Training._step

    def step(self, batch):
        own(self, batch)
        if self.epoch == at_epoch:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Training, "_step", step)
        with pytest.warns(UserWarning, match=f"was interrupted: {at_epoch} of 4 epochs are finished"):
            return train(*args, **settings)


def same(one, other):
    assert torch.equal(one.vector.vector, other.vector.vector)
    torch.testing.assert_close(curves_of(one.history), curves_of(other.history), rtol=0, atol=0, equal_nan=True)
    assert (one.best_epoch, one.lr, one.seed) == (other.best_epoch, other.lr, other.seed)
    assert one.state.header == other.state.header
    assert one.state.tensors.keys() == other.state.tensors.keys()
    for name, tensor in one.state.tensors.items():
        torch.testing.assert_close(tensor, other.state.tensors[name], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("at_epoch", [0, 2])
def test_interruption_gives_the_best_so_far_and_resuming_the_same_bits(small, monkeypatch, tmp_path, at_epoch):
    whole = finetune(small, TRAIN, generator=seeded(), **SHORT)
    part = interrupted(monkeypatch, at_epoch, small, TRAIN, generator=seeded(), **SHORT)
    assert not part.complete and len(part.history) == at_epoch + 1
    torch.testing.assert_close(
        curves_of(part.history), curves_of(whole.history)[:, : at_epoch + 1], rtol=0, atol=0, equal_nan=True
    )
    best = max(range(at_epoch + 1), key=lambda i: (part.history.valid_top1[i], -part.history.valid_loss[i]))
    assert part.best_epoch == best
    file = part.state.save(tmp_path / "state.safetensors")
    for state in (part.state, file, str(file), TrainingState.load(file), part.state):  # in memory twice: it is kept
        resumed = finetune(small, TRAIN, resume=state, generator=seeded(), **SHORT)
        assert resumed.complete
        same(resumed, whole)


def test_checkpoints_are_states_and_resuming_a_finished_training_changes_nothing(small, tmp_path, monkeypatch):
    file = tmp_path / "checkpoint.safetensors"
    whole = finetune(small, TRAIN, checkpoint=file, generator=seeded(), **SHORT)
    same(finetune(small, TRAIN, resume=file, generator=seeded(), **SHORT), whole)
    assert [entry.name for entry in tmp_path.iterdir()] == [file.name]
    interrupted(monkeypatch, 3, small, TRAIN, checkpoint=file, generator=seeded(), **SHORT)
    assert len(TrainingState.load(file).tensors["0.curve"]) == 4
    same(finetune(small, TRAIN, resume=file, generator=seeded(), **SHORT), whole)


def test_many_resume_with_relations_that_have_stopped(small, monkeypatch):
    splits = {"a": split_of(TRAIN, VALID), "b": split_of(MORE[:3], MORE[3:])}
    settings = dict(init="zero", layer=1, lr=0.6, epochs=4, batch_size=2, patience=1, progress=False)
    whole = finetune_many(small, splits, generator=seeded(), **settings)
    lengths = [len(run.history) for run in whole]
    at_epoch = min(lengths)  # one of them has stopped, the other goes on
    assert len(set(lengths)) == 2 and at_epoch < 4
    part = interrupted(monkeypatch, at_epoch, small, splits, train=finetune_many, generator=seeded(), **settings)
    assert not part.complete
    resumed = finetune_many(small, splits, resume=part["a"].state, generator=seeded(), **settings)
    for one, other in zip(resumed, whole, strict=True):
        same(one, other)


def test_interruption_between_layers_gives_the_best_of_those_done(small, monkeypatch):
    settings = dict(init="zero", valid=VALID, lr=0.3, epochs=2, progress=False)
    first = finetune(small, TRAIN, layer=0, generator=seeded(), **settings)
    own = _prepared.SteeredPrompts
    calls = itertools.count()

    def kept(*args, **kwargs):
        if next(calls) == 1:
            raise KeyboardInterrupt
        return own(*args, **kwargs)

    monkeypatch.setattr(_prepared, "SteeredPrompts", kept)
    with pytest.warns(UserWarning, match="finetune was interrupted: 1 of 3 layers are done"):
        part = finetune(small, TRAIN, layer=range(3), generator=seeded(), **settings)
    assert not part.complete and len(part.layer_scores) == 1
    assert torch.equal(part.vector.vector, first.vector.vector)
    monkeypatch.setattr(_prepared, "SteeredPrompts", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):  # nothing is done yet
        finetune(small, TRAIN, layer=range(3), generator=seeded(), **settings)


def test_interruption_inside_a_later_layer_is_not_complete(small, monkeypatch):
    settings = dict(init="zero", valid=VALID, lr=0.3, epochs=2, progress=False)
    own = Training.one_epoch

    def one_epoch(self):
        if self.change.prompts.layer == 1:
            raise KeyboardInterrupt
        own(self)

    monkeypatch.setattr(Training, "one_epoch", one_epoch)
    with pytest.warns(UserWarning, match="was interrupted: 0 of 2 epochs"):
        part = finetune(small, TRAIN, layer=range(3), generator=seeded(), **settings)
    assert [layer for layer, _, _ in part.layer_scores] == [0, 1]
    assert part.vector.layer == 0 and not part.complete and not part.vector.complete


@pytest.mark.parametrize(
    "change, named",
    [
        (dict(lr=0.2), "settings"),
        (dict(epochs=5), "settings"),
        (dict(layer=2), "layer"),
        (dict(generator=seeded(1)), "seeds"),
        (dict(valid=VALID[:2]), "data_hash"),
        (dict(relation="other"), "relations"),
        (dict(path="naive"), "path"),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_a_state_of_another_training_is_refused(small, change, named):
    done = finetune(small, TRAIN, generator=seeded(), **SHORT)
    with pytest.raises(ValueError, match=f"finetune: the saved training has {named} .*, this one "):
        finetune(small, TRAIN, resume=done.state, **({"generator": seeded()} | SHORT | change))


def test_a_state_of_other_pairs_or_another_model_is_refused(small, models, tmp_path):
    done = finetune(small, TRAIN, generator=seeded(), **SHORT)
    with pytest.raises(ValueError, match=r"the saved training has data_hash '[0-9a-f]{16}', this one"):
        finetune(small, [*TRAIN[:4], ("warm", "cold")], resume=done.state, generator=seeded(), **SHORT)
    with pytest.raises(ValueError, match=re.escape("the saved training has n_train [5], this one [4].")):
        finetune(small, TRAIN[:4], resume=done.state, generator=seeded(), **(SHORT | dict(valid=[TRAIN[4], *VALID])))
    file = done.state.save(tmp_path / "state.safetensors")
    parameter = next(small.parameters())
    with torch.no_grad():
        parameter[0, 0] += 1
    try:
        with pytest.raises(ValueError, match=r"the saved training has fingerprint .*weights.*, this one"):
            finetune(small, TRAIN, resume=file, generator=seeded(), **SHORT)
    finally:
        with torch.no_grad():
            parameter[0, 0] -= 1


def test_a_model_of_another_name_is_the_same_model(small):
    done = finetune(small, TRAIN, generator=seeded(), **SHORT)
    done.state.header["fingerprint"] = dict(done.state.header["fingerprint"], name="renamed", revision="abc")
    same_again = finetune(small, TRAIN, resume=done.state, generator=seeded(), **SHORT)
    assert torch.equal(same_again.vector.vector, done.vector.vector)


@pytest.mark.parametrize(
    "damage",
    [
        lambda state: state.tensors.pop("0.best"),
        lambda state: state.tensors.update({"0.value": torch.zeros(7)}),
        lambda state: state.tensors.update({"0.generator": torch.zeros(3, dtype=torch.uint8)}),
        lambda state: state.header.pop("lrs"),
        lambda state: state.header.update(stopped=None),
    ],
)
def test_a_damaged_state_is_refused(small, damage):
    done = finetune(small, TRAIN, generator=seeded(), **SHORT)
    damage(done.state)
    with pytest.raises(ValueError, match="finetune: the saved training is damaged \\("):
        finetune(small, TRAIN, resume=done.state, generator=seeded(), **SHORT)


@pytest.fixture(scope="module")
def two_done(models):
    """The state of a training of two relations, one of which has stopped."""
    splits = {"a": split_of(TRAIN, VALID), "b": split_of(MORE[:3], MORE[3:])}
    model = models("gpt2" if HAS_HOOKED else "bridge-gpt2")
    settings = dict(init="zero", layer=1, lr=0.6, epochs=4, batch_size=2, patience=1, progress=False)
    return finetune_many(model, splits, generator=seeded(), **settings)


def altered(state, **tensors):
    """The state with other tensors, by their name with a dot for each __; None takes one out."""
    every = {**state.tensors, **{name.replace("__", "."): value for name, value in tensors.items()}}
    return TrainingState({name: value for name, value in every.items() if value is not None}, state.header)


def test_a_state_is_checked_when_it_is_read(two_done, tmp_path):
    state = two_done.runs[0].state
    shapes = {name: tensor.shape for name, tensor in state.tensors.items()}
    assert state.header["stopped"].count(True) >= 1 and shapes["0.adam.0.exp_avg"] == shapes["0.value"]
    loaded = TrainingState.load(state.save(tmp_path / "good"))
    assert loaded.header == state.header and loaded.tensors.keys() == state.tensors.keys()
    d = shapes["0.value"][0]
    steps = {i: (len(state.tensors[f"{i}.curve"]) - 1) * n for i, n in ((0, 3), (1, 2))}  # 5 and 3 pairs, 2 a step
    assert {i: float(state.tensors[f"{i}.adam.0.step"]) for i in (0, 1)} == steps
    nan = torch.full((d,), math.nan)
    for change, message in [
        (dict(**{"0__best": nan}), "0.best: holds NaN or infinite values"),
        (dict(**{"1__start": nan}), "1.start: holds NaN or infinite values"),
        (dict(**{"0__best": torch.zeros(d, dtype=torch.int64)}), "0.best: expected numbers of a floating precision"),
        (dict(**{"1__value": torch.zeros(d + 1)}), f"1.value: expected shape [{d}], got [{d + 1}]"),
        (dict(**{"0__curve": torch.zeros(2, 4)}), "0.curve: expected 1 to 5 rows of 5, got [2, 4]"),
        (dict(**{"0__curve": torch.zeros(6, 5)}), "0.curve: expected 1 to 5 rows of 5, got [6, 5]"),
        (dict(**{"0__curve": None}), "KeyError: '0.curve'"),
        (dict(**{"0__generator": torch.zeros(3)}), "0.generator: expected bytes, got torch.float32 [3]"),
        (dict(**{"0__adam__0__step": torch.tensor(1.0)}), f"after {steps[0]} steps"),
        (dict(**{"0__adam__0__exp_avg": torch.zeros(2)}), f"expected moments of one shape after {steps[0]} steps"),
        (dict(**{"0__adam__0__exp_avg": None}), "KeyError: '0.adam.0.exp_avg'"),
        (dict(**{"0__adam__0__exp_avg_sq": -torch.ones(d)}), "0.adam.0.exp_avg_sq: expected squares, got -1.0"),
        (dict(**{"0__adam__0__more": torch.ones(d)}), "unknown tensors 0.adam.0.more"),
        (dict(**{"2__value": torch.ones(d)}), "unknown tensors 2.value"),
    ]:
        path = altered(state, **change).save(tmp_path / "bad")
        with pytest.raises(ValueError, match=r"bad: damaged training state \(.*" + re.escape(message)):
            TrainingState.load(path)
    for change, message in [
        (dict(best_epochs=[9, 0]), "best_epochs: expected 0.."),
        (dict(best_epochs=[0.0, 0]), "best_epochs: expected a whole number"),
        (dict(stopped=[0, 1]), "stopped: expected true or false"),
        (dict(lrs=[0.1]), "lrs: expected 2, one a relation, got 1"),
        (dict(lrs=[0.1, -1]), "lrs: expected numbers over 0, got -1"),
        (dict(relations=None), "relations: expected a list"),
    ]:
        path = TrainingState(state.tensors, state.header | change).save(tmp_path / "bad")
        with pytest.raises(ValueError, match=r"bad: damaged training state \(.*" + re.escape(message)):
            TrainingState.load(path)


def test_a_relation_that_stopped_may_hold_what_stopped_it(two_done, tmp_path):
    state = two_done.runs[0].state
    i = state.header["stopped"].index(True)
    nan = torch.full_like(state.tensors[f"{i}.value"], math.nan)
    path = altered(state, **{f"{i}__value": nan, f"{i}__adam__0__exp_avg": nan}).save(tmp_path / "state")
    assert TrainingState.load(path).tensors[f"{i}.value"].isnan().all()


def test_moments_of_a_state_fit_the_parameters(small):
    """They fit each other, but not what is trained; and nothing of the training has changed by then."""
    task = Task("r", TRAIN, VALID, 0)
    change = vector_change(small, [task], TrainableVector(torch.zeros(1, small.cfg.d_model), 1), None)
    training = Training([task], change, Settings(epochs=3, lr=0.1))
    _loop.train(training, epochs=1, progress=False)
    state = training.state()
    of_two = {f"0.adam.1.{name}": state.tensors[f"0.adam.0.{name}"] for name in ("step", "exp_avg", "exp_avg_sq")}
    short = {f"0.adam.0.{name}": torch.zeros(3) for name in ("exp_avg", "exp_avg_sq")}
    all_short = {f"0.{name}": torch.zeros(3) for name in ("value", "start", "best")}
    before = change.trainable.rows[0].detach().clone()
    for tensors, message in [
        (of_two, "moments of 2 parameters, but there are 1"),
        (short, f"0.adam.0.exp_avg: expected shape [{small.cfg.d_model}], got [3]"),
        (all_short, f"0.value: expected shape [{small.cfg.d_model}], got [3]"),
    ]:
        with pytest.raises(ValueError, match=re.escape(message)):
            training.restore(TrainingState({**state.tensors, **tensors}, state.header))
        assert torch.equal(change.trainable.rows[0], before) and len(training.curves[0]) == 2


@pytest.mark.parametrize("kind", ["vector", "distributed", "set"])
def test_a_vector_of_an_interrupted_training_says_so(small, monkeypatch, tmp_path, kind):
    how = dict(lr=0.3, epochs=4, batch_size=2, progress=False, generator=seeded())
    where = dict(init=distributed(small)) if kind == "distributed" else dict(init="zero", layer=1, relation="r")
    whole = finetune(small, TRAIN, **how, **where)
    part = interrupted(monkeypatch, 2, small, TRAIN, **how, **where)
    vectors = [run.vector if kind != "set" else VectorSet((run.vector,)) for run in (whole, part)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = type(vectors[0]).load(vectors[0].save(tmp_path / "whole"))
    told = "part: a training that was interrupted, the best of the epochs that were finished" + ": r" * (kind == "set")
    with pytest.warns(UserWarning, match=f"{told}\\."):
        loaded = type(vectors[1]).load(vectors[1].save(tmp_path / "part"))
    flags = [[one.complete for one in (found if kind == "set" else [found])] for found in (again, loaded)]
    assert flags == [[True], [False]]


@pytest.mark.parametrize("method, name", [(soft_prompt, SOFT_PROMPT_FORMAT), (lora, LORA_FORMAT)])
def test_what_an_interrupted_method_made_says_so(small, monkeypatch, tmp_path, method, name):
    how = dict(lr=0.3, epochs=4, batch_size=2, progress=False, generator=seeded())
    part = interrupted(monkeypatch, 2, small, TRAIN, train=method, **how)
    assert not part.complete and not part.change.complete
    path = part.change.save(tmp_path / "part")
    with pytest.warns(UserWarning, match=r"part: a training that was interrupted, .* finished\."):
        assert not type(part.change).load(path, model=small).complete
    tensors, header = read_tensors(path, name)
    for said in (dict(complete=True), {}):  # earlier files do not say, and are whole
        del header["complete"]
        header |= said
        write_tensors(path, tensors, header, name)
        assert type(part.change).load(path).complete
        header["complete"] = None
    write_tensors(path, tensors, header, name)
    with pytest.raises(ValueError, match=r"part: damaged .* complete: expected true or false, got None"):
        type(part.change).load(path)


def test_what_is_made_of_a_part_is_a_part(small, unchecked):
    part, whole = vector_of(small, complete=False), vector_of(small, seed=1)
    assert not (part + whole).complete and not (2 * part).complete and not part.at_layer(0).complete
    assert (whole + whole).complete and fvlens.random_vector_like(part, seeded()).complete
    with pytest.raises(ValueError, match="FunctionVector: complete: expected true or false, got 1"):
        vector_of(small, complete=1)


class Trap:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.write_text, (self.path, "run")


@pytest.mark.parametrize("load", [TrainingState.load, VectorSet.load])
def test_files_are_not_executed(tmp_path, load):
    trap, file = tmp_path / "trap", tmp_path / "file.safetensors"
    file.write_bytes(pickle.dumps(Trap(trap)))
    with pytest.raises(ValueError, match="not a safetensors file, or a truncated one"):
        load(file)
    assert not trap.exists()
    pickle.loads(file.read_bytes())
    assert trap.exists()  # it would have


def test_a_state_file_must_be_one(small, tmp_path):
    with pytest.raises(ValueError, match="no vector file at"):
        finetune(small, TRAIN, resume=tmp_path / "none", generator=seeded(), **SHORT)
    file = vector_of(small).save(tmp_path / "vector.safetensors")
    with pytest.raises(ValueError, match="expected 'fvlens-training-1'"):
        finetune(small, TRAIN, resume=file, generator=seeded(), **SHORT)


def test_checkpoint_folder_is_asked_for_before_the_work(small, tmp_path, monkeypatch):
    monkeypatch.setattr(Training, "one_epoch", lambda self: pytest.fail("trained"))
    with pytest.raises(ValueError, match=r"finetune: folder .*absent of the checkpoint does not exist; create"):
        finetune(small, TRAIN, checkpoint=tmp_path / "absent" / "state", generator=seeded(), **SHORT)
