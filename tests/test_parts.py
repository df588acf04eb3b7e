"""Direct effects, logit lens and attention patterns against plain Hugging Face, on every architecture and class."""

import dataclasses
import functools

import checkpoints
import matrix
import pytest
import torch
from architectures import build, rows_of, word_prompts
from conftest import needs_hooked, random_model, seeded
from matrix import agree, loaded, plain
from oracle import parts

import fvlens
from fvlens.activations import activation_cache
from fvlens.attribution import GROUPS, attention_patterns, direct_effects, logit_lens
from fvlens.metrics import best_tokens, rank
from fvlens.prompts import Template
from fvlens.suffix import read_out

TIGHT = 1e-4
NAMES = tuple(checkpoints.ARCHITECTURES)
every_case = pytest.mark.parametrize(("name", "backend"), [(n, b) for n in NAMES for b in matrix.BACKENDS])
HEADS = [(2, 3), (0, 1), (2, 0)]


@functools.cache
def double(name):
    return parts.double(plain(name))


def direct(model, prompts, **settings):
    return direct_effects(model, prompts, progress=False, **settings)


def lens(model, prompts, **settings):
    return logit_lens(model, prompts, progress=False, **settings)


def patterns(model, prompts, heads=HEADS, **settings):
    return attention_patterns(model, prompts, heads, progress=False, **settings)


def foils_of(prompts):
    """The other first tokens of the prompts' answers, for each prompt."""
    answers = prompts.answer_tokens[:, 0].tolist()
    return [sorted(set(answers) - {answer}) for answer in answers]


# --- direct effects ---


@functools.cache
def written(name):
    """The oracle's effects for each prompt of the matrix."""
    prompts = matrix.prompts(name).shuffled
    asked = zip(rows_of(prompts)[0], prompts.answer_tokens[:, 0].tolist(), foils_of(prompts), strict=True)
    return [parts.direct_effects(double(name), *each) for each in asked]


@pytest.mark.parametrize("name", NAMES)
def test_the_oracles_parts_add_up(name):
    for heads, mlps, others, total in written(name):
        assert float(heads.sum() + mlps.sum() + sum(others.values())) == pytest.approx(float(total), abs=1e-5)
        assert heads.abs().max() > 0.1 and mlps.abs().max() > 0.1 and abs(total) > 0.1


@every_case
def test_direct_effects_are_what_each_part_writes(name, backend):
    found = direct(loaded(name, backend), matrix.prompts(name).shuffled, batch_size=3)
    heads, mlps, others, total = zip(*written(name), strict=True)
    for ours, theirs in ((found.heads, heads), (found.mlps, mlps), (found.total, total)):
        torch.testing.assert_close(ours.double(), torch.stack(theirs), rtol=TIGHT, atol=TIGHT)
    for name_of, each in others[0].items():
        theirs = torch.stack([part[name_of] for part in others])
        if name_of in found.other_names:
            ours = found.others[:, found.other_names.index(name_of)].double()
            torch.testing.assert_close(ours, theirs, rtol=TIGHT, atol=TIGHT)
        else:
            assert float(theirs.abs().max()) == 0 == float(each)
    assert "embedding" in found.other_names
    assert float((found.sum - found.total).abs().max()) < TIGHT
    assert found.logit_cap == (12.0 if name == "gemma2" else None)


def test_foils(tiny, generator):
    """The whole vocabulary, words, and tokens for each prompt, against their logits one by one."""
    prompts = word_prompts(tiny, generator, n_prompts=4)
    answers = prompts.answer_tokens[:, 0]
    with torch.no_grad():
        logits = tiny(prompts.tokens, attention_mask=prompts.attention_mask)[:, -1].double()
    own = logits.gather(1, answers[:, None])[:, 0]
    rest = (logits.sum(dim=1) - own) / (logits.shape[1] - 1)
    words = ["cold", "small"]
    ids = [tiny.tokenizer(f" {word}", add_special_tokens=False)["input_ids"][0] for word in words]
    given = torch.stack([answers, (answers + 1) % 50, (answers + 2) % 50], dim=1)  # its own answer is left out
    for foil, expected, name, n_foils in (
        ("vocabulary", own - rest, "vocabulary", [logits.shape[1] - 1] * 4),
        (words, own - logits[:, ids].mean(dim=1), "given", [2] * 4),
        (given, own - logits.gather(1, given[:, 1:]).mean(dim=1), "given", [2] * 4),
        ("answers", None, "answers", [len(each) for each in foils_of(prompts)]),
    ):
        found = direct(tiny, prompts, foil=foil)
        if expected is not None:
            torch.testing.assert_close(found.total.double(), expected, rtol=TIGHT, atol=TIGHT)
        assert float((found.sum - found.total).abs().max()) < TIGHT
        assert (found.foil, found.n_foils.tolist()) == (name, n_foils)
    assert found.answers.equal(answers)


def test_a_frozen_norm_makes_the_effect_the_slope_along_a_write(tiny, generator):
    """Moving the last residual stream along a head's write moves the frozen difference by its direct effect."""
    prompts = word_prompts(tiny, generator, n_prompts=3)
    foil = (prompts.answer_tokens[:, :1] + 1) % 50
    found = direct(tiny, prompts, foil=foil)
    cache = activation_cache(tiny, prompts, sites=("z", "resid_post"), positions="last", progress=False)
    for layer, head in HEADS:
        write = cache["z", layer][:, 0, head] @ tiny.blocks[layer].attn.W_O[head].detach()
        last = cache["resid_post", 2][:, 0].double()
        gain, mean = tiny.ln_final.w.detach().double(), lambda x: x.mean(dim=1, keepdim=True)
        scale = (last - mean(last)).square().mean(dim=1).add(tiny.ln_final.eps).sqrt()
        torch.testing.assert_close(found.scale.double(), scale, rtol=1e-5, atol=0)
        moved = (write - mean(write)) / scale[:, None] * gain
        unembed = tiny.W_U.detach().double()
        slope = (moved * (unembed[:, prompts.answer_tokens[:, 0]] - unembed[:, foil[:, 0]]).T).sum(dim=1)
        torch.testing.assert_close(found.heads[:, layer, head].double(), slope, rtol=TIGHT, atol=1e-5)


@needs_hooked
@pytest.mark.parametrize("name", ["attn-only", "alibi", "shortformer", "soft-caps", "no norm"])
def test_parts_add_up_on_models_of_ones_own(generator, name):
    model = random_model(normalization_type=None) if name == "no norm" else build(name)
    found = direct(model, word_prompts(model, generator, n_prompts=4), foil="vocabulary")
    assert float((found.sum - found.total).abs().max()) < TIGHT * max(1, float(found.heads.abs().sum(dim=(1, 2)).max()))
    assert bool((found.mlps == 0).all()) == (name == "attn-only")
    assert ("positions" in found.other_names) == (name in ("attn-only", "no norm"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_near(dtype):
    prompts = matrix.prompts("llama").shuffled
    whole = direct(loaded("llama", matrix.BACKENDS[0]), prompts)
    model = fvlens.load_model(matrix.folder("llama"), device="cpu", backend=matrix.BACKENDS[0], dtype=dtype)
    half = direct(model, prompts)
    assert torch.cosine_similarity(half.heads.flatten(), whole.heads.flatten(), dim=0) > 0.98
    gap = (half.sum - half.total).abs()
    assert bool((gap < 0.1 * half.heads.abs().sum(dim=(1, 2))).all())


def test_slices_of_prompts_change_nothing(tiny, generator):
    prompts = word_prompts(tiny, generator, n_prompts=5)
    every = direct(tiny, prompts)
    sliced = direct(tiny, prompts, max_memory=24_000, batch_size=1)
    for name in ("heads", "mlps", "others", "total", "scale"):
        torch.testing.assert_close(getattr(sliced, name), getattr(every, name), rtol=1e-4, atol=1e-5)


def test_direct_effects_are_ordered_and_tabled(tiny, generator):
    prompts = word_prompts(tiny, generator, n_prompts=4)
    found = direct(tiny, prompts)
    mean = found.heads.double().mean(dim=0)
    order = sorted(((layer, head) for layer in range(3) for head in range(4)), key=lambda at: -float(mean[at]))
    assert found.top(3) == order[:3] and found.bottom(2) == order[::-1][:2]
    error = found.heads.double().std(dim=0) / 2
    torch.testing.assert_close(found.stderr.double(), error)
    frame = found.to_dataframe()
    n_parts = 12 + 3 + len(found.other_names)
    assert len(frame) == 4 * n_parts
    assert list(frame.columns) == ["prompt", "part", "kind", "layer", "head", "effect", "total"]
    sums = frame.groupby("prompt").effect.sum()
    assert sums.tolist() == pytest.approx(found.total.tolist(), abs=1e-4)
    at = frame[(frame.prompt == 2) & (frame.part == "L1H3")].iloc[0]
    assert (at.kind, at.layer, at["head"], at.effect) == ("head", 1, 3, pytest.approx(float(found.heads[2, 1, 3])))
    mlp = frame[(frame.prompt == 1) & (frame.part == "MLP 2")].iloc[0]
    assert mlp.effect == pytest.approx(float(found.mlps[1, 2])) and mlp.isna()["head"]
    assert f"4 prompts, 3 layers x 4 heads, mean logit difference {float(found.total.mean()):+.3f}" in repr(found)
    for n in (0, 13):
        with pytest.raises(ValueError, match=f"top: expected n between 1 and 12 \\(all heads\\), got {n}"):
            found.top(n)
        with pytest.raises(ValueError, match=f"bottom: expected n between 1 and 12 \\(all heads\\), got {n}"):
            found.bottom(n)


def test_figures_of_direct_effects_show_the_numbers():
    found = direct(loaded("gpt2", matrix.BACKENDS[0]), matrix.prompts("gpt2").shuffled.select([0, 1, 2]))
    for prompt in (None, 1):
        figure = found.plot(n_top=2, prompt=prompt)
        heads = found.heads.mean(dim=0) if prompt is None else found.heads[prompt]
        shown = torch.tensor(figure.data[0].z)
        torch.testing.assert_close(shown[:, :4], heads)
        torch.testing.assert_close(shown[:, 5], found.mlps.mean(dim=0) if prompt is None else found.mlps[prompt])
        total = float(found.total.mean() if prompt is None else found.total[prompt])
        others = found.others.mean(dim=0) if prompt is None else found.others[prompt]
        embedding, positions, biases = float(others[0]), float(others[1]), float(others[2:].sum())
        assert figure.layout.title.subtitle.text.replace("<br>", " ") == (
            f"Sum of all parts {total:+.2f}: embedding {embedding:+.2f}, positions {positions:+.2f}, biases "
            f"{biases:+.2f}; outlined: the largest of heads (2)"
        )
        assert len(figure.layout.shapes) == 2
        assert ("standard error" in figure.data[0].hovertext[0][0]) == (prompt is None)
    with pytest.raises(ValueError, match=r"plot: expected a prompt in 0\.\.2, got 3"):
        found.plot(prompt=3)


def test_foils_that_there_are_not_are_refused(tiny, generator):
    prompts = word_prompts(tiny, generator, n_prompts=3)
    n = tiny.cfg.d_vocab
    for foil, message in (
        ("wrong", "foil='wrong'; expected 'answers', 'vocabulary', a list of words, or token ids for each prompt"),
        ([], "expected at least one word as foil, or token ids"),
        ([" "], "expected words as foil, got ' '"),
        (torch.tensor([[1], [2]]), r"for 3 prompts, got shape \(2, 1\)"),
        (torch.full((3, 2), n), rf"expected token ids in 0\.\.{n - 1} as foil, got {n} to {n}"),
        (prompts.answer_tokens[:, :1], "no wrong answer is left to 3 of 3 prompts"),
    ):
        with pytest.raises(ValueError, match=message):
            direct(tiny, prompts, foil=foil)
    with pytest.raises(ValueError, match=r"no wrong answer is left to 1 of 1 prompts \(the first is 0\); give more"):
        direct(tiny, prompts.select([0]))


@needs_hooked
def test_models_whose_parts_do_not_add_up_are_refused(generator):
    def refused(model, message):
        with pytest.raises(ValueError, match=message):
            direct(model, word_prompts(model, seeded(), n_prompts=3), foil="vocabulary")

    class Odd(torch.nn.Module):
        """No norm: it looks at each number by itself."""

        def __init__(self):
            super().__init__()
            self.w = torch.nn.Parameter(torch.ones(()))

        def forward(self, x):
            return torch.tanh(x * self.w)

    model = build("gpt2")
    model.ln_final = Odd()
    refused(model, "the parts add up to something else than the logit difference .* neither a LayerNorm nor an RMSNorm")
    model = build("gpt2")
    inner = model.blocks[1].attn.forward
    model.blocks[1].attn.forward = lambda *args, **kwargs: 2 * inner(*args, **kwargs)
    refused(model, "what attention adds in layer 1 is not the sum of its heads' writes, nor a norm of it")
    model = build("gpt2")
    model.unembed.hook_in = torch.nn.Tanh()
    refused(model, "the model's logits are not its final norm times its unembedding")
    model = build("gpt2")
    vector = torch.ones(model.cfg.d_model)
    with fvlens.inject(model, matrix.Trained(vector, 1)):
        refused(model, "something acts on the model .* leave the block first")


# --- logit lens ---


@every_case
def test_the_lens_is_the_models_own_head_on_every_layer(name, backend):
    model, prompts = loaded(name, backend), matrix.prompts(name).shuffled
    longest = int(prompts.attention_mask.sum(dim=1).argmax())
    prompts = prompts.select([longest, (longest + 1) % len(prompts)])
    places = [-1, -5, -prompts.tokens.shape[1]]  # the last one is there in the longest prompt only
    found = lens(model, prompts, positions=places, k=3, batch_size=2)
    assert not bool(found.mask.all())
    for i, row in enumerate(rows_of(prompts)[0]):
        theirs, here = parts.lens(double(name), row), found.mask[i]
        theirs = theirs[:, [place for place, there in zip(places, here.tolist(), strict=True) if there]]
        answer = int(prompts.answer_tokens[i, 0])
        agree(found.probability[:, i, here], theirs[:, :, answer])
        agree(found.top_probability[:, i, here], theirs.topk(3).values)
        agree(theirs.gather(-1, found.top_tokens[:, i, here]), theirs.topk(3).values)
        own = theirs[:, :, answer, None]
        above, near = (theirs > own * (1 + TIGHT)).sum(dim=-1), (theirs >= own * (1 - TIGHT)).sum(dim=-1)
        assert ((above <= found.rank[:, i, here]) & (found.rank[:, i, here] < near)).all()
        assert bool((found.rank[:, i, ~here] == -1).all()) and bool((found.probability[:, i, ~here] == 0).all())
        assert found.tokens[i, here].tolist() == [
            row[place] for place, there in zip(places, here, strict=True) if there
        ]
        assert found.places[i].tolist() == [place if there else 0 for place, there in zip(places, here, strict=True)]


def test_the_last_layer_of_the_lens_is_what_the_model_says(tiny, generator):
    prompts = word_prompts(tiny, generator, n_prompts=6)
    found = lens(tiny, prompts, layers=[0, 2], k=4)
    with torch.no_grad():
        logits = tiny(prompts.tokens, attention_mask=prompts.attention_mask)[:, -1]
    answers = prompts.answer_tokens[:, 0]
    assert found.layers == (0, 2) and found.mask.shape == (6, 1)
    assert found.rank[1, :, 0].equal(rank(logits, answers))
    assert found.top_tokens[1, :, 0].equal(best_tokens(logits, 4))
    chances = logits.double().softmax(dim=-1).gather(1, answers[:, None])[:, 0]
    torch.testing.assert_close(found.probability[1, :, 0].double(), chances, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(found.mean[1].double(), chances.mean(), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(found.stderr[1].double(), chances.std() / 6**0.5, rtol=1e-5, atol=1e-7)
    assert float(found.top1[1]) == pytest.approx(float((logits.argmax(dim=-1) == answers).float().mean()))
    frame = found.to_dataframe()
    assert len(frame) == 12 and set(frame.pos) == {-1}
    some = frame[(frame.layer == 2) & (frame.prompt == 4)].iloc[0]
    assert (some["rank"], some.token) == (int(found.rank[1, 4, 0]), ":")
    assert some.top_token == tiny.tokenizer.decode([int(logits[4].argmax())])
    assert "2 layers, 6 prompts, 1 tokens" in repr(found)


@needs_hooked  # a bridge under a vector refuses: the next test
def test_the_lens_under_a_vector_is_that_of_the_steered_model(tiny, generator):
    prompts = word_prompts(tiny, generator, n_prompts=3)
    steering = matrix.Trained(torch.randn(32, generator=generator), 1)
    with fvlens.inject(tiny, steering), torch.no_grad():
        logits = tiny(prompts.tokens, attention_mask=prompts.attention_mask)[:, -1]
        found = lens(tiny, prompts)
    agree(found.probability[2, :, 0], logits.softmax(dim=-1).gather(1, prompts.answer_tokens[:, :1])[:, 0])
    assert not torch.allclose(found.probability[2], lens(tiny, prompts).probability[2], rtol=0.01)


def test_a_steered_bridge_is_not_read_out_twice():
    model, prompts = loaded("gpt2", "bridge"), matrix.prompts("gpt2").shuffled
    with fvlens.inject(model, matrix.Trained(torch.ones(32), 2)):
        with pytest.raises(ValueError, match=r"something acts on this TransformerBridge .* leave the block"):
            lens(model, prompts)


@pytest.mark.parametrize("backend", matrix.BACKENDS)
def test_read_out_is_the_end_of_the_model_before_any_prompt_was_run(backend):
    """A bridge has seen no prefix yet."""
    model = fvlens.load_model(matrix.folder("gpt-j"), device="cpu", backend=backend)
    resid = torch.randn(2, 3, 32, generator=seeded())
    theirs = plain("gpt-j").lm_head(plain("gpt-j").transformer.ln_f(resid))
    with torch.no_grad():
        agree(read_out(model, resid), theirs, 1e-5)


def test_figures_of_the_lens_show_the_numbers(tiny, generator):
    prompts = word_prompts(tiny, generator, n_prompts=3, n_shots=1)
    found = lens(tiny, prompts, positions=None)
    line = found.plot()
    assert list(line.data[-1].y) == pytest.approx(found.mean.tolist())
    high = (found.mean + 1.96 * found.stderr).tolist()
    assert list(line.data[0].y)[:3] == pytest.approx(high)
    assert line.layout.title.subtitle.text == "Band: 95% interval of the mean (1.96 standard errors)"
    n = int(prompts.attention_mask[1].sum())
    figure = found.plot(prompt=1)
    torch.testing.assert_close(torch.tensor(figure.data[0].z), found.probability.flip(0)[:, 1, -n:])
    best = tiny.tokenizer.decode([int(found.top_tokens[2, 1, -1, 0])])
    assert f"best {best!r} {float(found.top_probability[2, 1, -1, 0]):.2f}" in figure.data[0].hovertext[0][-1]
    assert list(figure.layout.yaxis.ticktext) == ["layer 2", "layer 1", "layer 0"]
    alone = lens(tiny, prompts.select([0])).plot()
    assert len(alone.data) == 1 and alone.layout.title.subtitle.text is None
    with pytest.raises(ValueError, match=r"plot: expected a prompt in 0\.\.2, got -1"):
        found.plot(prompt=-1)


def test_k_out_of_range_is_refused(tiny, generator):
    prompts = word_prompts(tiny, generator, n_prompts=2)
    for k in (0, tiny.cfg.d_vocab + 1):
        with pytest.raises(ValueError, match=f"logit_lens: expected k between 1 and {tiny.cfg.d_vocab}, got {k}"):
            lens(tiny, prompts, k=k)


# --- attention patterns ---


@pytest.mark.parametrize("backend", matrix.BACKENDS)
@pytest.mark.parametrize("name", ["gpt2", "neox", "mistral", "gemma2"])  # of caches, all are tried in test_cache
def test_patterns_are_the_models_attention(name, backend):
    model, prompts = loaded(name, backend), matrix.prompts(name).shuffled
    full = patterns(model, prompts, full=True, right="query", batch_size=2)
    last = patterns(model, prompts, right="query")
    for i, row in enumerate(rows_of(prompts)[0]):
        theirs, n = parts.attention(plain(name), row), len(row)
        own = torch.stack([theirs[layer, head] for layer, head in HEADS])
        agree(full.full[i, :, -n:, -n:], own)
        agree(last.last[i, :, -n:], own[:, -1])
        assert bool((last.last[i, :, :-n] == 0).all()) and bool((full.full[i, :, :-n] == 0).all())
    torch.testing.assert_close(full.last, last.last, rtol=1e-5, atol=1e-6)
    assert last.full is None and full.heads == last.heads == tuple(HEADS)


PAIRS = [("hot", "cold"), ("big", "small"), ("happy", "sad"), ("up", "down"), ("extraordinarily", "old")]
KINDS = Template("kinds", "Q:{input}\nA:{output}\n\n", "Q:{input}\nA:", prefix="Words.\n")


def shown(model, prompt_labels, query=("wet", "sad")):
    """One prompt whose demonstrations have these labels."""
    demonstrations = [fvlens.relations.Pair(*pair) for pair in prompt_labels]
    return fvlens.prompts.render_prompts(
        model, [fvlens.relations.Pair(*query)], [demonstrations], template=KINDS, labels="permuted", n_shots=len(PAIRS)
    )


def test_tokens_are_grouped_by_what_they_are_for(tiny):
    """Against the text, piece by piece: labels of several tokens count as one."""
    labels = ["cold", "sad", "small", "down", "slowpoke"]
    prompts = shown(tiny, zip([pair[0] for pair in PAIRS], labels, strict=True))
    pieces = [("Words.\n", "prefix")]
    for (word, true), label in zip(PAIRS, labels, strict=True):
        kind = "right_label" if label == true else "wrong_label"
        pieces += [("Q:", "separator"), (f" {word}", "demonstration_input"), ("\nA:", "separator"), (f" {label}", kind)]
        pieces += [("\n\n", "separator")]
    pieces += [("Q:", "separator"), (" wet", "query"), ("\nA:", "separator")]
    letters = [kind for text, kind in pieces for _ in text]
    text = "".join(text for text, _ in pieces)
    encoded = tiny.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    assert prompts.texts == (text,) and prompts.tokens[0, 1:].tolist() == encoded["input_ids"]
    expected = ["bos", *(letters[end - 1] for _, end in encoded["offset_mapping"][:-1]), "predictive"]
    found = patterns(tiny, prompts, pairs=PAIRS)
    assert [GROUPS[i] for i in found.groups[0].tolist()] == expected
    assert found.group_names == GROUPS
    for h in range(len(HEADS)):
        for g, name in enumerate(GROUPS):
            total = sum(float(found.last[0, h, c]) for c, kind in enumerate(expected) if kind == name)
            assert float(found.by_group[0, h, g]) == pytest.approx(total, abs=1e-6)
    chance = [expected.count(name) / len(expected) for name in GROUPS]
    assert found.chance.tolist() == pytest.approx(chance)
    # for the query, the label that answers it is right, wherever it stands
    query = patterns(tiny, prompts, right="query")
    rights = {c for c, kind in enumerate(query.groups[0].tolist()) if GROUPS[kind] == "right_label"}
    start = text.index("A: sad") + 2
    covered = {c + 1 for c, (_, end) in enumerate(encoded["offset_mapping"]) if start < end <= start + len(" sad")}
    assert rights == covered


def test_means_and_attention_between_groups_are_those_of_a_loop(tiny, generator):
    prompts = word_prompts(tiny, generator, n_prompts=4)
    found = patterns(tiny, prompts, full=True, right="query")
    names = found.group_names
    assert names == tuple(name for i, name in enumerate(GROUPS) if i in found.groups)
    torch.testing.assert_close(found.mean, torch.stack(list(found.by_group)).mean(dim=0))
    torch.testing.assert_close(found.stderr.double(), found.by_group.double().std(dim=0) / 2)
    real = [[GROUPS[g] if g >= 0 else None for g in row] for row in found.groups.tolist()]
    for f, source in enumerate(names):
        for t, target in enumerate(names):
            values = [
                sum(found.full[p, 1, q, k].item() for k, kind in enumerate(real[p]) if kind == target)
                for p in range(4)
                for q, from_kind in enumerate(real[p])
                if from_kind == source
            ]
            assert float(found.between[1, f, t]) == pytest.approx(sum(values) / len(values), abs=1e-5)
    torch.testing.assert_close(found.between.sum(dim=-1), torch.ones(3, len(names)))
    with pytest.raises(ValueError, match="between: needs attention from all tokens"):
        patterns(tiny, prompts, right="query").between


def test_what_is_right_is_known_or_asked_for(model, generator, unchecked):
    settings = dict(n_prompts=3, n_shots=4, generator=generator)
    clean = fvlens.build_prompts(model, "antonym", **settings)
    assert "wrong_label" not in patterns(model, clean).group_names
    drawn = fvlens.build_prompts(model, "antonym", labels="random", **settings)
    assert "right_label" not in patterns(model, drawn).group_names  # by the library's relation of that name
    pairs = {pair.input: pair.output for shown in drawn.demonstrations for pair in shown}
    assert "wrong_label" not in patterns(model, drawn, pairs=pairs).group_names
    for prompts, arguments, message in (
        (drawn, dict(right="both"), "right='both'; expected 'input' or 'query'"),
        (drawn, dict(pairs=[("hot", "cold")]), r"the true pairs leave out \d+ inputs of demonstrations, such as"),
        (dataclasses.replace(drawn, relation="mine"), {}, "of the random labels of 'mine' are right is not known"),
        (drawn, dict(heads=[]), "expected at least one head, got none"),
        (drawn, dict(heads=[(9, 0)]), "L9H0 does not exist"),
        (drawn, dict(full=True, max_memory=1000), r"3 whole patterns of 3 prompts take \d+ bytes, above 1000"),
        (
            dataclasses.replace(drawn, demonstrations=tuple(shown[:3] for shown in drawn.demonstrations)),
            {},
            "prompt 0 shows 3 labels, but its tokens hold 4: the tokenizer merges",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            patterns(model, prompts, **arguments)
    no_shots = fvlens.build_prompts(model, "antonym", labels="permuted", **settings | dict(n_shots=0))
    assert not {"right_label", "wrong_label"} & set(patterns(model, no_shots).group_names)


def test_tables_of_patterns_are_tidy(tiny, generator):
    prompts = word_prompts(tiny, generator, n_prompts=3)
    n_real = int(prompts.attention_mask.sum())
    found = patterns(tiny, prompts, right="query", full=True)
    frame = dataclasses.replace(found, full=None).to_dataframe()
    assert list(frame.columns) == ["prompt", "layer", "head", "key_pos", "token", "group", "attention"]
    assert len(frame) == 3 * n_real
    assert frame.groupby(["prompt", "layer", "head"]).attention.sum().tolist() == pytest.approx([1.0] * 9, abs=1e-5)
    some = frame[(frame.prompt == 1) & (frame.layer == 0) & (frame["head"] == 1) & (frame.key_pos == -1)].iloc[0]
    assert (some.token, some.group, some.attention) == (":", "predictive", pytest.approx(float(found.last[1, 1, -1])))
    whole = found.to_dataframe()
    lengths = prompts.attention_mask.sum(dim=1)
    assert len(whole) == 3 * int((lengths * (lengths + 1) // 2).sum())
    assert (whole.query_pos >= whole.key_pos).all()
    some = whole[(whole.prompt == 2) & (whole.layer == 2) & (whole["head"] == 3)]
    some = some[(some.query_pos == -2) & (some.key_pos == -4)].iloc[0]
    assert some.attention == pytest.approx(float(found.full[2, 0, -2, -4]))
    assert "3 heads (L2H3, L0H1, L2H0), 3 prompts, from all tokens" in repr(found)


def test_figures_of_patterns_show_the_numbers(tiny, generator):
    prompts = word_prompts(tiny, generator, n_prompts=3, n_shots=1)
    found = patterns(tiny, prompts, right="query", full=True)
    n = int(prompts.attention_mask[2].sum())
    mean = found.plot()
    torch.testing.assert_close(torch.tensor(mean.data[0].z), torch.cat([found.mean, found.chance[None]]))
    assert list(mean.layout.yaxis.ticktext) == ["L2H3", "L0H1", "L2H0", "even attention"]
    assert "standard error" in mean.data[0].hovertext[0][0] and "standard error" not in mean.data[0].hovertext[3][0]
    one = found.plot(prompt=2)
    torch.testing.assert_close(torch.tensor(one.data[0].z), found.last[2, :, -n:])
    assert one.data[0].hovertext[1][-1].endswith("<br>last token")
    whole = found.plot(prompt=2, head=(0, 1))
    torch.testing.assert_close(torch.tensor(whole.data[0].z), found.full[2, 1, -n:, -n:])
    for arguments, message in (
        (dict(head=(0, 1)), "is for one prompt's pattern; give prompt=, too"),
        (dict(prompt=3), r"plot: expected a prompt in 0\.\.2, got 3"),
        (dict(prompt=0, head=(1, 1)), r"plot: head=L1H1: no such head; there are L2H3, L0H1, L2H0"),
    ):
        with pytest.raises(ValueError, match=message):
            found.plot(**arguments)
    with pytest.raises(ValueError, match="attention from all tokens was not asked for"):
        dataclasses.replace(found, full=None).plot(prompt=0, head=(0, 1))
