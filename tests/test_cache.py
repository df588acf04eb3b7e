"""Activation caches against TransformerLens' own caches, plain Hugging Face, and loops over single prompts."""

import dataclasses
import re
from itertools import pairwise

import checkpoints
import matrix
import pytest
import torch
from architectures import build, global_randomness, rows_of, word_prompts
from conftest import needs_hooked, random_model
from matrix import loaded, plain

import fvlens
from fvlens import activation_cache
from fvlens.activations import SITES, position_names
from fvlens.interventions import hooked, resid_hook, z_hook
from fvlens.models import fingerprint
from fvlens.prompts import TokenClass
from fvlens.suffix import has_hooks

TIGHT = 1e-6
EVERY = [(name, backend) for name in checkpoints.ARCHITECTURES for backend in matrix.BACKENDS]
every_case = pytest.mark.parametrize(("name", "backend"), EVERY)
PARALLEL = ("neox", "gpt-j", "phi")


def cached(model, prompts, **settings):
    return activation_cache(model, prompts, progress=False, **settings)


def sites_of(name):
    return tuple(site for site in SITES if not (site == "resid_mid" and name in PARALLEL))


def real_rows(values, site, mask):
    """Numbers of real tokens [token ...] of an activation [prompt ...]."""
    return values.movedim(1 + SITES[site].pos_axis, 1)[mask]


def same_length(prompts):
    """The prompts of the commonest length, without padding."""
    lengths = prompts.attention_mask.sum(dim=1)
    n = int(lengths.mode().values)
    some = prompts.select(lengths == n)
    cut = {key: getattr(some, key)[:, -n:] for key in ("tokens", "attention_mask", "token_classes")}
    return dataclasses.replace(some, **cut)


# --- the numbers are right ---


@every_case
@pytest.mark.parametrize("padded", [True, False])
def test_numbers_are_those_of_run_with_cache(name, backend, padded):
    model, prompts = loaded(name, backend), matrix.prompts(name).clean
    prompts = prompts if padded else same_length(prompts)
    assert bool(prompts.attention_mask.all()) != padded
    cache = cached(model, prompts, sites=sites_of(name))
    real = prompts.attention_mask.bool()
    with torch.no_grad():
        _, theirs = model.run_with_cache(prompts.tokens, attention_mask=prompts.attention_mask)
    for site, kind in SITES.items():
        if site not in cache:
            continue
        for layer in range(model.cfg.n_layers):
            expected = theirs[f"blocks.{layer}.{kind.hook}"]
            found = cache[site, layer]
            assert found.shape == expected.shape
            matrix.agree(real_rows(found, site, real), real_rows(expected, site, real), TIGHT)
            assert padded is False or bool((real_rows(found, site, ~real) == 0).all())


@every_case
def test_numbers_are_those_of_hugging_face_prompt_by_prompt(name, backend):
    """Residual streams and attention of every prompt alone, in every batch size."""
    model, prompts = loaded(name, backend), matrix.prompts(name).clean
    n_layers = model.cfg.n_layers
    for size in matrix.BATCH_SIZES:
        cache = cached(model, prompts, sites=("resid_pre", "resid_post", "pattern"), batch_size=size)
        for i, row in enumerate(rows_of(prompts)[0]):
            with torch.no_grad():
                out = plain(name)(torch.tensor([row]), output_hidden_states=True, output_attentions=True)
            n = len(row)
            for layer in range(n_layers):
                matrix.agree(cache["resid_pre", layer][i, -n:], out.hidden_states[layer][0], 1e-5)
                matrix.agree(cache["pattern", layer][i, :, -n:, -n:], out.attentions[layer][0], 1e-5)
                if layer + 1 < n_layers:  # Hugging Face gives the last one behind the final norm
                    matrix.agree(cache["resid_post", layer][i, -n:], out.hidden_states[layer + 1][0], 1e-5)
            assert bool((cache["pattern"][:, i, :, :, :-n] == 0).all())


@every_case
def test_sites_of_a_block_fit_together(name, backend):
    model, prompts = loaded(name, backend), matrix.prompts(name).clean
    cache = cached(model, prompts, sites=sites_of(name))
    real = prompts.attention_mask.bool()
    stream = {site: cache[site][:, real] for site in cache.sites if "d_model" in cache.axes(site)}
    before = stream["resid_pre"]
    matrix.agree(before + stream["attn_out"] + stream["mlp_out"], stream["resid_post"], TIGHT)
    matrix.agree(before[1:], stream["resid_post"][:-1], TIGHT)
    if "resid_mid" in cache:
        matrix.agree(before + stream["attn_out"], stream["resid_mid"], TIGHT)
    values = cache["v"]
    values = values.repeat_interleave(model.cfg.n_heads // values.shape[-2], dim=-2)
    mixed = torch.einsum("lphqk,lpkhd->lpqhd", cache["pattern"], values)
    matrix.agree(mixed[:, real], cache["z"][:, real], TIGHT)
    matrix.agree(cache["pattern"].sum(dim=-1).movedim(2, 3)[:, real], torch.ones(3, int(real.sum()), 4), 1e-5)


@needs_hooked
@pytest.mark.parametrize("name", ["alibi", "shortformer", "qk-norm", "soft-caps"])
def test_numbers_on_models_of_ones_own(generator, name):
    model = build(name)
    prompts = word_prompts(model, generator)
    cache = cached(model, prompts, sites=("q", "z", "pattern", "resid_post"), batch_size=3)
    for i, row in enumerate(rows_of(prompts)[0]):
        with torch.no_grad():
            _, theirs = model.run_with_cache(torch.tensor([row]))
        n = len(row)
        for layer in range(3):
            for site in ("q", "z", "resid_post"):
                matrix.agree(cache[site, layer][i, -n:], theirs[f"blocks.{layer}.{SITES[site].hook}"][0], 1e-5)
            matrix.agree(cache["pattern", layer][i, :, -n:, -n:], theirs["pattern", layer][0], 1e-5)


# --- what is kept ---


@pytest.mark.parametrize("positions", position_names())
def test_named_positions_are_those_tokens(tiny, generator, positions):
    template = fvlens.prompts.Template("t", "Q:{input}\nA:{output}\n\n", "Q:{input}\nA:", prefix="Words.\n")
    prompts = word_prompts(tiny, generator, template=template)
    sites = ("z", "pattern", "resid_post")
    every, some = cached(tiny, prompts, sites=sites), cached(tiny, prompts, sites=sites, positions=positions)
    n_pos = prompts.tokens.shape[1]
    for i in range(len(prompts)):
        if positions == "last":
            wanted = [n_pos - 1]
        else:
            kinds = prompts.token_classes[i].tolist()
            wanted = [c for c, kind in enumerate(kinds) if kind == TokenClass[positions.upper()]]
        n = len(wanted)
        assert some.columns[i, -n:].tolist() == wanted
        assert some.mask[i].tolist() == [False] * (some.mask.shape[1] - n) + [True] * n
        for site in ("z", "resid_post"):
            assert torch.equal(some[site][:, i, -n:], every[site][:, i, wanted])
            assert bool((some[site][:, i, :-n] == 0).all())
        assert torch.equal(some["pattern"][:, i, :, -n:], every["pattern"][:, i, :, wanted])
    assert some.positions == positions
    assert some["pattern"].shape == (3, len(prompts), 4, some.mask.shape[1], n_pos)


@pytest.mark.parametrize(
    ("positions", "wanted"),
    [
        (-1, [-1]),
        ([-3, -1], [-3, -1]),
        ((-1, -30), [-1, -30]),
        (slice(-4, None), [-4, -3, -2, -1]),
        (slice(-6, -1, 2), [-6, -4, -2]),
        (None, None),
    ],
)
def test_positions_count_from_the_right(tiny, generator, positions, wanted):
    prompts = word_prompts(tiny, generator)
    every, some = cached(tiny, prompts), cached(tiny, prompts, positions=positions)
    wanted = list(range(-prompts.tokens.shape[1], 0)) if wanted is None else wanted
    assert torch.equal(some["z"], every["z"][:, :, wanted])
    assert torch.equal(some["resid_post"], every["resid_post"][:, :, wanted])
    assert torch.equal(some.mask, prompts.attention_mask.bool()[:, wanted])
    assert not every.mask.all()


def test_layers_sites_and_precision(tiny, generator):
    prompts = word_prompts(tiny, generator)
    every = cached(tiny, prompts, sites=("z", "mlp_out"))
    some = cached(tiny, prompts, sites="mlp_out", layers=[2, 0], dtype=torch.bfloat16)
    assert (some.sites, some.layers, some.dtype, every.dtype) == (("mlp_out",), (0, 2), torch.bfloat16, torch.float32)
    assert torch.equal(some["mlp_out"], every["mlp_out"][[0, 2]].bfloat16())
    assert torch.equal(some["mlp_out", 2], some["mlp_out"][1])
    alone = cached(tiny, prompts, layers=1)["z"]  # without mlp_out the engine runs the prompts, to rounding
    assert (alone - every["z"][1:2]).abs().max() <= 1e-5 * every["z"].abs().max()
    assert every.axes("z") == ("layer", "prompt", "pos", "head", "d_head")
    assert every.axes("mlp_out") == ("layer", "prompt", "pos", "d_model")
    assert some.shape("mlp_out") == tuple(some["mlp_out"].shape)
    assert ("z" in every, "z" in some, len(some)) == (True, False, 8)
    assert some.n_bytes == 2 * some["mlp_out"].numel()
    shape = re.escape(str(list(some.shape("mlp_out"))))
    assert re.match(rf"ActivationCache\(mlp_out {shape}, torch.bfloat16, {some.n_bytes} bytes in memory, ", repr(some))


def test_models_in_half_precision_give_float32_unless_told_otherwise(generator):
    model = random_model(dtype=torch.bfloat16)
    prompts = word_prompts(model, generator)
    cache = cached(model, prompts)
    assert cache["z"].dtype == torch.float32
    assert torch.equal(cache["z"], cache["z"].bfloat16().float())
    assert torch.equal(cached(model, prompts, dtype=torch.bfloat16)["z"], cache["z"].bfloat16())


def test_a_cache_says_where_it_comes_from(tiny, generator):
    relation = fvlens.load_relation("antonym")
    prompts = fvlens.build_prompts(tiny, relation, n_prompts=3, n_shots=2, template="colon", generator=generator)
    cache = cached(tiny, prompts)
    assert cache.prompts is prompts
    assert (cache.fingerprint, cache.positions, cache.layers) == (fingerprint(tiny), None, (0, 1, 2))
    row = prompts.tokens[0][prompts.attention_mask[0].bool()].tolist()
    assert "".join(cache.words[token] for token in row[1:]) == prompts.texts[0]
    assert not cache["z"].is_inference() and cache["z"].device.type == "cpu"
    with pytest.raises(dataclasses.FrozenInstanceError):
        cache.layers = (1,)
    bare = random_model()
    bare.tokenizer = None
    assert cached(bare, prompts).words == {}


def test_nothing_else_changes(tiny, generator):
    prompts = word_prompts(tiny, generator)
    before = global_randomness()
    first = cached(tiny, prompts)
    assert torch.equal(first["z"], cached(tiny, prompts)["z"])
    assert before == global_randomness()
    assert not has_hooks(tiny)
    broken = dataclasses.replace(prompts, tokens=torch.full_like(prompts.tokens, tiny.cfg.d_vocab))
    with pytest.raises(IndexError):
        cached(tiny, broken)
    assert not has_hooks(tiny)


# --- reading ---


def test_selections_are_the_same_numbers(tiny, generator):
    prompts = word_prompts(tiny, generator)
    cache = cached(tiny, prompts, sites=("z", "pattern"))
    flags = torch.tensor([True, False] * 4)
    for chosen, index in (([3, 1, 1, -1], [3, 1, 1, 7]), (flags, [0, 2, 4, 6]), (slice(2, 5), [2, 3, 4])):
        some = cache.select(prompts=chosen, layers=[1, 2], sites="pattern")
        assert torch.equal(some["pattern"], cache["pattern"][1:, index])
        assert torch.equal(some["pattern", 2], cache["pattern"][2, index])
        assert torch.equal(some.mask, cache.mask[index]) and torch.equal(some.columns, cache.columns[index])
        assert some.prompts.texts == tuple(prompts.texts[i] for i in index)
        assert torch.equal(some.select(prompts=[-1])["pattern"], some["pattern"][:, -1:])
    assert torch.equal(cache.select(layers=2)["z"], cache["z"][2:])


def test_patching_with_a_value_is_what_the_model_did(tiny, generator):
    """What is cached from one run, put into another at the last token, carries over what the first one said."""
    clean = word_prompts(tiny, generator, labels="true")
    other = word_prompts(tiny, generator, labels="permuted")
    cache = cached(tiny, clean)

    def last_logits(edits):
        def put(value):
            def edit(activation):
                result = activation.clone()
                result[(slice(None), -1)] = value(activation[:, -1])
                return result

            return edit

        with torch.no_grad(), hooked(tiny, {hook: put(value) for hook, value in edits.items()}):
            return tiny(other.tokens, attention_mask=other.attention_mask)[:, -1]

    with torch.no_grad():
        wanted = tiny(clean.tokens, attention_mask=clean.attention_mask)[:, -1]
    assert not torch.allclose(last_logits({}), wanted, atol=1e-2)
    whole = last_logits({resid_hook(2): lambda old: cache.value("resid_post", 2)})
    torch.testing.assert_close(whole, wanted, rtol=1e-5, atol=1e-5)
    one = last_logits({resid_hook(2): lambda old: cache.value("resid_post", 2, prompt=3).expand_as(old)})
    torch.testing.assert_close(one, wanted[3].expand_as(one), rtol=1e-5, atol=1e-5)
    # heads one at a time are all heads together, and they are the attention's whole output
    by_head = torch.stack([cache.value("z", 1, head) for head in range(4)], dim=1)
    assert torch.equal(by_head, cache.value("z", 1))
    patched = last_logits({z_hook(1): lambda old: cache.value("z", 1)})
    assert not torch.allclose(patched, last_logits({}), atol=1e-3)
    own = cached(tiny, other)
    torch.testing.assert_close(last_logits({z_hook(1): lambda old: own.value("z", 1)}), last_logits({}))


def test_values_at_other_tokens(tiny, generator):
    prompts = word_prompts(tiny, generator)
    every, some = cached(tiny, prompts), cached(tiny, prompts, positions=[-5, -2])
    assert torch.equal(every.value("z", 2, position=-5), every["z", 2][:, -5])
    assert torch.equal(some.value("z", 2, position=-5), every["z", 2][:, -5])
    assert torch.equal(some.value("resid_post", 0, prompt=2, position=-2), every["resid_post", 0][2, -2])
    labels = cached(tiny, prompts, positions="demonstration_label")
    column = int(labels.columns[4, -1])
    position = column - prompts.tokens.shape[1]
    assert torch.equal(labels.value("z", 0, 3, prompt=4, position=position), every["z", 0][4, column, 3])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(site="pattern", layer=0), "value: 'pattern' has no value at one token; its axes are layer, prompt, head"),
        (dict(site="mlp_out", layer=0), "the cache holds no site 'mlp_out'; it holds z, resid_post, pattern."),
        (dict(site="z", layer=3), "the cache holds no layer 3; it holds [0, 1, 2]."),
        (dict(site="z", layer=0, head=4), "value: 'z' has heads 0..3, got head=4."),
        (dict(site="resid_post", layer=0, head=0), "value: 'resid_post' has no heads, got head=0."),
        (dict(site="z", layer=0, prompt=8), "value: expected a prompt in 0..7, got 8."),
        (dict(site="z", layer=0, position=0), "value: position 0 was not kept, or is padding, in prompts [0, 1, 2,"),
    ],
)
def test_values_that_are_not_there_are_refused(tiny, generator, arguments, message):
    cache = cached(tiny, word_prompts(tiny, generator), sites=("z", "resid_post", "pattern"))
    with pytest.raises(ValueError, match=re.escape(message)):
        cache.value(**arguments)


def test_padding_has_no_value(tiny, generator):
    prompts = word_prompts(tiny, generator)
    cache = cached(tiny, prompts)
    n_pos = prompts.tokens.shape[1]
    short = (prompts.attention_mask[:, 0] == 0).nonzero().flatten().tolist()
    assert short
    with pytest.raises(ValueError, match=re.escape(f"value: position {-n_pos} was not kept, or is padding, in {short}"
                                                   .replace("in [", "in prompts ["))):  # fmt: skip
        cache.value("z", 0, position=-n_pos)


# --- means ---


@pytest.mark.parametrize("positions", ["last", "demonstration_label", "query"])
def test_mean_heads_are_the_means(tiny, generator, positions):
    prompts = word_prompts(tiny, generator)
    expected = fvlens.mean_head_activations(tiny, prompts, positions=positions, progress=False)
    every, some = cached(tiny, prompts), cached(tiny, prompts, positions=positions)
    for means in (some.mean_heads(), every.mean_heads(positions), every.select(sites="z").mean_heads(positions)):
        torch.testing.assert_close(means.z, expected.z, rtol=1e-6, atol=1e-7)
        assert dataclasses.replace(means, z=expected.z, batch_size=expected.batch_size) == expected
    vector = fvlens.function_vector(tiny, every.mean_heads(), heads=[(0, 1), (2, 3)], layer=1)
    assert vector.data_hash == prompts.data_hash


def test_means_leave_padding_out(tiny, generator):
    prompts = word_prompts(tiny, generator)
    cache = cached(tiny, prompts, sites=("z", "pattern"))
    kept = cache.mask
    n_pos = kept.shape[1]
    over_prompts = cache.mean("z")
    for pos in (0, n_pos // 2, n_pos - 1):
        expected = cache["z"][:, kept[:, pos], pos].double().mean(dim=1)
        torch.testing.assert_close(over_prompts[:, pos], expected.float(), rtol=1e-5, atol=1e-6)
    over_tokens, patterns = cache.mean("z", over=("pos",)), cache.mean("pattern", over=("query_pos",))
    for i in (0, 5):
        expected = cache["z"][:, i, kept[i]].double().mean(dim=1)
        torch.testing.assert_close(over_tokens[:, i], expected.float(), rtol=1e-5, atol=1e-6)
        expected = cache["pattern"][:, i][:, :, kept[i]].double().mean(dim=2)
        torch.testing.assert_close(patterns[:, i], expected.float(), rtol=1e-5, atol=1e-6)
    both = cache.mean(over=("prompt", "pos"))
    assert set(both) == {"z", "pattern"}
    torch.testing.assert_close(both["z"], cache["z"][:, kept].double().mean(dim=1).float(), rtol=1e-5, atol=1e-6)
    assert both["pattern"].shape == (3, 4, n_pos)
    short = cache.select(prompts=(kept[:, 0] == 0))
    assert bool(short.mean("z")[:, 0].isnan().all()) and bool(short.mean("z")[:, -1].isfinite().all())


def test_means_that_there_are_not(tiny, generator):
    prompts = word_prompts(tiny, generator)
    cache = cached(tiny, prompts, positions="last")
    with pytest.raises(ValueError, match=re.escape("mean: over=('head',); expected 'prompt', 'pos' or both.")):
        cache.mean("z", over=("head",))
    with pytest.raises(ValueError, match=re.escape("mean: over=(); expected")):
        cache.mean("z", over=())
    with pytest.raises(ValueError, match="the cache holds no site 'q'; it holds z, resid_post"):
        cache.mean("q")
    message = "mean_heads: expected a cache of 'z' in all 3 layers, got "
    for some, told in ((cache.select(sites="resid_post"), "resid_post in"), (cache.select(layers=[0, 1]), "z, resid")):
        with pytest.raises(ValueError, match=message + told):
            some.mean_heads()
    with pytest.raises(
        ValueError, match=r"mean_heads: positions='query': \d+ of these tokens were not kept \(the cach"
    ):
        cache.mean_heads("query")
    with pytest.raises(ValueError, match="positions='first'; expected one of last"):
        cache.mean_heads("first")
    # a place without a token does not count for the token that its column stands for
    longest = prompts.attention_mask.all(dim=1)
    empty = dataclasses.replace(cache, columns=torch.zeros_like(cache.columns), mask=torch.zeros_like(cache.mask))
    with pytest.raises(ValueError, match="mean_heads: positions='bos': 1 of these tokens were not kept"):
        empty.select(prompts=longest).select(prompts=[0]).mean_heads("bos")


def test_figures_of_long_prompts_name_the_tokens_that_have_room(tiny, generator):
    prompts = word_prompts(tiny, generator, n_shots=7)
    n = int(prompts.attention_mask[0].sum())
    axis = cached(tiny, prompts, sites="pattern", layers=0).plot().layout.xaxis
    assert n > 52 and len(axis.tickvals) < 52
    assert axis.tickvals[-1] == n - 1 and axis.ticktext[-1] == ":"
    assert min(later - earlier for earlier, later in pairwise(axis.tickvals)) > 1
    words = [tiny.tokenizer.decode([token]) for token in prompts.tokens[0, -n:].tolist()]
    assert sum(len(text) > 2 for text in axis.ticktext) > sum(len(text) > 2 for text in words[:-1:2])


# --- what is refused ---


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            dict(sites=("z", "zz")),
            "sites: no site named 'zz'; expected some of z, q, k, v, pattern, attn_out, mlp_out, ",
        ),
        (dict(sites=()), "sites: expected at least one site and each once, got []."),
        (dict(sites=("z", "z")), "sites: expected at least one site and each once, got ['z', 'z']."),
        (dict(layers=[0, 3]), "layers: expected different layers out of [0, 1, 2], got [0, 3]."),
        (dict(layers=[]), "layers: expected different layers out of [0, 1, 2], got []."),
        (dict(layers=[1, 1]), "layers: expected different layers out of [0, 1, 2], got [1, 1]."),
        (dict(layers=-1), "layers: expected different layers out of [0, 1, 2], got [-1]."),
        (dict(positions="labels"), "positions='labels'; expected one of last, bos, prefix,"),
        (dict(positions=0), "expected different indices counted from the right, from -1 (the last token) to -"),
        (dict(positions=[-1, -1]), "expected different indices counted from the right, from -1 (the last token) to -"),
        (dict(positions=[]), "positions=[]: expected different indices counted from the right"),
        (dict(positions=[-999]), "got [-999]."),
        (dict(positions=slice(0, 3)), "positions=slice(0, 3, None): prompts are left-padded, so positions count from"),
        (dict(positions=slice(-1, -3)), "expected different indices counted from the right"),
        (
            dict(dtype=torch.int64),
            "activation_cache: dtype=torch.int64; expected one of torch.float32, torch.float16, ",
        ),
        (dict(batch_size=0), "activation_cache: expected batch_size >= 1, got 0."),
        (dict(max_memory=0), "max_memory: expected at least 1 byte, got 0."),
        (dict(folder="nowhere"), "activation_cache: folder nowhere does not exist; create it first."),
    ],
)
def test_what_there_is_not_is_refused(tiny, generator, settings, message):
    prompts = word_prompts(tiny, generator)
    with pytest.raises(ValueError, match=re.escape(message)):
        cached(tiny, prompts, **settings)
    assert not has_hooks(tiny)


@pytest.mark.parametrize("backend", matrix.BACKENDS)
@pytest.mark.parametrize("name", PARALLEL)
def test_parallel_blocks_have_no_stream_between(name, backend):
    message = (
        "site 'resid_mid': this model has no blocks.0.hook_resid_mid (its attention and its MLP read the same residual "
        "stream, so that nothing lies between them)."
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        cached(loaded(name, backend), matrix.prompts(name).clean, sites="resid_mid")


@needs_hooked
def test_sites_that_a_model_does_not_use_are_refused(generator):
    model = build("attn-only")
    prompts = word_prompts(model, generator)
    with pytest.raises(ValueError, match=r"site 'resid_mid': this model has no .* \(its blocks have no MLP\)"):
        cached(model, prompts, sites="resid_mid")
    message = "site 'mlp_out': blocks.0.hook_mlp_out never ran on these prompts, so that this model has no such"
    with pytest.raises(ValueError, match=message):
        cached(model, prompts, sites=("z", "mlp_out"))
    assert not has_hooks(model)


@needs_hooked
def test_activations_of_another_shape_are_refused(tiny, generator):
    prompts = word_prompts(tiny, generator)
    message = (
        r"site 'z': blocks\.1\.attn\.hook_z gives \[\d+, 4, 3\] a prompt; expected pos, head, d_head = \[\d+, 4, 8\]"
    )
    point = tiny.hook_dict["blocks.1.attn.hook_z"]
    narrowed = point.register_forward_pre_hook(lambda module, args: (args[0][..., :3],))
    try:
        with pytest.raises(ValueError, match=message):
            cached(tiny, prompts, sites=("z", "mlp_out"))  # with mlp_out the class's own forward runs
    finally:
        narrowed.remove()
    assert not has_hooks(tiny)


def test_selections_that_are_not_there_are_refused(tiny, generator):
    cache = cached(tiny, word_prompts(tiny, generator))
    for arguments, message in (
        (dict(prompts=[8]), r"select: expected prompts in 0\.\.7, got \[8\]"),
        (dict(prompts=[]), "select: expected at least one prompt to keep, got none"),
        (dict(prompts=torch.ones(3, dtype=torch.bool)), r"select: expected 8 flags, one a prompt, got \(3,\)"),
        (dict(layers=[4]), r"layers: expected different layers out of \[0, 1, 2\], got \[4\]"),
        (dict(sites="q"), "the cache holds no site 'q'; it holds z, resid_post"),
    ):
        with pytest.raises(ValueError, match=message):
            cache.select(**arguments)
    with pytest.raises(ValueError, match=r"the cache holds no layer 7; it holds \[0, 1, 2\]"):
        cache["z", 7]


# --- what a reader sees ---


def test_tables_are_tidy(tiny, generator):
    prompts = word_prompts(tiny, generator, n_shots=1)
    cache = cached(tiny, prompts, sites=("z", "pattern"), layers=[0, 2], positions=slice(-6, None)).select(
        prompts=[2, 5]
    )
    table = cache.to_dataframe("z")
    assert list(table.columns) == [
        "site", "layer", "prompt", "pos", "head", "d_head", "token", "token_class", "value",
    ]  # fmt: skip
    assert len(table) == 2 * int(cache.mask.sum()) * 32
    for _, row in table.sample(20, random_state=0).iterrows():
        place = (cache.layers.index(row.layer), row.prompt, row.pos, row["head"], row.d_head)
        assert row.value == cache["z"][place]
        token = int(cache.prompts.tokens[row.prompt, row.pos])
        assert row.token == tiny.tokenizer.decode([token]).replace("\n", "↵")
        assert row.token_class == TokenClass(int(cache.prompts.token_classes[row.prompt, row.pos])).name.lower()
    patterns = cache.to_dataframe("pattern")
    for _, row in patterns.sample(20, random_state=0).iterrows():
        place = (cache.layers.index(row.layer), row.prompt, row["head"], row.query_pos, row.key_pos)
        assert row.value == cache["pattern"][place]
    both = cache.to_dataframe()
    assert len(both) == len(table) + len(patterns)
    assert set(both.site) == {"z", "pattern"} and both.d_head.isna().sum() == len(patterns)
    with pytest.raises(
        ValueError, match=r"to_dataframe: a table of \d+ rows would take about \d+ bytes, above max_memory="
    ):
        dataclasses.replace(cache, max_memory=10_000).to_dataframe()


def test_figures_show_the_numbers(tiny, generator):
    prompts = word_prompts(tiny, generator, n_shots=1)
    cache = cached(tiny, prompts, sites=("resid_post", "z", "pattern"), layers=[1, 2])
    short = int(prompts.attention_mask.sum(dim=1).argmin())
    n = int(prompts.attention_mask[short].sum())
    assert n < prompts.tokens.shape[1]
    attention = cache.plot("pattern", layer=2, head=3, prompt=short)
    shown = torch.tensor(attention.data[0].z)
    torch.testing.assert_close(shown, cache["pattern", 2][short, 3, -n:, -n:])
    assert attention.layout.title.text == f"Attention of L2H3, prompt {short}"
    assert list(attention.layout.yaxis.ticktext)[-3:] == ["↵", "A", ":"]
    assert sorted(zip(attention.layout.xaxis.tickvals, attention.layout.xaxis.ticktext, strict=True)) == list(
        enumerate(attention.layout.yaxis.ticktext)
    )
    heads = torch.tensor(cache.plot("z").data[0].z)
    assert bool(heads[0].isnan().all())
    expected = torch.stack([cache["z", layer][cache.mask].norm(dim=-1).mean(dim=0) for layer in (1, 2)])
    torch.testing.assert_close(heads[1:], expected, rtol=1e-5, atol=1e-6)
    one = torch.tensor(cache.plot("z", prompt=short).data[0].z)
    torch.testing.assert_close(one[2], cache["z", 2][short, -n:].norm(dim=-1).mean(dim=0), rtol=1e-5, atol=1e-6)
    norms = cache.plot()
    expected = [float(cache["resid_post", layer][cache.mask].norm(dim=-1).mean()) for layer in (1, 2)]
    assert list(norms.data[-1].y) == pytest.approx(expected, rel=1e-5)
    tokens = torch.tensor(cache.plot(prompt=short).data[0].z)
    torch.testing.assert_close(tokens[1], cache["resid_post", 2][short, -n:].norm(dim=-1))
    for arguments, message in (
        (dict(site="q"), "the cache holds no site 'q'"),
        (dict(site="pattern", layer=0), r"the cache holds no layer 0; it holds \[1, 2\]"),
        (dict(site="pattern", head=4), r"plot: expected a head in 0\.\.3, got 4"),
        (dict(site="z", prompt=8), r"plot: expected a prompt in 0\.\.7, got 8"),
        (dict(site="z", head=1), "plot: layer= and head= choose one pattern, and 'z' is none; select layers instead"),
    ):
        with pytest.raises(ValueError, match=message):
            cache.plot(**arguments)
