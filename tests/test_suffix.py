"""The fast path against whole forward passes with hooks, on every kind of architecture."""

import re

import pytest
import torch
from architectures import ARCHITECTURES, FASTEST, build, word_prompts
from conftest import needs_hooked, random_model, seeded
from hypothesis import given, settings
from hypothesis import strategies as st

import fvlens
from fvlens.interventions import inject, resid_hook, z_hook
from fvlens.suffix import (
    Slices,
    _hooked,
    _memory,
    _run,
    choose_route,
    counted_gain,
    has_hooks,
    laid_out,
    plan_slices,
    run_prefix,
    steered_resid,
)
from fvlens.types import Head

pytestmark = needs_hooked  # most of it is about the weights path; test_bridge and test_matrix say the same of a bridge

ROUTES = ("weights", "kv")
BOTH = [(name, path) for name in ARCHITECTURES for path in ROUTES if path in ("kv", FASTEST[name])]
BOTH = [(name, path) for name, path in BOTH if FASTEST[name] != "naive"]


@pytest.fixture(scope="module")
def models():
    """Each architecture in double precision, made once."""
    made = {}

    def get(name):
        if name not in made:
            made[name] = build(name, dtype=torch.float64)
        return made[name]

    return get


@pytest.fixture(autouse=True)
def _no_hooks_left(models):
    yield
    for name in ARCHITECTURES:
        assert not has_hooks(models(name))


def forward(model, prompts, hooks=()):
    """Logits of a whole forward pass under hooks."""
    with model.hooks(fwd_hooks=list(hooks)):
        return model(prompts.tokens, attention_mask=prompts.attention_mask)


def real(prompts, n_suffix):
    """Which suffix positions hold a token and no padding."""
    return prompts.attention_mask[:, -n_suffix:].bool()


# --- against whole forward passes ---


@pytest.mark.parametrize(("name", "path"), BOTH)
def test_prefix_keeps_what_a_whole_pass_computes(models, generator, name, path):
    model = models(name)
    prompts = word_prompts(model, generator)
    n = 3
    run = run_prefix(model, prompts.tokens, prompts.attention_mask, n_suffix=n, path=path)
    with torch.no_grad():
        logits, cache = model.run_with_cache(prompts.tokens, attention_mask=prompts.attention_mask)
    for layer in range(model.cfg.n_layers):
        torch.testing.assert_close(run.resid_before(layer), cache["resid_pre", layer][:, -n:])
        torch.testing.assert_close(run.kept_z(layer), cache["z", layer][:, -n:])
    torch.testing.assert_close(run.resid_final, cache["resid_post", model.cfg.n_layers - 1][:, -n:])
    torch.testing.assert_close(run.logits(run.resid_final), logits[:, -n:])
    assert (run.n_prompts, run.n_suffix) == (len(prompts), n)


@pytest.mark.parametrize(("name", "path"), BOTH)
@pytest.mark.parametrize("n_suffix", [1, 4, None], ids=["one", "four", "all"])
def test_patched_heads_equal_hooked_passes(models, generator, name, path, n_suffix):
    """Also where the suffix is so long that it holds padding of the shorter prompts."""
    model = models(name)
    prompts = word_prompts(model, generator, n_shots=1)
    n = prompts.tokens.shape[1] if n_suffix is None else n_suffix
    assert n_suffix is not None or not real(prompts, n).all()
    heads = [Head(0, 3), Head(0, 1), Head(1, 0), Head(2, 2)]
    heads.sort()
    values = torch.randn(len(heads), model.cfg.d_head, generator=generator, dtype=torch.float64)
    where = real(prompts, n) & (torch.rand(len(prompts), n, generator=generator) < 0.6)
    where[:, 0] |= real(prompts, n)[:, 0]
    run = run_prefix(model, prompts.tokens, prompts.attention_mask, n_suffix=n, path=path)
    with torch.no_grad():
        got = run.logits(run.patched(heads, values, where))
        plain = forward(model, prompts)[:, -n:]
        for i, head in enumerate(heads):

            def replace(z, hook, i=i, head=head):
                z = z.clone()
                z[:, -n:, head.head] = torch.where(where[..., None], values[i], z[:, -n:, head.head])
                return z

            expected = forward(model, prompts, [(z_hook(head.layer), replace)])[:, -n:]
            keep = real(prompts, n)
            torch.testing.assert_close(got[:, i][keep], expected[keep], rtol=1e-8, atol=1e-8)
            assert (expected - plain)[where].abs().max() > 1e-2  # the patch is not a trifle


@pytest.mark.parametrize(("name", "path"), BOTH)
def test_continue_from_equals_a_pass_with_that_residual(models, generator, name, path):
    model = models(name)
    prompts = word_prompts(model, generator)
    n, n_variants = 2, 3
    run = run_prefix(model, prompts.tokens, prompts.attention_mask, n_suffix=n, path=path)
    shape = (len(prompts), n_variants, n, model.cfg.d_model)
    given_resid = torch.randn(shape, generator=generator, dtype=torch.float64)
    for layer in range(model.cfg.n_layers + 1):
        with torch.no_grad():
            got = run.logits(run.continue_from(layer, given_resid))
            for i in range(n_variants):

                def replace(resid, hook, i=i):
                    return torch.cat([resid[:, :-n], given_resid[:, i]], dim=1)

                last = layer == model.cfg.n_layers
                name_of_hook = resid_hook(layer - 1) if last else f"blocks.{layer}.hook_resid_pre"
                expected = forward(model, prompts, [(name_of_hook, replace)])[:, -n:]
                torch.testing.assert_close(got[:, i], expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(("name", "path"), BOTH)
@pytest.mark.parametrize("in_steps", [False, True])
@pytest.mark.parametrize("batched", [False, True])
def test_steered_resid_equals_inject_and_so_does_its_gradient(models, generator, name, path, batched, in_steps):
    model = models(name)
    prompts = word_prompts(model, generator)
    run = run_prefix(model, prompts.tokens, prompts.attention_mask, path=path)
    shape = (len(prompts), model.cfg.d_model) if batched else (model.cfg.d_model,)
    vector = torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
    wanted = prompts.first_answer_token

    class Add:
        def __init__(self, layer):
            self.layer = layer

        def additions(self):
            return {resid_hook(self.layer): vector}

        def check(self, model):
            pass

    def gradient(logits):
        loss = -logits.log_softmax(dim=-1)[torch.arange(len(prompts)), wanted].mean()
        return torch.autograd.grad(loss, vector)[0]

    for layer in range(model.cfg.n_layers):
        if in_steps:
            fast = run.steps(layer).logits(torch.arange(len(prompts)), vector)[:, 0]
        else:
            fast = run.logits(steered_resid(run, layer, vector))[:, 0, 0]
        with inject(model, Add(layer)):
            slow = model(prompts.tokens, attention_mask=prompts.attention_mask)[:, -1]
        torch.testing.assert_close(fast, slow, rtol=1e-8, atol=1e-8)
        expected = gradient(slow)
        assert expected.norm() > 1e-3
        assert (gradient(fast) - expected).norm() <= 1e-6 * expected.norm()


@pytest.mark.parametrize(("name", "path"), BOTH)
def test_steps_take_some_prompts_in_any_order_and_answers_of_several_tokens(models, generator, name, path):
    model = models(name)
    prompts = word_prompts(model, generator)
    n, layer = 3, 0
    run = run_prefix(model, prompts.tokens, prompts.attention_mask, n_suffix=n, path=path)
    rows = torch.tensor([2, 0, 2])
    vectors = torch.randn((3, model.cfg.d_model), generator=generator, dtype=torch.float64)

    def add(resid, hook):
        resid = resid.clone()
        resid[:, -n] += vectors
        return resid

    some = prompts.select(rows.tolist())
    with torch.no_grad():
        expected = forward(model, some, [(resid_hook(layer), add)])[:, -n:]
        got = run.steps(layer).logits(rows, vectors)
    keep = real(some, n)
    torch.testing.assert_close(got[keep], expected[keep], rtol=1e-8, atol=1e-8)


def test_steps_take_fewer_operations(generator):
    """The point of them: queries, keys and values in one product, norms and GELU in one operation each."""
    model = random_model()
    prompts = word_prompts(model, generator)
    vector, rows = torch.zeros(model.cfg.d_model), torch.arange(len(prompts))

    def count(path):
        steps = run_prefix(model, prompts.tokens, prompts.attention_mask, path=path).steps(0)
        with torch.no_grad(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            steps.logits(rows, vector)
        return sum(event.count for event in profile.key_averages() if event.key.startswith("aten::"))

    count("weights")
    assert count("weights") < 0.5 * count("kv")


@pytest.mark.parametrize("path", ROUTES)
def test_steered_resid_starts_at_the_first_suffix_position(models, generator, path):
    """With an answer appended, the vector goes to the prompt's end, not to the answer's."""
    model = models("grouped-query")
    prompts = word_prompts(model, generator)
    n = 3
    vector = torch.randn(model.cfg.d_model, generator=generator, dtype=torch.float64)
    run = run_prefix(model, prompts.tokens, prompts.attention_mask, n_suffix=n, path=path)

    def add(resid, hook):
        resid = resid.clone()
        resid[:, -n] += vector
        return resid

    with torch.no_grad():
        for layer in range(model.cfg.n_layers):
            expected = forward(model, prompts, [(resid_hook(layer), add)])[:, -n:]
            torch.testing.assert_close(run.logits(steered_resid(run, layer, vector))[:, 0], expected)


def test_log_probs_equal_log_softmax_in_any_slices(models, generator, monkeypatch):
    model = models("soft-caps")
    prompts = word_prompts(model, generator)
    n = 3
    run = run_prefix(model, prompts.tokens, prompts.attention_mask, n_suffix=n)
    resid = run.resid_final[:, None] + torch.randn(len(prompts), 2, n, model.cfg.d_model, generator=generator)
    targets = torch.randint(model.cfg.d_vocab, (len(prompts), n), generator=generator)
    targets[0, 1] = targets[3, 0] = -1
    with torch.no_grad():
        wanted = targets.clamp(min=0)[:, None, :, None].expand(-1, 2, -1, -1)
        expected = run.logits(resid).log_softmax(dim=-1).gather(-1, wanted)[..., 0]
        expected[0, :, 1] = expected[3, :, 0] = 0
        torch.testing.assert_close(run.log_probs(resid, targets), expected, rtol=1e-5, atol=1e-5)
        sizes = []
        original = type(run).logits
        monkeypatch.setattr(type(run), "logits", lambda self, x, *a: sizes.append(len(x)) or original(self, x, *a))
        n_scored = 2 * int((targets >= 0).sum())
        for at_once in (1, 5, n_scored - 1, n_scored, 1000):
            found = run.log_probs(resid, targets, at_once=at_once)
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
            assert sum(sizes) == n_scored  # nothing else is unembedded
            assert max(sizes) == min(at_once, n_scored)
            sizes.clear()
        monkeypatch.setattr(_run, "_LOGIT_SLICE", 5 * model.cfg.d_vocab)
        torch.testing.assert_close(run.log_probs(resid, targets), expected, rtol=1e-5, atol=1e-5)
        assert max(sizes) == 5
        sizes.clear()
        nothing = torch.full_like(targets, -1)
        assert torch.equal(run.log_probs(resid, nothing), torch.zeros_like(expected))
        assert not sizes


# --- what it costs ---


def test_counted_gain_equals_a_count_by_hand():
    # L = 2 layers, H = 1 head, T = 3 tokens, in units of one token through one block.
    # naive: 3 runs (plain, head of layer 0, head of layer 1) of 3 tokens through 2 blocks = 18.
    # fast: one run = 6; layer 0's patch: half of block 0 and block 1 = 1.5; layer 1's: half of block 1 = 0.5.
    assert counted_gain(2, 1, 3) == pytest.approx(18 / (6 + 1.5 + 0.5))
    # shapes of GPT-J and Llama-2-7B, as counted in the methods
    assert [round(counted_gain(*shape)) for shape in ((28, 16, 97), (32, 32, 97))] == [136, 163]


def test_counted_gain_equals_the_tokens_that_really_go_through_the_blocks(generator, monkeypatch):
    """Counted on the model: tokens whose queries, keys and values are made, and tokens through an MLP, half each."""
    model = random_model()
    prompts = word_prompts(model, generator, n_prompts=2, n_shots=2)
    n_layers, n_heads, n_pos = model.cfg.n_layers, model.cfg.n_heads, prompts.tokens.shape[1]
    rows = {"class": 0.0, "engine": 0.0}

    def counted(function, whose, which):
        def call(*args):
            x = args[which]
            rows[whose] += 0.5 * x.shape[:-1].numel()
            return function(*args)

        return call

    for block in model.blocks:
        monkeypatch.setattr(
            block.attn, "calculate_qkv_matrices", counted(block.attn.calculate_qkv_matrices, "class", 0)
        )
        monkeypatch.setattr(block.mlp, "forward", counted(block.mlp.forward, "class", 0))
    monkeypatch.setattr(_hooked.Walk, "heads", counted(_hooked.Walk.heads, "engine", 2))
    monkeypatch.setattr(_hooked.Walk, "finish", counted(_hooked.Walk.finish, "engine", 2))
    with torch.no_grad():
        model(prompts.tokens, attention_mask=prompts.attention_mask)
    one_run = rows["class"]
    assert one_run == len(prompts) * n_pos * n_layers
    means = fvlens.mean_head_activations(model, prompts, progress=False)
    rows["engine"] = 0.0
    fvlens.indirect_effects(model, prompts, means, path="weights", progress=False)
    assert rows["class"] in (one_run, 2 * one_run)  # nothing of the effects goes through the class's own blocks
    saved = 0.5 * len(prompts) * (n_pos - 1)  # of the last block, only the suffix has a use
    tokens, mask = prompts.tokens.tolist(), prompts.attention_mask.tolist()
    beginnings = {
        tuple(row[: i + 1]) if own[i] else () for row, own in zip(tokens, mask, strict=True) for i in range(n_pos)
    }
    n_shared = len(prompts) * n_pos - len(beginnings)  # positions that go through with those of another prompt
    saved += 0.5 * n_shared * (2 * n_layers - 1)  # heads of all blocks, and the rest of all but the last
    counted_rows = rows["engine"] + saved
    assert (1 + n_layers * n_heads) * one_run / counted_rows == pytest.approx(counted_gain(n_layers, n_heads, n_pos))


@given(st.integers(1, 60), st.integers(1, 50), st.integers(1, 200))
def test_slices_cover_everything_once_and_in_order(prompts, variants, n):
    plan = Slices(prompts=prompts, variants=variants)
    for parts, size in ((plan.over_prompts(n), prompts), (plan.over_variants(n), variants)):
        covered = [list(range(n))[part] for part in parts]
        assert [i for part in covered for i in part] == list(range(n))
        assert max(map(len, covered)) <= size


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_plan_needs_what_it_says_and_uses_what_it_gets(tiny, data):
    laid_out(tiny)  # else a second copy of the weights would count where it fits
    n_pos = data.draw(st.integers(1, 100))
    shape = dict(
        n_pos=n_pos,
        n_suffix=data.draw(st.integers(1, n_pos)),
        n_variants=data.draw(st.integers(1, 40)),
        path=data.draw(st.sampled_from(ROUTES)),
    )
    with pytest.raises(ValueError, match="max_memory=1 bytes is too small: one prompt of") as error:
        plan_slices(tiny, **shape, max_memory=1)
    needed = int(re.search(r"needs about (\d+) bytes", str(error.value))[1])
    with pytest.raises(ValueError, match=f"needs about {needed} bytes; give more memory or shorter prompts"):
        plan_slices(tiny, **shape, max_memory=needed - 1)
    # more memory never means less at once, and k times the need is enough for k prompts or k variants
    previous = 1
    for k in (1, 2, 5, 40, 1000):
        plan = plan_slices(tiny, **shape, max_memory=k * needed)
        assert plan.copied == (shape["path"] == "weights")
        assert plan.variants <= shape["n_variants"]
        assert plan.prompts == 1 or plan.variants == shape["n_variants"]
        assert previous <= plan.prompts * plan.variants
        assert plan.variants >= min(k, shape["n_variants"])
        previous = plan.prompts * plan.variants


def test_default_plan_is_bounded_by_what_is_free(tiny, monkeypatch):
    laid_out(tiny)
    shape = dict(n_pos=50, n_suffix=1, n_variants=12, path="weights")
    for free, expected in ((4 * 10**7, 10**7), (10**15, 1024**3), (None, 1024**3)):
        monkeypatch.setattr(_memory, "free_memory", lambda device, free=free: free)
        wide = plan_slices(tiny, **shape, max_memory=expected)
        assert plan_slices(tiny, **shape, max_memory=None, warn=False) == wide
        if free == 4 * 10**7:
            with pytest.warns(UserWarning, match=f"10 MiB instead of 1024, so {wide.prompts} prompts run together"):
                plan_slices(tiny, **shape, max_memory=None)
        else:
            plan_slices(tiny, **shape, max_memory=None)


# --- which path ---


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_fastest_exact_path_is_chosen(models, name):
    path, reason = choose_route(models(name))
    assert path == FASTEST[name]
    assert reason == {"alibi": "positions alibi", "shortformer": "positions shortformer"}.get(name, "")


@pytest.mark.parametrize(
    ("changes", "path", "reason"),
    [
        (dict(attention_dir="bidirectional"), "naive", "attention is not causal"),
        (dict(use_attention_sinks=True), "kv", "attention sinks"),
        (dict(use_logn_attn=True), "kv", "log-n attention"),
        (dict(use_dynamic_ntk_rope=True), "naive", "dynamic NTK rotary"),
        (dict(clip_qkv=8.0), "kv", "clipped queries and keys"),
        (dict(load_in_4bit=True), "kv", "4-bit weights"),
        (dict(original_architecture="Olmo2ForCausalLM"), "kv", "norm places of Olmo2ForCausalLM"),
        (dict(use_split_qkv_input=True), "kv", "split attention inputs"),
        (dict(use_attn_in=True), "kv", "split attention inputs"),
        (dict(ungroup_grouped_query_attention=True), "kv", "ungrouped query groups"),
        (dict(n_devices=2), "kv", "a model on several devices"),
        (dict(positional_embedding_type="relative_positional_bias"), "kv", "positions relative_positional_bias"),
    ],
)
def test_a_slower_path_says_why(monkeypatch, changes, path, reason):
    model = random_model()
    for key, value in changes.items():
        monkeypatch.setattr(model.cfg, key, value, raising=False)
    assert choose_route(model) == (path, reason)
    with pytest.raises(ValueError, match=re.escape(f"path='weights' is not exact for this model ({reason}); use path")):
        choose_route(model, "weights")
    if path == "naive":
        with pytest.raises(ValueError, match=re.escape(f"path='kv' is not exact for this model ({reason}); use path")):
            choose_route(model, "kv")


@pytest.mark.parametrize("kind", ["fwd", "bwd"])
def test_hooks_of_the_user_mean_naive(kind):
    model = random_model()
    assert not has_hooks(model)
    model.add_hook(z_hook(1), lambda x, hook: None, dir=kind)
    assert has_hooks(model)
    assert choose_route(model) == ("naive", "hooks on the model")
    for path in ROUTES:
        with pytest.raises(ValueError, match=re.escape(f"path='{path}' is not exact for this model (hooks on the")):
            choose_route(model, path)
    model.reset_hooks()
    assert choose_route(model) == ("weights", "")


def test_a_path_can_be_insisted_on(tiny, unchecked):
    assert choose_route(tiny, "naive") == ("naive", "asked for")
    assert choose_route(tiny, "kv") == ("kv", "asked for")
    assert choose_route(tiny, "weights") == ("weights", "")
    with pytest.raises(ValueError, match="path='quick'; expected one of weights, kv, naive, or None for the fastest"):
        choose_route(tiny, "quick")


# --- errors ---


@pytest.mark.parametrize("n_suffix", [0, -1, 1000])
def test_suffix_length_is_checked(tiny, generator, n_suffix):
    prompts = word_prompts(tiny, generator, n_shots=0)
    n_pos = prompts.tokens.shape[1]
    expected = f"expected n_suffix between 1 and {n_pos} .the prompt length., got {n_suffix}"
    with pytest.raises(ValueError, match=expected):
        run_prefix(tiny, prompts.tokens, prompts.attention_mask, n_suffix=n_suffix)


def test_variants_may_come_in_any_order(models, generator):
    model = models("grouped-query")
    prompts = word_prompts(model, generator, n_shots=1)
    run = run_prefix(model, prompts.tokens, prompts.attention_mask)
    heads = [Head(1, 0), Head(0, 2), Head(2, 3), Head(0, 1)]
    values = torch.randn(len(heads), model.cfg.d_head, generator=generator, dtype=torch.float64)
    where = torch.ones(len(prompts), 1).bool()
    together = run.patched(heads, values, where)
    for i, head in enumerate(heads):
        torch.testing.assert_close(together[:, i : i + 1], run.patched([head], values[i : i + 1], where))


@given(st.integers(0, 2**32 - 1))
def test_distinct_beginnings_are_those_found_one_by_one(seed):
    """Few kinds of tokens, so that prompts often begin alike; padding is one beginning of its own."""
    g = seeded(seed)
    n_prompts, n_pos, n_kinds = (int(torch.randint(1, most, (), generator=g)) for most in (7, 9, 4))
    lengths = torch.randint(1, n_pos + 1, (n_prompts,), generator=g)
    mask = (torch.arange(n_pos) >= n_pos - lengths[:, None]).long()
    tokens = torch.randint(0, n_kinds, (n_prompts, n_pos), generator=g)
    places, first = _hooked.distinct(tokens, mask)
    keys = [
        (prompt, pos, tuple(tokens[prompt, n_pos - int(lengths[prompt]) : pos + 1].tolist()))
        for prompt in range(n_prompts) for pos in range(n_pos)
    ]  # fmt: skip
    n_distinct = len({key for *_, key in keys})
    if n_distinct > 0.9 * len(keys):
        assert torch.equal(places, torch.arange(len(keys)).view(n_prompts, n_pos))
        assert torch.equal(first, torch.arange(len(keys)))
        return
    assert len(first) == n_distinct
    number_of = {}
    for at, (prompt, pos, key) in enumerate(keys):
        place = int(places[prompt, pos])
        if key not in number_of:
            number_of[key] = place
            assert int(first[place]) == at
        assert number_of[key] == place
    assert len(set(number_of.values())) == n_distinct


def test_prompts_that_begin_alike_give_what_each_gives_alone(generator):
    """Twenty bare queries, each of them twice, of unlike length: activations of all layers against one prompt a run."""
    model = random_model(n_layers=3, dtype=torch.float64)
    pairs = fvlens.load_relation("antonym").pairs[:20]
    prompts = fvlens.build_prompts(model, pairs, queries=[*pairs, *pairs], n_shots=0, generator=generator)
    places, first = _hooked.distinct(prompts.tokens, prompts.attention_mask)
    assert len(first) < 0.5 * places.numel()
    n_suffix = 2
    together = run_prefix(model, prompts.tokens, prompts.attention_mask, n_suffix=n_suffix)
    for i in (0, 7, 19, 20, 39):
        real = prompts.attention_mask[i].bool()
        alone = run_prefix(model, prompts.tokens[i : i + 1, real], prompts.attention_mask[i : i + 1, real], n_suffix=2)
        n_prefix = int(real.sum()) - n_suffix
        same = dict(rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(together.resid_final[i], alone.resid_final[0], **same)
        torch.testing.assert_close(together.resid_pre[:, i], alone.resid_pre[:, 0], **same)
        torch.testing.assert_close(together.z[:, i], alone.z[:, 0], **same)
        torch.testing.assert_close(together.kept[i, ..., -n_prefix:, :], alone.kept[0], **same)
