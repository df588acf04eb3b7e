"""The commands: every error is one line with a hint and exit code 2; help; options; commands as processes."""

import dataclasses
import json
import re
from typing import Annotated, Any, Literal

import pytest
import torch
import typer
from commands import process
from typer.testing import CliRunner

from fvlens import FunctionVector, cli
from fvlens.cli._options import Fields, field_docs, spread
from fvlens.models import fingerprint
from fvlens.prompts import Template
from fvlens.report import Loading, RunOptions


def test_unknown_names_are_refused_with_the_nearest(refused):
    assert "no relation named 'antonim'" in refused("run", "antonim")
    assert "did you mean antonym" in refused("heads", "antonim")
    assert "no relation has category 'nosuch'; expected one of" in refused("relations", "--category", "nosuch")
    assert "no relation has family 'nosuch'" in refused("relations", "--family", "nosuch")
    assert "no relation has domain 'nosuch'" in refused("relations", "--domain", "nosuch")
    assert "'rel-smal' is neither a folder nor a model" in refused("run", "antonym", "--model", "rel-smal")
    assert "did you mean rel-small" in refused("heads", "antonym", "--model", "rel-smal")
    assert "no template named 'nosuch'; expected one of qa" in refused("run", "antonym", "--template", "nosuch")


def test_folders_and_files_that_do_not_fit_are_refused(refused, tmp_path):
    file = tmp_path / "file"
    file.write_text("something")
    assert refused("run", "antonym", "--out", file) == f"fvlens: --out {file} is a file; give a folder."
    assert file.read_text() == "something"
    assert "holds no config.json" in refused("run", "antonym", "--model", tmp_path)
    assert f"no vector file at {tmp_path / 'none'}" in refused("inject", tmp_path / "none", "hot")
    assert "file: not a safetensors file, or a truncated one" in refused("inject", file, "hot")


def test_a_vector_of_another_model_is_refused(call, refused, tiny, tmp_path):
    mark = fingerprint(tiny)
    fields = dict(layer=0, heads=(), relation="antonym", fingerprint=mark)
    file = FunctionVector(vector=torch.ones(tiny.cfg.d_model), **fields).save(tmp_path / "v.safetensors")
    message = refused("inject", file, "hot", "--model", "rel-small")
    assert f"v.safetensors was made on model {mark.name!r}, not on this one (file / model: " in message
    assert f"d_model: {tiny.cfg.d_model} / 128" in message
    assert "leave out --model: the file says how its model is loaded" in message
    message = refused("inject", file, "hot")
    assert (
        f"v.safetensors names the model {mark.name!r}, and a file does not choose what is loaded; say --mod" in message
    )
    code, out, err = call("inject", file, "hot", "--trust")  # a model that nothing but our own code can make
    named, message = err.splitlines()
    assert (code, out, named) == (2, "", f"v.safetensors names the model {mark.name}")
    assert f"v.safetensors was made on model {mark.name!r}, which cannot be loaded as {mark.name!r}" in message
    assert message.endswith("Say with --model where it is.")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["run"], "Missing argument 'relation'"),
        (["run", "antonym", "--labels", "true"], "'true' is not one of 'permuted', 'random'"),
        (["run", "antonym", "--seed", "x"], "Invalid value for '--seed': Input should be a valid integer"),
        (["run", "antonym", "--n-shots", "0"], "--n-shots: expected at least 1, got 0."),
        (["run", "antonym", "--n-heads", "33"], "--n-heads 33: expected at most 16, half of the model's 32 heads"),
        (["run", "antonym", "--layer", "4"], "--layer 4: expected 0..3."),
        (["run", "antonym", "--n-train", "0"], "--n-train: expected at least 1, got 0."),
        (["run", "antonym", "--epochs", "-1"], "--epochs: expected 0 or more, got -1; 0 leaves the training out."),
        (["run", "antonym", "--nosuch"], "No such option: --nosuch"),
        (["run", "antonym", "--n-shots", "60"], "60"),
        (["run", "antonym", "--device", "nosuch"], "nosuch"),
        (["nosuch"], "No such command 'nosuch'"),
        (["inject", "VECTOR"], "Missing argument 'prompt'"),
        (["inject", "VECTOR", " "], "the prompt is empty; give some text."),
        (
            ["inject", "VECTOR", "a" * 40 + " b", "--generate", "500", "--model", "rel-small"],
            "--generate asks for 500 more; the model",
        ),
        (["inject", "VECTOR", "hot", "--top", "0"], "'--top': Input should be greater than or equal to 1"),
        (["inject", "VECTOR", "hot", "--generate", "-1"], "'--generate': Input should be greater than or equal to 0"),
    ],
)
def test_bad_options_are_refused(refused, saved, args, message):
    quiet = ["--quiet"] if args[0] == "run" and len(args) > 1 else []
    assert message in refused(*(saved if arg == "VECTOR" else arg for arg in args), *quiet)


def test_usage_errors_point_to_the_help(refused):
    assert refused("run").endswith("(fvlens --help, or --debug for details)")
    assert not refused("run", "antonim").endswith("details)")


def test_debug_shows_the_traceback(call):
    with pytest.raises(ValueError, match="no relation named 'antonim'"):
        cli.main(["--debug", "run", "antonim"])
    with pytest.raises(ValueError, match="no relation named 'antonim'"):
        cli.main(["run", "antonim", "--debug"])
    assert call("relations", "--domain", "animal", "--debug")[0] == 0


def test_an_interruption_is_one_line(call, monkeypatch):
    def interrupted(name):
        raise KeyboardInterrupt

    monkeypatch.setattr("fvlens.cli._run.relation_of", interrupted)
    assert call("run", "antonym") == (130, "", "fvlens: interrupted\n")


def test_help_names_every_command(call):
    code, out, err = call("--help")
    assert (code, err) == (0, "")
    assert out.count("\n") > 10  # not squeezed into one line, as errors are
    for command in ("run", "rerun", "universal", "relations", "models", "heads", "inject", "explain"):
        assert re.search(rf"^  {command} ", out, flags=re.MULTILINE)
        assert call(command, "--help")[0] == 0


# --- as a user runs it ---


def test_an_error_of_a_process_is_one_line():
    """Nothing else comes to standard error, from imports neither. A run that succeeds is in ``test_cli_run``."""
    failed = process("run", "antonim")
    assert (failed.returncode, failed.stdout, failed.stderr.count("\n")) == (2, "", 1)
    assert failed.stderr.startswith("fvlens: no file 'antonim', and no relation named 'antonim'")


# --- options made from dataclasses ---


@dataclasses.dataclass(frozen=True)
class Settings:
    """Some settings.

    Attributes:
        n_times, n_more: how often, over
            two lines.
        how: in which way.
        template: how it is written.
        always: without asking.

    Not an attribute: this.
    """

    n_times: int = 3
    n_more: int | None = None
    how: Literal["fast", "slow"] = "fast"
    template: str | Template = "qa"
    always: bool = False

    def __post_init__(self):
        if self.n_times < 1:
            raise ValueError(f"n_times: expected at least 1, got {self.n_times}.")
        if self.how == "slow" and self.always:
            raise ValueError("always and slow exclude each other.")


@pytest.fixture
def options_of():
    """What a command with these settings is called with, and its help."""

    def run(annotation, *args):
        seen = []

        def command(settings, *, last=False):
            seen.append(settings)

        command.__annotations__ = {"settings": annotation, "last": bool}
        app = typer.Typer(pretty_exceptions_enable=False, rich_markup_mode=None, add_completion=False)
        app.command()(spread(command))
        done = CliRunner().invoke(app, [str(arg) for arg in args])
        if isinstance(done.exception, ValueError):
            raise done.exception
        return (seen or [None])[0], " ".join(done.output.split())

    return run


def test_a_command_gets_the_dataclass_of_its_options(options_of, tmp_path):
    assert options_of(Settings)[0] == Settings()
    args = ("--n-times", 4, "--n-more", 2, "--how", "slow", "--template", "arrow")
    assert options_of(Settings, *args)[0] == Settings(4, 2, "slow", "arrow")
    assert options_of(Settings, "--always")[0] == Settings(always=True)
    own = Template("mine", "{input} is{output};", "{input} is")
    (tmp_path / "own.json").write_text(json.dumps(own.to_json()))
    assert options_of(Settings, "--template", tmp_path / "own.json")[0].template == own


def test_a_command_can_ask_what_was_given_and_leave_fields_out(options_of):
    given = Annotated[dict[str, Any], Fields(Settings)]
    assert options_of(given)[0] == {}
    assert options_of(given, "--n-times", 3, "--always")[0] == {"n_times": 3, "always": True}
    some = Annotated[Settings, Fields(Settings, ("how",))]
    assert options_of(some, "--how", "slow")[0] == Settings(how="slow")
    assert "No such option: --n-times" in options_of(some, "--n-times", 3)[1]


def test_help_is_what_the_docstring_says_of_each_field(options_of):
    assert field_docs(Settings) == {
        "n_times": "how often, over two lines.",
        "n_more": "how often, over two lines.",
        "how": "in which way.",
        "template": "how it is written.",
        "always": "without asking.",
    }
    told = options_of(Annotated[Settings, Fields(Settings, notes={"n_more": "Or none."})], "--help")[1]
    assert (
        "--n-times <int> How often, over two lines. [default: 3] --n-more <int> How often, over two lines. Or none. "
        in told
    )
    assert "In which way. [default: fast]" in told
    assert "How it is written. Built in are qa, arrow, colon, chat; one of your own is a JSON file. [default:" in told
    assert "--always Without asking. --" in told


@dataclasses.dataclass(frozen=True)
class More(Settings):
    """Settings of a special case.

    Attributes:
        n_more: how often at least.
        sizes: of what there are several.
        places: where, if anywhere.
    """

    sizes: tuple[int, ...] = (1, 2)
    places: tuple[str, ...] = ()


def test_options_of_a_class_that_extends_another(options_of):
    assert list(field_docs(More)) == [field.name for field in dataclasses.fields(More)]
    assert field_docs(More)["n_times"] == "how often, over two lines." != field_docs(More)["n_more"]
    assert options_of(More)[0] == More()
    assert options_of(More, "--sizes", 3, "--sizes", 1, "--how", "slow")[0] == More(sizes=(3, 1), how="slow")
    told = options_of(More, "--help")[1]
    assert "Of what there are several. [default: 1 2]" in told and "Where, if anywhere. --" in told


def test_the_dataclass_refuses_in_the_name_of_the_option(options_of):
    with pytest.raises(ValueError, match=r"^--n-times: expected at least 1, got 0\.$"):
        options_of(Settings, "--n-times", 0)
    with pytest.raises(ValueError, match=r"^always and slow exclude each other\.$"):
        options_of(Settings, "--how", "slow", "--always")


@pytest.mark.parametrize("kind", [Loading, RunOptions])
def test_every_setting_of_a_run_is_explained(kind):
    assert list(field_docs(kind)) == [field.name for field in dataclasses.fields(kind)]
    assert all(field_docs(kind).values())


def test_every_command_that_loads_a_model_loads_it_alike(call):
    options = {"--model", "--device", "--dtype", "--revision", "--backend", "--base", "--trust"}
    for command in ("run", "universal", "compare", "study layer", "heads", "inject", "compose", "analogy", "analogies",
                    "sensitivity"):  # fmt: skip
        told = call(*command.split(), "--help")[1]
        assert options <= set(re.findall(r"^  (--[\w-]+)", told, re.MULTILINE)), command
    # a run's own files say how its model is loaded; the others need none
    for command, taken in (("rerun", {"--model", "--base", "--trust"}), ("relations", set()), ("models", set())):
        found = set(re.findall(r"^  (--[\w-]+)", call(command, "--help")[1], re.MULTILINE))
        assert options & found == taken, command
