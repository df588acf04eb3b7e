"""Effects of heads: against an independent loop over Hugging Face models, and what must hold on every architecture."""

import dataclasses
import itertools
import re
import warnings

import pytest
import torch
from architectures import (
    ARCHITECTURES,
    FASTEST,
    build,
    effects_of,
    global_randomness,
    likely_answers,
    means_of,
    rows_of,
    word_prompts,
)
from conftest import TOKENIZER, needs_hooked, random_model, seeded
from oracle import hf
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPTNeoXConfig, LlamaConfig

import fvlens
from fvlens.activations import position_mask, position_names
from fvlens.attribution import _mediation
from fvlens.interventions import z_hook
from fvlens.models import embedded_folder, fingerprint
from fvlens.prompts import TokenClass
from fvlens.suffix import ROUTES, has_hooks, plan_batch, plan_slices

pytestmark = needs_hooked  # most of it is about the weights path; test_bridge and test_matrix say the same of a bridge

PLACES = ("last", "demonstration_label", "query")


# --- against plain Hugging Face ---


def random_checkpoint(name, folder):
    """A random-weight Hugging Face checkpoint: random biases and gains too, peaked predictions."""
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER, local_files_only=True)
    shared = dict(vocab_size=len(tokenizer), bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    wide = dict(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=160
    )
    configs = {
        "gpt2": lambda: GPT2Config(n_embd=32, n_inner=64, n_layer=3, n_head=4, n_positions=160, **shared),
        "llama": lambda: LlamaConfig(num_key_value_heads=2, tie_word_embeddings=False, **wide, **shared),
        "neox": lambda: GPTNeoXConfig(use_parallel_residual=True, rotary_pct=0.25, **wide, **shared),
    }
    g = seeded(3)
    with torch.random.fork_rng(devices=[]):
        made = AutoModelForCausalLM.from_config(configs[name]())
    with torch.no_grad():
        for key, parameter in made.named_parameters():
            noise = torch.randn(parameter.shape, generator=g)
            if "norm" in key or ".ln_" in key:
                gain = 3 if ("final" in key or key in ("transformer.ln_f.weight", "model.norm.weight")) else 1
                parameter.copy_(gain + 0.2 * noise if key.endswith("weight") else 0.2 * noise)
            else:
                parameter.copy_(0.3 * noise)
    made.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["embedded", "gpt2", "llama", "neox"])
def both(request, tmp_path_factory):
    """One model twice: as fvlens loads it, and as plain Hugging Face."""
    name = request.param
    folder = embedded_folder() if name == "embedded" else random_checkpoint(name, tmp_path_factory.mktemp(name))
    plain = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype=torch.float32).eval()
    return fvlens.load_model("rel-small" if name == "embedded" else folder, device="cpu"), plain, name


@pytest.fixture(scope="module")
def oracle_prompts(both):
    """Clean prompts, and corrupted ones of both kinds, for the oracle tests."""
    model, _, name = both
    g = seeded()
    relation = fvlens.load_relation("antonym")
    clean = fvlens.build_prompts(model, relation, n_prompts=4, n_shots=3, generator=g)
    corrupted = {}
    for labels in ("permuted", "random"):
        made = fvlens.build_prompts(model, relation, n_prompts=3, n_shots=3, labels=labels, generator=g)
        corrupted[labels] = made if name == "embedded" else likely_answers(model, made)
    return clean, corrupted


@pytest.mark.parametrize("labels", ["permuted", "random"])
def test_effects_equal_the_naive_loop_over_hugging_face(both, oracle_prompts, labels):
    model, plain, name = both
    clean, corrupted = oracle_prompts
    prompts = corrupted[labels]
    means = means_of(model, clean)
    oracle_means = hf.mean_head_outputs(plain, rows_of(clean)[0])
    torch.testing.assert_close(means.z, oracle_means, rtol=1e-4, atol=1e-5)

    got = effects_of(model, prompts, means)
    rows, answers = rows_of(prompts)
    cie, baseline = hf.indirect_effects(plain, rows, [answer[:1] for answer in answers], oracle_means)
    assert cie.abs().max() > 1e-3
    if name != "embedded":
        assert 0.01 < baseline.max() < 0.99
        assert cie.abs().max() > 0.05
    assert (got.cie - cie).abs().max() < 1e-5
    assert (got.baseline - baseline).abs().max() < 1e-5
    assert got.path == "weights"


def test_effects_on_whole_answers_equal_the_naive_loop(tmp_path, generator):
    folder = random_checkpoint("llama", tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval()
    model = fvlens.load_model(folder, device="cpu")
    prompts = word_prompts(model, generator, n_shots=2, n_prompts=3)
    assert prompts.answer_mask.sum(dim=1).max() > 1
    means = means_of(model, prompts, stretch=3)
    got = effects_of(model, prompts, means, answer="whole")
    cie, baseline = hf.indirect_effects(plain, *rows_of(prompts), means.z)
    assert cie.abs().max() > 1e-2
    assert (got.cie - cie).abs().max() < 1e-5
    assert (got.baseline - baseline).abs().max() < 1e-5


def test_function_vector_and_steered_logits_equal_hugging_face(both, oracle_prompts):
    model, plain, _ = both
    clean, corrupted = oracle_prompts
    prompts = corrupted["permuted"]
    heads = [(0, 1), (1, 3), (2, 0)]
    vector = fvlens.function_vector(model, means_of(model, clean), heads=heads, layer=1)
    rows, _ = rows_of(prompts)
    expected = hf.function_vector(plain, hf.mean_head_outputs(plain, rows_of(clean)[0]), heads)
    torch.testing.assert_close(vector.vector, expected, rtol=1e-4, atol=1e-5)
    with torch.no_grad(), fvlens.inject(model, vector):
        got = model(prompts.tokens, attention_mask=prompts.attention_mask)[:, -1]
    wanted = torch.stack([hf.steered_logits(plain, row, expected, 1)[-1] for row in rows])
    unsteered = torch.stack([hf.logits(plain, row)[-1] for row in rows])
    assert (wanted - unsteered).abs().max() > 0.1
    torch.testing.assert_close(got.log_softmax(dim=-1), wanted.log_softmax(dim=-1), rtol=0, atol=2e-4)


# Which tokens are patched and scored is the same code for all architectures; what a suffix sees of the tokens before it
# is each one's own. So two of them take every combination, and all of them the shortest and the longest suffix.
AGREEING = [
    (name, positions, answer)
    for name in ARCHITECTURES
    for positions, answer in itertools.product([*PLACES, "bos"], ["first", "whole"])
    if name in ("gpt2", "local") or (positions, answer) in (("last", "first"), ("bos", "whole"))
]


@pytest.mark.parametrize(("name", "positions", "answer"), AGREEING)
def test_all_paths_agree(models, generator, name, positions, answer):
    """``bos``: the suffix is the whole prompt and holds the padding of the shorter ones."""
    model = models(name)
    prompts = word_prompts(model, generator, n_shots=2, n_prompts=5)
    assert not prompts.attention_mask.all()
    assert prompts.answer_mask.sum(dim=1).unique().numel() > 1
    means = means_of(model, prompts, stretch=3, positions=positions)
    naive = effects_of(model, prompts, means, path="naive", answer=answer)
    assert naive.path == "naive"
    assert naive.cie.abs().max() > (1e-2 if answer == "first" else 1e-3)
    available = [path for path in ("weights", "kv") if FASTEST[name] in (path, "weights")]
    for path in available:
        got = effects_of(model, prompts, means, path=path, answer=answer)
        assert (got.path, got.answer, got.positions) == (path, answer, positions)
        torch.testing.assert_close(got.cie, naive.cie, rtol=1e-4, atol=5e-6)
        torch.testing.assert_close(got.baseline, naive.baseline, rtol=1e-4, atol=5e-6)
    if not available:
        with pytest.warns(UserWarning, match="takes the naive path, one forward pass a head .positions shortformer"):
            got = effects_of(model, prompts, means, answer=answer)
        assert got.path == "naive"
        assert torch.equal(got.cie, naive.cie)
    assert not has_hooks(model)


def test_every_token_class_can_be_patched(models, generator):
    """Against hooks written out here, so that the positions are those that the classes name."""
    model = models("gpt2")
    template = fvlens.prompts.Template("t", "Q:{input}\nA:{output}\n\n", "Q:{input}\nA:", prefix="Words.\n")
    prompts = word_prompts(model, generator, n_shots=1, n_prompts=2, template=template)
    for positions in position_names():
        means = means_of(model, prompts, stretch=3, positions=positions)
        kind = TokenClass.PREDICTIVE if positions == "last" else TokenClass[positions.upper()]
        with torch.no_grad():
            logits, cache = model.run_with_cache(prompts.tokens, attention_mask=prompts.attention_mask)
        where = prompts.token_classes == int(kind)
        assert where.any(dim=1).all()
        torch.testing.assert_close(means.z[1], 3 * cache["z", 1][where].mean(dim=0))

        def replace(z, hook, where=where, means=means):
            z = z.clone()
            z[:, :, 2][where] = means.z[1, 2]
            return z

        with torch.no_grad(), model.hooks(fwd_hooks=[(z_hook(1), replace)]):
            patched = model(prompts.tokens, attention_mask=prompts.attention_mask)
        index = torch.arange(len(prompts)), prompts.first_answer_token
        expected = patched[:, -1].softmax(dim=-1)[index] - logits[:, -1].softmax(dim=-1)[index]
        got = effects_of(model, prompts, means)
        torch.testing.assert_close(got.cie[:, 1, 2], expected, rtol=1e-4, atol=5e-6)


# --- properties ---


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize("name", ["gpt2", "grouped-query", "parallel"])
def test_a_heads_own_output_changes_nothing(models, generator, name, path):
    model = models(name)
    prompts = word_prompts(model, generator, n_prompts=4)
    for i in range(len(prompts)):
        alone = prompts.select([i])
        got = effects_of(model, alone, means_of(model, alone), path=path)
        assert got.cie.abs().max() < 5e-6
        assert effects_of(model, alone, means_of(model, alone, stretch=2), path=path).cie.abs().max() > 1e-3


@pytest.mark.parametrize("name", ["gpt2", "grouped-query", "parallel", "qk-norm"])
def test_heads_and_output_bias_add_up_to_the_attention_output(models, generator, name):
    model = models(name)
    prompts = word_prompts(model, generator)
    means = means_of(model, prompts)
    with torch.no_grad():
        _, cache = model.run_with_cache(prompts.tokens, attention_mask=prompts.attention_mask)
    for layer in range(model.cfg.n_layers):
        every = [(layer, head) for head in range(model.cfg.n_heads)]
        summed = fvlens.function_vector(model, means, heads=every, layer=0).vector
        expected = cache["attn_out", layer][:, -1].mean(dim=0)
        torch.testing.assert_close(summed + model.blocks[layer].attn.b_O.detach(), expected)


@pytest.mark.parametrize("path", ["weights", "kv"])
def test_memory_bound_changes_nothing(generator, path):
    model = random_model(n_layers=3, n_heads=32, d_model=128, d_head=4, d_mlp=512)  # heads weigh more than tokens
    prompts = word_prompts(model, generator, n_prompts=7)
    means = means_of(model, prompts, stretch=2)
    whole = effects_of(model, prompts, means, path=path)
    with pytest.raises(ValueError, match="max_memory=1 bytes is too small: one prompt of") as error:
        effects_of(model, prompts, means, path=path, max_memory=1)
    least = int(re.search(r"needs about (\d+) bytes", str(error.value))[1])
    shape = dict(n_pos=prompts.tokens.shape[1], n_suffix=1, n_variants=96, path=path)
    cuts = set()
    for factor in (1, 3, 9, 27):
        bound = int(factor * least)
        plan = plan_slices(model, **shape, max_memory=bound)
        cuts.add((plan.prompts, plan.variants))
        cut = effects_of(model, prompts, means, path=path, max_memory=bound)
        torch.testing.assert_close(cut.cie, whole.cie, rtol=1e-4, atol=2e-6)
        torch.testing.assert_close(cut.baseline, whole.baseline, rtol=1e-4, atol=2e-6)
    assert any(n_prompts == 1 and n_variants < 96 for n_prompts, n_variants in cuts)
    assert any(n_prompts > 1 for n_prompts, _ in cuts)


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize("name", ["gpt2", "grouped-query"])
def test_padding_batch_and_order_change_nothing(models, generator, name, path):
    model = models(name)
    prompts = word_prompts(model, generator)
    means = means_of(model, prompts, stretch=2)
    whole = effects_of(model, prompts, means, path=path)
    n_pad = 5
    padded = dataclasses.replace(
        prompts,
        tokens=torch.nn.functional.pad(prompts.tokens, (n_pad, 0), value=7),
        attention_mask=torch.nn.functional.pad(prompts.attention_mask, (n_pad, 0)),
        token_classes=torch.nn.functional.pad(prompts.token_classes, (n_pad, 0), value=int(TokenClass.PADDING)),
    )
    order = torch.randperm(len(prompts), generator=generator).tolist()
    alone = [prompts.select([i]) for i in range(len(prompts))]
    alone = [  # without padding at all
        dataclasses.replace(
            one,
            tokens=one.tokens[:, one.attention_mask[0].bool()],
            token_classes=one.token_classes[:, one.attention_mask[0].bool()],
            attention_mask=one.attention_mask[:, one.attention_mask[0].bool()],
        )
        for one in alone
    ]
    for got in (
        effects_of(model, padded, means, path=path).cie,
        effects_of(model, prompts.select(order), means, path=path).cie[torch.tensor(order).argsort()],
        torch.cat([effects_of(model, one, means, path=path).cie for one in alone]),
    ):
        torch.testing.assert_close(got, whole.cie, rtol=1e-4, atol=2e-6)
    torch.testing.assert_close(means_of(model, padded, stretch=2).z, means.z, rtol=1e-4, atol=1e-5)


def test_effects_of_heads_that_nobody_reads_are_zero(generator):
    model = random_model()
    with torch.no_grad():
        model.blocks[1].attn.W_O[2] = 0
    prompts = word_prompts(model, generator)
    got = effects_of(model, prompts, means_of(model, prompts, stretch=5))
    assert got.cie[:, 1, 2].abs().max() < 1e-6
    assert got.cie[:, 1, [0, 1, 3]].abs().amax(dim=(0, 1)).min() > 1e-5


@pytest.mark.parametrize("path", ROUTES)
def test_same_bits_again_and_global_randomness_untouched(models, generator, path):
    model = models("gpt2")
    prompts = word_prompts(model, generator, n_prompts=3)
    before = global_randomness()
    means = means_of(model, prompts, stretch=2)
    first = effects_of(model, prompts, means, path=path)
    assert torch.equal(first.cie, effects_of(model, prompts, means, path=path).cie)
    assert before == global_randomness()
    assert not has_hooks(model)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_half_precision_comes_close(generator):
    """Sums are float32; a bfloat16 model gives float32 effects near those of the float32 model."""
    single = build("gpt2")
    prompts = word_prompts(single, generator)
    expected = effects_of(single, prompts, means_of(single, prompts, stretch=3))
    rounded = build("gpt2", dtype=torch.bfloat16)
    means = means_of(rounded, prompts, stretch=3)
    assert means.z.dtype == torch.float32
    for path in ROUTES:
        got = effects_of(rounded, prompts, means, path=path)
        assert got.cie.dtype == got.baseline.dtype == torch.float32
        correlation = torch.corrcoef(torch.stack([got.cie.flatten(), expected.cie.flatten()]))[0, 1]
        assert correlation > 0.97


# --- hooks of the user ---


def test_hooks_of_the_user_count_and_are_kept(generator):
    """They are part of the model that is asked: the effects are those of the hooked model, by the naive path."""
    model, changed = random_model(), random_model()
    change = torch.linspace(-1, 1, 32)
    with torch.no_grad():
        changed.blocks[1].mlp.b_out += change
    prompts = word_prompts(model, generator, n_prompts=4)
    calls = []

    def shift(mlp_out, hook):
        calls.append(1)
        return mlp_out + change

    means = dataclasses.replace(means_of(changed, prompts, stretch=3), fingerprint=fingerprint(model))
    plain = effects_of(model, prompts, means)
    model.add_hook("blocks.1.hook_mlp_out", shift)
    with pytest.warns(UserWarning, match=re.escape("one forward pass a head (hooks on the model)")):
        got = effects_of(model, prompts, means)
    expected = effects_of(changed, prompts, dataclasses.replace(means, fingerprint=fingerprint(changed)))
    assert (got.path, expected.path) == ("naive", "weights")
    torch.testing.assert_close(got.cie, expected.cie, rtol=1e-4, atol=5e-6)
    assert (got.cie - plain.cie).abs().max() > 1e-3
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # asked for: no warning
        assert torch.equal(effects_of(model, prompts, means, path="naive").cie, got.cie)
    n_calls = len(calls)
    model(prompts.tokens)
    assert len(calls) == n_calls + 1
    model.reset_hooks()
    assert not has_hooks(model)


# --- interruption ---


def interrupt(monkeypatch, at_update):
    """Make the progress bar raise KeyboardInterrupt at its n-th update, as Ctrl-C there would."""
    n_updates = 0

    class Bar(_mediation.tqdm):
        def update(self, n=1):
            nonlocal n_updates
            n_updates += 1
            if n_updates == at_update:
                raise KeyboardInterrupt
            return super().update(n)

    monkeypatch.setattr(_mediation, "tqdm", Bar)


@pytest.mark.parametrize("path", ROUTES)
def test_interruption_keeps_what_is_finished(models, generator, monkeypatch, path):
    model = models("gpt2")
    prompts = word_prompts(model, generator, n_shots=0, n_prompts=34)
    means = means_of(model, prompts, stretch=2)
    cells = model.cfg.n_layers * model.cfg.n_heads
    settings = dict(path=path)
    n_pos = prompts.tokens.shape[1]
    bounds = [int(10**5 * 1.03**k) for k in range(200)]
    if path == "naive":
        settings["max_memory"] = bound = next(bound for bound in bounds if batch_of(model, n_pos, bound) > 4)
        n_first, updates = batch_of(model, n_pos, bound), cells
    else:
        shape = dict(n_pos=n_pos, n_suffix=1, n_variants=cells, path=path)
        settings["max_memory"] = bound = next(bound for bound in bounds if fits(model, shape, bound))
        n_first, updates = plan_slices(model, **shape, max_memory=bound).prompts, 1
    assert 1 < n_first < len(prompts) / 2
    whole = effects_of(model, prompts, means, **settings)
    assert whole.complete
    interrupt(monkeypatch, updates + 1)
    message = f"indirect_effects was interrupted: {n_first} of 34 prompts are finished"
    with pytest.warns(UserWarning, match=message):
        part = effects_of(model, prompts, means, **settings)
    assert not part.complete
    assert torch.equal(part.cie, whole.cie[:n_first])
    assert torch.equal(part.baseline, whole.baseline[:n_first])
    assert not has_hooks(model)


def batch_of(model, n_pos, bound):
    """Prompts that a naive pass takes at a time under a memory bound; 0 if not even one fits."""
    try:
        return plan_batch(model, n_pos=n_pos, max_memory=bound)
    except ValueError:
        return 0


def fits(model, shape, bound):
    """Whether a memory bound gives slices of more than four whole prompts."""
    try:
        plan = plan_slices(model, **shape, max_memory=bound)
    except ValueError:
        return False
    return plan.variants == shape["n_variants"] and plan.prompts > 4


@pytest.mark.parametrize("path", ROUTES)
def test_interruption_before_anything_is_finished_passes_on(models, generator, monkeypatch, path):
    model = models("gpt2")
    prompts = word_prompts(model, generator, n_shots=0)
    means = means_of(model, prompts)
    interrupt(monkeypatch, 1)
    with pytest.raises(KeyboardInterrupt):
        effects_of(model, prompts, means, path=path)
    assert not has_hooks(model)


@pytest.mark.parametrize("path", ["kv", "naive"])
@pytest.mark.parametrize("method", ["atp", "ig", "lrp"])
def test_interrupted_screens_keep_what_is_finished(models, generator, monkeypatch, method, path):
    model = models("gpt2")
    prompts = word_prompts(model, generator, n_shots=1, n_prompts=3)
    means = means_of(model, prompts, stretch=2)
    with pytest.raises(ValueError, match="needs about") as error:
        effects_of(model, prompts, means, method=method, path=path, max_memory=1)
    settings = dict(
        method=method, path=path, max_memory=int(re.search(r"needs about (\d+) bytes", str(error.value))[1])
    )
    whole = effects_of(model, prompts, means, **settings)
    interrupt(monkeypatch, 2)
    with pytest.warns(UserWarning, match="indirect_effects was interrupted: 1 of 3 prompts are finished"):
        part = effects_of(model, prompts, means, recheck=2, **settings)
    assert (part.complete, part.recheck) == (False, None)
    assert torch.equal(part.cie, whole.cie[:1])
    assert torch.equal(part.baseline, whole.baseline[:1])
    assert not part.to_dataframe().complete.any() and "complete" not in whole.to_dataframe()
    assert "interrupted" in part.plot().layout.title.text
    assert not has_hooks(model)


def test_an_interrupted_recheck_leaves_the_screen(models, generator, monkeypatch):
    model = models("gpt2")
    prompts = word_prompts(model, generator, n_shots=1, n_prompts=3)
    means = means_of(model, prompts, stretch=2)
    whole = effects_of(model, prompts, means, method="atp")
    monkeypatch.setattr(_mediation, "_fast", lambda *args: interrupted_after(torch.zeros(1, 2), torch.zeros(1)))
    with pytest.warns(UserWarning, match="indirect_effects was interrupted: 1 of 3 prompts are finished"):
        part = effects_of(model, prompts, means, method="atp", recheck=2)
    assert (part.complete, part.recheck) == (False, None)
    assert torch.equal(part.cie, whole.cie)


def interrupted_after(*batch):
    """One batch, then Ctrl-C."""
    yield batch
    raise KeyboardInterrupt


@pytest.mark.parametrize("path", ROUTES)
def test_progress_bar_counts_prompts_and_heads(models, generator, monkeypatch, path):
    model = models("gpt2")
    prompts = word_prompts(model, generator, n_shots=0)
    means = means_of(model, prompts)
    bars = []

    class Bar(_mediation.tqdm):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            bars.append((self, self.disable))

    monkeypatch.setattr(_mediation, "tqdm", Bar)
    monkeypatch.setattr("fvlens.progress.is_drawn", lambda: True)  # as on a terminal
    fvlens.indirect_effects(model, prompts, means, path=path, progress=True)
    assert [(bar.n, bar.total, off) for bar, off in bars] == [(12 * len(prompts), 12 * len(prompts), False)]


def test_result_says_where_it_comes_from(models, generator):
    model = models("gpt2")
    relation = fvlens.load_relation("antonym")
    clean = fvlens.build_prompts(model, relation, n_prompts=2, n_shots=2, generator=generator)
    prompts = fvlens.build_prompts(
        model, relation, n_prompts=3, n_shots=1, labels="permuted", template="arrow", generator=generator
    )
    means = means_of(model, clean)
    got = effects_of(model, prompts, means)
    assert (got.relation, got.labels, str(got.template), got.n_shots) == ("antonym", "permuted", "arrow", 1)
    assert (got.method, got.positions, got.answer, got.complete) == ("exact", "last", "first", True)
    assert got.data_hash == prompts.data_hash != clean.data_hash
    assert got.fingerprint == fingerprint(model)
    assert got.cie.device.type == "cpu"
    assert not got.cie.is_inference()
    assert not got.baseline.is_inference()


# --- errors ---


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(method="shap"), "indirect_effects: method='shap'; expected one of exact, atp, ig, lrp."),
        (
            dict(recheck=3),
            "indirect_effects: recheck=3 runs the best heads of a screen again; method='exact' needs none, leave it",
        ),
        (
            dict(method="atp", recheck=13),
            "indirect_effects: expected recheck between 0 and 12 (all heads), got 13; about twice the heads",
        ),
        (dict(method="ig", recheck=-1), "indirect_effects: expected recheck between 0 and 12 (all heads), got -1;"),
        (dict(method="ig", n_steps=0), "indirect_effects: expected n_steps >= 1, got 0; 8 is usual."),
        (
            dict(method="atp", path="weights"),
            "indirect_effects: path='weights' has no hooks to take the gradients of method='atp' at; use path=None, ",
        ),
        (
            dict(method="lrp", answer="whole"),
            "indirect_effects: method='lrp' scores attention from the last token by the logit of the answer's first "
            "token; expected positions='last' and answer='first', got 'last' and 'whole'.",
        ),
        (dict(answer="second"), "indirect_effects: answer='second'; expected 'first' or 'whole'."),
        (
            dict(positions="query"),
            "indirect_effects: positions='query', but the means were taken at 'last'; "
            "call mean_head_activations(..., positions='query').",
        ),
        (dict(path="quick"), "path='quick'; expected one of weights, kv, naive, or None"),
        (dict(max_memory=1000), "max_memory=1000 bytes is too small: one prompt of"),
    ],
)
def test_bad_settings_are_refused(tiny, generator, unchecked, settings, message):
    prompts = word_prompts(tiny, generator, n_shots=1)
    with pytest.raises(ValueError, match=re.escape(message)):
        effects_of(tiny, prompts, means_of(tiny, prompts), **settings)
    assert not has_hooks(tiny)


def test_paths_that_are_not_exact_are_refused(models, generator):
    prompts = word_prompts(models("alibi"), generator, n_shots=0)
    with pytest.raises(ValueError, match=re.escape("path='weights' is not exact for this model (positions alibi)")):
        effects_of(models("alibi"), prompts, means_of(models("alibi"), prompts), path="weights")
    with pytest.raises(ValueError, match=re.escape("path='kv' is not exact for this model (positions shortformer)")):
        effects_of(models("shortformer"), prompts, means_of(models("shortformer"), prompts), path="kv")


def test_means_of_another_model_are_refused(tiny, generator):
    prompts = word_prompts(tiny, generator, n_shots=0)
    other = random_model()
    with torch.no_grad():
        other.blocks[0].mlp.b_in[0] += 1e-3
    expected = "indirect_effects: the means come from another model (weights: "
    with pytest.raises(ValueError, match=re.escape(expected)):
        effects_of(tiny, prompts, means_of(other, prompts))


def test_positions_that_a_prompt_has_not_are_refused(tiny, generator):
    shown = word_prompts(tiny, generator, n_shots=1)
    bare = word_prompts(tiny, generator, n_shots=0)
    means = means_of(tiny, shown, positions="demonstration_label")
    message = "positions='demonstration_label': 8 of 8 prompts have no such token (they have 0 demonstrations"
    with pytest.raises(ValueError, match=re.escape(message)):
        effects_of(tiny, bare, means)
    with pytest.raises(ValueError, match=re.escape("positions='first'; expected one of last, bos, prefix,")):
        position_mask(shown, "first")


def test_relevance_needs_demonstrations_and_the_last_position(tiny, generator):
    shown, bare = word_prompts(tiny, generator, n_shots=1), word_prompts(tiny, generator, n_shots=0)
    message = "sums over the demonstrations' label tokens, but 8 of 8 prompts have none (they have 0 demonstrations)"
    with pytest.raises(ValueError, match=re.escape(message)):
        effects_of(tiny, bare, means_of(tiny, bare), method="lrp")
    with pytest.raises(ValueError, match="expected positions='last' and answer='first', got 'query' and 'first'"):
        effects_of(tiny, shown, means_of(tiny, shown, positions="query"), method="lrp")


def test_no_hooks_stay_after_an_error_inside(tiny, generator):
    prompts = word_prompts(tiny, generator, n_shots=1)
    means = means_of(tiny, prompts)
    broken = dataclasses.replace(prompts, tokens=torch.full_like(prompts.tokens, tiny.cfg.d_vocab))
    for path in ROUTES:
        with pytest.raises(IndexError):
            effects_of(tiny, broken, means, path=path)
        assert not has_hooks(tiny)
