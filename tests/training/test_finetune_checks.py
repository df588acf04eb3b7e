"""Fine-tuned vectors: what is odd, what is refused, what results say, and a model that is left as it was."""

import dataclasses
import json
import math
import re
import warnings

import pytest
import torch
from architectures import build
from checkpoints import save
from conftest import HAS_HOOKED, seeded
from torch.nn import functional as F

import fvlens
from fvlens.interventions import resid_hook
from fvlens.models import fingerprint
from fvlens.prompts import TEMPLATES, Template
from fvlens.relations import Relation
from fvlens.suffix import has_hooks
from fvlens.training import (
    FineTunedSet,
    History,
    Settings,
    Task,
    TrainableVector,
    Training,
    TrainingState,
    VectorSet,
    Wants,
    _loop,
    _prepared,
    evaluate_adapted,
    finetune,
    finetune_many,
    frozen,
)
from fvlens.vectors import DistributedVector, FunctionVector
from training.plain_loops import (
    MORE,
    SHORT,
    TRAIN,
    VALID,
    close,
    curves_of,
    plain_loss,
    split_of,
    vector_change,
    vector_of,
    with_words,
)

# --- what is odd ---


def test_a_loss_that_is_not_finite_stops_its_relation_alone(small):
    splits = {"wild": split_of(TRAIN, VALID), "calm": split_of(MORE[:3], MORE[3:])}
    wild = vector_of(small, relation="wild")
    wild = dataclasses.replace(wild, vector=torch.full_like(wild.vector, 3e38))
    with pytest.warns(UserWarning, match="the loss of wild is not finite after epoch 0; try a lower lr"):
        runs = finetune_many(
            small, splits, init={"wild": wild, "calm": vector_of(small, seed=3)}, lr=0.1, epochs=2,
            generator=seeded(), progress=False,
        )  # fmt: skip
    assert torch.equal(runs["wild"].vector.vector, wild.vector) and len(runs["wild"].history) == 1
    g = seeded()
    torch.randint(2**31, (1,), generator=g)
    alone = finetune(
        small, MORE[:3], init=vector_of(small, seed=3), valid=MORE[3:], lr=0.1, epochs=2, generator=g, progress=False
    )
    assert runs["calm"].seed == alone.seed
    close(runs["calm"].vector.vector, alone.vector.vector)


def test_without_validation_the_last_finite_epoch_stands(small):
    with pytest.warns(UserWarning, match="the loss of this relation is not finite after epoch 1; try a lower lr"):
        tuned = finetune(small, TRAIN, init="zero", layer=1, lr=1e30, epochs=3, generator=seeded(), progress=False)
    assert tuned.best_epoch == 0 and len(tuned.history) == 2
    assert (tuned.vector.vector == 0).all()


def test_half_precision_is_trained_in_single_precision(small, models, tmp_path):
    name = "bridge-gpt2" if not HAS_HOOKED else None
    if name is None:
        half, wide = build("gpt2", dtype=torch.bfloat16), build("gpt2")
    else:
        folder = with_words(save("gpt2", tmp_path))
        half, wide = (
            fvlens.load_model(folder, device="cpu", backend="bridge", dtype=dtype)
            for dtype in (torch.bfloat16, torch.float32)
        )
    settings = dict(init="zero", layer=1, lr=0.05, epochs=3, progress=False)
    expected = finetune(wide, TRAIN, generator=seeded(), **settings)
    for path in (None, "naive"):
        tuned = finetune(half, TRAIN, path=path, generator=seeded(), **settings)
        assert tuned.state.tensors["0.value"].dtype == tuned.state.tensors["0.adam.0.exp_avg"].dtype == torch.float32
        torch.testing.assert_close(tuned.history.train_loss, expected.history.train_loss, rtol=0.03, atol=0)
        assert tuned.history.train_loss[-1] < tuned.history.train_loss[0]
        # a vector far below the residual stream's precision still moves, by sums in the wider of the two
        assert float(tuned.vector.vector.abs().max()) > 0
        trainable = TrainableVector(torch.zeros(1, half.cfg.d_model), 1)
        change = vector_change(half, [Task("", TRAIN, (), 0)], trainable, tuned.path)
        with torch.no_grad():
            logits = change.read(torch.arange(2), torch.zeros(2, dtype=torch.long), Wants(logits=True)).logits
        assert logits.dtype == torch.float32
        assert not torch.equal(logits, logits.bfloat16().float())  # nowhere rounded to the model's precision


def test_the_models_dropout_and_the_callers_contexts_do_not_matter(models):
    model = models("bridge-gpt2")
    assert model.original_model.config.resid_pdrop > 0
    settings = dict(init="zero", layer=0, lr=0.05, epochs=1, progress=False)
    expected = finetune(model, TRAIN, generator=seeded(), **settings)
    model.train()
    try:
        with torch.no_grad():
            tuned = finetune(model, TRAIN, generator=seeded(), **settings)
        assert model.training
    finally:
        model.eval()
    assert torch.equal(tuned.vector.vector, expected.vector.vector)


def test_hooks_of_others_mean_whole_passes_and_a_warning(models, small):
    point = small.hook_dict[resid_hook(2)]
    point.add_hook(lambda resid, hook: 1.5 * resid, is_permanent=True)
    try:
        with pytest.warns(UserWarning, match="finetune takes whole forward passes, which is slow \\(hooks on the mod"):
            tuned = finetune(small, TRAIN, init="zero", layer=1, lr=0.05, epochs=1, generator=seeded(), progress=False)
        with frozen(small):
            assert float(tuned.history.train_loss[0]) == pytest.approx(
                float(plain_loss(small, TRAIN, 1, torch.zeros(small.cfg.d_model))), rel=1e-6
            )
    finally:
        small.reset_hooks(including_permanent=True)
    assert tuned.path == "naive"


# --- ties ---


@pytest.mark.parametrize("path", ["weights", "kv", "naive"])
def test_of_two_equal_logits_the_smaller_id_is_right_in_validation(tied, path):
    """The model answers every prompt by its bias alone, which no vector changes."""
    vector = vector_of(tied)
    for valid, expected in (([("hot", "cold"), ("big", "small")], 0.5), ([("big", "small")], 0.0)):
        tuned = finetune(
            tied, [("icy", "cold")], valid=valid, init=vector, epochs=1, path=path, generator=seeded(), progress=False
        )
        assert tuned.history.valid_top1.tolist() == [expected, expected]


# --- the model is left as it was ---


@pytest.mark.parametrize("end", ["success", "error", "interrupt", "error inside a forward"])
@pytest.mark.parametrize("path", [None, "naive"])
def test_the_model_is_left_as_it_was(models, small, monkeypatch, end, path):
    parameters = dict(small.named_parameters())
    names = list(parameters)
    values = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    for parameter in parameters.values():
        parameter.grad = None  # the model is shared with tests that take gradients
    parameters[names[0]].requires_grad_(False)
    grad = torch.ones_like(parameters[names[1]])
    parameters[names[1]].grad = grad
    small.train()
    list(small.modules())[-1].eval()
    modes = [module.training for module in small.modules()]
    assert len(set(modes)) == 2
    flags = [parameter.requires_grad for parameter in parameters.values()]
    own = Training.one_epoch

    def one_epoch(self):
        own(self)
        if self.epoch == 1 and end == "error":
            raise RuntimeError("on purpose")
        if self.epoch == 1 and end == "interrupt":
            raise KeyboardInterrupt
        if self.epoch == 1 and end == "error inside a forward":
            monkeypatch.setattr(F, "cross_entropy", lambda *a, **k: 1 / 0)

    monkeypatch.setattr(Training, "one_epoch", one_epoch)
    kinds = {"success": (), "error": RuntimeError, "interrupt": (), "error inside a forward": ZeroDivisionError}

    def train():
        return finetune(
            small, TRAIN, init="zero", layer=1, lr=0.1, epochs=3, path=path, generator=seeded(), progress=False
        )

    try:
        if end == "interrupt":
            with pytest.warns(UserWarning, match="was interrupted: 1 of 3 epochs are finished"):
                train()
        elif kinds[end]:
            with pytest.raises(kinds[end]):
                train()
        else:
            train()
        assert [parameter.requires_grad for parameter in parameters.values()] == flags
        assert [module.training for module in small.modules()] == modes
        assert all(torch.equal(parameters[name], values[name]) for name in names)
        assert parameters[names[1]].grad is grad and (grad == 1).all()
        assert all(parameters[name].grad is None for name in names if name != names[1])
        assert not has_hooks(small)
    finally:
        small.eval()
        for parameter in parameters.values():
            parameter.requires_grad_(True)
            parameter.grad = None


def test_global_randomness_is_untouched_and_a_seed_gives_the_same_bits(small):
    before = torch.get_rng_state()
    runs = [
        finetune(small, TRAIN, init="zero", layer=1, epochs=2, batch_size=2, generator=seeded(seed), progress=False)
        for seed in (0, 0, 1)
    ]
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(runs[0].vector.vector, runs[1].vector.vector)
    assert runs[0].seed == runs[1].seed != runs[2].seed
    assert not torch.equal(runs[0].vector.vector, runs[2].vector.vector)


# --- the progress bar ---


def test_one_bar_counts_epochs(small, monkeypatch):
    bars = []

    class Bar(_loop.tqdm):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            bars.append((kwargs, self))

        def update(self, n=1):
            self.counted = getattr(self, "counted", 0) + n
            return super().update(n)

    monkeypatch.setattr(_loop, "tqdm", Bar)
    splits = {"a": split_of(TRAIN), "b": split_of(MORE)}
    finetune_many(small, splits, init="zero", layer=1, epochs=3, generator=seeded())
    ((settings, bar),) = bars
    assert (settings["total"], settings["disable"], settings["desc"]) == (3, False, "fine-tuning 2 relations")
    assert bar.counted == 3
    finetune(small, TRAIN, init="zero", layer=1, epochs=1, relation="a", generator=seeded(), progress=False)
    assert bars[-1][0]["disable"] and bars[-1][0]["desc"] == "fine-tuning a"


# --- results ---


def test_result_says_where_it_comes_from(small):
    init = dataclasses.replace(vector_of(small), heads=(fvlens.Head(0, 1),), template="arrow")
    tuned = finetune(small, TRAIN, init=init, valid=VALID, epochs=1, l2=0.5, generator=seeded(), progress=False)
    vector = tuned.vector
    assert (vector.kind, vector.relation, vector.layer, str(vector.template)) == ("fine-tuned", "r", 1, "arrow")
    assert vector.heads == init.heads and vector.seed == tuned.seed
    assert vector.fingerprint == fingerprint(small)
    assert tuned.settings == Settings(l2=0.5, epochs=1, template="arrow")
    queries = fvlens.build_prompts(small, [*TRAIN, *VALID], n_shots=0, template="arrow", generator=seeded())
    assert vector.data_hash == queries.data_hash
    named = finetune(
        small, Relation("words", TRAIN), init=init, template="qa", epochs=1, generator=seeded(), progress=False
    )
    assert named.relation == "words" and named.settings.template == TEMPLATES["qa"]
    assert tuned.seconds > 0


def test_tables_and_figures(small):
    splits = {"a": split_of(TRAIN, VALID), "b": split_of(MORE[:3], MORE[3:])}
    runs = finetune_many(small, splits, init="zero", layer=1, epochs=2, lr=0.1, generator=seeded(), progress=False)
    table = runs.to_dataframe()
    assert list(table.columns) == [
        "relation", "epoch", "train_loss", "valid_loss", "valid_top1", "norm", "cosine",
    ]  # fmt: skip
    assert table.relation.tolist() == ["a"] * 3 + ["b"] * 3 and table.epoch.tolist() == [0, 1, 2] * 2
    for name in ("train_loss", "valid_loss", "valid_top1", "norm"):
        assert table[name].tolist() == [x for run in runs for x in getattr(run.history, name).tolist()]
    assert len(runs["b"].history) == 3
    figure = runs["b"].plot()
    traces = {trace.name: list(trace.y) for trace in figure.data}
    assert traces["training pairs"] == runs["b"].history.train_loss.double().tolist()
    assert traces["validation top-1"] == runs["b"].history.valid_top1.double().tolist()
    assert "cosine" not in traces  # the start was zero
    assert figure.layout.title.text == "Training of b"
    with pytest.raises(ValueError, match="no training of 'c' here; there are a, b"):
        runs["c"]


def test_history_counts_its_entries():
    curve = torch.arange(3.0)
    assert len(History(curve, curve, curve, curve, curve)) == 3


# --- templates ---


OWN = Template("mine", "{input} is to{output};\n", "{input} is to", prefix="Pairs:\n")


def test_an_own_template_goes_from_prompts_to_the_tuned_vectors_scores(small, tmp_path, monkeypatch):
    """Prompts, means, vector, file, training, file, evaluation: at every place the same text is asked."""
    shown = fvlens.build_prompts(small, TRAIN, n_prompts=3, n_shots=2, template=OWN, generator=seeded())
    means = fvlens.mean_head_activations(small, shown, progress=False)
    made = fvlens.function_vector(small, means, heads=[(0, 1)], layer=1)
    vector = FunctionVector.load(made.save(tmp_path / "v.safetensors"), model=small)
    tuned = finetune(small, TRAIN, init=vector, valid=VALID, epochs=1, generator=seeded(), progress=False)
    assert tuned.settings.template == OWN
    loaded = FunctionVector.load(tuned.vector.save(tmp_path / "tuned.safetensors"), model=small)
    assert loaded.template == vector.template == means.template == OWN

    asked = tuple(f"Pairs:\n {pair.input} is to" for pair in VALID)
    texts = []
    for module in ("fvlens.evaluation._prompting", "fvlens.training._collateral", "fvlens.training._prepared"):
        original = __import__(module, fromlist=["build_prompts"]).build_prompts

        def watched(*args, original=original, **given):
            texts.append(original(*args, **given).texts)
            return original(*args, **given)

        monkeypatch.setattr(f"{module}.build_prompts", watched)
    scored = fvlens.evaluate(small, VALID, vector=loaded, generator=seeded())
    assert (scored.template, texts.pop()) == (OWN, asked)
    sweep = fvlens.layer_sweep(small, VALID, loaded, layers=[1], generator=seeded(), progress=False)
    assert torch.equal(sweep.evaluations[0].ranks, scored.ranks) and texts.pop() == asked
    answers = fvlens.generate_answers(small, VALID, vector=loaded, max_new_tokens=1, generator=seeded())
    assert (answers.template, texts.pop()) == (OWN, asked)
    for adapted in (tuned, loaded):
        again = evaluate_adapted(small, VALID, adapted, generator=seeded())
        assert torch.equal(again.ranks, scored.ranks) and texts.pop() == asked
    fvlens.evaluate(small, VALID, vector=loaded, template="qa", generator=seeded())  # what is given goes first
    assert texts.pop() == tuple(f"Q: {pair.input}\nA:" for pair in VALID)
    fvlens.evaluate(small, VALID, generator=seeded())
    assert texts.pop() == tuple(f"Q: {pair.input}\nA:" for pair in VALID)

    splits = {"a": split_of(TRAIN, VALID), "b": split_of(MORE)}
    many = finetune_many(
        small, splits, init=[loaded, loaded], n_train=2, epochs=1, generator=seeded(), progress=False
    ).vectors
    kept = VectorSet.load(many.save(tmp_path / "set.safetensors"))
    assert kept.template == many.template == OWN and [one.template for one in kept] == [OWN, OWN]


def test_starts_of_several_templates_need_one_to_be_given(small):
    splits = {"a": split_of(TRAIN), "b": split_of(MORE)}
    starts = [vector_of(small, template=OWN), vector_of(small, template="arrow")]
    with pytest.raises(
        ValueError, match=r"finetune_many: the starts are of 2 templates \(arrow, mine\); give template="
    ):
        finetune_many(small, splits, init=starts, epochs=1, generator=seeded(), progress=False)
    given = finetune_many(small, splits, init=starts, epochs=1, template="colon", generator=seeded(), progress=False)
    assert {str(vector.template) for vector in given.vectors} == {"colon"}
    assert VectorSet((vector_of(small, template=OWN), vector_of(small, relation="s"))).template is None


def test_a_training_of_version_0_1_goes_on(small, tmp_path):
    """Its state holds the name of the template alone."""
    how = dict(init="zero", layer=1, epochs=2, template="arrow", progress=False)
    whole = finetune(small, TRAIN, generator=seeded(), **how)
    header = json.loads(json.dumps(whole.state.header))
    assert header["settings"]["template"] == TEMPLATES["arrow"].to_json()
    header["settings"]["template"] = "arrow"
    old = TrainingState(whole.state.tensors, header)
    assert torch.equal(finetune(small, TRAIN, resume=old, generator=seeded(), **how).vector.vector, whole.vector.vector)
    header["settings"]["template"] = "mine"
    with pytest.raises(ValueError, match=r"the saved training has settings .*'template': 'mine'"):
        finetune(small, TRAIN, resume=old, generator=seeded(), **how)


def test_a_distributed_vector_is_trained_in_its_own_template(small):
    values = torch.zeros(small.cfg.n_layers, small.cfg.n_heads, small.cfg.d_head)
    init = DistributedVector(values, (fvlens.Head(0, 1),), "r", fingerprint(small), template=OWN)
    tuned = finetune(small, TRAIN[:2], init=init, epochs=1, generator=seeded(), progress=False)
    assert tuned.settings.template == OWN and tuned.vector.template == OWN


# --- errors ---


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(loss="mse"), "finetune: loss='mse'; expected one of cross_entropy, perplexity."),
        (dict(anchor="one"), "finetune: anchor='one'; expected one of zero, init."),
        (dict(schedule="step"), "finetune: schedule='step'; expected one of cosine, constant."),
        (dict(l2=-1.0), "finetune: expected l2 of 0 or more, got -1.0."),
        (dict(l2=math.nan), "finetune: l2: expected a finite number, got nan."),
        (dict(lr=0.0), "finetune: expected lr over 0, or None, got 0.0."),
        (dict(lr=math.inf), "finetune: lr: expected a finite number or None, got inf."),
        (dict(epochs=0), "finetune: expected epochs of at least 1, got 0."),
        (dict(batch_size=0), "finetune: expected batch_size of at least 1, got 0."),
        (dict(patience=0), "finetune: expected patience of at least 1, got 0."),
        (dict(template="none"), "template"),
        (dict(layer=None), "finetune: init='zero' does not say where; give layer=."),
        (dict(layer=3), "finetune: expected layers in 0..2, got [3]."),
        (dict(layer=-1), "finetune: expected layers in 0..2, got [-1]."),
        (dict(layer=[]), "finetune: expected layers in 0..2, got []."),
        (dict(layer=[0, 1], valid=None), "finetune: several layers, but no validation pairs to choose by; give valid="),
        (
            dict(layer=[0, 1], checkpoint="x"),
            "finetune: resume and checkpoint are for the training of one layer, got layers [0, 1].",
        ),
        (
            dict(layer=[0, 1], resume=TrainingState({}, {})),
            "finetune: resume and checkpoint are for the training of one layer, got layers [0, 1].",
        ),
        (dict(init="noise"), "finetune: init='noise'; expected a vector or 'zero'."),
        (dict(path="fast"), "path='fast'; expected one of weights, kv, naive"),
        (dict(max_memory=1000), "max_memory=1000 bytes is too small"),
    ],
)
def test_bad_settings_are_refused(small, unchecked, change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        finetune(small, TRAIN, **({"generator": seeded()} | SHORT | change))


def test_pairs_and_models_are_checked(small, models, unchecked, monkeypatch):
    with pytest.raises(ValueError, match="finetune: no training pairs of this relation"):
        finetune(small, [], generator=seeded(), **SHORT)
    other = models("bridge-llama")
    foreign = vector_of(other)
    with pytest.raises(ValueError, match="the vector of 'r'"):
        finetune(small, TRAIN, generator=seeded(), **(SHORT | dict(init=foreign)))
    tuned = finetune(small, TRAIN, check=False, generator=seeded(), **(SHORT | dict(init=foreign, epochs=1)))
    assert tuned.vector.fingerprint == fingerprint(small)
    monkeypatch.setattr(_prepared, "_MOST_ROWS", 2)
    with pytest.raises(
        ValueError, match=re.escape("finetune: a step of 3 pairs of this relation does not fit the mem")
    ):
        finetune(small, TRAIN, generator=seeded(), **(SHORT | dict(batch_size=3, loss="perplexity")))


def test_a_step_of_more_than_fits_adds_up_the_gradients_of_its_parts(small, monkeypatch):
    settings = SHORT | dict(batch_size=5, l2=0.01)
    whole = finetune(small, TRAIN, generator=seeded(), **settings)
    monkeypatch.setattr(_prepared, "_MOST_ROWS", 2)
    parts = finetune(small, TRAIN, generator=seeded(), **settings)
    assert parts.batch_size < 5 <= whole.batch_size
    close(parts.vector.vector, whole.vector.vector)
    torch.testing.assert_close(curves_of(parts.history), curves_of(whole.history), rtol=1e-5, atol=1e-6, equal_nan=True)


def test_relations_of_many_are_checked(small, unchecked):
    splits = {"a": split_of(TRAIN), "b": split_of(MORE)}
    settings = dict(layer=1, generator=seeded(), progress=False)
    start = vector_of(small)
    for relations, init, more, message in [
        ({}, "zero", {}, "finetune_many: expected at least one relation, got none."),
        ([], "zero", {}, "finetune_many: expected at least one relation, got none."),
        (splits, "noise", {}, "finetune_many: init='noise'; expected 'zero' or function vectors."),
        (splits, {"a": start}, {}, "finetune_many: init has no vector of b."),
        (splits, [start], {}, "finetune_many: 2 relations, but 1 vectors to start from."),
        (splits, [start, start.at_layer(2)], dict(layer=None), "finetune: the starts are of layers [1, 2]; give lay"),
        (splits, "zero", dict(n_train=0), "finetune_many: expected n_train of at least 1, or None for all pairs, got"),
        (["antonym", "antonym"], "zero", {}, "finetune_many: two relations are named 'antonym'; names must be"),
        ({"a": split_of(())}, "zero", {}, "finetune: no training pairs of a."),
    ]:
        with pytest.raises(ValueError, match=re.escape(message)):
            finetune_many(small, relations, init=init, **(settings | more))


def test_frozen_puts_everything_back_after_an_error(small):
    small.train()
    try:
        with pytest.raises(ZeroDivisionError, match="inside, False"), frozen(small):
            raise ZeroDivisionError(f"inside, {small.training}")
        assert small.training and all(parameter.requires_grad for parameter in small.parameters())
    finally:
        small.eval()


def test_no_warnings_in_an_ordinary_training(small):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        runs = finetune_many(
            small, {"a": split_of(TRAIN, VALID)}, init="zero", layer=1, epochs=1, generator=seeded(), progress=False
        )
    assert isinstance(runs, FineTunedSet)
