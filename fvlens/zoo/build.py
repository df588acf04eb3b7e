"""Train the embedded model: ``python -m fvlens.zoo.build [--out DIR] [--steps N] [--seed N]``.

Deterministic by seed on one machine. Uses a GPU if there is one. Progress goes to a bar and to ``train.log``;
``checkpoint.safetensors`` is written every few minutes, and a run started again on the same folder goes on from it
with the same bits as a run that was never stopped.
"""

import argparse
import json
import logging
import math
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from fvlens.files import read_tensors, write_json, write_tensors
from fvlens.metrics import is_best
from fvlens.progress import tqdm
from fvlens.relations import Relation, list_relations, load_relation
from fvlens.types import as_whole
from fvlens.zoo.recipe import BOS, Batch, Recipe, SequenceSampler, train_tokenizer

log = logging.getLogger("fvlens.zoo")

CHECKPOINT_FORMAT = "fvlens-checkpoint-1"


def gpt2_config(recipe: Recipe, vocabulary: int, bos: int) -> GPT2Config:
    """Hugging Face configuration of the recipe's shape."""
    return GPT2Config(
        vocab_size=vocabulary,
        n_positions=recipe.n_ctx,
        n_embd=recipe.d_model,
        n_layer=recipe.n_layers,
        n_head=recipe.n_heads,
        n_inner=recipe.d_mlp,
        activation_function="gelu_pytorch_tanh",
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=bos,
        eos_token_id=bos,
        tie_word_embeddings=True,
    )


def learning_rate(recipe: Recipe, step: int) -> float:
    """Linear warm-up, then cosine decay to a hundredth of ``recipe.lr``."""
    if step < recipe.warmup:
        return recipe.lr * (step + 1) / recipe.warmup
    progress = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    return recipe.lr * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


class Trainee(nn.Module):
    """The model with its pair checks.

    A pair check is a linear read-out of the residual stream at a label: is this label true of the input before it? Its
    loss makes the lower blocks compare each label with its input, which answers alone teach too slowly. The checks are
    thrown away after training.
    """

    def __init__(self, recipe: Recipe, vocabulary: int, bos: int) -> None:
        super().__init__()
        # both libraries initialise from the global generator; fork it so that the caller's state stays as it was
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(recipe.seed)
            self.model = GPT2LMHeadModel(gpt2_config(recipe, vocabulary, bos))
            self.checks = nn.ModuleList(
                nn.Sequential(nn.LayerNorm(recipe.d_model, elementwise_affine=False), nn.Linear(recipe.d_model, 1))
                for _ in recipe.check_layers
            )
        self.recipe = recipe

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Cross-entropy of counted answers, pair checks and separators (nats), and the shares that are right."""
        device = self.model.device
        out = self.model.transformer(batch.tokens.to(device), use_cache=False, output_hidden_states=True)
        positions, counted = batch.answer_positions.to(device), batch.counted.to(device)
        logits = self.model.lm_head(out.last_hidden_state[:, positions][counted]).float()
        targets = batch.targets.to(device)[counted]
        answers = nn.functional.cross_entropy(logits, targets)
        wanted = batch.true_pair.to(device).float()
        labels = positions + 1  # a label follows the position that predicts it
        read = [
            check(out.hidden_states[layer + 1][:, labels[:-1]])[..., 0].float()
            for layer, check in zip(self.recipe.check_layers, self.checks, strict=True)
        ]
        check = torch.stack([nn.functional.binary_cross_entropy_with_logits(r, wanted) for r in read]).mean()
        some = max(1, round(self.recipe.separator_share * len(batch.tokens)))  # the sequences of a batch are alike
        after = self.model.lm_head(out.last_hidden_state[:some, labels]).float().flatten(0, 1)
        separators = nn.functional.cross_entropy(after, torch.full_like(after[:, 0], batch.separator, dtype=torch.long))
        with torch.no_grad():
            right = is_best(logits, targets).float().mean()
            checked = ((read[-1] > 0) == (wanted > 0)).float().mean()
        return {
            "answers": answers,
            "checks": check,
            "separators": separators,
            "answers right": right,
            "checks right": checked,
        }

    @torch.no_grad()
    def truth_probability(self, batch: Batch) -> tuple[float, float]:
        """Mean probability of the true answer after the last demonstration, in clean and in permuted sequences."""
        device = self.model.device
        hidden = self.model.transformer(batch.tokens.to(device), use_cache=False).last_hidden_state
        chances = self.model.lm_head(hidden[:, batch.answer_positions[-1]]).float().softmax(dim=-1)
        chance = chances.gather(1, batch.truth.to(device)[:, None])[:, 0].cpu()
        return float(chance[batch.clean].mean()), float(chance[batch.permuted].mean())


def _save_checkpoint(
    path: Path, trainee: Trainee, optimizer: torch.optim.Optimizer, generator: torch.Generator, step: int
) -> None:
    tensors: dict[str, Tensor] = {"generator": generator.get_state()}
    for name, parameter in trainee.named_parameters():
        tensors[f"weights.{name}"] = parameter.detach()
        for key, value in optimizer.state[parameter].items():
            tensors[f"{key}.{name}"] = value.detach()
    write_tensors(path, tensors, {"step": step, "recipe": asdict(trainee.recipe)}, CHECKPOINT_FORMAT)


def _load_checkpoint(path: Path, trainee: Trainee, optimizer: torch.optim.Optimizer, generator: torch.Generator) -> int:
    try:
        tensors, header = read_tensors(path, CHECKPOINT_FORMAT, "checkpoint")
    except ValueError as error:
        raise ValueError(
            f"train: {error} Remove the checkpoint to start again; one of fvlens 0.1 is only for that version."
        ) from error
    moments = ("step", "exp_avg", "exp_avg_sq")
    try:
        theirs = header["recipe"]
        ours = json.loads(json.dumps(asdict(trainee.recipe)))  # as it comes back from JSON
        differing = [key for key in ours if theirs.get(key) != ours[key]]
        if differing:
            raise ValueError(
                f"train: {path} belongs to another recipe (it differs in {', '.join(differing)}); give another "
                "folder or remove the checkpoint."
            )
        step = as_whole(header["step"], f"train: {path}: step", 0, trainee.recipe.steps)
        generator.set_state(tensors["generator"])
        for name, parameter in trainee.named_parameters():
            with torch.no_grad():
                parameter.copy_(tensors[f"weights.{name}"])
            optimizer.state[parameter] = {
                key: tensors[f"{key}.{name}"].to(parameter.device)  # a fused optimizer keeps its step there too
                for key in moments
            }
    except (AttributeError, KeyError, RuntimeError, TypeError) as error:
        raise ValueError(
            f"train: {path} is damaged ({type(error).__name__}: {error}); remove it to start again."
        ) from error
    return step


def train(
    recipe: Recipe,
    relations: Sequence[Relation],
    out: Path,
    *,
    device: str | None = None,
    checkpoint_minutes: float = 3.0,
    progress: bool = True,
) -> Path:
    """Train the model of ``recipe`` on ``relations`` and write it to ``out`` in Hugging Face format.

    Returns:
        ``out``, which then holds ``config.json``, ``model.safetensors`` and the tokenizer's files, besides the
        checkpoint and the log of the run.

    Raises:
        ValueError: ``out`` holds the checkpoint of another recipe.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(sorted({word for relation in relations for pair in relation for word in pair}))
    sampler = SequenceSampler(recipe, relations, tokenizer)
    trainee = Trainee(recipe, tokenizer.get_vocab_size(), sampler.bos).to(device).train()
    decay = [p for p in trainee.parameters() if p.dim() >= 2]
    rest = [p for p in trainee.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": recipe.weight_decay}, {"params": rest, "weight_decay": 0.0}],
        lr=recipe.lr,
        betas=(0.9, 0.98),
        fused=True,
    )
    generator = torch.Generator().manual_seed(recipe.seed)
    checkpoint = out / "checkpoint.safetensors"
    start = _load_checkpoint(checkpoint, trainee, optimizer, generator) if checkpoint.exists() else 0
    if start:
        log.info("resumed at step %d", start)
    began = saved = time.monotonic()
    running: dict[str, float] = {}
    bar = tqdm(range(start, recipe.steps), initial=start, total=recipe.steps, disable=not progress, desc="training")
    for step in bar:
        batch = sampler.draw(generator)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(recipe, step)
        found = trainee.losses(batch)
        optimizer.zero_grad(set_to_none=True)
        total = found["answers"] + recipe.check_weight * found["checks"] + recipe.separator_weight * found["separators"]
        total.backward()
        nn.utils.clip_grad_norm_(trainee.parameters(), 1.0)
        optimizer.step()
        for key, value in found.items():
            running[key] = 0.98 * running.get(key, value.item()) + 0.02 * value.item()
        if step % 100 == 99:
            clean, permuted = trainee.truth_probability(batch)
            text = ", ".join(f"{key} {value:.3f}" for key, value in running.items())
            bar.set_postfix_str(text)
            log.info(
                "step %d: %s; P(truth) clean %.2f permuted %.2f; %.0f s",
                step + 1, text, clean, permuted, time.monotonic() - began,
            )  # fmt: skip
        if time.monotonic() - saved > 60 * checkpoint_minutes:
            _save_checkpoint(checkpoint, trainee, optimizer, generator, step + 1)
            saved = time.monotonic()
    _save_checkpoint(checkpoint, trainee, optimizer, generator, recipe.steps)
    export(trainee.model, tokenizer, out, recipe)
    return out


def export(model: GPT2LMHeadModel, tokenizer, out: Path, recipe: Recipe) -> None:
    """Write ``config.json``, ``model.safetensors``, the tokenizer and ``recipe.json`` to ``out``."""
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=BOS, pad_token=BOS, padding_side="left"
    )
    model.eval().cpu().save_pretrained(out)
    fast.save_pretrained(out)
    write_json(out / "recipe.json", asdict(recipe), indent=2)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line of the recipe."""
    default = Recipe()
    parser = argparse.ArgumentParser(prog="python -m fvlens.zoo.build", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("rel-small-build"))
    parser.add_argument("--steps", type=int, default=default.steps)
    parser.add_argument("--seed", type=int, default=default.seed)
    parser.add_argument("--device", default=None)
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", filename=args.out / "train.log")
    recipe = Recipe(steps=args.steps, seed=args.seed)
    train(recipe, [load_relation(name) for name in list_relations()], args.out, device=args.device)


if __name__ == "__main__":
    main()
