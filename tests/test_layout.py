"""The engine's copy of a model's weights: never stale, one a model, gone with it; and the way without a copy."""

import copy
import gc
import inspect
import weakref

import matrix
import pytest
import torch
from architectures import ARCHITECTURES, FASTEST, build, word_prompts
from conftest import needs_hooked, random_model, seeded
from test_edits import by_whole_passes, compare
from torch.nn.utils import parametrize

import fvlens
from fvlens import models
from fvlens.models import _looks, fingerprint, refresh
from fvlens.suffix import Edit, _layout, laid_out, run_prefix
from fvlens.suffix._layout import is_laid_out
from fvlens.suffix._scratch import Scratch

pytestmark = needs_hooked  # a bridge has no laid-out weights

ARCHITECTURES = [name for name in ARCHITECTURES if FASTEST[name] == "weights"]


@pytest.fixture
def prompts(generator):
    return word_prompts(build("grouped-query", dtype=torch.float64), generator, n_shots=1)


def engine_and_whole(model, prompts):
    """Logits at the prompts' ends under an edited head and stream, by the engine and by whole passes."""
    g, cfg = seeded(3), model.cfg
    dtype = cfg.dtype
    edits = (
        Edit(0, "z", torch.randn(cfg.d_head, generator=g, dtype=torch.float64).to(dtype), head=1),
        Edit(cfg.n_layers - 2, "resid_post", torch.randn(cfg.d_model, generator=g, dtype=torch.float64).to(dtype)),
    )
    with torch.no_grad():
        run = run_prefix(model, prompts.tokens, prompts.attention_mask)
        ours = torch.stack([run.logits(run.resid_final), run.logits(run.under([edits])[:, 0])])
    plain = by_whole_passes(model, prompts, (), 1)
    return ours, torch.stack([plain, by_whole_passes(model, prompts, edits, 1)])


def off(model, prompts):
    """How far the engine is from whole passes, relative to the largest logit."""
    ours, whole = engine_and_whole(model, prompts)
    return float((ours.double() - whole.double()).abs().max() / whole.double().abs().max())


def unlike(model, prompts, before):
    """Whether a change shows in whole passes at all."""
    return float((by_whole_passes(model, prompts, (), 1).double() - before).abs().max()) > 1e-3


# --- changes that are noticed ---


class Doubled(torch.nn.Module):
    """A parametrisation with a parameter of its own."""

    def __init__(self, dtype):
        super().__init__()
        self.factor = torch.nn.Parameter(torch.full((3,), 2.0, dtype=dtype))

    def forward(self, weight):
        return weight * self.factor[1]


def scale_by_data(model):
    model.blocks[1].attn.W_Q.data.mul_(1.5)


def scale_in_place(model):
    with torch.no_grad():
        model.blocks[1].mlp.W_out.mul_(1.5)


def load_others(model):
    model.load_state_dict(
        {name: 1.1 * value for name, value in model.state_dict().items() if value.is_floating_point()}, strict=False
    )


def merge_lora(model):
    with torch.no_grad():
        for attn in (block.attn for block in model.blocks):
            for name in ("W_Q", "_W_V" if attn.cfg.n_key_value_heads is not None else "W_V"):
                weight = getattr(attn, name)
                n, d, h = weight.shape
                down, up = (
                    torch.randn(shape, generator=seeded(), dtype=weight.dtype) for shape in ((d, 2), (2, n * h))
                )
                weight.add_(0.1 * (down @ up).view(d, n, h).transpose(0, 1))


def parametrise(model):
    parametrize.register_parametrization(model.blocks[0].attn, "W_Q", Doubled(model.cfg.dtype))


def replace_a_parameter(model):
    attn = model.blocks[2].attn
    attn.W_O = torch.nn.Parameter(attn.W_O.detach() * 1.5)


def replace_a_block(model):
    model.blocks[1].mlp = copy.deepcopy(model.blocks[2].mlp)


def unembed_others(model):
    with torch.no_grad():
        model.unembed.W_U.mul_(1.3)


def other_final_norm(model):
    with torch.no_grad():
        model.ln_final.w.add_(0.5)


def bias_where_none_was(model):
    with torch.no_grad():
        model.blocks[0].mlp.b_out.fill_(0.5)
        model.blocks[0].attn.b_Q.fill_(0.5)
        model.blocks[1].mlp.b_in.fill_(0.5)
        model.unembed.b_U[::2] = 0.5


def turn_positions(model):
    for block in model.blocks:
        block.attn.rotary_cos.mul_(-1)


def change_in_inference_mode(model):
    with torch.inference_mode():
        for parameter in model.blocks[1].parameters():
            parameter.data = parameter.data * 1.2


def train_a_step(model):
    optimiser = torch.optim.SGD(model.parameters(), lr=0.05)
    model(torch.tensor([[1, 2, 3, 4]])).square().mean().backward()
    optimiser.step()
    optimiser.zero_grad()


CHANGES = [
    scale_by_data,
    scale_in_place,
    load_others,
    merge_lora,
    parametrise,
    replace_a_parameter,
    replace_a_block,
    unembed_others,
    other_final_norm,
    bias_where_none_was,
    turn_positions,
    change_in_inference_mode,
    train_a_step,
]


@pytest.mark.parametrize("copied", [True, False], ids=["copied", "not copied"])
@pytest.mark.parametrize("change", CHANGES, ids=[change.__name__ for change in CHANGES])
def test_a_changed_model_is_what_runs(prompts, monkeypatch, change, copied):
    model = build("grouped-query", dtype=torch.float64)
    if change is bias_where_none_was:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if ".b_" in name:
                    parameter.zero_()
    monkeypatch.setattr("fvlens.suffix._prefix.copy_fits", lambda *_, **__: copied)
    assert off(model, prompts) < 1e-9
    before, mark = by_whole_passes(model, prompts, (), 1), fingerprint(model)
    change(model)
    assert unlike(model, prompts, before)
    assert off(model, prompts) < 1e-9
    assert (fingerprint(model) == mark) == (change is turn_positions)  # which is no parameter


def test_parameters_of_a_parametrisation_count(prompts):
    model = build("grouped-query", dtype=torch.float64)
    parametrise(model)
    own = model.blocks[0].attn.parametrizations.W_Q
    for change in (
        lambda: own[0].factor.data.mul_(2),
        lambda: own.original.data.mul_(0.5),
        lambda: setattr(own[0], "factor", torch.nn.Parameter(torch.full_like(own[0].factor, 3.0))),
        lambda: parametrize.remove_parametrizations(model.blocks[0].attn, "W_Q", leave_parametrized=False),
    ):
        assert off(model, prompts) < 1e-9
        before = by_whole_passes(model, prompts, (), 1)
        change()
        assert unlike(model, prompts, before)
        assert off(model, prompts) < 1e-9


def test_another_precision_is_what_runs(prompts):
    model = build("grouped-query")
    bounds = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 0.05}
    for dtype in (torch.float32, torch.float64, torch.float32, torch.bfloat16, torch.float32):
        model.to(dtype)
        assert off(model, prompts) < bounds[dtype]
        weights = laid_out(model).blocks[0].qkv.weight
        assert weights.dtype == dtype
    assert off(model, prompts) > 1e-12  # not what was laid out for double precision


def test_a_model_made_in_inference_mode_runs_and_its_changes_are_seen(prompts):
    with torch.inference_mode():
        model = build("grouped-query", dtype=torch.float64)
    assert all(parameter.is_inference() for parameter in model.parameters())
    assert off(model, prompts) < 1e-9
    before, mark = by_whole_passes(model, prompts, (), 1), fingerprint(model)
    with torch.inference_mode():
        model.blocks[0].attn.W_O.mul_(1.5)
    assert unlike(model, prompts, before)
    assert off(model, prompts) < 1e-9
    assert fingerprint(model) != mark
    with torch.inference_mode():
        assert off(model, prompts) < 1e-9


def test_effects_and_training_follow_a_change(prompts, generator):
    """Through the façade: the same numbers as of a model that never was another."""
    changed, fresh = build("grouped-query"), build("grouped-query")
    first = fvlens.mean_head_activations(changed, prompts, progress=False)
    fvlens.indirect_effects(changed, prompts, first, progress=False)
    for one in (changed, fresh):
        scale_by_data(one)

    def effects(model):
        means = fvlens.mean_head_activations(model, prompts, progress=False)
        return fvlens.indirect_effects(model, prompts, means, progress=False).cie

    assert torch.equal(effects(changed), effects(fresh))


# --- what is not noticed ---


def test_unseen_entries_need_a_refresh(prompts):
    model = build("grouped-query", dtype=torch.float64)
    assert off(model, prompts) < 1e-9
    before, mark = by_whole_passes(model, prompts, (), 1), fingerprint(model)
    weight = model.unembed.W_U.data.view(-1)
    seen = torch.arange(len(weight))[:: len(weight) // _looks.N_SEEN][: _looks.N_SEEN]
    unseen = torch.ones(len(weight), dtype=torch.bool)
    unseen[seen] = False
    version = model.unembed.W_U._version
    weight[unseen] *= 1.5
    assert model.unembed.W_U._version == version
    assert unlike(model, prompts, before)
    assert off(model, prompts) > 1e-3  # stale, as documented
    assert fingerprint(model) == mark
    refresh(model)
    assert off(model, prompts) < 1e-9
    assert fingerprint(model) != mark
    weight[seen[17]] += 10.0
    assert off(model, prompts) < 1e-9  # one that is seen


def test_refresh_is_for_either_class_and_documented():
    assert "refresh" in models.__all__
    text = inspect.getdoc(refresh)
    for word in ("64 entries", "``.data``", "shared memory", "Not\nnoticed"):
        assert word in text
    stranger = torch.nn.Linear(2, 2)
    refresh(stranger)  # nothing was kept of it


@pytest.mark.parametrize(
    "numbers",
    [
        torch.arange(5.0),
        torch.arange(6000.0).view(3, 40, 50),
        torch.arange(6000.0).view(3, 40, 50).permute(2, 0, 1),
        torch.arange(6000.0).view(60, 100).T,
        torch.arange(6000.0).view(60, 100)[::2, ::3],
        torch.arange(6000.0).view(3, 40, 50)[:, 1:30:2, ::5],
        torch.arange(60.0)[:, None].expand(-1, 30),
        torch.tensor(3.0),
        torch.empty(0),
    ],
    ids=["short", "dense", "permuted", "transposed", "cut", "cut 3", "expanded", "scalar", "empty"],
)
def test_what_is_looked_at_is_what_the_storage_holds(numbers):
    seen = _looks.spread(numbers)
    assert seen.ndim == 1
    assert len(seen) <= _looks.N_SEEN
    assert (len(seen) > 0) == (numbers.numel() > 0)
    if numbers.numel():
        seen[-1] = -7.0
        assert bool((numbers == -7.0).any())
    if numbers.numel() > 1000 and numbers.stride() != (1, 0):
        assert len(seen) >= min(14, min(numbers.shape))


# --- one a model, and gone with it ---


def test_nothing_is_made_twice(prompts):
    model = build("grouped-query", dtype=torch.float64)
    first = laid_out(model)
    run_prefix(model, prompts.tokens, prompts.attention_mask)
    fvlens.mean_head_activations(model, prompts, progress=False)
    assert laid_out(model) is first
    assert laid_out(model, compute=torch.float32) is not first
    assert laid_out(model) is first
    n_block = sum(
        parameter.numel() for name, parameter in model.blocks.named_parameters() if ".W_" in name or "._W" in name
    )
    assert first.n_bytes == 8 * (n_block + model.W_U.numel())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_copy_goes_with_its_model(name, generator):
    model = build(name)
    prompts = word_prompts(model, generator, n_shots=0)
    held = len(_looks._kept)
    run_prefix(model, prompts.tokens, prompts.attention_mask)
    fingerprint(model)
    assert len(_looks._kept) == held + 1
    weights = weakref.ref(laid_out(model).blocks[0].qkv.weight)
    own = weakref.ref(model)
    del model
    gc.collect()
    assert own() is None
    assert weights() is None
    assert len(_looks._kept) == held


def test_the_copy_goes_with_a_refresh_and_an_old_one_with_the_next_use():
    model = build("grouped-query")
    weights = weakref.ref(laid_out(model).blocks[0].qkv.weight)
    assert is_laid_out(model)
    refresh(model)
    gc.collect()
    assert weights() is None
    assert not is_laid_out(model)
    old = weakref.ref(laid_out(model).blocks[0].qkv.weight)
    scale_in_place(model)
    laid_out(model)
    gc.collect()
    assert old() is None


def test_models_do_not_share(prompts):
    model = build("grouped-query", dtype=torch.float64)
    laid_out(model)
    twin = copy.deepcopy(model)
    assert not is_laid_out(twin)
    scale_in_place(twin)
    for one in (model, twin):
        assert off(one, prompts) < 1e-9
    storages = [laid_out(one).blocks[0].qkv.weight.data_ptr() for one in (model, twin)]
    assert storages[0] != storages[1]
    assert unlike(twin, prompts, by_whole_passes(model, prompts, (), 1))


# --- without a copy ---


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("n_suffix", [1, 3])
def test_without_a_copy_variants_equal_whole_passes(generator, monkeypatch, name, n_suffix):
    monkeypatch.setattr("fvlens.suffix._prefix.copy_fits", lambda *_, **__: False)
    model = build(name, dtype=torch.float64)
    prompts = word_prompts(model, generator, n_shots=1)
    compare(model, prompts, "weights", n_suffix, generator, dtype=torch.float64, tolerance=1e-8)
    assert not is_laid_out(model)
    layout = laid_out(model, copied=False)
    assert (layout.is_copied, layout.n_bytes) == (False, 0)
    products = [product for block in layout.blocks for product in (block.qkv, block.out)]
    assert not any(isinstance(product.weight, torch.Tensor) for product in products)


@pytest.mark.parametrize("name", matrix.checkpoints.ARCHITECTURES)
def test_without_a_copy_variants_equal_whole_passes_on_every_architecture_of_the_matrix(generator, monkeypatch, name):
    monkeypatch.setattr("fvlens.suffix._prefix.copy_fits", lambda *_, **__: False)
    model, prompts = matrix.loaded(name, "hooked"), matrix.prompts(name).shuffled
    refresh(model)
    compare(model, prompts, "weights", 2, generator, dtype=torch.float32, tolerance=matrix.TOLERANCE)
    assert not is_laid_out(model)


def test_without_a_copy_nothing_large_is_made(generator):
    model = random_model(n_layers=2, n_heads=4, d_model=64, d_head=16, d_mlp=256)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        laid_out(model, copied=False)
    taken = sum(
        max(0, event.nbytes()) for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"
    )
    assert taken < 0.25 * sum(p.numel() * p.element_size() for p in model.parameters())


@pytest.mark.parametrize("n_rows", [1, 2, 5, 16, 17])
@pytest.mark.parametrize("widths", [(70,), (40, 30)], ids=["one", "two"])
@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("turns", [False, True], ids=["Intel", "others"])
def test_products_of_few_rows_are_those_of_many_and_so_are_their_gradients(
    generator, monkeypatch, n_rows, widths, plain, dtype, turns
):
    """Rows wide enough for the way that only products of few rows take, against a plain product in double precision."""
    monkeypatch.setattr(_layout, "TURNS_SINGLE_PRECISION", turns)
    n_in, close = _layout.WIDE, dict(rtol=1e-4, atol=1e-4) if dtype == torch.float32 else {}
    parts = [torch.randn(n_in, width, generator=generator, dtype=torch.float64) for width in widths]
    bias = torch.randn(sum(widths), generator=generator, dtype=torch.float64)
    x = torch.randn(n_rows, n_in, generator=generator, dtype=torch.float64, requires_grad=True)
    factor = torch.randn(n_rows, sum(widths), generator=generator, dtype=torch.float64)
    expected = x @ torch.cat(parts, dim=1) + bias
    (wanted,) = torch.autograd.grad((expected * factor).sum(), x)
    product = _layout._product([part.to(dtype) for part in parts], bias.to(dtype), None, True, plain=plain)
    rows = x.detach().to(dtype).requires_grad_()
    found = product(rows)
    (gradient,) = torch.autograd.grad((found * factor.to(dtype)).sum(), rows)
    torch.testing.assert_close(found.double(), expected, **close)
    torch.testing.assert_close(gradient.double(), wanted, **close)
    torch.testing.assert_close(product(rows.detach()).double(), expected, **close)
    is_turned = type(found.grad_fn.next_functions[0][0]).__name__ == "_FewRowsBackward"
    assert is_turned == (1 < n_rows <= _layout.FEW_ROWS and (turns or dtype == torch.float64))


# --- memory that is written to again ---


def test_results_without_gradients_share_memory_and_all_others_do_not(generator):
    scratch = Scratch(4)
    product = _layout._product([torch.randn(3, 5, generator=generator)], None, None, True)
    x, y = torch.randn(2, 3, generator=generator), torch.randn(4, 3, generator=generator)
    first = product(x, scratch, "a")
    torch.testing.assert_close(first, product(x))
    kept = first.clone()
    other = product(y, scratch, "b")
    assert torch.equal(first, kept)  # another name, another place
    second = product(y, scratch, "a")
    assert second.data_ptr() == first.data_ptr()
    assert other.data_ptr() != second.data_ptr()
    torch.testing.assert_close(second, product(y))
    with_gradient = product(y.requires_grad_(), scratch, "a")
    assert with_gradient.requires_grad
    assert torch.equal(second, other)
    with torch.inference_mode():
        product(x, scratch, "a")
    product(x, scratch, "a")  # inference tensors stay their own
    wide = scratch.rows("a", 9, 5, x)
    assert wide.shape == (9, 5)


def test_a_layout_takes_the_embedding_for_a_tied_unembedding():
    model = build("grouped-query")
    untied = _layout.laid_out(model)
    with torch.no_grad():
        model.embed.W_E.copy_(model.unembed.W_U.T)
    tied = _layout.laid_out(model)
    assert tied is not untied
    assert untied.n_bytes - tied.n_bytes == model.unembed.W_U.numel() * model.unembed.W_U.element_size()
    assert tied.unembed.weight.data_ptr() == model.embed.W_E.data_ptr()
