"""Files of tensors against the safetensors library, and what a write leaves behind when it fails."""

import dataclasses
import hashlib
import json
import os
import re
import stat
import threading

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fvlens import files
from fvlens.files import DTYPES, Pieces, TensorFile, read_tensors, write_tensors

FORM = "test-1"
SHAPES = ((), (0,), (3,), (2, 0, 4), (2, 3, 5))


def some_tensors():
    """A tensor of every precision and shape, and some that do not lie in one piece."""
    g = torch.Generator().manual_seed(0)
    made = {
        f"{str(dtype).removeprefix('torch.')} {i}": (8 * torch.randn(shape, generator=g)).to(dtype)
        for dtype in DTYPES
        for i, shape in enumerate(SHAPES)
    }
    return made | {"turned": torch.randn(4, 6, generator=g).T, "every other": torch.arange(9)[::2]}


def test_the_library_reads_what_we_write_and_we_read_what_it_writes(tmp_path):
    made = some_tensors()
    path = write_tensors(tmp_path / "ours", made, {"a": [1, "ä"]}, FORM)
    found, header = read_tensors(path, FORM)
    theirs = load_file(path)
    lazily = TensorFile.open(path, FORM, "file")
    assert header == lazily.header == {"a": [1, "ä"]}
    assert set(found) == set(theirs) == set(lazily.entries) == set(made)
    for name, tensor in made.items():
        for other in (found[name], theirs[name], lazily.read(name)):
            assert other.dtype == tensor.dtype and torch.equal(other, tensor), name
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    assert metadata.keys() == {"format", "fvlens", "sha256", "sha256 of tensors"}
    assert (metadata["format"], metadata["fvlens"]) == (FORM, json.dumps(header, sort_keys=True))
    whole = {name: tensor.contiguous() for name, tensor in made.items()}
    save_file(whole, tmp_path / "theirs", metadata={"format": FORM, "fvlens": "{}"})
    lazily = TensorFile.open(tmp_path / "theirs", FORM, "file")
    for name, tensor in made.items():
        assert torch.equal(lazily.read(name), tensor), name
    assert (tmp_path / "theirs").stat().st_size < path.stat().st_size + 1000


@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(0, 9), min_size=1, max_size=5), st.integers(0, 40), st.integers(0, 40))
def test_pieces_are_one_tensor_and_parts_are_read_from_where_they_are(tmp_path, lengths, first, n):
    whole = torch.arange(3 * sum(lengths), dtype=torch.float32).reshape(-1, 3)
    pieces = Pieces((sum(lengths), 3), torch.float32, lambda: iter(whole.split(lengths)))
    path = write_tensors(tmp_path / "pieces", {"x": pieces, "y": torch.ones(2, dtype=torch.int8)}, {}, FORM)
    file = TensorFile.open(path, FORM, "file")
    assert torch.equal(file.read("x"), whole) and torch.equal(load_file(path)["y"], torch.ones(2, dtype=torch.int8))
    first, last = min(first, whole.numel()), min(first + n, whole.numel())
    out = torch.empty(last - first)
    file.read_into(out, "x", first)
    assert torch.equal(out, whole.flatten()[first:last])


def test_what_cannot_be_written_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "x"
    for n, told in ((3, 12), (5, 20)):
        wrong = Pieces((4,), torch.float32, lambda n=n: (torch.ones(n),))
        with pytest.raises(ValueError, match=f"save: 'x' takes 16 bytes, but its pieces have {told}"):
            write_tensors(path, {"x": wrong}, {}, FORM)
    with pytest.raises(ValueError, match=r"save: 'x' has dtype torch.complex64; expected one of torch.float64, torch"):
        write_tensors(path, {"x": torch.ones(2, dtype=torch.complex64)}, {}, FORM)
    monkeypatch.setattr(files._tensors, "_MOST_HEADER", 500)
    with pytest.raises(ValueError, match=r"save: the header of x would take \d+ bytes; 500 are allowed"):
        write_tensors(path, {"x": torch.ones(2)}, {"long": "x" * 500}, FORM)
    missing = tmp_path / "no" / "x"
    with pytest.raises(ValueError, match=re.escape(f"save: folder {missing.parent} does not exist; create it first.")):
        write_tensors(missing, {"x": torch.ones(2)}, {}, FORM)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such modes")
@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_the_mode_is_left_to_the_umask(tmp_path, mask, mode):
    before = os.umask(mask)
    try:
        path = write_tensors(tmp_path / "x", {"x": torch.ones(2)}, {}, FORM)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == mode


def test_a_file_is_on_the_disk_before_it_takes_its_name(tmp_path, monkeypatch):
    path = write_tensors(tmp_path / "x", {"x": torch.ones(2)}, {}, FORM)
    calls = []
    sync, replace = os.fsync, os.replace

    def seen_sync(descriptor):
        calls.append(("fsync", os.fstat(descriptor).st_size))
        sync(descriptor)

    def seen_replace(part, target):
        assert torch.equal(read_tensors(path, FORM)[0]["x"], torch.ones(2))  # the old one is there until the end
        assert part.parent == target.parent
        calls.append(("replace", part.stat().st_size))
        replace(part, target)

    monkeypatch.setattr(files._write.os, "fsync", seen_sync)
    monkeypatch.setattr(files._write.os, "replace", seen_replace)
    write_tensors(path, {"x": torch.zeros(3)}, {}, FORM)
    size = path.stat().st_size
    assert calls == [("fsync", size), ("replace", size)]
    assert torch.equal(read_tensors(path, FORM)[0]["x"], torch.zeros(3))


@pytest.mark.parametrize("error", [OSError("no space left"), KeyboardInterrupt()])
def test_a_failed_write_leaves_the_old_file_alone(tmp_path, error):
    path = write_tensors(tmp_path / "x", {"x": torch.ones(2)}, {}, FORM)

    def broken():
        yield torch.ones(2)
        raise error

    with pytest.raises(type(error)):
        write_tensors(path, {"x": Pieces((4,), torch.float32, broken)}, {}, FORM)
    assert list(tmp_path.iterdir()) == [path]
    assert torch.equal(read_tensors(path, FORM)[0]["x"], torch.ones(2))


def test_a_temporary_name_that_is_taken_is_not_followed(tmp_path, monkeypatch):
    """Somebody who guesses the name cannot make us write through a link of theirs."""
    victim = tmp_path / "victim"
    victim.write_text("precious")
    monkeypatch.setattr(files._write.secrets, "token_hex", lambda n: "guessed")
    (tmp_path / ".x.guessed.part").symlink_to(victim)
    with pytest.raises(FileExistsError):
        write_tensors(tmp_path / "x", {"x": torch.ones(2)}, {}, FORM)
    assert victim.read_text() == "precious"
    assert (tmp_path / ".x.guessed.part").is_symlink()  # not ours to take away


def test_writers_side_by_side_each_write_a_whole_file(tmp_path):
    path = tmp_path / "x"
    values = [torch.full((50_000,), float(i)) for i in range(8)]
    threads = [threading.Thread(target=write_tensors, args=(path, {"x": value}, {}, FORM)) for value in values]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = read_tensors(path, FORM)[0]["x"]
    assert any(torch.equal(found, value) for value in values)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("reader", [read_tensors, lambda path, form: TensorFile.open(path, form, "vector file")])
def test_only_regular_files_are_read(tmp_path, reader):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path in (pipe, type(pipe)("/dev/zero")):
        message = f"{path.name}: expected a regular file, got a pipe, a socket or a device."
        with pytest.raises(ValueError, match=re.escape(message)):
            reader(path, FORM)
    for path in (tmp_path, tmp_path / "missing", tmp_path / "null\0byte"):
        with pytest.raises(ValueError, match=re.escape(f"no vector file at {path}.")):
            reader(path, FORM)
    path = write_tensors(tmp_path / "x", {"x": torch.ones(2)}, {}, FORM)
    (tmp_path / "link").symlink_to(path)
    assert reader(tmp_path / "link", FORM)


def test_a_file_that_changed_is_not_read_further(tmp_path):
    path = write_tensors(tmp_path / "x", {"x": torch.ones(4)}, {}, FORM)
    file = TensorFile.open(path, FORM, "file")
    write_tensors(path, {"x": torch.zeros(4)}, {}, FORM)
    with pytest.raises(ValueError, match="x: the file was replaced or changed since it was opened"):
        file.read("x")
    file = TensorFile.open(path, FORM, "file")
    data = path.read_bytes()
    path.write_bytes(data[:-4])
    status = path.stat()
    identity = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
    with pytest.raises(ValueError, match="x: the file ends before its tensors do"):
        dataclasses.replace(file, identity=identity).read("x")
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ValueError, match="x: expected a regular file"):
        file.read("x")


def test_tensors_of_other_precisions_are_refused(tmp_path):
    path = tmp_path / "x"
    save_file({"x": torch.ones(4).to(torch.float8_e5m2)}, path, metadata={"format": FORM, "fvlens": "{}"})
    with pytest.raises(ValueError, match=r"x: unexpected tensors \(KeyError: 'F8_E5M2'\)"):
        TensorFile.open(path, FORM, "file")


def test_text_is_read_from_regular_files_of_a_sensible_size(tmp_path):
    file = tmp_path / "a.txt"
    file.write_bytes("\ufeffa\u00e9\n".encode())
    assert files.read_text(file, "list") == "a\u00e9\n"
    with pytest.raises(ValueError, match=r"a.txt: expected a list of at most 6 bytes, got 7\."):
        files.read_text(file, "list", most=6)
    with pytest.raises(ValueError, match=r"no list at .*none\."):
        files.read_text(tmp_path / "none", "list")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="pipe: expected a regular file, got a pipe"):
        files.read_text(tmp_path / "pipe", "list")
    file.write_bytes(b"a\xff")
    with pytest.raises(ValueError, match=r"a.txt: expected UTF-8 text, but byte 1 is none\."):
        files.read_text(file, "list")


def test_text_that_cannot_be_read_is_told(tmp_path, monkeypatch):
    file = tmp_path / "a.txt"
    file.write_text("a")

    def denied(*args, **given):
        raise PermissionError(13, "Permission denied")

    for place, name in ((files._write.os, "open"), (type(file), "stat")):
        with monkeypatch.context() as patch:
            patch.setattr(place, name, denied)
            with pytest.raises(ValueError, match=r"a.txt: cannot be read \(Permission denied\)\."):
                files.read_text(file, "list")


# --- text, JSON, tables ---


def test_the_same_content_gives_the_same_bytes(tmp_path):
    import pandas as pd

    frame = pd.DataFrame({"word": ["a,b", "é"], "top1": [0.5, float("nan")]})
    assert files.write_table(tmp_path / "t.csv", frame).read_bytes() == 'word,top1\n"a,b",0.5\né,\n'.encode()
    assert files.write_text(tmp_path / "t.txt", "a\r\né\n").read_bytes() == "a\r\né\n".encode()
    content = {"b": [1, 2.5, None], "a": "é"}
    path = files.write_json(tmp_path / "t.json", content)
    assert path.read_bytes() == b'{"b": [1, 2.5, null], "a": "\\u00e9"}\n'
    assert files.read_json(path, "list") == content
    assert files.write_json(path, {"a": (1.0, float("nan"))}, indent=1, null_for_nan=True).read_text() == (
        '{\n "a": [\n  1.0,\n  null\n ]\n}\n'
    )
    with pytest.raises(ValueError, match=r"save: t.json: expected finite numbers \(Out of range float values"):
        files.write_json(path, [float("nan")])
    one, two = {"a": torch.ones(2), "b": torch.ones(1)}, {"b": torch.ones(1), "a": torch.ones(2)}
    first = write_tensors(tmp_path / "one", one, {"x": 1, "y": 2}, FORM).read_bytes()
    assert write_tensors(tmp_path / "two", two, {"y": 2, "x": 1}, FORM).read_bytes() == first


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1, "a": 1}', "the key 'a' comes twice"),
        ('[{"b": {"c": 1, "c": 2}}]', "the key 'c' comes twice"),
        ("[NaN]", "NaN is not a number"),
        ("[-Infinity]", "-Infinity is not a number"),
        ("[1e999]", "1e999 is not a number"),
        ("[" * 100_000, "values lie too deep inside others"),
        ("{", "Expecting property name"),
    ],
)
def test_json_that_can_mean_two_things_or_nothing_is_refused(tmp_path, text, message):
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=re.escape("a.json: not a JSON file, or a truncated one (") + ".*") as error:
        files.read_json(path, "list")
    assert message in str(error.value)
    path.write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"a.json: not a JSON file, or a truncated one \('utf-8' codec"):
        files.read_json(path, "list")


@pytest.mark.parametrize("reader", [files.read_bytes, files.read_text, files.read_json])
def test_no_reader_waits_for_a_pipe_or_opens_a_device(tmp_path, reader, monkeypatch):
    import socket

    os.mkfifo(tmp_path / "pipe")
    server = socket.socket(socket.AF_UNIX)
    monkeypatch.chdir(tmp_path)  # names of sockets are short
    server.bind("socket")
    for path in (tmp_path / "pipe", tmp_path / "socket", type(tmp_path)("/dev/zero")):
        with pytest.raises(ValueError, match=f"{path.name}: expected a regular file, got a pipe, a socket or a device"):
            reader(path, "list")
    server.close()
    with pytest.raises(ValueError, match=r"no list at .*\. It is a folder; give the name of a file\."):
        reader(tmp_path, "list")
    # exchanged between the look and the opening
    file = tmp_path / "file"
    file.write_text("[]")
    own = os.open
    monkeypatch.setattr(files._write.os, "open", lambda path, flags: own(tmp_path / "pipe", flags))
    with pytest.raises(ValueError, match="file: expected a regular file, got a pipe"):
        reader(file, "list")

    def gone(path, flags):
        raise FileNotFoundError(2, "gone")

    monkeypatch.setattr(files._write.os, "open", gone)
    with pytest.raises(ValueError, match="no list at"):
        reader(file, "list")


def test_a_disk_that_fails_while_it_is_read_is_told(tmp_path):
    (tmp_path / "a").write_text("a")
    with pytest.raises(ValueError, match=r"a: cannot be read \(Input/output error\)"):
        with files._read.regular(tmp_path / "a", "list"):
            raise OSError(5, "Input/output error")


def test_tensors_larger_than_expected_are_refused(tmp_path):
    path = write_tensors(tmp_path / "x", {"x": torch.ones(100)}, {}, FORM)
    size = path.stat().st_size
    with pytest.raises(ValueError, match=f"x: expected a vector file of at most 99 bytes, got {size}"):
        read_tensors(path, FORM, most=99)


# --- what is there already ---


def test_a_link_stays_and_its_file_is_replaced(tmp_path):
    (tmp_path / "inner").mkdir()
    target, link = tmp_path / "inner" / "target", tmp_path / "link"
    target.write_text("old")
    link.symlink_to(target)
    files.write_text(link, "new")
    assert link.is_symlink() and target.read_text() == "new"
    target.unlink()
    files.write_text(link, "newer")  # a link that led nowhere
    assert link.is_symlink() and target.read_text() == "newer"
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["inner", "link", "target"]
    circle = tmp_path / "circle"
    circle.symlink_to(circle)
    with pytest.raises(ValueError, match="circle is a link that leads in a circle; remove it or choose another name"):
        files.write_text(circle, "x")
    (tmp_path / "lost").symlink_to(tmp_path / "none" / "x")
    with pytest.raises(ValueError, match=r"save: folder .*none does not exist; create it first"):
        files.write_text(tmp_path / "lost", "x")


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such modes")
@pytest.mark.parametrize("mode", [0o600, 0o640, 0o664, 0o666])
def test_the_mode_of_a_file_that_is_replaced_is_kept(tmp_path, mode):
    path = files.write_text(tmp_path / "x", "old")
    path.chmod(mode)
    files.write_text(path, "new")
    assert path.read_text() == "new" and stat.S_IMODE(path.stat().st_mode) == mode


def test_only_files_are_replaced(tmp_path):
    with pytest.raises(ValueError, match=r"save: .* is a folder; give the name of a file in it"):
        files.write_text(tmp_path, "x")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match=r"save: .*pipe is a pipe, a socket or a device; give the name of a file"):
        files.write_text(tmp_path / "pipe", "x")
    with pytest.raises(ValueError, match=r"save: .* cannot be written \(.+\); choose another name"):
        files.write_text(tmp_path / ("é" * 200), "x")
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]


# --- damage ---


@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_bytes_that_change_are_refused_or_read_as_the_library_reads_them(tmp_path, data):
    tensors = {"x": torch.arange(4.0), "y": torch.ones(2, 1, dtype=torch.int8)}
    whole = bytearray(write_tensors(tmp_path / "x", tensors, {"a": 1}, FORM).read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(whole) - 1))
        whole[place : place + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=2))
        if not whole:
            break
    (tmp_path / "x").write_bytes(whole)
    try:
        found, _ = read_tensors(tmp_path / "x", FORM)
    except ValueError:
        return
    theirs = load_file(tmp_path / "x")
    assert found.keys() == theirs.keys()
    assert all(torch.equal(found[name], theirs[name]) or found[name].isnan().any() for name in found)


def test_every_bit_of_a_file_counts(tmp_path):
    """Whatever bit is turned: refused, unless the file says the same (a space in place of another, say)."""
    path = write_tensors(tmp_path / "x", {"x": torch.arange(2.0), "y": torch.ones(1, dtype=torch.bool)}, {"a": 1}, FORM)
    whole = path.read_bytes()
    n_refused = 0
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        try:
            found, header = read_tensors(path, FORM)
        except ValueError:
            n_refused += 1
        else:
            assert found["x"].tolist() == [0.0, 1.0] and found["y"].tolist() == [True] and header == {"a": 1}
    assert n_refused > len(whole) - 8


def test_checksums_are_those_of_what_the_file_holds(tmp_path):
    tensors = {"x": torch.arange(4.0), "y": torch.ones(2, 1, dtype=torch.int8), "none": torch.zeros(0)}
    path = write_tensors(tmp_path / "x", tensors, {"layer": 1}, FORM)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata["sha256 of tensors"]) == {
        name: hashlib.sha256(tensor.numpy().tobytes()).hexdigest() for name, tensor in tensors.items()
    }
    whole = path.read_bytes()
    n_header = int.from_bytes(whole[:8], "little")
    layout = json.loads(whole[8 : 8 + n_header])
    assert layout["__metadata__"].pop("sha256") == metadata["sha256"]
    text = json.dumps(layout, sort_keys=True, separators=(",", ":"))
    assert hashlib.sha256(text.encode()).hexdigest() == metadata["sha256"]


@pytest.mark.parametrize(
    ("old", "new", "what"),
    [
        (b'layer\\": 1', b'layer\\": 2', "its metadata"),
        (b'"shape":[4]', b'"shape":[1,4]', "its metadata"),
        (b"sha256 of tensors", b"sha256 of nothing", "its metadata"),
        (b'"sha256":', b'"sha255":', "its metadata"),
        (torch.full((4,), 7.0).numpy().tobytes(), torch.full((4,), 6.0).numpy().tobytes(), "the numbers of 'x'"),
    ],
)
def test_what_was_changed_after_it_was_saved_is_refused(tmp_path, old, new, what):
    path = write_tensors(tmp_path / "x", {"x": torch.full((4,), 7.0)}, {"layer": 1}, FORM)
    whole = path.read_bytes()
    assert whole.count(old) == 1
    path.write_bytes(whole.replace(old, new))
    told = f"x: {what} changed after the file was saved (another checksum); take an undamaged copy, or make it again."
    with pytest.raises(ValueError, match=re.escape(told)):
        read_tensors(path, FORM)


def test_a_file_that_is_read_in_parts_is_checked_where_it_is_read_whole(tmp_path):
    path = write_tensors(tmp_path / "x", {"x": torch.full((4,), 7.0), "y": torch.ones(1)}, {}, FORM)
    path.write_bytes(path.read_bytes().replace(torch.full((4,), 7.0).numpy().tobytes(), bytes(16)))
    file = TensorFile.open(path, FORM, "file")
    assert file.read("y").tolist() == [1.0]
    with pytest.raises(ValueError, match="x: the numbers of 'x' changed after the file was saved"):
        file.read("x")


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ([1], "not a safetensors file, or a truncated one (the header is no JSON object)"),
        ({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, "'x' of shape [2] lies in 4 bytes"),
        (
            {"x": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}},
            "a tensor begins at byte 4, but",
        ),
        ({"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, "the tensors end at byte"),
        ({"x": {"dtype": "F32", "shape": [True, 2], "data_offsets": [0, 8]}}, "unexpected tensors (TypeError: 'x' has"),
        ({"x": {"dtype": "F32", "shape": [-2, -1], "data_offsets": [0, 8]}}, "unexpected tensors (TypeError: 'x' has"),
        ({"x": 3}, "unexpected tensors (TypeError"),
        ({"x": {"dtype": ["F32"], "shape": [2], "data_offsets": [0, 8]}}, "unexpected tensors (TypeError"),
    ],
)
def test_tensors_that_do_not_lie_where_they_should_are_refused(tmp_path, told, message):
    metadata = {"__metadata__": {"format": FORM, "fvlens": "{}"}}
    text = json.dumps(metadata | told if isinstance(told, dict) else told).encode()
    (tmp_path / "x").write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    for reader in (read_tensors, lambda path, form: TensorFile.open(path, form, "file")):
        with pytest.raises(ValueError, match=re.escape(message)) as error:
            reader(tmp_path / "x", FORM)
        assert str(error.value).startswith("x: ")


def test_a_folder_that_takes_no_file_is_told(tmp_path, monkeypatch):
    def denied(*args):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(files._write.os, "open", denied)
    with pytest.raises(ValueError, match=r"save: .*x cannot be written \(Permission denied\); choose another"):
        files.write_text(tmp_path / "x", "x")
