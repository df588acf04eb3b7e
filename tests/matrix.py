"""Every architecture of ``checkpoints`` on every backend there is: what the oracle finds, and what fvlens finds.

One function a feature. Each runs the feature, asserts that it agrees with the oracle over plain Hugging Face, and
returns the cell of the support table: ``"yes"``, or what kind of yes. A feature that the package does not support
raises its ``ValueError``. ``test_matrix`` asserts on the cells, ``support_table`` writes them into the models' page.

Models, prompts and the oracle's results are made once a process.
"""

import atexit
import dataclasses
import functools
import shutil
import tempfile
from pathlib import Path
from types import SimpleNamespace

import checkpoints
import torch
from architectures import WORDS, rows_of
from oracle import hf
from transformers import AutoTokenizer

import fvlens
from fvlens.activations import HeadMeans
from fvlens.interventions import resid_hook
from fvlens.prompts import PAD_ANSWER, Prompts, TokenClass
from fvlens.suffix import Edit, run_prefix, steered_resid

TOLERANCE = 1e-4
"""Largest difference from the oracle, relative to the largest number of the oracle's tensor."""

LAYER = 1
"""Vectors are added after this layer, but where every layer is tried."""

BATCH_SIZES = (2, 5)
"""The first leaves a batch of one prompt; the last holds all."""


def _backends() -> tuple[str, ...]:
    try:
        from transformer_lens import HookedTransformer  # noqa: F401
    except ImportError:  # gone from TransformerLens 4 on
        return ("bridge",)
    return ("hooked", "bridge")


BACKENDS = _backends()
ROUTES = {"hooked": ("weights", "kv"), "bridge": ("kv",)}
"""Exact fast paths of a backend, fastest first; the naive path is always there."""
SLOWER: dict[tuple[str, str], tuple[str, ...]] = {}
"""(architecture, backend) whose fast paths are others than those of the backend."""


def fast_paths(name: str, backend: str) -> tuple[str, ...]:
    return SLOWER.get((name, backend), ROUTES[backend])


def off(ours: torch.Tensor, oracle: torch.Tensor) -> float:
    """Largest difference, relative to the largest number of the oracle's."""
    assert ours.shape == oracle.shape, f"{tuple(ours.shape)} and {tuple(oracle.shape)}"
    scale = oracle.abs().max().item()
    assert scale > 0 and bool(torch.isfinite(ours).all())
    return (ours.double() - oracle.double()).abs().max().item() / scale


def agree(ours: torch.Tensor, oracle: torch.Tensor, tolerance: float = TOLERANCE) -> bool:
    """Whether the two tensors are equal to the tolerance; raises if not, with the difference."""
    difference = off(ours, oracle)
    assert difference <= tolerance, f"differs from the oracle by {difference:.2g}, relative to its largest number"
    return True


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- checkpoints, models, prompts ---


@functools.cache
def home() -> Path:
    folder = tempfile.mkdtemp(prefix="fvlens-matrix-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


@functools.cache
def folder(name: str) -> Path:
    return checkpoints.save(name, home() / name)


@functools.cache
def plain(name: str):
    return checkpoints.hugging_face(folder(name))


@functools.cache
def loaded(name: str, backend: str):
    return fvlens.load_model(folder(name), device="cpu", backend=backend)


@functools.cache
def tokenizer():
    return AutoTokenizer.from_pretrained(checkpoints.TOKENIZER, local_files_only=True)


def made_prompts(model, **settings):
    """Prompts of unequal length."""
    return fvlens.build_prompts(model, WORDS, **{"n_shots": 2, "n_prompts": BATCH_SIZES[-1], **settings})


@dataclasses.dataclass(frozen=True, slots=True)
class Made:
    """Prompts for one architecture. Tokens are the same for every model, since the tokenizer is.

    ``clean`` is what means are taken over; ``shuffled`` is what is patched and steered, its answers being likely ones.
    """

    clean: Prompts
    shuffled: Prompts

    @property
    def rows(self) -> list[list[int]]:
        return rows_of(self.shuffled)[0]

    @property
    def answers(self) -> list[list[int]]:
        return rows_of(self.shuffled)[1]


@functools.cache
def prompts(name: str) -> Made:
    g = seeded(4)  # prompts of 24 to 32 tokens, answers of 1 to 4
    writer = SimpleNamespace(tokenizer=tokenizer(), cfg=SimpleNamespace(n_ctx=checkpoints.CONTEXT))
    clean = made_prompts(writer, generator=g)
    shuffled = made_prompts(writer, generator=g, labels="permuted")
    rows, answers = rows_of(shuffled)
    given = shuffled.answer_tokens.clone()
    for i, (row, answer) in enumerate(zip(rows, answers, strict=True)):
        # prompt i gets the token of rank i mod 3, and of the tokens after it the likeliest
        chosen = [int(hf.logits(plain(name), row)[-1].topk(3).indices[i % 3])]
        for _ in answer[1:]:
            chosen.append(int(hf.logits(plain(name), row + chosen)[-1].argmax()))
        given[i, : len(chosen)] = torch.tensor(chosen)
    assert (given == PAD_ANSWER).equal(shuffled.answer_tokens == PAD_ANSWER)
    return Made(clean, dataclasses.replace(shuffled, answer_tokens=given))


def label_positions(made: Prompts) -> list[list[int]]:
    """Where each row of ``rows_of`` has its demonstrations' labels."""
    found = []
    for kinds, keep in zip(made.token_classes, made.attention_mask, strict=True):
        own = kinds[keep.bool()]
        found.append((own == int(TokenClass.DEMONSTRATION_LABEL)).nonzero().flatten().tolist())
    return found


# --- the oracle's results ---


@dataclasses.dataclass(frozen=True, slots=True)
class Reference:
    """What the oracle finds for one architecture."""

    logits: torch.Tensor  # [prompt d_vocab]
    means: torch.Tensor  # [layer head d_head]
    cie: torch.Tensor  # [prompt layer head]
    baseline: torch.Tensor  # [prompt]
    label_means: torch.Tensor
    label_cie: torch.Tensor  # of whole answers, heads patched at the demonstrations' labels
    label_baseline: torch.Tensor
    heads: list[tuple[int, int]]  # the four of the largest AIE
    vector: torch.Tensor  # [d_model]
    direction: torch.Tensor  # [d_model], a random vector that matters
    steered: torch.Tensor  # [layer prompt d_vocab], under the vector
    distributed: torch.Tensor  # [prompt d_vocab]
    losses: torch.Tensor  # [prompt], of the first token, with the direction added
    gradients: torch.Tensor  # [prompt d_model]
    whole_losses: torch.Tensor
    whole_gradients: torch.Tensor
    generated: list[list[int]]


N_NEW = 4


def effects_of(model, name: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The oracle's means, CIE and baseline, in the precision of the model."""
    made = prompts(name)
    means = hf.mean_head_outputs(model, rows_of(made.clean)[0])
    cie, baseline = hf.indirect_effects(model, made.rows, [answer[:1] for answer in made.answers], means)
    return means, cie, baseline


@functools.cache
def unsteered(name: str) -> torch.Tensor:
    """Logits [prompt d_vocab] at the prompts' ends."""
    return torch.stack([hf.logits(plain(name), row)[-1] for row in prompts(name).rows])


@functools.cache
def reference(name: str) -> Reference:
    model, made = plain(name), prompts(name)
    rows, answers = made.rows, made.answers
    means, cie, baseline = effects_of(model, name)
    label_means = hf.mean_head_outputs(model, rows_of(made.clean)[0], label_positions(made.clean))
    label_cie, label_baseline = hf.indirect_effects(model, rows, answers, label_means, label_positions(made.shuffled))
    n_heads = means.shape[1]
    order = cie.mean(dim=0).flatten().argsort(descending=True).tolist()
    heads = [(i // n_heads, i % n_heads) for i in order[:4]]
    vector = hf.function_vector(model, means, heads)
    direction = torch.randn(vector.shape, generator=seeded(1))
    values = torch.zeros_like(means)
    for layer, head in heads:
        values[layer, head] = means[layer, head]
    first = [hf.loss_and_gradient(model, r, a[:1], direction, LAYER) for r, a in zip(rows, answers, strict=True)]
    whole = [hf.loss_and_gradient(model, r, a, direction, LAYER) for r, a in zip(rows, answers, strict=True)]
    return Reference(
        logits=unsteered(name),
        means=means,
        cie=cie,
        baseline=baseline,
        label_means=label_means,
        label_cie=label_cie,
        label_baseline=label_baseline,
        heads=heads,
        vector=vector,
        direction=direction,
        steered=torch.stack(
            [
                torch.stack([hf.steered_logits(model, row, vector, layer)[-1] for row in rows])
                for layer in range(len(means))
            ]
        ),
        distributed=torch.stack([hf.distributed_logits(model, row, values)[-1] for row in rows]),
        losses=torch.stack([loss for loss, _ in first]),
        gradients=torch.stack([gradient for _, gradient in first]),
        whole_losses=torch.stack([loss for loss, _ in whole]),
        whole_gradients=torch.stack([gradient for _, gradient in whole]),
        generated=[hf.greedy(model, row, N_NEW, direction, LAYER) for row in rows],
    )


# --- fvlens on the same prompts ---


def batches(size: int) -> list[list[int]]:
    """Indices of the prompts, so many at a time."""
    return [list(range(i, min(i + size, BATCH_SIZES[-1]))) for i in range(0, BATCH_SIZES[-1], size)]


def last_logits(model, made: Prompts, size: int) -> torch.Tensor:
    """Logits [prompt d_vocab] at the last token, so many prompts at a time, with all their padding."""
    parts = []
    for index in batches(size):
        part = made.select(index)
        parts.append(model(part.tokens, attention_mask=part.attention_mask)[:, -1])
    return torch.cat(parts)


@dataclasses.dataclass(frozen=True, slots=True)
class Trained:
    """A Steering whose vector is a leaf, so that a gradient reaches it."""

    vector: torch.Tensor
    layer: int

    def additions(self):
        return {resid_hook(self.layer): self.vector}

    def check(self, model):
        pass


def means_of(name: str, backend: str, **settings) -> HeadMeans:
    settings = {"batch_size": BATCH_SIZES[-1], **settings}
    return fvlens.mean_head_activations(loaded(name, backend), prompts(name).clean, progress=False, **settings)


def effects(name: str, backend: str, *, path=None, size: int | None = None, means=None, **settings):
    """fvlens' indirect effects, the prompts given so many at a time: CIE, baseline, paths taken."""
    model, made = loaded(name, backend), prompts(name).shuffled
    means = means_of(name, backend) if means is None else means
    found = [
        fvlens.indirect_effects(model, made.select(index), means, path=path, progress=False, **settings)
        for index in batches(size or BATCH_SIZES[-1])
    ]
    return torch.cat([f.cie for f in found]), torch.cat([f.baseline for f in found]), {f.path for f in found}


def vector_of(name: str, backend: str, layer: int = LAYER) -> fvlens.FunctionVector:
    model = loaded(name, backend)
    return fvlens.function_vector(model, means_of(name, backend), heads=reference(name).heads, layer=layer)


def injected_logits(name: str, backend: str, steering, size: int) -> torch.Tensor:
    model = loaded(name, backend)
    with torch.no_grad(), fvlens.inject(model, steering):
        return last_logits(model, prompts(name).shuffled, size)


def loss_of(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """``-log P`` [prompt] of the targets [prompt pos] at the last positions; -1 is not scored."""
    logs = logits.log_softmax(dim=-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    return -(logs * (targets >= 0)).sum(dim=-1)


def loss_under_injection(name: str, backend: str, vector: torch.Tensor, *, index: list[int], whole: bool):
    """``-log P(answer)`` [prompt] with a vector injected at the prompt's last token, through whole forward passes."""
    model, made = loaded(name, backend), prompts(name).shuffled.select(index)
    steering = Trained(vector, LAYER)
    if not whole:
        with fvlens.inject(model, steering):
            logits = model(made.tokens, attention_mask=made.attention_mask)[:, -1:]
        return loss_of(logits, made.answer_tokens[:, :1])
    # the prompt's end is not the last token here, so one prompt at a time through the vector's own hook
    losses = []
    for row, answer in zip(*rows_of(made), strict=True):

        def add(resid, hook, row=row):
            place = len(row) - 1
            return torch.cat([resid[:, :place], resid[:, place : place + 1] + vector, resid[:, place + 1 :]], dim=1)

        with model.hooks(fwd_hooks=[(resid_hook(LAYER), add)]):
            tokens = torch.tensor([row + answer[:-1]])
            logits = model(tokens, attention_mask=torch.ones_like(tokens))[:, len(row) - 1 :]
        losses.append(loss_of(logits, torch.tensor([answer])))
    return torch.cat(losses)


def loss_on_the_fast_path(name: str, backend: str, vector: torch.Tensor, *, index: list[int], whole: bool, path: str):
    """The same, through the suffix alone."""
    model, made = loaded(name, backend), prompts(name).shuffled.select(index)
    n_answer = made.answer_tokens.shape[1] if whole else 1
    given = made.answer_tokens[:, : n_answer - 1]
    tokens = torch.cat([made.tokens, given.clamp(min=0)], dim=1)
    mask = torch.cat([made.attention_mask, torch.ones_like(given)], dim=1)
    run = run_prefix(model, tokens, mask, n_suffix=n_answer, path=path)
    logits = run.logits(steered_resid(run, LAYER, vector))[:, 0]
    return loss_of(logits, made.answer_tokens[:, :n_answer])


def gradient(loss, vector: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses [prompt] and the gradient of their sum."""
    losses = loss(vector)
    return losses.detach(), torch.autograd.grad(losses.sum(), vector)[0]


# --- features: each asserts agreement with the oracle and returns its cell; what is not supported raises ---


def loads(name: str, backend: str) -> str:
    model, made = loaded(name, backend), prompts(name).shuffled
    assert type(model).__name__ == {"hooked": "HookedTransformer", "bridge": "TransformerBridge"}[backend]
    assert not model.training
    with torch.no_grad():
        for size in BATCH_SIZES:
            agree(last_logits(model, made, size), unsteered(name))
    return "yes"


@functools.cache
def cie(name: str, backend: str) -> str:
    oracle = reference(name)
    for size in BATCH_SIZES:
        found, baseline, _ = effects(name, backend, size=size, means=means_of(name, backend, batch_size=size))
        agree(found, oracle.cie)
        agree(baseline, oracle.baseline)
    return "yes"


def fast_path(name: str, backend: str) -> str:
    """Each fast path the model should have gives the same effects; the first of them is what is taken unasked."""
    oracle = reference(name)
    expected = fast_paths(name, backend)
    for path in expected:
        found, _, taken = effects(name, backend, path=path)
        assert taken == {path}
        agree(found, oracle.cie)
    _, _, taken = effects(name, backend, size=None)
    assert taken == {expected[0] if expected else "naive"}
    return taken.pop()


def batched_variants(name: str, backend: str) -> str:
    """A vector after each layer, and each head replaced by its mean, all in one batch that they join on the way."""
    model, made, oracle = loaded(name, backend), prompts(name).shuffled, reference(name)
    n_layers, n_heads = oracle.means.shape[:2]
    variants = [(Edit(layer, "resid_post", oracle.vector),) for layer in range(n_layers)]
    for layer in range(n_layers):
        for head in range(n_heads):
            variants.append((Edit(layer, "z", oracle.means[layer, head], head=head, op="replace"),))
    first = made.first_answer_token[:, None, None]
    for path in fast_paths(name, backend):
        run = run_prefix(model, made.tokens, made.attention_mask, path=path)
        with torch.no_grad():
            logits = run.logits(run.under(variants))[:, :, 0]
        agree(logits[:, :n_layers].transpose(0, 1), oracle.steered)
        chances = logits[:, n_layers:].softmax(dim=-1).gather(-1, first.expand(-1, n_layers * n_heads, 1))[..., 0]
        agree(chances.unflatten(1, (n_layers, n_heads)) - oracle.baseline[:, None, None], oracle.cie)
    return ", ".join(fast_paths(name, backend)) or "none"


def gradients(name: str, backend: str) -> str:
    """One vector for all prompts, and one a prompt; through whole passes and through every fast path."""
    oracle = reference(name)
    fast = [functools.partial(loss_on_the_fast_path, path=path) for path in fast_paths(name, backend)]
    for whole in (False, True):
        losses, wanted = (oracle.whole_losses, oracle.whole_gradients) if whole else (oracle.losses, oracle.gradients)
        for way in (loss_under_injection, *fast):
            for size in BATCH_SIZES if not whole else BATCH_SIZES[-1:]:
                parts = []
                for index in batches(size):
                    vector = oracle.direction.clone().requires_grad_()
                    parts.append(gradient(functools.partial(way, name, backend, index=index, whole=whole), vector))
                agree(torch.cat([part[0] for part in parts]), losses)
                agree(sum(part[1] for part in parts), wanted.sum(dim=0))
    vectors = oracle.direction.repeat(BATCH_SIZES[-1], 1).requires_grad_()
    (everyone,) = batches(BATCH_SIZES[-1])
    _, found = gradient(functools.partial(loss_under_injection, name, backend, index=everyone, whole=False), vectors)
    agree(found, oracle.gradients)
    return "yes"


def generation(name: str, backend: str) -> str:
    """``model.generate`` in an open block, one prompt at a time: the vector is at the prompt's last token only.

    The prompts' BOS is the padding token too, as in GPT-2, and yet must be seen.
    """
    model, oracle = loaded(name, backend), reference(name)
    found = []
    with fvlens.inject(model, Trained(oracle.direction, LAYER)):
        for row in prompts(name).rows:
            tokens = model.generate(
                torch.tensor([row]),
                max_new_tokens=N_NEW,
                do_sample=False,
                stop_at_eos=False,
                return_type="tokens",
                verbose=False,
            )
            found.append(tokens[0, len(row) :].tolist())
    assert found == oracle.generated
    return "yes"


def grouped_heads(name: str, backend: str) -> str:
    """Effects are a query head's own, also where several share keys and values."""
    cfg, own = loaded(name, backend).cfg, plain(name).config
    n_groups = getattr(own, "num_key_value_heads", None) or own.num_attention_heads
    assert (cfg.n_heads, cfg.d_head) == reference(name).means.shape[1:]
    assert (getattr(cfg, "n_key_value_heads", None) or cfg.n_heads) == n_groups
    assert means_of(name, backend).z.shape == reference(name).means.shape
    if n_groups == cfg.n_heads:
        return "none in it"
    cie(name, backend)
    return f"yes ({cfg.n_heads} on {n_groups})"


def half(name: str, backend: str, *, dtype: torch.dtype, cosine: float) -> str:
    """Means, a function vector and its injection in half precision: finite, and near to the oracle's in single."""
    oracle, made = reference(name), prompts(name)
    model = fvlens.load_model(folder(name), device="cpu", backend=backend, dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    means = fvlens.mean_head_activations(model, made.clean, progress=False)
    vector = fvlens.function_vector(model, means, heads=oracle.heads, layer=LAYER)
    assert torch.cosine_similarity(vector.vector, oracle.vector, dim=0) > cosine
    with torch.no_grad(), fvlens.inject(model, vector):
        logits = last_logits(model, made.shuffled, BATCH_SIZES[-1])
    assert logits.dtype == dtype
    assert bool(torch.isfinite(logits).all())
    assert torch.cosine_similarity(logits.float(), oracle.steered[LAYER], dim=-1).min() > cosine
    return "yes"


FEATURES = {
    "loads": loads,
    "CIE": cie,
    "fast path": fast_path,
    "batched variants": batched_variants,
    "gradient through an injected vector": gradients,
    "generation under injection": generation,
    "grouped heads": grouped_heads,
    "bfloat16": functools.partial(half, dtype=torch.bfloat16, cosine=0.98),
    "float16": functools.partial(half, dtype=torch.float16, cosine=0.999),
}


def logit_difference(name: str, backend: str) -> float:
    """Largest difference of the logits from Hugging Face's, relative to the largest logit."""
    with torch.no_grad():
        found = last_logits(loaded(name, backend), prompts(name).shuffled, BATCH_SIZES[-1])
    return off(found, unsteered(name))
