"""Keys: how they are stored, who may use what, limits, and reading them again."""

from __future__ import annotations

import json
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml

from translora_ray.cli import main
from translora_ray.errors import UsageError
from translora_ray.serving.auth import OPEN, Key, Keyring, Limiter, add_key, digest, read_keys


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_key_is_shown_once_and_only_its_digest_is_stored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "keys.yaml"
    assert main(["keys", str(file), "--add", "team", "--adapters", "support-*", "numbers", "--max-tokens", "64"]) == 0
    key = capsys.readouterr().out.split()[0]
    assert key.startswith("tl-") and len(key) > 40
    assert key not in file.read_text() and file.stat().st_mode & 0o777 == 0o600
    (stored,) = read_keys(file)
    assert stored.sha256 == digest(key) and stored.adapters == ("support-*", "numbers") and stored.max_tokens == 64
    ring = Keyring(str(file), print)
    assert ring.find(key) == stored
    for wrong in (None, "", key[:-1], key + "x", key.upper(), stored.sha256, "\udcff", "ключ"):
        assert ring.find(wrong) is None


def test_the_second_key_leaves_the_first_and_a_name_is_taken_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "keys.yaml"
    first, second = add_key(file, "a", ("*",)), add_key(file, "b", ("x",))
    ring = Keyring(str(file), print)
    assert [found.name for found in (ring.find(first), ring.find(second)) if found] == ["a", "b"]
    before = file.read_bytes()
    assert main(["keys", str(file), "--add", "a", "--adapters", "*"]) == 2
    assert "key named a" in capsys.readouterr().err and file.read_bytes() == before


def test_adapters_are_globs_over_names() -> None:
    key = Key(name="t", sha256="0" * 64, adapters=("support-*", "numbers"))
    assert [name for name in ("support-routing", "support-", "numbers", "numbers2", "Support-x", "support", "x") if key.may_use(name)] == [
        "support-routing",
        "support-",
        "numbers",
    ]


def test_a_key_for_what_is_no_name_is_not_made(tmp_path: Path) -> None:
    for glob in ("support:stable", "support@3"):
        with pytest.raises(UsageError, match="without version or channel"):
            add_key(tmp_path / "keys.yaml", "t", ("numbers", glob))
    assert not list(tmp_path.iterdir())


def test_without_a_file_everyone_may_do_everything() -> None:
    ring = Keyring(None, print)
    assert ring.find(None) is OPEN and ring.find("anything") is OPEN and OPEN.may_use("any-name")


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("keys: [{name: a, sha256: abc, adapters: ['*']}]", "sha256"),
        (f"keys: [{{name: a, sha256: {'a' * 64}, adapters: []}}]", "adapters"),
        (f"keys: [{{name: a, sha256: {'a' * 64}, adapters: ['*'], key: tl-x}}]", "key"),
        (f"keys: [{{name: a, sha256: {'a' * 64}, adapters: ['*'], requests_per_minute: 0}}]", "requests_per_minute"),
        (f"keys: [{{name: a, sha256: {'a' * 64}, adapters: ['*']}}, {{name: b, sha256: {'a' * 64}, adapters: ['*']}}]", "same sha256"),
        ("[1, 2]", "the file"),
        ("", "keys: Field required"),
        ("keys: {", "neither YAML nor JSON"),
    ],
)
def test_a_file_that_is_not_understood_is_refused(tmp_path: Path, text: str, wrong: str) -> None:
    (tmp_path / "keys.yaml").write_text(text)
    with pytest.raises(UsageError, match=wrong):
        read_keys(tmp_path / "keys.yaml")


def test_json_is_read_too(tmp_path: Path) -> None:
    (tmp_path / "keys.json").write_text(json.dumps({"keys": [{"name": "a", "sha256": digest("tl-k"), "adapters": ["*"]}]}))
    found = Keyring(str(tmp_path / "keys.json"), print).find("tl-k")
    assert found and found.name == "a"


def test_changes_are_read_and_a_slip_locks_nobody_out(tmp_path: Path) -> None:
    file, clock, said = tmp_path / "keys.yaml", Clock(), []
    first = add_key(file, "a", ("*",))
    ring = Keyring(str(file), said.append, check_seconds=1.0, clock=clock)
    second = add_key(file, "b", ("*",))
    assert ring.find(second) is None, "it does not look at the file for every request"
    clock.now += 1
    assert ring.find(second) is not None and ring.find(first) is not None

    keep = yaml.safe_load(file.read_text())
    for number, text in enumerate(("keys: nonsense", ""), 1):
        file.write_text(text)
        for _ in range(2):
            clock.now += 1
            assert ring.find(first) is not None and len(said) == number and "as they were" in said[-1], "said once"

    keep["keys"] = keep["keys"][1:]
    file.write_text(yaml.safe_dump(keep))
    os.utime(file, (time.time() + 5, time.time() + 5))
    clock.now += 1
    assert ring.find(first) is None and ring.find(second) is not None, "a key that was taken out is refused"


def test_a_key_that_was_taken_out_while_the_file_could_not_be_read_is_refused_when_it_can(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, clock, said = tmp_path / "keys.yaml", Clock(), []
    key = add_key(file, "a", ("*",))
    ring = Keyring(str(file), said.append, check_seconds=1.0, clock=clock)
    file.write_text("keys: []")
    clock.now += 1

    def fails(_: Path) -> str:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as broken:
        broken.setattr(Path, "read_text", fails)
        assert ring.find(key) is not None and "Input/output error" in said[0]
    clock.now += 1
    assert ring.find(key) is None


def test_keys_that_are_added_at_once_are_all_there(tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    file.touch()
    ready = threading.Barrier(8)

    def add(number: int) -> str:
        ready.wait()
        return add_key(file, f"key{number}", ("*",))

    with ThreadPoolExecutor(8) as threads:
        made = list(threads.map(add, range(8)))
    assert {key.sha256 for key in read_keys(file)} == set(map(digest, made))


def test_a_minutes_worth_at_once_and_then_a_steady_rate() -> None:
    clock = Clock()
    limiter, key, other = (
        Limiter(clock),
        Key(name="a", sha256="a" * 64, adapters=("*",), requests_per_minute=6),
        Key(name="b", sha256="b" * 64, adapters=("*",)),
    )
    assert [limiter.wait(key) for _ in range(6)] == [0.0] * 6
    assert limiter.wait(key) == pytest.approx(10)
    assert limiter.wait(other) == 0.0, "one tenant's haste is not another's"
    clock.now += 9
    assert limiter.wait(key) == pytest.approx(1)
    clock.now += 1.01
    assert limiter.wait(key) == 0.0
    assert limiter.wait(key) > 9
    clock.now += 3600
    assert [limiter.wait(key) == 0.0 for _ in range(7)] == [True] * 6 + [False]
