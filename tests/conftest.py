"""Shared fixtures. Shape and type checking (jaxtyping + beartype) is on for the whole package."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "PYTEST_XDIST_WORKER" in os.environ:  # as many processes as cores: more threads would only wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start, too
os.environ.pop("COLUMNS", None)  # xdist sets it, and a console keeps for good the width it finds when it is made

import checked

checked.install("fvlens")

import dataclasses
import gc
import time
from importlib.metadata import version
from pathlib import Path

import jaxtyping
import pytest
import torch
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

if "PYTEST_XDIST_WORKER" in os.environ:  # as many processes as cores: more threads would only wait for each other
    torch.set_num_threads(1)

from runs import SMALL, TINY, Call, small_run

import fvlens
from fvlens.models import quiet_deprecation
from fvlens.report import results_json, run_relation
from fvlens.suffix import has_hooks
from fvlens.universal import read_heads


def pytest_collection_finish():
    """What is imported by now stays: collections, one before each smaller batch, need not look at it again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def model():
    """The embedded model."""
    return fvlens.load_model("rel-small", device="cpu")


@pytest.fixture
def unchecked():
    """Runtime type checking off, as in ordinary use: our own messages must do, and time is a user's time."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


TOKENIZER = Path(__file__).parent / "tokenizer"
"""A tokenizer that stays when the embedded model is trained anew, since random-weight models depend on its size."""

HAS_HOOKED = version("transformer-lens").split(".")[0] == "3"
needs_hooked = pytest.mark.skipif(not HAS_HOOKED, reason="HookedTransformer is gone from TransformerLens 4 on")


BACKENDS = ["hooked", "bridge"] if HAS_HOOKED else ["bridge"]
both = pytest.mark.parametrize("backend", BACKENDS)


def random_model(**overrides):
    """A random-weight model with the tests' own tokenizer: HookedTransformer, or a bridge where there is none."""
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER, local_files_only=True)
    if not HAS_HOOKED:
        return _random_bridge(tokenizer, **overrides)
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    settings = dict(
        n_layers=3, n_heads=4, d_model=32, d_head=8, d_mlp=64, n_ctx=160, act_fn="gelu_new", normalization_type="LN",
        d_vocab=len(tokenizer), device="cpu", seed=None, initializer_range=0.3,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]), quiet_deprecation():
        torch.default_generator.manual_seed(0)
        made = HookedTransformer(
            HookedTransformerConfig(**{**settings, **overrides}), tokenizer=tokenizer, default_padding_side="left"
        )
    return made.eval()


def _random_bridge(tokenizer, *, n_layers=3, n_heads=4, d_model=32, d_mlp=64, n_ctx=160, dtype=torch.float32, **others):
    """A bridge around a random GPT-2 of this shape."""
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    others = {key: value for key, value in others.items() if not (key == "d_head" and value == d_model // n_heads)}
    if others:
        pytest.skip(f"a model with {', '.join(others)} needs HookedTransformer, gone from TransformerLens 4 on")
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=n_ctx, n_embd=d_model, n_layer=n_layers, n_head=n_heads, n_inner=d_mlp,
        initializer_range=0.3, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        config._attn_implementation = "eager"
        made = GPT2LMHeadModel(config).to(dtype).eval()
        made.lm_head.weight = torch.nn.Parameter(0.3 * torch.randn(made.lm_head.weight.shape, dtype=dtype))
        bridge = build_bridge_from_module(made, "GPT2LMHeadModel", hf_config=config, dtype=dtype, model_name="random")
    tokenizer.padding_side = "left"
    bridge.tokenizer = tokenizer
    return bridge.eval()


@pytest.fixture(scope="session")
def tiny():
    """A random-weight model of 3 layers and 4 heads."""
    return random_model()


@pytest.fixture(scope="session")
def models():
    """Random-weight models by kind of architecture, each made once."""
    from architectures import built

    return built


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Name of an architecture -> its tiny checkpoint, made on first use."""
    from checkpoints import save

    root = tmp_path_factory.mktemp("checkpoints")

    def get(name):
        folder = root / name
        return folder if folder.is_dir() else save(name, folder)

    return get


def seeded(seed=0):
    """A generator with this seed."""
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def generator():
    """A generator with seed 0."""
    return seeded()


@pytest.fixture(scope="session")
def tied():
    """A model that gives two words the same largest logit behind any prompt: `` cold``, of the smaller id, `` small``.

    The answer to ``hot`` is therefore right and that to ``big`` of rank 1.
    """
    if not HAS_HOOKED:
        pytest.skip("needs HookedTransformer, gone from TransformerLens 4 on")
    made = random_model()
    first, second = (made.tokenizer(word, add_special_tokens=False)["input_ids"] for word in (" cold", " small"))
    assert len(first) == len(second) == 1 and first < second
    with torch.no_grad():
        made.unembed.W_U.zero_()  # only the bias is left, so that no rounding parts the two
        made.unembed.b_U.copy_(torch.arange(made.cfg.d_vocab) / -1e6)
        made.unembed.b_U[[*first, *second]] = 1.0
    return made


@pytest.fixture(scope="session")
def means(tiny):
    """Mean head outputs of the random-weight model under the demonstrations of ``evaluations``."""
    from evaluations import DEMONSTRATIONS

    clean = fvlens.build_prompts(tiny, DEMONSTRATIONS, n_shots=2, n_prompts=6, generator=seeded(3))
    return fvlens.mean_head_activations(tiny, clean, progress=False)


@pytest.fixture
def no_trace(tiny):
    """No hooks stay, the model's generate is its own, the global random state is neither read nor set."""
    state = torch.random.get_rng_state()
    yield
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not has_hooks(tiny)
    assert "generate" not in tiny.__dict__


@pytest.fixture
def left_clean(model, tiny):
    """After the test no hook and no wrapper of an open block is left on the shared models."""
    from steering import pristine

    yield
    for each in (model, tiny):
        assert pristine(each)


@pytest.fixture
def call(capsys, monkeypatch):
    """Run a command in this process: exit code, standard output, standard error."""
    from fvlens import cli

    monkeypatch.setenv("COLUMNS", "200")
    for console in (cli.out, cli.err):  # made in a test that had another width, it would keep that for good
        monkeypatch.setattr(console, "_width", None)

    def run(*args):
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            cli.main([str(arg) for arg in args])
        captured = capsys.readouterr()
        return end.value.code, captured.out, captured.err

    return run


@pytest.fixture
def refused(call):
    """Run a command that must fail: its one line on standard error."""

    def run(*args):
        code, out, err = call(*args)
        assert (code, out) == (2, "")
        assert err.startswith("fvlens: ")
        assert err.count("\n") == 1
        assert err.endswith("\n")
        return err.strip()

    return run


@pytest.fixture(scope="session")
def saved(model, tmp_path_factory):
    """A vector file of the embedded model."""
    return small_run(model).vector.save(tmp_path_factory.mktemp("vector") / "antonym.safetensors")


# --- runs of the whole chain ---


@pytest.fixture(scope="session")
def result(model):
    return small_run(model)


@pytest.fixture(scope="session")
def numbers(result):
    return results_json(result)


@pytest.fixture(scope="session")
def watched(model):
    """The same run again, with every prompt that was built, and the seconds it took."""
    calls = []

    def spy(module, original):
        def build(*args, **kwargs):
            prompts = original(*args, **kwargs)
            calls.append(Call(module, prompts))
            return prompts

        return build

    with pytest.MonkeyPatch.context() as patch:
        for module in ("find", "evaluation._prompting", "training._prepared"):
            target = f"fvlens.{module}.build_prompts"
            patch.setattr(target, spy(module, fvlens.build_prompts))
        began = time.monotonic()
        again = run_relation(model, fvlens.load_relation("antonym"), options=SMALL, progress=False)
    return again, calls, time.monotonic() - began


@pytest.fixture(scope="session")
def tiny_result(tiny):
    return run_relation(tiny, fvlens.load_relation("antonym"), options=TINY, progress=False)


@pytest.fixture
def heads_file(tmp_path):
    path = tmp_path / "heads.json"
    path.write_text("[[2, 3], [0, 1], [1, 1]]")
    return path


@pytest.fixture(scope="session")
def given(tiny, tmp_path_factory):
    """A run over heads from a file, with another relation among its controls."""
    heads_file = tmp_path_factory.mktemp("heads") / "heads.json"
    heads_file.write_text("[[2, 3], [0, 1], [1, 1]]")
    options = dataclasses.replace(TINY, n_others=1, n_heads=5)
    return run_relation(
        tiny, fvlens.load_relation("antonym"), options=options, heads=read_heads(heads_file, tiny), progress=False
    )
