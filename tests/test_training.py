"""The loop's seams: changes and objectives of one's own, options, what is trained comes back from its file."""

import dataclasses
import re
import typing
from pathlib import Path

import pytest
import torch
from conftest import needs_hooked, random_model
from test_documents import blocks
from torch import nn
from torch.nn import functional as F

import fvlens
from fvlens.files import read_tensors, write_tensors
from fvlens.interventions import hooked, resid_hook
from fvlens.models import fingerprint
from fvlens.relations import Pair
from fvlens.training import (
    OBJECTIVES,
    Change,
    DistributedChange,
    Execution,
    LoRA,
    Objective,
    PreparedPrompts,
    Settings,
    SoftPrompt,
    SteerablePrompts,
    Task,
    TrainableDistributedVector,
    TrainableVector,
    Training,
    TrainingOptions,
    TrainingState,
    VectorChange,
    Wants,
    finetune,
    frozen,
    lora,
    soft_prompt,
    train,
)
from fvlens.training._lora import LORA_FORMAT
from fvlens.training._settings import LOSSES
from fvlens.training._soft_prompt import SOFT_PROMPT_FORMAT
from fvlens.vectors import DistributedVector

README = Path(fvlens.__file__).parent / "training/README.md"
WORDS = [("hot", "cold"), ("happy", "sad"), ("big", "a small one"), ("up", "down"), ("left", "right"), ("old", "young")]
PAIRS = tuple(Pair(*pair) for pair in WORDS)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def examples():
    """What the page's examples leave, run one after another as a reader would."""
    found = {}
    for code in blocks(README.read_text(encoding="utf-8"), "python"):
        exec(compile(code, str(README), "exec"), found)
    return found


# --- the page's examples ---


def test_the_example_of_a_change_trains_it_and_says_what_the_model_then_says(examples, model):
    gained, change = examples["gains"], examples["HeadGain"]
    assert gained.history.train_loss[-1] < gained.history.train_loss[0]
    tasks, own = examples["tasks"], PreparedPrompts.of(model, examples["tasks"])
    made = change(own, 1, 0)
    with torch.no_grad():
        made.gain.fill_(gained.result)
    rows = torch.arange(3)
    with frozen(model), torch.no_grad():
        logs = made.read(rows, torch.zeros_like(rows), Wants()).log_probs
    # the same by a plain hook
    for row, pair in zip(rows.tolist(), tasks[0].train, strict=False):
        prompts = fvlens.build_prompts(model, [pair], n_shots=0, generator=seeded())

        def scaled(z, hook):
            z = z.clone()
            z[:, :, 0] *= gained.result
            return z

        with torch.no_grad(), model.hooks(fwd_hooks=[("blocks.1.attn.hook_z", scaled)]):
            plain = model(prompts.tokens)[0, -1].log_softmax(dim=-1)
        assert float(logs[row, 0]) == pytest.approx(float(plain[prompts.answer_tokens[0, 0]]), abs=1e-4)


def test_the_examples_of_objectives_make_their_own_loss_small(examples, model):
    for name, history in examples["curves"].items():
        assert history.train_loss[-1] < 0.8 * history.train_loss[0], name
        assert history.valid_loss[-1] < history.valid_loss[0], name
    # of the start, by plain means: the divergence of bare queries from those after demonstrations
    tasks, n = examples["tasks"], 20
    bare = PreparedPrompts.of(model, tasks)
    with torch.no_grad():
        plain = bare.whole_passes(torch.arange(n), {}).log_softmax(dim=-1)
    says, targets = examples["says"][:n], bare.targets[:n]
    terms = (says.exp() * (says - plain)).sum(dim=-1) * (targets >= 0)
    start = float(examples["curves"]["Distillation"].train_loss[0])
    assert start == pytest.approx(float(terms.sum(dim=1).mean()), rel=1e-4)
    there = bare.found_at([resid_hook(3)], torch.arange(n))[resid_hook(3)]
    start = float(examples["curves"]["Resemblance"].train_loss[0])
    assert start == pytest.approx(float((there - examples["goal"][:n]).square().mean()), rel=1e-4)


# --- what objectives are told ---


class Pattern(Objective):
    """How little the last token attends to the first."""

    wants = Wants(hooks=("blocks.2.attn.hook_pattern",))

    def per_pair(self, readout):
        (pattern,) = readout.activations.values()
        return 1 - pattern[:, :, readout.last, 0].mean(dim=1)


def steered(model, n=4, layer=1, path=None, pairs=PAIRS):
    tasks = [Task("r", pairs[:n], pairs[n:], 0)]
    trainable = TrainableVector(0.1 * torch.randn(1, model.cfg.d_model, generator=seeded()), layer)
    return tasks, VectorChange(SteerablePrompts.of(model, tasks, layer=layer, path=path), trainable)


@pytest.mark.parametrize("path", [pytest.param("weights", marks=needs_hooked), "kv"])
def test_whole_distributions_over_kept_prompts_are_those_of_whole_passes(tiny, path):
    """Answers of several lengths, so that rows of several slices come back in order."""
    _, kept = steered(tiny, path=path)
    _, whole = steered(tiny, path="naive")
    whole.trainable.load_state_dict(kept.trainable.state_dict())
    rows = torch.tensor([2, 0, 5, 3, 1])
    relation = torch.zeros_like(rows)
    assert len(set((kept.prompts.targets >= 0).sum(dim=1).tolist())) > 1
    goal = torch.randn(tiny.cfg.d_vocab, generator=seeded(5))
    with frozen(tiny):
        ours, theirs = (one.read(rows, relation, Wants(logits=True, first=True)) for one in (kept, whole))
        there = ours.targets >= 0
        torch.testing.assert_close(ours.logits[there], theirs.logits[there], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ours.first, theirs.first, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ours.log_probs, theirs.log_probs, rtol=1e-4, atol=1e-5)
        for one in (ours, theirs):
            (one.logits[there] @ goal).sum().backward()
        mine, other = (own.trainable.rows[0].grad for own in (kept, whole))
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-4)


def test_attention_is_seen_as_the_change_leaves_it(tiny):
    tasks, change = steered(tiny)
    rows = torch.arange(3)
    with frozen(tiny), torch.no_grad():
        readout = change.read(rows, torch.zeros_like(rows), Pattern.wants)
        prompts = change.prompts
        found = []
        edits = prompts.edits(change.trainable.rows[0])
        with hooked(tiny, edits), hooked(tiny, {"blocks.2.attn.hook_pattern": found.append}):
            tiny(prompts.tokens[rows], attention_mask=prompts.mask[rows])
    torch.testing.assert_close(readout.activations["blocks.2.attn.hook_pattern"], found[0])
    assert readout.logits is None and readout.first is None
    outcome = train(Training(tasks, change, Settings(epochs=8, lr=0.3), Pattern()), progress=False).outcomes[0]
    assert outcome.history.train_loss[-1] < outcome.history.train_loss[0]


def test_a_residual_stream_is_seen_as_the_change_leaves_it(tiny):
    """At the very hook that the change acts at."""
    _, change = steered(tiny)
    rows, hook = torch.arange(3), resid_hook(1)
    with frozen(tiny), torch.no_grad():
        with_it = change.read(rows, torch.zeros_like(rows), Wants(hooks=(hook,))).activations[hook]
        plain = change.prompts.found_at([hook], rows)[hook]
    last = change.prompts.last
    torch.testing.assert_close(with_it[:, last] - plain, change.trainable.rows[0].expand_as(plain), rtol=0, atol=1e-5)


class Doubled(Objective):
    """A mean over pairs, twice."""

    def per_pair(self, readout):
        return -readout.log_probs.sum(dim=1)

    def of_mean(self, mean):
        return 2 * mean


def test_a_loss_of_a_relation_is_what_its_mean_makes(tiny):
    runs = []
    for objective in (None, Doubled()):
        tasks, change = steered(tiny)
        runs.append(train(Training(tasks, change, Settings(epochs=2), objective), progress=False).outcomes[0])
    plain, doubled = (run.history.train_loss for run in runs)
    assert float(doubled[0]) == pytest.approx(2 * float(plain[0]), rel=1e-6)


def test_a_state_of_another_objective_is_refused(tiny):
    tasks, change = steered(tiny)
    done = train(Training(tasks, change, Settings(epochs=1), Doubled()), progress=False)
    with pytest.raises(ValueError, match="finetune: the saved training has objective 'Doubled', this one 'Pattern'"):
        train(Training(tasks, change, Settings(epochs=1), Pattern()), resume=done.state, progress=False)


def test_every_named_loss_has_its_objective():
    assert tuple(OBJECTIVES) == LOSSES


# --- the loop ---


class Two(Change):
    """Two parameters of unlike shapes, one of them not contiguous."""

    def __init__(self, prompts):
        super().__init__(prompts)
        d_model = self.model.cfg.d_model
        self.left = nn.Parameter(torch.randn(d_model, 2, generator=seeded()).T)
        self.right = nn.Parameter(torch.zeros(2))
        assert not self.left.is_contiguous()

    def parameters(self):
        return [[self.left, self.right]]

    def scale(self, rows):
        return 1.0

    def edits(self, rows, relation):
        return {resid_hook(1): self.prompts.at_last_token(self.right @ self.left)}


def two(model, **settings):
    tasks = [Task("r", PAIRS[:4], PAIRS[4:], 0)]
    change = Two(PreparedPrompts.of(model, tasks))
    return Training(tasks, change, Settings(epochs=3, batch_size=2, **settings), whose="somebody")


def test_an_interrupted_epoch_leaves_no_trace(tiny, monkeypatch):
    """Parameters, the optimiser's memory, curves and the order of minibatches are those of the last whole epoch."""
    whole = two(tiny)
    expected = train(whole, progress=False)
    part = two(tiny)
    own, n_steps = Training._step, [0]

    def step(self, batch):
        own(self, batch)
        n_steps[0] += 1
        if n_steps[0] == 3:  # the second epoch's first
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Training, "_step", step)
        with pytest.warns(UserWarning, match="training was interrupted: 1 of 3 epochs"):
            stopped = train(part, progress=False)
    assert not stopped.complete and part.epoch == 1
    fresh = two(tiny)
    alone = train(fresh, epochs=1, progress=False)
    assert alone.complete and fresh.epoch == 1
    for name, tensor in alone.state.tensors.items():
        torch.testing.assert_close(stopped.state.tensors[name], tensor, rtol=0, atol=0)
    for resumed in (train(part, progress=False), train(two(tiny), resume=stopped.state, progress=False)):
        torch.testing.assert_close(resumed.outcomes[0].values, expected.outcomes[0].values, rtol=0, atol=0)


def test_no_state_is_made_where_nobody_asks_for_one(tiny, monkeypatch, tmp_path):
    made = []
    own = Training.state
    monkeypatch.setattr(Training, "state", lambda self: made.append(self.epoch) or own(self))
    train(two(tiny), progress=False)
    assert made == [3]
    train(two(tiny), progress=False, checkpoint=tmp_path / "state.safetensors")
    assert made[1:] == [1, 2, 3, 3]


def test_messages_name_the_function_that_was_called(tiny, tmp_path):
    with pytest.raises(
        ValueError, match=r"somebody: folder .*absent of the checkpoint does not exist; create it first"
    ):
        train(two(tiny), checkpoint=tmp_path / "absent" / "state", progress=False)
    done = train(two(tiny), progress=False)
    with pytest.raises(ValueError, match="somebody: the saved training has settings"):
        train(two(tiny, lr=0.5), resume=done.state, progress=False)
    damaged = TrainingState({**done.state.tensors, "0.value": torch.zeros(3)}, done.state.header)
    with pytest.raises(ValueError, match="somebody: the saved training is damaged"):
        train(two(tiny), resume=damaged, progress=False)


def test_a_result_leaves_the_training_as_it_is(tiny):
    """The best epoch may be an earlier one; what goes on is the last."""
    heads = torch.zeros(tiny.cfg.n_layers, tiny.cfg.n_heads, tiny.cfg.d_head)
    init = DistributedVector(heads, (fvlens.Head(0, 1),), "r", fingerprint(tiny))
    tasks = [Task("r", PAIRS[:4], PAIRS[4:], 0)]
    change = DistributedChange(SteerablePrompts.of(tiny, tasks, layer=-1), TrainableDistributedVector(init))
    training = Training(tasks, change, Settings(epochs=3, lr=0.5))
    train(training, epochs=2, progress=False)
    before = training.state().tensors["0.value"]
    training.best[0] = torch.zeros_like(training.best[0])
    (outcome,) = training.outcomes()
    assert torch.equal(training.state().tensors["0.value"], before) and before.abs().max() > 0
    assert outcome.result.values.abs().max() == 0


# --- options ---


def test_keywords_are_the_fields_of_settings_and_execution():
    fields = [field.name for kind in (Settings, Execution) for field in dataclasses.fields(kind)]
    assert sorted(typing.get_type_hints(TrainingOptions)) == sorted(fields)


def test_settings_as_one_value_and_keywords_over_it(tiny):
    settings = Settings(epochs=2, lr=0.1, batch_size=3, template="arrow")
    how = dict(init="zero", layer=1, generator=seeded(), progress=False)
    tuned = finetune(tiny, PAIRS[:4], settings=settings, **how)
    assert tuned.settings == settings
    tuned = finetune(tiny, PAIRS[:4], settings=settings, epochs=1, template=None, **how)
    assert tuned.settings == dataclasses.replace(settings, epochs=1)
    soft = soft_prompt(tiny, PAIRS[:4], settings=settings, epochs=1, generator=seeded(), progress=False)
    assert soft.settings == dataclasses.replace(settings, epochs=1)


@pytest.mark.parametrize("train", [finetune, soft_prompt, lora])
def test_an_unknown_keyword_is_refused(tiny, train):
    how = dict(init="zero", layer=1) if train is finetune else {}
    with pytest.raises(TypeError, match=f"{train.__name__}\\(\\) got an unexpected keyword argument 'epoch'"):
        train(tiny, PAIRS, epoch=1, generator=seeded(), **how)


@pytest.mark.parametrize("train", [soft_prompt, lora])
def test_baselines_go_on_where_they_were_stopped(tiny, train, tmp_path, monkeypatch):
    how = dict(valid=PAIRS[4:], epochs=3, batch_size=2, progress=False)
    whole = train(tiny, PAIRS[:4], generator=seeded(), **how)
    own = Training.one_epoch

    def one_epoch(self):
        if self.epoch == 1:
            raise KeyboardInterrupt
        own(self)

    with monkeypatch.context() as patch:
        patch.setattr(Training, "one_epoch", one_epoch)
        with pytest.warns(UserWarning, match="was interrupted: 1 of 3 epochs"):
            part = train(tiny, PAIRS[:4], generator=seeded(), **how)
    assert not part.complete and len(part.history) == 2
    file = part.state.save(tmp_path / "state.safetensors")
    resumed = train(tiny, PAIRS[:4], resume=file, generator=seeded(), **how)
    for field in dataclasses.fields(whole.change):
        ours, theirs = (getattr(one.change, field.name) for one in (resumed, whole))
        assert torch.equal(ours, theirs) if isinstance(ours, torch.Tensor) else ours == theirs
    with pytest.raises(ValueError, match=f"{train.__name__}: path='kv', but this is trained by whole passes"):
        train(tiny, PAIRS[:4], path="kv", generator=seeded(), **how)


# --- files ---


@pytest.fixture(scope="module")
def adapted():
    """A model and what was trained on it."""
    model = random_model()
    how = dict(epochs=1, progress=False)
    soft = soft_prompt(model, PAIRS[:3], n_tokens=2, generator=seeded(), **how).change
    return model, soft, lora(model, PAIRS[:3], rank=2, layers=[0, 2], generator=seeded(), **how).change


@pytest.mark.parametrize("which", [1, 2], ids=["soft prompt", "low-rank update"])
def test_what_was_trained_comes_back_from_its_file(adapted, which, tiny, model, tmp_path):
    own, change = adapted[0], adapted[which]
    file = change.save(tmp_path / "change.safetensors")
    loaded = type(change).load(file, model=own)
    for field in dataclasses.fields(change):
        ours, theirs = (getattr(one, field.name) for one in (loaded, change))
        assert torch.equal(ours, theirs) if isinstance(ours, torch.Tensor) else ours == theirs
    tokens = torch.tensor([[1, 5, 9, 2]])
    with torch.no_grad():
        found = [one.read(own, tokens, torch.ones_like(tokens), n_read=1) for one in (loaded, change)]
    assert torch.equal(*found)
    with pytest.raises(ValueError, match=r"was made on model .*, not on this one"):
        type(change).load(file, model=model)
    with pytest.raises(ValueError, match="no vector file at"):
        type(change).load(tmp_path / "none")
    other = adapted[3 - which].save(tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"format 'fvlens-(lora|soft-prompt)-1', expected"):
        type(change).load(other)


@pytest.mark.parametrize(
    "kind, format, what, damage, told",
    [
        (SoftPrompt, SOFT_PROMPT_FORMAT, "soft prompt", lambda t, h: t.pop("offsets"), "KeyError: 'offsets'"),
        (SoftPrompt, SOFT_PROMPT_FORMAT, "soft prompt", lambda t, h: h.clear(), "KeyError: 'fingerprint'"),
        (
            SoftPrompt, SOFT_PROMPT_FORMAT, "soft prompt", lambda t, h: t.update(tokens=t["tokens"][:1]),
            "offsets [2, 32] of tokens [1]",
        ),
        (LoRA, LORA_FORMAT, "low-rank update", lambda t, h: t.pop("b_v"), "KeyError: 'b_v'"),
        (LoRA, LORA_FORMAT, "low-rank update", lambda t, h: h.update(layers=[0]), "1 layers and [[2, 32, 2], "),
    ],
)  # fmt: skip
def test_damaged_changes_are_refused(adapted, tmp_path, unchecked, kind, format, what, damage, told):
    change = next(one for one in adapted[1:] if isinstance(one, kind))
    file = change.save(tmp_path / "change.safetensors")
    tensors, header = read_tensors(file, format)
    damage(tensors, header)
    write_tensors(file, tensors, header, format)
    with pytest.raises(ValueError, match=f"change.safetensors: damaged {what} \\(.*{re.escape(told)}"):
        kind.load(file)


def test_cross_entropy_is_what_torch_says(tiny):
    _, change = steered(tiny, path="naive")
    rows = torch.arange(4)
    with frozen(tiny), torch.no_grad():
        readout = change.read(rows, torch.zeros_like(rows), Wants(logits=True, first=True))
    expected = F.cross_entropy(
        readout.logits.flatten(0, 1), readout.targets.flatten(), ignore_index=-1, reduction="sum"
    )
    assert float(OBJECTIVES["cross_entropy"]().per_pair(readout).sum()) == pytest.approx(float(expected), rel=1e-5)
    right = OBJECTIVES["cross_entropy"]().is_right(readout)
    assert right.tolist() == (readout.first.argmax(dim=-1) == readout.targets[:, 0]).tolist()
