"""bfloat16 and float16 models: what is summed in float32, and how near the numbers come to a float32 model's.

Bars leave about three times the error that was measured on these prompts; what was measured, the worst of all classes
and paths, stands behind them in brackets. ``fvlens study precision`` measures more relations and prompts.
"""

import contextlib
import copy
import dataclasses
import functools
import math

import checkpoints
import pytest
import torch
from conftest import needs_hooked, seeded
from matrix import BACKENDS

import fvlens
from fvlens.metrics import spearman, top_k_overlap
from fvlens.models import fingerprint
from fvlens.prompts import TokenClass
from fvlens.studies import STUDIES, Settings, run_study
from fvlens.studies import _precision as study_precision
from fvlens.suffix import SteeredPrompts, open_reader, run_prefix, steered_resid, wide_logits
from fvlens.suffix._estimate import Estimate
from fvlens.suffix._layout import is_laid_out, laid_out
from fvlens.training import frozen, lora

HALF = {"bfloat16": torch.bfloat16, "float16": torch.float16}
ROUTES = {"hooked": ("weights", "kv", "naive"), "bridge": ("kv", "naive")}
BOTH = [(backend, precision) for backend in BACKENDS for precision in HALF]
EACH = [(backend, precision, path) for backend, precision in BOTH for path in ROUTES[backend]]
NAME = "animal-german"
N_HEADS = 8
"""Heads whose effects on so few prompts lie above the rounding of half precision, so that their order is the same."""


@functools.cache
def loaded(backend, precision, folder="rel-small"):
    return fvlens.load_model(folder, device="cpu", dtype=getattr(torch, precision), backend=backend)


def built(model, n_prompts, *, labels="true", n_shots=4):
    """Prompts of one relation, the same for every model; every other one is shorter, and so left-padded."""
    split = fvlens.load_relation(NAME).split(seeded())
    generator = seeded(1)
    long, short = (
        fvlens.build_prompts(
            model,
            split.train,
            queries=split.valid,
            n_prompts=n_prompts // 2,
            n_shots=shots,
            labels=labels,
            relation=NAME,
            generator=generator,
        )
        for shots in (n_shots, n_shots - 1)
    )
    width = long.tokens.shape[1] - short.tokens.shape[1]
    assert width > 0
    fill = {"tokens": 0, "attention_mask": 0, "token_classes": int(TokenClass.PADDING)}
    fields = {
        name: torch.cat([getattr(long, name), torch.nn.functional.pad(getattr(short, name), (width, 0), value=value)])
        for name, value in fill.items()
    }
    for name in ("queries", "demonstrations", "texts"):
        fields[name] = getattr(long, name) + getattr(short, name)
    return dataclasses.replace(long, answer_tokens=torch.cat([long.answer_tokens, short.answer_tokens]), **fields)


@functools.cache
def effects_of(backend, precision, path, folder="rel-small", n_prompts=4):
    """Effects of a few prompts and the vector of the best heads."""
    model = loaded(backend, precision, folder)
    means = fvlens.mean_head_activations(model, built(model, 2 * n_prompts), progress=False)
    effects = fvlens.indirect_effects(model, built(model, n_prompts, labels="random"), means, path=path, progress=False)
    return effects, fvlens.function_vector(model, means, heads=effects.ranking[:N_HEADS], layer=1)


@contextlib.contextmanager
def captured(model, *names):
    """Activations by hook name: one tensor a forward."""
    found = {name: [] for name in names}
    points = [model.hook_dict[name] for name in names]
    for name, point in zip(names, points, strict=True):
        point.add_hook(lambda activation, hook, name=name: found[name].append(activation.detach().clone()))
    try:
        yield found
    finally:
        for point in points:
            point.remove_hooks()


def exact_logits(model, normed):
    """The unembedding in float64 of what the model itself gives it."""
    unembed = model.unembed
    return normed.double() @ unembed.W_U.double() + unembed.b_U.double()


# --- sums ---


@pytest.mark.parametrize(("backend", "precision"), BOTH)
def test_means_of_large_values_are_not_rounded(backend, precision):
    """With a large common part in every z, a half-precision sum of it loses what the prompts differ by."""
    model = fvlens.load_model("rel-small", device="cpu", dtype=HALF[precision], backend=backend)
    with torch.no_grad():
        for block in model.blocks:
            block.attn.W_V.mul_(0.1)
        bias = [
            block.attn.b_V if backend == "hooked" else block.attn.v.original_component.bias for block in model.blocks
        ]
        for values in bias:
            values += 20.3
    prompts = built(model, 40, n_shots=1)
    names = [f"blocks.{layer}.attn.hook_z" for layer in range(model.cfg.n_layers)]
    with captured(model, *names) as found:
        means = fvlens.mean_head_activations(model, prompts, batch_size=4, progress=False)
    assert means.z.dtype == torch.float32
    seen = [torch.cat([z[:, -1] for z in found[name]]) for name in names]
    assert all(len(z) == 40 and z.dtype == HALF[precision] for z in seen)
    expected = torch.stack([z.double().mean(dim=0) for z in seen])
    assert expected.abs().mean() > 15
    torch.testing.assert_close(means.z.double(), expected, rtol=1e-6, atol=1e-6)
    half = torch.stack([sum(part.sum(dim=0) for part in z.split(4)) / 40 for z in seen])
    assert (half.double() - expected).abs().max() > 1e-3  # what this test would see


@pytest.mark.parametrize(("backend", "precision"), BOTH)
def test_vectors_are_summed_in_float32(backend, precision):
    _, vector = effects_of(backend, precision, "kv")
    model = loaded(backend, precision)
    means = fvlens.mean_head_activations(model, built(model, 8), progress=False)
    expected = torch.zeros(model.cfg.d_model, dtype=torch.float64)
    rounded = expected.clone()
    for layer, head in vector.heads:
        weight = model.blocks[layer].attn.W_O[head].detach()
        expected += means.z[layer, head].double() @ weight.double()
        rounded += (means.z[layer, head].to(weight.dtype) @ weight).double()
    assert vector.vector.dtype == torch.float32
    assert (vector.vector - expected).norm() < 1e-6 * expected.norm()
    assert (rounded - expected).norm() > 1e-4 * expected.norm()


@pytest.mark.parametrize(("backend", "precision"), BOTH)
def test_logits_and_probabilities_are_not_rounded(backend, precision):
    model = loaded(backend, precision)
    prompts = built(model, 4, labels="random")
    answers = prompts.answer_tokens[:, 0]
    with captured(model, "unembed.hook_in") as found, torch.no_grad():
        reader = open_reader(model, len(prompts), keep=False)
        logits = reader.read(prompts.tokens, prompts.attention_mask, n_read=1)[:, 0]
        own = model(prompts.tokens, attention_mask=prompts.attention_mask)[:, -1]
        run = run_prefix(model, prompts.tokens, prompts.attention_mask, path="kv")
        logs = run.log_probs(run.resid_final[:, None], answers[:, None])[:, 0, 0]
    expected = exact_logits(model, found["unembed.hook_in"][0].flatten(0, -2))
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(own, expected.to(own.dtype), rtol=2**-8, atol=0.02)  # the model itself is left as it is
    assert (own.double() - expected).abs().max() > 1e-3
    expected_logs = expected.log_softmax(dim=-1).gather(-1, answers[:, None])[:, 0]
    suffix = exact_logits(model, found["unembed.hook_in"][-1].flatten(0, -2))
    torch.testing.assert_close(
        logs.double(), suffix.log_softmax(dim=-1).gather(-1, answers[:, None])[:, 0], rtol=1e-5, atol=1e-5
    )
    for path in ROUTES[backend]:
        effects, _ = effects_of(backend, precision, path)
        eps = torch.finfo(HALF[precision]).eps
        wanted = expected_logs
        if path == "weights":  # its own residual streams, which are rounded otherwise than the class's
            final = run_prefix(model, prompts.tokens, prompts.attention_mask).resid_final[:, 0]
            own_logits = exact_logits(model, laid_out(model).final(final))
            wanted = own_logits.log_softmax(dim=-1).gather(-1, answers[:, None])[:, 0]
        torch.testing.assert_close(effects.baseline.double().log(), wanted, rtol=0, atol=eps)


@pytest.mark.parametrize("backend", BACKENDS)
def test_ranks_have_no_ties_of_rounding(backend):
    """A token tied with the answer does not count against it, so that rounded logits would flatter the model."""
    model = loaded(backend, "bfloat16")
    pairs = list(fvlens.load_relation(NAME))
    with captured(model, "unembed.hook_in") as found:
        score = fvlens.evaluate(model, pairs, batch_size=len(pairs), generator=seeded())
    exact = exact_logits(model, found["unembed.hook_in"][0].flatten(0, -2))
    answers = torch.tensor([model.tokenizer(f" {pair.output}", add_special_tokens=False).input_ids for pair in pairs])
    answers = answers[:, :1]
    ranks = (exact > exact.gather(-1, answers)).sum(dim=-1)
    assert torch.equal(score.ranks, ranks)
    rounded = exact.bfloat16()
    assert not torch.equal((rounded > rounded.gather(-1, answers)).sum(dim=-1), ranks)


@pytest.mark.parametrize("precision", HALF)
def test_wide_logits_in_slices(precision, monkeypatch):
    from fvlens.suffix import _layout

    generator = seeded()
    rows, weight, bias = (torch.randn(shape, generator=generator) for shape in ((2, 3, 8), (8, 21), (21,)))
    rows, weight, bias = (x.to(HALF[precision]) for x in (rows, weight, bias))
    monkeypatch.setattr(_layout, "WEIGHT_SLICE", 8 * 5)
    expected = rows.double() @ weight.double() + bias.double()
    torch.testing.assert_close(wide_logits(rows, weight, bias).double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(wide_logits(rows, weight).double(), expected - bias.double(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("backend", "precision"), BOTH)
def test_decoded_logits_are_not_rounded(backend, precision):
    model = loaded(backend, precision)
    _, vector = effects_of(backend, precision, "kv")
    with torch.no_grad():
        normed = model.ln_final(vector.vector.to(HALF[precision])[None, None])[0, 0]
    exact = normed.double() @ model.W_U.double()
    best = exact.topk(10)
    found = vector.decode(model, 10)
    assert [text for text, _ in found] == [model.tokenizer.decode([token]) for token in best.indices.tolist()]
    assert [value for _, value in found] == pytest.approx(best.values.tolist(), rel=1e-5)


@pytest.mark.parametrize(("backend", "precision"), BOTH)
def test_an_injected_sum_is_rounded_once(backend, precision):
    """``round(x + v)``, not ``round(x + round(v))``; the fast path does the same."""
    model = loaded(backend, precision)
    prompts = built(model, 6)
    _, vector = effects_of(backend, precision, "kv")
    name = "blocks.1.hook_resid_post"
    with torch.no_grad(), captured(model, name) as plain:
        model(prompts.tokens, attention_mask=prompts.attention_mask)
    with torch.no_grad(), fvlens.inject(model, vector, scale=0.7), captured(model, name) as steered:
        model(prompts.tokens, attention_mask=prompts.attention_mask)
    before, after = plain[name][0], steered[name][0]
    assert after.dtype == HALF[precision]
    assert torch.equal(after[:, :-1], before[:, :-1])
    once = (before[:, -1].float() + 0.7 * vector.vector).to(HALF[precision])
    twice = before[:, -1] + (0.7 * vector.vector).to(HALF[precision])
    assert torch.equal(after[:, -1], once)
    assert not torch.equal(once, twice)
    with torch.no_grad():
        run = run_prefix(model, prompts.tokens, prompts.attention_mask, path="kv")
        top = model.cfg.n_layers - 1
        fast = steered_resid(run, top, vector.vector)[:, 0, 0]
    assert torch.equal(fast, (run.resid_final[:, 0].float() + vector.vector).to(HALF[precision]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_a_shared_vector_are_summed_in_float32(backend):
    """The gradient of one vector for all prompts is the sum of those of one vector a prompt."""
    model = loaded(backend, "bfloat16")
    prompts = built(model, 6)
    _, vector = effects_of(backend, "bfloat16", "kv")

    class Steering:
        def __init__(self, values):
            self.values = values

        def additions(self):
            return {"blocks.1.hook_resid_post": self.values}

        def check(self, model):
            pass

    def gradient(values):
        values.requires_grad_()
        with fvlens.inject(model, Steering(values)):
            logits = open_reader(model, len(prompts), keep=False).read(prompts.tokens, prompts.attention_mask, n_read=1)
        logits[:, 0].log_softmax(dim=-1).gather(-1, prompts.answer_tokens[:, :1]).sum().backward()
        return values.grad

    shared = gradient(vector.vector.clone())
    each = gradient(vector.vector.expand(len(prompts), -1).clone())
    expected = each.double().sum(dim=0)
    assert (shared - expected).norm() < 1e-6 * expected.norm()
    assert (expected.bfloat16().double() - expected).norm() > 1e-4 * expected.norm()
    for parameter in model.parameters():
        parameter.grad = None


# --- how near to float32 ---

BARS = {
    "bfloat16": dict(spearman=0.985, difference=0.006, cosine=0.9999),  # [0.9947, 0.0047, 0.999999]
    "float16": dict(spearman=0.998, difference=0.0008, cosine=0.99999),  # [0.9995, 0.00035, 0.9999999]
}
"""For the embedded model: AIE against float32 over the heads that have an effect, its largest difference, and the
function vectors."""


@pytest.mark.parametrize(("backend", "precision", "path"), EACH)
def test_effects_come_close_to_float32(backend, precision, path):
    bars = BARS[precision]
    effects, vector = effects_of(backend, precision, path)
    reference, expected = effects_of(backend, "float32", "naive")
    assert effects.path == path
    assert effects.cie.dtype == effects.baseline.dtype == torch.float32
    assert bool(effects.cie.isfinite().all())
    ours, theirs = effects.aie.flatten(), reference.aie.flatten()
    assert (ours - theirs).abs().max() < bars["difference"]
    clear = theirs.abs() > bars["difference"]  # below it lies the order of rounding errors
    assert int(clear.sum()) >= 8
    assert spearman(ours[clear], theirs[clear]) > bars["spearman"]
    assert top_k_overlap(ours, theirs, N_HEADS) >= 0.9
    assert vector.cosine(expected) > bars["cosine"]
    # and the ways to compute agree within the precision: some eps of a probability of 1 (at most 2.8 were measured)
    naive, _ = effects_of(backend, precision, "naive")
    assert (effects.cie - naive.cie).abs().max() < 4 * torch.finfo(HALF[precision]).eps


@pytest.mark.parametrize(("backend", "precision"), BOTH)
def test_left_padding_changes_no_more_than_rounding(backend, precision):
    """Attention masks at the lowest number of the precision give no NaN, and hide the padding."""
    model = loaded(backend, precision)
    prompts = built(model, 6, labels="random")
    padded = open_reader(model, len(prompts), keep=False)
    with torch.no_grad():
        together = padded.read(prompts.tokens, prompts.attention_mask, n_read=1)[:, 0].softmax(dim=-1)
        for row, length in enumerate(prompts.attention_mask.sum(dim=1).tolist()):
            alone = open_reader(model, 1, keep=False).read(
                prompts.tokens[row : row + 1, -length:], torch.ones(1, length, dtype=torch.long), n_read=1
            )
            difference = (alone[0, 0].softmax(dim=-1) - together[row]).abs().max()
            assert difference < 4 * torch.finfo(HALF[precision]).eps


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {name: checkpoints.save(name, tmp_path_factory.mktemp(name)) for name in ("llama", "gemma2")}


RANDOM_BARS = {
    "bfloat16": dict(spearman=0.93, cosine=0.98),  # [0.965, 0.992]
    "float16": dict(spearman=0.98, cosine=0.9998),  # [0.993, 0.99992]
}
"""For random weights, whose 12 effects are alike: AIE against float32, and the effects of all prompts."""


@pytest.mark.parametrize(("backend", "precision", "path"), EACH)
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_effects_of_other_architectures_come_close_to_float32(folders, name, backend, precision, path):
    bars = RANDOM_BARS[precision]
    effects, _ = effects_of(backend, precision, path, folders[name], 16)
    reference, _ = effects_of(backend, "float32", "naive", folders[name], 16)
    assert bool(effects.cie.isfinite().all()) and effects.cie.abs().max() > 0
    ours, theirs = effects.cie.flatten(), reference.cie.flatten()
    assert spearman(effects.aie.flatten(), reference.aie.flatten()) > bars["spearman"]
    assert torch.cosine_similarity(ours, theirs, dim=0) > bars["cosine"]


# --- whose vector it is ---


@pytest.mark.parametrize(("backend", "precision"), BOTH)
def test_a_vector_of_another_precision_says_so(tmp_path, backend, precision):
    _, vector = effects_of(backend, precision, "kv")
    path = vector.save(tmp_path / "half.safetensors")
    again = fvlens.FunctionVector.load(path, model=loaded(backend, precision))
    assert torch.equal(again.vector, vector.vector)
    assert (again.fingerprint.dtype, fingerprint(loaded(backend, precision)).dtype) == (precision, precision)
    single = loaded(backend, "float32")
    message = rf"was made on the same weights in another form \(then / now: dtype: {precision} / float32\)"
    with pytest.warns(UserWarning, match=message):
        fvlens.FunctionVector.load(path, model=single)
    tokens = built(single, 2).tokens
    with pytest.warns(UserWarning, match=message), fvlens.inject(single, again), torch.no_grad():
        single(tokens)
    with torch.no_grad():
        plain = single(tokens)
        with fvlens.inject(single, again, check=False):
            steered = single(tokens)
    assert bool(steered.isfinite().all()) and (steered - plain)[:, -1].abs().max() > 0.1


# --- the table ---


def effects_with(aie):
    """Effects of one prompt with this AIE map."""
    effects, _ = effects_of(BACKENDS[0], "float32", "naive")
    cie = torch.tensor(aie, dtype=torch.float32).reshape(1, 3, 4)
    mark = dataclasses.replace(effects.fingerprint, n_layers=3, n_heads=4)
    return dataclasses.replace(effects, cie=cie, baseline=torch.zeros(1), fingerprint=mark)


def test_compare_counts_heads_above_the_error():
    theirs = [0.5, -0.4, 0.3, 0.2, 0.02, 0.01, 0.0, -0.01, -0.02, 0.011, 0.012, 0.013]
    ours = [0.5, -0.4, 0.2, 0.3, 0.02, 0.01, 0.0, -0.01, -0.02, 0.011, 0.012, 0.013]
    found = study_precision.compare(effects_with(ours), effects_with(theirs))
    assert found["difference"] == pytest.approx(0.1)
    assert found["clear"] == pytest.approx(4 / 12)
    assert found["spearman_clear"] == pytest.approx(1 - 6 * 2 / (4 * 15))  # two neighbours of four swapped
    assert found["spearman"] == pytest.approx(1 - 6 * 2 / (12 * 143))
    assert found["overlap"] == 1.0
    far = study_precision.compare(effects_with([-x for x in theirs]), effects_with(theirs))
    assert far["clear"] == 0 and math.isnan(far["spearman_clear"])


def test_the_table_compares_each_precision_with_float32(tmp_path, monkeypatch):
    monkeypatch.setattr(study_precision, "N_CLEAN", 8)
    monkeypatch.setattr(study_precision, "N_CORRUPTED", 4)
    monkeypatch.setattr(study_precision, "BACKENDS", ("bridge",))
    monkeypatch.setattr(study_precision, "DTYPES", ("float32", "bfloat16"))
    study = STUDIES["precision"]
    outcome = run_study(study, study.cells(Settings(relations=(NAME,))), tmp_path)
    tables = outcome.tables()
    lines = study.markdown(tables).splitlines()[:-2]
    assert [line.split(" | ")[:3] for line in lines[2:]] == [
        ["| bridge", precision, labels]
        for precision in ("other prompts", "bfloat16")
        for labels in ("permuted", "random")
    ]
    assert len({line.count("|") for line in lines}) == 1
    rows = {(row["precision"], row["labels"]): row for row in tables["precisions"].to_dict("records")}
    for labels in ("permuted", "random"):
        half, other = rows["bfloat16", labels], rows["other prompts", labels]
        assert half["spearman"] > 0.98  # [0.99]
        assert half["difference"] < 0.2 * other["difference"]
        by_relation = [r for r in outcome.rows() if (r["precision"], r["labels"]) == ("bfloat16", labels)]
        assert [r["overlap"] for r in by_relation] == [half["overlap"]]


def test_the_yardsticks_vector_is_that_of_the_recipe(model):
    split = fvlens.load_relation("plural").split(seeded())
    found = fvlens.find_vector(model, split, n_prompts=6, n_corrupted=4, seed=0, generator=seeded(), progress=False)
    vector, scale = study_precision.best_vector(model, split.valid, found.means, found.effects, 0)
    assert torch.equal(vector.vector, found.vector.vector)
    assert (vector.layer, scale) == (found.layer, found.scale)


# --- products in bfloat16 of a float32 model ---


@needs_hooked
@pytest.mark.parametrize("name", ["antonym", "plural"])
def test_products_in_bfloat16_come_near_and_are_recorded(name):
    """The residual stream and sums stay in float32: nearer than a model in bfloat16, and never unasked."""
    model = loaded("hooked", "float32")
    split = fvlens.load_relation(name).split(seeded())
    build = functools.partial(fvlens.build_prompts, model, split.train, generator=seeded())
    means = fvlens.mean_head_activations(model, build(n_prompts=20), progress=False)
    shuffled = build(n_prompts=25, labels="permuted")
    exact = fvlens.indirect_effects(model, shuffled, means, progress=False)
    near = fvlens.indirect_effects(model, shuffled, means, progress=False, compute=torch.bfloat16)
    assert (exact.compute, near.compute) == (None, "bfloat16")
    assert (exact.path, near.path, near.weights) == ("weights", "weights", "copied")
    assert near.cie.dtype == torch.float32
    assert 1e-5 < (near.cie - exact.cie).abs().max() < 0.1  # [0.033], of effects up to 0.9
    assert (near.aie - exact.aie).abs().max() < 0.01  # [0.0031], of averages up to 0.52
    # of heads with effects within the error any order is chance: over all 32 heads 0.963 here, over 0.97 elsewhere
    counts = exact.aie.abs() > 0.0031
    assert 5 <= counts.sum() < counts.numel()
    assert spearman(near.aie[counts], exact.aie[counts]) > 0.98

    vector = fvlens.function_vector(model, means, heads=exact.top(10), layer=2)
    sweeps = [
        fvlens.layer_sweep(model, split.test, vector, generator=seeded(1), progress=False, compute=compute)
        for compute in (None, torch.bfloat16)
    ]
    assert [one.compute for sweep in sweeps for one in sweep.evaluations[:1]] == [None, "bfloat16"]
    ranks, chances = (
        [torch.cat([getattr(one, field) for one in sweep.evaluations]) for sweep in sweeps]
        for field in ("ranks", "probabilities")
    )
    assert 0 < (chances[0] - chances[1]).abs().max() < 0.08  # [0.027]
    assert (ranks[0] != ranks[1]).sum() <= 10  # [3 of 272, 3 of 192]
    assert ((ranks[0] == 0) != (ranks[1] == 0)).sum() <= 3  # [1 and 1]


@needs_hooked
def test_trainings_with_products_in_bfloat16_come_near_and_are_recorded(tmp_path):
    """Vectors of the residual stream and of heads: near those of float32 products, and never unasked."""
    model = loaded("hooked", "float32")
    split = fvlens.load_relation("antonym").split(seeded())
    values = torch.zeros(model.cfg.n_layers, model.cfg.n_heads, model.cfg.d_head)
    heads = fvlens.DistributedVector(values, (fvlens.Head(1, 0), fvlens.Head(2, 1)), "antonym", fingerprint(model))
    for start in (dict(init="zero", layer=1), dict(init=heads)):
        file = tmp_path / "state"
        how = dict(valid=split.valid, epochs=6, progress=False, **start)
        exact, near = (
            fvlens.finetune(model, split.train[:20], generator=seeded(), compute=compute, checkpoint=path, **how)
            for compute, path in ((None, None), (torch.bfloat16, file))
        )
        assert [(one.compute, one.path) for one in (exact, near)] == [(None, "weights"), ("bfloat16", "weights")]
        for name in ("train_loss", "valid_loss"):
            losses = [getattr(one.history, name) for one in (exact, near)]
            assert losses[0].dtype == losses[1].dtype == torch.float32
            assert 0 < (losses[0] - losses[1]).abs().max() < 0.15
        mine, theirs = (
            torch.cat([value.flatten() for value in one.vector.additions().values()]) for one in (exact, near)
        )
        assert 0 < (mine - theirs).norm() < 0.2 * mine.norm()
        with pytest.raises(ValueError, match="finetune: the saved training has compute 'bfloat16', this one None"):
            fvlens.finetune(model, split.train[:20], generator=seeded(), resume=file, **how)


@needs_hooked
@pytest.mark.parametrize("compute", [None, torch.bfloat16])
def test_gradients_with_products_in_bfloat16_are_those_of_float32_nearly(compute):
    """The yardstick is the same training step in float64; float32 is a thousand times nearer to it."""
    exact, model = copy.deepcopy(loaded("hooked", "float32")).double(), loaded("hooked", "float32")
    exact.cfg.dtype = torch.float64
    pairs = fvlens.load_relation("antonym").pairs[:20]
    prompts = fvlens.build_prompts(model, pairs, n_shots=0, generator=seeded())
    rows, found = torch.arange(len(pairs)), []
    for network, precision in ((exact, None), (model, compute)):
        kept = SteeredPrompts(
            network, prompts.tokens, prompts.attention_mask, prompts.answer_tokens, 1, path="weights", compute=precision
        )
        vector = torch.full((network.cfg.d_model,), 0.1, requires_grad=True)
        with frozen(network):
            (gradient,) = torch.autograd.grad(kept.read(rows, vector)[0].sum(), vector)
        found.append(gradient)
    off = float((found[0] - found[1]).norm() / found[0].norm())
    assert (1e-4 < off < 0.05) if compute is not None else off < 1e-4


@needs_hooked
@pytest.mark.parametrize("of", ["effects", "scores", "training"])
def test_products_in_another_precision_are_refused_where_there_are_none(of):
    pairs = fvlens.load_relation("antonym").pairs[:6]

    def run(backend, precision, **options):
        model = loaded(backend, precision)
        if of == "scores":
            return fvlens.evaluate(model, pairs, generator=seeded(), **options)
        if of == "training":
            how = dict(init="zero", layer=1, epochs=1, progress=False)
            return fvlens.finetune(model, pairs, generator=seeded(), **how, **options)
        prompts = built(model, 4)
        means = fvlens.mean_head_activations(model, prompts, progress=False)
        return fvlens.indirect_effects(model, prompts, means, progress=False, **options)

    what = {"effects": "indirect_effects", "scores": "evaluate", "training": "training"}[of]
    for backend, path, taken in (("hooked", "kv", "kv"), ("hooked", "naive", "naive"), ("bridge", None, "kv")):
        text = f"{what}: compute=torch.bfloat16 is for path='weights', but this takes '{taken}'"
        with pytest.raises(ValueError, match=text):
            run(backend, "float32", path=path, compute=torch.bfloat16)
    for precision, compute in (("bfloat16", torch.bfloat16), ("float16", torch.bfloat16), ("float32", torch.int8)):
        text = f"{what}: compute={compute} of a model in torch.{precision}; expected a float32 model and a precision"
        with pytest.raises(ValueError, match=text):
            run("hooked", precision, compute=compute)
    if of == "effects":
        with pytest.raises(ValueError, match=r"compute=torch\.bfloat16 is for method='exact', but this is 'atp'"):
            run("hooked", "float32", compute=torch.bfloat16, method="atp")
    if of == "training":
        with pytest.raises(ValueError, match=r"lora: compute=torch\.bfloat16 is for path='weights', but this takes"):
            lora(loaded("hooked", "float32"), pairs, compute=torch.bfloat16, epochs=1, generator=seeded())


@needs_hooked
def test_products_in_another_precision_have_a_copy_of_their_own():
    model = copy.deepcopy(loaded("hooked", "float32"))
    for compute, size in ((None, 4), (torch.bfloat16, 2)):
        layout = laid_out(model, compute=compute)
        assert layout.blocks[0].qkv.weight.dtype == (compute or torch.float32)
        # the embedding is the unembedding laid out, which is copied in another precision only
        tied = 0 if compute else size * model.unembed.W_U.numel()
        assert layout.n_bytes + tied == Estimate.of(model).copied(compute)
        assert (layout.n_bytes + tied) * 4 == Estimate.of(model).copy * size
    assert is_laid_out(model)
    assert is_laid_out(model, torch.bfloat16)
