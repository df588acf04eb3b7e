"""Causal mediation over heads: which heads carry the task.

For each prompt p~ with corrupted demonstrations and each head (l, h), the head's output is replaced by its task mean
and the change of the answer's probability is the causal indirect effect (CIE). Its mean over prompts is the average
indirect effect (AIE), by which heads are ranked. All heads and prompts are computed exactly; see :mod:`fvlens.suffix`
for why this costs little more than running the prompts once.
"""

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from fvlens.activations import HeadMeans, Positions, position_mask
from fvlens.interventions import z_hook
from fvlens.metrics import log_probability
from fvlens.models import Fingerprint, fingerprint, model_device
from fvlens.prompts import Prompts
from fvlens.suffix import Path, choose_path, plan_slices, run_prefix
from fvlens.types import Head

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go


@dataclass(frozen=True, slots=True)
class IndirectEffects:
    """Causal indirect effects of every head on every prompt.

    Attributes:
        cie: change of the answer's probability when the head's output is replaced; positive means that the replacement
            helps.
        baseline: the answer's probability on the corrupted prompt itself.
        path: ``"weights"``, ``"kv"`` or ``"naive"``: how the effects were computed.
        method: ``"exact"``.
        positions: where heads were patched.
        answer: ``"first"`` (probability of the answer's first token) or ``"whole"`` (of the whole answer).
        complete: False if the computation was interrupted; ``cie`` then holds the prompts that were finished.
        relation, labels, template, n_shots, data_hash: the corrupted prompts.
        fingerprint: the model.
    """

    cie: Float[Tensor, "prompt layer head"]
    baseline: Float[Tensor, " prompt"]
    path: Path
    method: str
    positions: Positions
    answer: str
    complete: bool
    relation: str
    labels: str
    template: str
    n_shots: int
    data_hash: str
    fingerprint: Fingerprint

    @property
    def aie(self) -> Float[Tensor, "layer head"]:
        """Average indirect effect: mean of :attr:`cie` over prompts."""
        return self.cie.mean(dim=0)

    @property
    def stderr(self) -> Float[Tensor, "layer head"]:
        """Standard error of :attr:`aie` over prompts (NaN for a single prompt)."""
        n = self.cie.shape[0]
        if n < 2:
            return torch.full_like(self.cie[0], torch.nan)
        return self.cie.std(dim=0) / n**0.5

    def top(self, n: int) -> list[Head]:
        """The n heads with the largest AIE, best first.

        Raises:
            ValueError: n is not between 1 and the number of heads.
        """
        n_layers, n_heads = self.cie.shape[1:]
        if not 1 <= n <= n_layers * n_heads:
            raise ValueError(f"top: expected n between 1 and {n_layers * n_heads} (all heads), got {n}.")
        order = self.aie.flatten().argsort(descending=True, stable=True)[:n].tolist()
        return [Head(i // n_heads, i % n_heads) for i in order]

    def to_dataframe(self) -> "pd.DataFrame":
        """One row a prompt and head: ``prompt, layer, head, cie, baseline``."""
        import pandas as pd

        prompt, layer, head = torch.meshgrid(*(torch.arange(n) for n in self.cie.shape), indexing="ij")
        return pd.DataFrame(
            {
                "prompt": prompt.flatten().numpy(),
                "layer": layer.flatten().numpy(),
                "head": head.flatten().numpy(),
                "cie": self.cie.flatten().numpy(),
                "baseline": self.baseline[prompt.flatten()].numpy(),
            }
        )

    def plot(self, *, n_top: int = 10) -> "go.Figure":
        """Heatmap of the AIE, layer by head, the ``n_top`` strongest heads outlined."""
        from fvlens import plots

        n_top = min(n_top, self.aie.numel())
        what = f"{self.labels} labels, {self.cie.shape[0]} prompts"
        return plots.heatmap(
            self.aie,
            stderr=self.stderr,
            outlined=self.top(n_top),
            title=f"Average indirect effect, {self.relation or 'custom pairs'} ({what})",
            colorbar_title="AIE",
        )


def indirect_effects(
    model: Any,
    prompts: Prompts,
    means: HeadMeans,
    *,
    method: Literal["exact"] = "exact",
    positions: Positions | None = None,
    answer: Literal["first", "whole"] = "first",
    path: Path | None = None,
    max_memory: int | None = None,
    progress: bool = True,
) -> IndirectEffects:
    """Causal indirect effect of every head on corrupted prompts.

    ``CIE(l, h | p~) = P(y | p~, z_{l,h} := mean z_{l,h}) - P(y | p~)``, with P the probability of the answer's first
    token [paper]. The standard error over prompts is ours.

    Args:
        model: the model.
        prompts: corrupted prompts, usually ``labels="permuted"``, about 25.
        means: task means of the head outputs from :func:`~fvlens.mean_head_activations`.
        method: ``"exact"``, every head patched in turn.
        positions: where heads are patched; by default where ``means`` were taken (``"last"`` in the paper).
        answer: score the answer's ``"first"`` token, or the ``"whole"`` answer (teacher-forced; patched at the prompt).
        path: insist on ``"weights"``, ``"kv"`` or ``"naive"``; by default the fastest that is exact for the model.
        max_memory: bytes for activations; by default chosen from what is free.
        progress: show a progress bar. Interrupting returns the prompts that are finished, with a warning.

    Returns:
        :class:`IndirectEffects`; effects are differences of probabilities, in [-1, 1], positive where patching helps.

    Raises:
        ValueError: unknown method, positions, answer or path; means of another model or of other positions; a memory
            bound too small for one prompt.

    Example:
        >>> import torch, fvlens
        >>> model = fvlens.load_model("rel-small")
        >>> pairs = fvlens.load_relation("antonym")
        >>> g = torch.Generator().manual_seed(0)
        >>> clean = fvlens.build_prompts(model, pairs, n_prompts=8, generator=g)
        >>> shuffled = fvlens.build_prompts(model, pairs, n_prompts=4, labels="permuted", generator=g)
        >>> means = fvlens.mean_head_activations(model, clean, progress=False)
        >>> effects = fvlens.indirect_effects(model, shuffled, means, progress=False)
        >>> effects.path, len(effects.top(10))
        ('weights', 10)

    References:
        Todd et al. 2024, arXiv:2310.15213, section 2.3, equations 4 and 5.
    """
    if method != "exact":
        raise ValueError(f"indirect_effects: method={method!r}; expected 'exact'.")
    if answer not in ("first", "whole"):
        raise ValueError(f"indirect_effects: answer={answer!r}; expected 'first' or 'whole'.")
    positions = means.positions if positions is None else positions
    if positions != means.positions:
        raise ValueError(
            f"indirect_effects: positions={positions!r}, but the means were taken at {means.positions!r}; "
            f"call mean_head_activations(..., positions={positions!r})."
        )
    differences = fingerprint(model).differences(means.fingerprint)
    if differences:
        raise ValueError(f"indirect_effects: the means come from another model ({'; '.join(differences)}).")
    chosen, reason = choose_path(model, path)
    if chosen == "naive" and path is None:
        warnings.warn(f"indirect_effects takes the naive path, one forward pass a head ({reason}).", stacklevel=2)

    tokens, mask, targets = _with_answers(prompts, answer)
    n_extra = tokens.shape[1] - prompts.tokens.shape[1]
    patched = torch.nn.functional.pad(position_mask(prompts, positions), (0, n_extra))
    first = int(patched.any(dim=0).nonzero()[0])
    n_suffix = tokens.shape[1] - first
    if chosen == "naive":
        batches: Iterable[tuple[Tensor, Tensor]] = _naive(model, tokens, mask, targets, means, patched, progress)
    else:
        batches = _fast(model, tokens, mask, targets, means, patched, n_suffix, chosen, max_memory, progress)
    cies: list[Tensor] = []
    baselines: list[Tensor] = []
    complete = True
    try:
        for cie, baseline in batches:
            cies.append(cie)
            baselines.append(baseline)
    except KeyboardInterrupt:
        if not cies:
            raise
        complete = False
        done = sum(map(len, cies))
        warnings.warn(f"indirect_effects was interrupted: {done} of {len(prompts)} prompts are finished.", stacklevel=2)
    return IndirectEffects(
        cie=torch.cat(cies),
        baseline=torch.cat(baselines),
        path=chosen,
        method=method,
        positions=positions,
        answer=answer,
        complete=complete,
        relation=prompts.relation,
        labels=prompts.labels,
        template=prompts.template.name,
        n_shots=prompts.n_shots,
        data_hash=prompts.data_hash,
        fingerprint=means.fingerprint,
    )


def _with_answers(prompts: Prompts, answer: str) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens to run, their mask, and the next token wanted at each position (-1: not scored)."""
    n_answer = prompts.answer_tokens.shape[1] if answer == "whole" else 1
    given = prompts.answer_tokens[:, : n_answer - 1]
    # padding behind a short answer: attended by nobody that is scored, so any token will do
    tokens = torch.cat([prompts.tokens, given.clamp(min=0)], dim=1)
    mask = torch.cat([prompts.attention_mask, torch.ones_like(given)], dim=1)
    targets = torch.full_like(tokens, -1)
    targets[:, prompts.tokens.shape[1] - 1 :] = prompts.answer_tokens[:, :n_answer]
    return tokens, mask, targets


def _fast(
    model: Any,
    tokens: Tensor,
    mask: Tensor,
    targets: Tensor,
    means: HeadMeans,
    patched: Tensor,
    n_suffix: int,
    path: Path,
    max_memory: int | None,
    progress: bool,
) -> Iterable[tuple[Tensor, Tensor]]:
    """CIE and baseline of the prompts, batch by batch, on the fast path."""
    cfg = model.cfg
    device = model_device(model)
    cells = [Head(layer, head) for layer in range(cfg.n_layers) for head in range(cfg.n_heads)]
    values = means.z.to(device, cfg.dtype).flatten(0, 1)
    targets, patched = targets[:, -n_suffix:].to(device), patched[:, -n_suffix:].to(device)
    plan = plan_slices(
        model, n_pos=tokens.shape[1], n_suffix=n_suffix, n_variants=len(cells), path=path, max_memory=max_memory
    )
    with tqdm(total=len(tokens) * len(cells), desc="indirect effects", disable=not progress, leave=False) as bar:
        for rows in plan.over_prompts(len(tokens)):
            with torch.inference_mode():
                run = run_prefix(model, tokens[rows], mask[rows], n_suffix=n_suffix, path=path)
                base = run.log_probs(run.resid_final[:, None], targets[rows]).sum(dim=-1).exp()  # [prompt 1]
                found = []
                for part in plan.over_variants(len(cells)):
                    resid = run.patched(cells[part], values[part], patched[rows])
                    found.append(run.log_probs(resid, targets[rows]).sum(dim=-1).exp())
                    bar.update(len(base) * (part.stop - part.start))
                cie = (torch.cat(found, dim=1) - base).unflatten(1, (cfg.n_layers, cfg.n_heads))
            yield cie.cpu().clone(), base[:, 0].cpu().clone()


def _naive(
    model: Any,
    tokens: Tensor,
    mask: Tensor,
    targets: Tensor,
    means: HeadMeans,
    patched: Tensor,
    progress: bool,
    batch_size: int = 32,
) -> Iterable[tuple[Tensor, Tensor]]:
    """CIE and baseline by one hooked forward pass a head: slow, but it works for every model."""
    cfg = model.cfg
    device = model_device(model)
    values = means.z.to(device, cfg.dtype)

    def probability(rows: slice, layer: int | None, head: int) -> Tensor:
        where = patched[rows].to(device)

        def replace(z: Tensor, hook: Any) -> Tensor:
            z = z.clone()
            z[:, :, head] = torch.where(where[..., None], values[hook.layer(), head], z[:, :, head])
            return z

        hooks = [] if layer is None else [(z_hook(layer), replace)]
        with model.hooks(fwd_hooks=hooks):
            logits = model(tokens[rows].to(device), attention_mask=mask[rows].to(device))
        wanted = targets[rows].to(device)
        logs = log_probability(logits, wanted.clamp(min=0))
        return torch.where(wanted < 0, torch.zeros_like(logs), logs).sum(dim=-1).exp()

    n_cells = cfg.n_layers * cfg.n_heads
    with tqdm(total=len(tokens) * n_cells, desc="indirect effects", disable=not progress, leave=False) as bar:
        for start in range(0, len(tokens), batch_size):
            rows = slice(start, min(len(tokens), start + batch_size))
            with torch.inference_mode():
                base = probability(rows, None, 0)
                cie = torch.empty(len(base), cfg.n_layers, cfg.n_heads)
                for layer in range(cfg.n_layers):
                    for head in range(cfg.n_heads):
                        cie[:, layer, head] = (probability(rows, layer, head) - base).cpu()
                        bar.update(len(base))
            yield cie.clone(), base.cpu().clone()
