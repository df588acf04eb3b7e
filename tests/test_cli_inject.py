"""``fvlens inject``: a prompt with and without the vector, in the vector's own template."""

import json

import pytest
import torch
from commands import cells

from fvlens import FunctionVector
from fvlens.models import fingerprint
from fvlens.prompts import Template


def continuation(model, text, vector=None, scale=1.0, n=5):
    """The most likely next tokens and their chances, the vector added by a hook of our own."""
    ids = model.tokenizer(text, add_special_tokens=False)["input_ids"]

    def add(resid, hook):
        return resid + scale * vector.vector * (torch.arange(resid.shape[1]) == resid.shape[1] - 1)[:, None]

    hooks = [] if vector is None else [(f"blocks.{vector.layer}.hook_resid_post", add)]
    with torch.no_grad(), model.hooks(fwd_hooks=hooks):
        chances = model(torch.tensor([[model.tokenizer.bos_token_id, *ids]]))[0, -1].softmax(dim=-1)
    values, tokens = chances.topk(n)
    return [f"{model.tokenizer.decode([t])!r} {v:.3f}" for t, v in zip(tokens.tolist(), values.tolist(), strict=True)]


@pytest.mark.parametrize(
    ("prompt", "text", "options", "scale", "n"),
    [
        ("hot", "Q: hot\nA:", [], 1.0, 5),
        ("  big ", "Q: big\nA:", ["--scale", "-0.5", "--top", "3"], -0.5, 3),
        ("Q: open\nA:", "Q: open\nA:", [], 1.0, 5),
        ("the [bold] cat is :cat:", "the [bold] cat is :cat:", ["--top", "2"], 1.0, 2),
    ],
)
def test_inject_shows_a_prompt_with_and_without_the_vector(call, model, saved, prompt, text, options, scale, n):
    vector = FunctionVector.load(saved)
    code, out, err = call("inject", saved, *options, "--", prompt)
    assert code == 0 and err.splitlines()[0] == "antonym.safetensors names the model rel-small"
    first, rest = out.split("\n", 1)
    assert first == f"prompt {text!r}"
    plain, steered = continuation(model, text, n=n), continuation(model, text, vector, scale, n)
    assert plain != steered
    rows = cells(rest)
    assert rows[0] == ["rank", "plain", f"with antonym after layer {vector.layer}"]
    assert rows[1:] == [[str(i + 1), plain[i], steered[i]] for i in range(n)]


def generated(model, text, n, vector=None):
    """Tokens written greedily, as text; the vector stays at the last token of the prompt."""
    prompt = [model.tokenizer.bos_token_id, *model.tokenizer(text, add_special_tokens=False)["input_ids"]]
    new = []

    def add(resid, hook):
        return resid + vector.vector * (torch.arange(resid.shape[1]) == len(prompt) - 1)[:, None]

    hooks = [] if vector is None else [(f"blocks.{vector.layer}.hook_resid_post", add)]
    with torch.no_grad(), model.hooks(fwd_hooks=hooks):
        for _ in range(n):
            new.append(int(model(torch.tensor([prompt + new]))[0, -1].argmax()))
    ended = new.index(model.tokenizer.eos_token_id) if model.tokenizer.eos_token_id in new else n
    return model.tokenizer.decode(new[:ended])


@pytest.mark.parametrize(("prompt", "text"), [("hot", "Q: hot\nA:"), ("Q: hot\nA:", "Q: hot\nA:")])
@pytest.mark.parametrize("n", [1, 4])
def test_inject_generates_until_the_answer_ends(call, model, saved, prompt, text, n):
    """Only the prompt's last token is steered. An answer to a word ends where the template's does, at a line break; a
    text of one's own goes on."""
    vector = FunctionVector.load(saved)
    code, out, err = call("inject", saved, "--generate", n, "--", prompt)
    assert code == 0 and "Traceback" not in err
    for line, name, how in zip(out.splitlines()[-2:], ("plain  ", "steered"), (None, vector), strict=True):
        written = generated(model, text, n, how)
        assert line == f"{name} {(written.split(chr(10))[0].strip() if prompt == 'hot' else written)!r}"


def test_a_word_is_asked_in_the_template_of_the_vector(call, model, tiny, tmp_path):
    def file(template):
        fields = dict(layer=0, heads=(), relation="", fingerprint=fingerprint(model), template=template)
        return FunctionVector(vector=torch.zeros(model.cfg.d_model), **fields).save(tmp_path / "v.safetensors")

    assert call("inject", file("arrow"), "hot")[1].startswith("prompt ' hot ->'\n")
    code, out, _ = call("inject", file(""), "hot")
    assert code == 0
    assert out.startswith("prompt 'Q: hot\\nA:'\n")
    rows = cells(out)[3:]
    assert all(before == after for _, before, after in rows)  # a zero vector changes nothing
    assert "with vector after layer 0" in out
    own = Template("my own", "{input} is to{output};\n", "{input} is to", prefix="Pairs {x}:\n")
    assert call("inject", file(own), "hot")[1].startswith("prompt 'Pairs {x}:\\n hot is to'\n")
    written = tmp_path / "own.json"
    written.write_text(json.dumps(own.to_json()))
    assert call("inject", file("qa"), "hot", "--template", written)[1].startswith("prompt 'Pairs {x}:\\n hot is to'\n")
    assert call("inject", file(own), "hot", "--template", "arrow")[1].startswith("prompt ' hot ->'\n")


def test_a_run_in_an_own_template_and_again(call, tmp_path):
    """From a file, through every part of the run, into its files, and once more from these alone."""
    own = Template("mine", "{input} is to{output};\n", "{input} is to")
    written = tmp_path / "own.json"
    written.write_text(json.dumps(own.to_json()))
    few = ["--n-shots", 2, "--n-prompts", 4, "--n-heads", 2, "--epochs", 1, "--n-others", 1, "--n-random", 1]
    folder = tmp_path / "run"
    code, _, err = call("run", "plural", "--out", folder, "--template", written, *few, "--quiet")
    assert (code, err) == (0, "")
    read = json.loads((folder / "results.json").read_text())
    assert (read["options"]["template"], read["options"]["template_text"]) == ("mine", own.to_json())
    for name in ("vector.safetensors", "vector-finetuned.safetensors"):
        assert FunctionVector.load(folder / name).template == own
    written.unlink()  # the run knows its template
    code, out, _ = call("rerun", folder, "--quiet")
    assert code == 0 and "the same run" in out
    read["options"]["template_text"]["query"] = "nothing"
    (folder / "results.json").write_text(json.dumps(read))
    code, _, err = call("rerun", folder, "--quiet")
    assert code == 2 and "options.template_text: template 'mine': expected {input} exactly once in query" in err


def test_a_template_that_is_none_is_refused(call, tmp_path):
    code, _, err = call("heads", "plural", "--template", tmp_path / "none.json")
    assert code == 2 and "none.json." in err and "no template at" in err
    code, _, err = call("heads", "plural", "--template", "nosuch")
    assert (
        code == 2 and "--template: no template named 'nosuch'; expected one of qa, arrow, colon, chat, or a JSON" in err
    )
