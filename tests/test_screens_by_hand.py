"""Gradient screens of models that are written by hand: relevance of one layer, and what screens miss."""

import math

import pytest
import torch
from architectures import effects_of
from conftest import seeded

from fvlens.activations import HeadMeans
from fvlens.models import fingerprint
from fvlens.prompts import TEMPLATES, Prompts, TokenClass
from fvlens.relations import Pair
from fvlens.types import Head


def test_relevance_of_one_layer_by_hand():
    """No norm, no MLP, one layer: half of attention times what the label writes towards the answer."""
    model = bare_model(n_layers=1, attn_only=True)
    g = seeded(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=g))
    prompts = bare_prompts(tokens=[1, 2, 3])
    got = effects_of(model, prompts, bare_means(model), method="lrp")
    attn = model.blocks[0].attn
    with torch.no_grad():
        x = model.W_E[[1, 2, 3]] + model.W_pos[:3]
        q, k = x @ attn.W_Q[1] + attn.b_Q[1], x @ attn.W_K[1] + attn.b_K[1]
        attention = (q[2] @ k.T).softmax(dim=-1)[1]
        writes = (x[1] @ attn.W_V[1] + attn.b_V[1]) @ attn.W_O[1] @ model.W_U[:, 0]
    assert writes > 0.1
    assert got.cie[0, 0, 1].item() == pytest.approx(0.5 * (attention * writes).item(), rel=1e-4)
    with torch.no_grad():
        attn.W_O[1] *= -1  # now it argues against the answer: nothing positive is left
    assert effects_of(model, prompts, bare_means(model), method="lrp").cie[0, 0, 1] == 0


# --- what screens miss ---


def bare_model(**settings):
    """A model without norms, all weights zero, to be written by hand."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    from fvlens.models import quiet_deprecation

    shape = dict(
        n_layers=2, n_heads=3, d_model=6, d_head=2, d_mlp=2, n_ctx=4, d_vocab=4, act_fn="relu", normalization_type=None,
        use_attn_scale=False, device="cpu", init_weights=False,
    )  # fmt: skip
    with quiet_deprecation():
        model = HookedTransformer(HookedTransformerConfig(**{**shape, **settings}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    return model.eval()


def bare_prompts(tokens):
    """One prompt of three tokens: BOS, a label, the query; the answer is token 0."""
    pair = Pair("a", "b")
    kinds = [TokenClass.BOS, TokenClass.DEMONSTRATION_LABEL, TokenClass.PREDICTIVE]
    return Prompts(
        tokens=torch.tensor([tokens]),
        attention_mask=torch.ones(1, 3, dtype=torch.long),
        answer_tokens=torch.tensor([[0]]),
        token_classes=torch.tensor([[int(kind) for kind in kinds]]),
        queries=(pair,),
        demonstrations=((pair,),),
        labels="permuted",
        n_shots=1,
        template=TEMPLATES["qa"],
        relation="",
        texts=("a b",),
    )


def bare_means(model, **values):
    """Task means: 0 but for the first number of the heads named, such as ``L0H1=0.5``."""
    z = torch.zeros(model.cfg.n_layers, model.cfg.n_heads, model.cfg.d_head)
    for name, value in values.items():
        layer, head = name[1:].split("H")
        z[int(layer), int(head), 0] = value
    return HeadMeans(
        z=z, positions="last", n_prompts=1, fingerprint=fingerprint(model), relation="", template="qa", n_shots=1,
        labels="true", data_hash="",
    )  # fmt: skip


KEY, VALUE, SIGNAL, ANSWER, ONE = range(5)
"""Directions of the residual stream of the models below."""


def saturated():
    """L0H0 turns round the query of L1H0, whose attention is saturated: it looks at BOS, and then at the label.

    Scores of L1H0 are ``q k`` with ``q = 5 (1 - 2 SIGNAL)`` and ``k`` = +1 at BOS, -1 at the label, 0 at the query. On
    the prompt q = 5: the label gets exp(-10) of the attention and the pattern hardly moves with q. With L0H0 at its
    mean q = -5: the label gets nearly all, and L1H0 copies it to the answer. L0H1 writes a little to it directly.
    """
    model = bare_model(attn_only=True)
    with torch.no_grad():
        model.W_E[1:, ONE] = 1
        model.W_E[1, KEY], model.W_E[2, KEY], model.W_E[2, VALUE] = 1, -1, 1
        first, second = (block.attn for block in model.blocks)
        first.W_O[0, 0, SIGNAL] = 1
        first.W_O[1, 0, ANSWER] = 1
        second.W_Q[0, ONE, 0], second.W_Q[0, SIGNAL, 0] = 5, -10
        second.W_K[0, KEY, 0] = 1
        second.W_V[0, VALUE, 0] = 1
        second.W_O[0, 0, ANSWER] = 8
        model.W_U[ANSWER, 0] = 1
    return model, bare_means(model, L0H0=1.0, L0H1=0.05)


def cancelling():
    """L0H0 helps the answer directly and hurts it through the MLP, by the same slope at z~ but not further on.

    ``logit = u - relu(u + 0.1) + relu(u - 0.1)`` with u what L0H0 writes: slope 1 - 1 = 0 at u = 0, and 1 beyond 0.1.
    """
    model = bare_model(n_layers=1)
    with torch.no_grad():
        attn, mlp = model.blocks[0].attn, model.blocks[0].mlp
        attn.W_O[0, 0, SIGNAL] = attn.W_O[0, 0, ANSWER] = attn.W_O[1, 0, ANSWER] = 1
        mlp.W_in[SIGNAL] = 1
        mlp.b_in.copy_(torch.tensor([0.1, -0.1]))
        mlp.W_out[:, ANSWER] = torch.tensor([-1.0, 1.0])
        model.W_U[ANSWER, 0] = 1
    return model, bare_means(model, L0H0=3.0, L0H1=0.05)


def opposed():
    """L0H0 alone would wake a silent neuron; L0H1 of the same layer silences it when both are moved together.

    ``logit = 2 relu(u - 1)``, with u what both write, +3 and -3 at their means. L0H2 writes a little directly.
    """
    model = bare_model(n_layers=1)
    with torch.no_grad():
        attn, mlp = model.blocks[0].attn, model.blocks[0].mlp
        attn.W_O[0, 0, SIGNAL] = attn.W_O[1, 0, SIGNAL] = attn.W_O[2, 0, ANSWER] = 1
        mlp.W_in[SIGNAL, 0] = 1
        mlp.b_in[0] = -1
        mlp.W_out[0, ANSWER] = 2
        model.W_U[ANSWER, 0] = 1
    return model, bare_means(model, L0H0=3.0, L0H1=-3.0, L0H2=0.05)


def chance(logit):
    """P of token 0 among four, the others at logit 0."""
    return math.exp(logit) / (math.exp(logit) + 3)


MISSED = Head(0, 0)


@pytest.mark.parametrize(
    ("made", "method", "decoy", "effect"),
    [
        (saturated, "atp", Head(0, 1), chance(8 / (1 + math.exp(-5) + math.exp(-10))) - chance(8 * math.exp(-10))),
        (cancelling, "atp", Head(0, 1), chance(2.8) - chance(-0.1)),
        (opposed, "atp", Head(0, 2), chance(4) - chance(0)),
        (opposed, "ig", Head(0, 2), chance(4) - chance(0)),
    ],
)
def test_a_screen_misses_a_head_that_matters(made, method, decoy, effect):
    """The head that carries the answer scores about 0, and a recheck helps only if it is large enough to hold it."""
    model, means = made()
    prompts = bare_prompts([1, 2, 3])
    exact = effects_of(model, prompts, means)
    assert exact.aie[MISSED].item() == pytest.approx(effect, abs=2e-3)
    assert exact.aie[MISSED] > 0.4
    assert exact.top(1) == [MISSED]

    screen = effects_of(model, prompts, means, method=method)
    assert abs(screen.aie[MISSED]) < 0.005 * exact.aie[MISSED]
    assert screen.aie[decoy].item() == pytest.approx(exact.aie[decoy].item(), rel=0.05)
    assert screen.top(1) == [decoy]

    blind = effects_of(model, prompts, means, method=method, recheck=1)
    assert blind.recheck.heads == (decoy,)
    assert blind.top(1) == [decoy]
    assert blind.compare(exact, k=1).overlap_rechecked == 0

    full = effects_of(model, prompts, means, method=method, recheck=exact.aie.numel())
    assert full.top(1) == [MISSED]
    assert full.compare(exact, k=1).overlap == 0
    assert full.compare(exact, k=1).overlap_rechecked == 1


@pytest.mark.parametrize("made", [saturated, cancelling])
def test_integrated_gradients_find_what_the_slope_at_one_point_misses(made):
    model, means = made()
    prompts = bare_prompts([1, 2, 3])
    exact = effects_of(model, prompts, means)
    got = effects_of(model, prompts, means, method="ig")
    assert got.top(1) == [MISSED]
    assert got.aie[MISSED].item() == pytest.approx(exact.aie[MISSED].item(), rel=0.1)
