import errno
import json
import os
import pickle
import random
import shutil
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from medusa_ds.errors import UserError
from medusa_ds.training import checkpoint
from medusa_ds.training.checkpoint import encode_manifest, write_file
from medusa_ds.training.engine import MedusaEngine

pytestmark = pytest.mark.usefixtures("group_of_one")


def tensors(step: int) -> list[tuple[str, torch.Tensor]]:
    draw = torch.Generator().manual_seed(step)
    return [(f"weight{i}/{key}", torch.randn(5, 7, generator=draw)) for i in range(3) for key in ("master", "exp_avg")]


def save(root: Path, step: int) -> Path:
    return checkpoint.save(root, step, iter(tensors(step)), {"loop": {"step": step}}, 10_000)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Checkpoints of steps 20 and 40."""
    save(tmp_path / "checkpoints", 20)
    save(tmp_path / "checkpoints", 40)
    return tmp_path / "checkpoints"


def found_step(root: Path) -> int:
    reader = checkpoint.newest(root)
    assert reader is not None
    step = reader.state["loop"]["step"]
    for name, wanted in tensors(step):
        assert torch.equal(reader.tensor(name), wanted)
    assert set(reader.shapes()) == {name for name, _ in tensors(step)}
    return step


def test_newest_is_by_step_and_not_by_clock(root):
    os.utime(root / "step-000020", (2**33, 2**33))
    assert found_step(root) == 40


def test_large_tensors_are_spread_over_files(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "MAX_FILE_BYTES", 300)
    save(tmp_path, 7)
    assert len(list((tmp_path / "step-000007").glob("*.safetensors"))) == 3
    assert found_step(tmp_path) == 7


def damage_truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def damage_flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def damage_extend(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b" ")


DAMAGES = [damage_truncate, damage_flip, damage_extend, Path.unlink]


@pytest.mark.parametrize("name", ["rank00000-00000.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damaged_checkpoint_is_named_and_skipped(root, name, damage, capsys):
    """Mutation: without the comparison of checksums the flipped bit is loaded."""
    file = root / "step-000040" / name
    damage(file)
    assert found_step(root) == 20
    assert f"warning: {file}: " in capsys.readouterr().out


def test_random_bit_flips_and_truncations_are_all_found(root):
    draw, path = random.Random(0), root / "step-000040"
    contents = {file: file.read_bytes() for file in path.iterdir()}
    for trial in range(100):
        file = draw.choice(sorted(contents))
        content = bytearray(contents[file])
        if trial % 2:
            content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        else:
            del content[draw.randrange(len(content)) :]
        file.write_bytes(content)
        assert checkpoint.check(path), (trial, file)
        file.write_bytes(contents[file])
    assert checkpoint.check(path) == []


def test_only_damaged_checkpoints_are_an_error_and_not_a_new_start(root):
    for path in root.iterdir():
        damage_flip(path / "state.json")
    with pytest.raises(UserError, match="no whole checkpoint is left"):
        checkpoint.newest(root)


class Bomb:
    def __reduce__(self) -> Any:
        return os._exit, (13,)


def rewrite_manifest(path: Path, change: Any) -> None:
    """What somebody who knows the format would write."""
    manifest = json.loads((path / "manifest.json").read_bytes())
    change(manifest["files"])
    (path / "manifest.json").write_bytes(encode_manifest(manifest["step"], manifest["files"]))


def test_pickle_under_a_safetensors_name_is_never_unpickled(root, capsys):
    path = root / "step-000040"
    entry = write_file(path / "rank00000-00000.safetensors", pickle.dumps(Bomb()))
    rewrite_manifest(path, lambda files: files.update({"rank00000-00000.safetensors": entry}))
    assert found_step(root) == 20
    assert "rank00000-00000.safetensors: " in capsys.readouterr().out


STRANGE = [("step", "40"), ("best", "1"), ("best_step", "x"), ("token_map", 3), ("token_map", ["3"])]


@pytest.mark.parametrize(("part", "key", "value"), [*(("engine", *one) for one in STRANGE), ("loop", "before", [1])])
def test_a_state_that_no_run_writes_is_refused_before_a_step(root, part, key, value):
    """Mutation: ask for the step alone, and the run ends with a traceback at its next save, or when all is done."""
    path, state = root / "step-000040", {"engine": {"step": 40}, "loop": {"data": "x"}}
    for changed, message in ((False, "made with other training data"), (True, "state.json: not what a run writes")):
        state[part] |= {key: value} if changed else {}
        entry = write_file(path / "state.json", json.dumps(state).encode())
        rewrite_manifest(path, lambda files, entry=entry: files.update({"state.json": entry}))
        with pytest.raises(UserError, match=message):
            MedusaEngine.resume_newest(SimpleNamespace(_root=lambda: root), "another")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "name", ["../secret.safetensors", "/etc/passwd", "rank00000-00000.safetensors/../x", "a.pt", ""]
)
def test_manifest_names_no_file_outside(root, name, capsys):
    path = root / "step-000040"
    (path / "../secret.safetensors").write_bytes((path / "rank00000-00000.safetensors").read_bytes())
    rewrite_manifest(path, lambda files: files.update({name: files["rank00000-00000.safetensors"]}))
    assert found_step(root) == 20
    assert "which is no checkpoint file" in capsys.readouterr().out


def test_links_in_a_checkpoint_are_not_followed(root, capsys):
    for name in ("rank00000-00000.safetensors", "state.json", "manifest.json"):
        path = root / "step-000040"
        os.rename(path / name, root.parent / name)
        (path / name).symlink_to(root.parent / name)
        assert checkpoint.check(path)
        os.replace(root.parent / name, path / name)
    assert checkpoint.check(path) == []
    os.rename(path, root.parent / path.name)
    path.symlink_to(root.parent / path.name)
    assert found_step(root) == 20
    assert "is a link" in capsys.readouterr().out


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"step": 40}', '{"step": 40, "files": 3}', "[" * 5000, "\udc80", "NaN"]
)
def test_strange_manifests_are_named(root, text):
    (root / "step-000040" / "manifest.json").write_text(text, errors="surrogateescape")
    assert found_step(root) == 20


STEPS = ([40], "40", None, {}, 40.5)
ENTRIES = (3, [], {"bytes": "1", "blake2b": "x"}, {"bytes": True, "blake2b": ""}, {})


@pytest.mark.parametrize(("step", "state"), [(step, ...) for step in STEPS] + [(40, entry) for entry in ENTRIES])
def test_manifests_with_a_strange_step_or_entry_are_named(root, step, state):
    manifest = root / "step-000040" / "manifest.json"
    files = json.loads(manifest.read_bytes())["files"]
    manifest.write_bytes(encode_manifest(step, files if state is ... else files | {"state.json": state}))
    assert found_step(root) == 20


def test_checkpoint_under_another_steps_name_is_refused(root):
    shutil.copytree(root / "step-000040", root / "step-000060")
    assert found_step(root) == 40


def test_full_disk_at_any_file_call_is_one_line_and_keeps_older_checkpoints(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "reliability" / "inject")
    from file_faults import FileCalls

    def fail(number: int, *_: Any) -> None:
        if number == at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    messages = []
    for at in range(1, 100):
        root = tmp_path / str(at)
        save(root, 20)
        calls = FileCalls(root, fail)
        calls.install()
        try:
            save(root, 40)
        except UserError as error:
            messages.append(str(error))
        finally:
            calls.remove()
        assert not list(root.glob(".tmp*"))
        assert found_step(root) in (20, 40)
        if calls.count < at:
            break
    assert len(messages) > 8
    assert all(f"{tmp_path}" in text and "\n" not in text for text in messages)
    assert all("No space left on device, rank 0" in text and "needs 10000 bytes" in text for text in messages)


def test_room_is_checked_before_anything_is_written(root, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**6, 10**6, 9_999))
    with pytest.raises(UserError, match=r"9999 bytes are free.*needs 10000 bytes"):
        save(root, 60)
    assert sorted(path.name for path in root.iterdir()) == ["step-000020", "step-000040"]


def test_tensor_that_is_not_finite_is_not_saved(root):
    bad = [*tensors(60), ("weight3/master", torch.tensor([1.0, float("nan")]))]
    with pytest.raises(UserError, match="weight3/master is not finite"):
        checkpoint.save(root, 60, iter(bad), {}, 10_000)
    assert found_step(root) == 40


def test_saving_a_step_again_keeps_what_is_whole_and_replaces_what_is_damaged(root):
    before = (root / "step-000040" / "manifest.json").stat().st_ino
    save(root, 40)
    assert (root / "step-000040" / "manifest.json").stat().st_ino == before
    damage_flip(root / "step-000040" / "state.json")
    save(root, 40)
    assert found_step(root) == 40


def test_pruning_keeps_the_last_and_the_best(root):
    for step in (60, 80):
        save(root, step)
        checkpoint.keep(root, step, 20, 2)
    assert sorted(path.name for path in root.iterdir()) == ["best", "step-000020", "step-000060", "step-000080"]
    assert os.readlink(root / "best") == "step-000020"
    checkpoint.keep(root, 80, 80, 1)
    assert sorted(path.name for path in root.iterdir()) == ["best", "step-000080"]
    assert json.loads((root / "best" / "state.json").read_bytes()) == {"loop": {"step": 80}}


def test_damaged_later_checkpoint_does_not_take_a_whole_ones_place(root):
    """Mutation: counting it among the kept ones removes the only whole checkpoint."""
    damage_flip(root / "step-000040" / "state.json")
    assert found_step(root) == 20
    save(root, 30)
    checkpoint.keep(root, 30, None, 1)
    assert [path.name for path in root.iterdir()] == ["step-000030"]


def test_link_to_the_best_is_put_right_after_an_interruption(root):
    for step in (20, 40):
        checkpoint.keep(root, 40, step)
    assert os.readlink(root / "best") == "step-000040"
    checkpoint.keep(root, 40, 60)
    assert not os.path.lexists(root / "best")
    (root / "best").mkdir()  # as of a copy that followed the link
    checkpoint.keep(root, 40, 60)
    assert not os.path.lexists(root / "best")
    assert found_step(root) == 40
