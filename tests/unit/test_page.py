"""The report: the verdict first, the manifest's figures, nothing from elsewhere, nothing that is not escaped; and what a browser makes of it."""

from __future__ import annotations

import base64
import html
import json
import os
import random
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import fsspec
import numpy
import pyarrow.fs as pafs
import pytest
from matplotlib.image import imread

from translora_ray.config import Task
from translora_ray.evaluation import gate, page
from translora_ray.evaluation.compare import summary
from translora_ray.evaluation.distance import plane
from translora_ray.evaluation.plots import ACCEPTED, REAL, REJECTED
from translora_ray.recipe import Gate, Recipe, Selection, Synthesis
from translora_ray.records import Candidate, TaskRow
from translora_ray.storage import ANSWERS, MANIFEST, MAP, REPORT, RESULT, RunStore
from translora_ray.stream.collect import NOT_NEEDED
from translora_ray.stream.dedup import DUPLICATE, SEED_COPY
from translora_ray.stream.discriminate import OFF_TASK
from translora_ray.stream.teach import UNSURE

EVIL = '<script>alert("x")</script> & <img src=x onerror=alert(1)>'
LABELS = ["billing", "$delivery$", "<b>returns</b>", "返品"]
SEEDS = [TaskRow(f"where is my parcel number {i}", LABELS[i % 4]) for i in range(8)]


def candidates(judged: bool) -> list[Candidate]:
    """Six packs of 16: copies, duplicates, prompts off the task, accepted ones with answers, and six that nobody needed."""
    draw, found = random.Random(0), []
    for i in range(96):
        text, verdict = f"what about order {i} {'please ' * (i % 5)}", draw.gauss(1.5, 2.0)
        reason = NOT_NEEDED if i >= 90 else SEED_COPY if i % 16 == 3 else OFF_TASK if judged and verdict <= 0 else DUPLICATE if i % 16 == 9 else None
        asked = judged and reason != SEED_COPY
        found.append(Candidate(i, i, text, verdict if asked else None, None if reason else LABELS[i % 4], reason, None if judged else draw.gauss(0, 1)))
    found[0].input, found[0].reason, found[0].target = EVIL, None, LABELS[2]
    found[5].input, found[5].reason, found[5].target = f"{EVIL} \x00 again\nand again", UNSURE, None
    return found


MEASURED = {"agreement": 0.8125, "seeds": 0.875, "agreement_ends": (0.57, 0.93), "seeds_ends": (0.53, 0.98)}


def manifest(rows: list[Candidate], judged: bool, held_out: float) -> dict[str, Any]:
    recipe = Recipe(selection=Selection(quota=40), synthesis=Synthesis(pack_size=16), gate=Gate(held_out=held_out))
    accepted = [row for row in rows if row.accepted]
    rejects = {reason: sum(row.reason == reason for row in rows) for reason in {row.reason for row in rows} if reason}
    answers = gate.answers(LABELS, SEEDS, [row.target or "" for row in accepted])
    judgement = {**gate.without_rows(recipe.gate, MEASURED, len(accepted) / len(rows), answers), "held_out": 4}
    counts = {"quota": 40, "candidates": len(rows), "accepted": len(accepted), "trained": 40, "held_out": 4, "left": len(accepted) - 44}
    epochs = [2.1, 0.9, 0.4, 0.31]
    return {
        "kit": "0123456789abcdef",
        "target": "fedcba9876543210",
        "recipe_hash": recipe.digest(),
        "recipe": recipe.model_dump(),
        "task": Task(name="parcels", prompt="{input}", train="not kept", labels=LABELS).model_dump(),
        "kit_path": "kits/parcels",
        "source_base": "packaged:smollm2-135m-instruct",
        "lineage": ["aaaaaaaaaaaaaaaa", "bbbbbbbbbbbbbbbb"],
        "target_base": "packaged:gemma-3-270m",
        "engine": "transformers",
        "adapter_digest": "cccccccccccccccc",
        "adapter_modules": 126,
        "versions": {"translora_ray": "0.1.0", "torch": "2.13.0"},
        "counts": {**counts, "rejects": rejects, "engine_loads": {"x": ["base"], "y": ["base"]}},
        "tokens": {"generator": 12345, "discriminator": 96, "teacher": 456, "training": 98765},
        "seconds": {"generator": 61.5, "discriminator": 20.4, "teacher": 8.8, "training": 140.2},
        "last_attempt_seconds": {"stream": 88.1, "transfer": 260.7},
        "training": {
            "loss": 0.31, "rows": 40, "tokens": 98765, "seconds": 140.2, "epoch_losses": epochs, "learning_rate": 5e-4, "best_epoch": 4,
            "held_out_losses": [], "loss_curve": [[step, 3.0 / step**0.6] for step in range(1, 21)], "adapter": {"type": "lora", "rank": 16},
        },
        "selection": "discriminator" if judged else "excess",
        "gate": judgement if held_out else None,
        "driver_peak_mib": 812,
    }  # fmt: skip


def evaluated(store: RunStore) -> dict[str, Any]:
    """60 test rows, of which the transferred adapter loses some."""
    rights = {"source_base": 0, "source_adapter": 56, "target_base": 3, "target_few_shot": 25, "transferred": 51}
    scores = {arm: [float(i < right) for i in range(60)] for arm, right in rights.items()}
    rows = [TaskRow(f"real row {i} {EVIL if i == 53 else ''}", LABELS[i % 4]) for i in range(60)]
    lines = []
    for i, row in enumerate(rows):
        answers = {arm: row.target if scores[arm][i] else f"wrong answer of {arm} to {i}" for arm in scores}
        lines.append(json.dumps({"input": row.input, "target": row.target, "answers": answers, "scores": {arm: scores[arm][i] for arm in scores}}))
    result = summary(scores, "exact_match")
    draw = numpy.random.default_rng(0)
    result |= {"gate": gate.on_rows(Gate(), result["against"]), "distance": {"filtered": 0.0312, "unfiltered": 0.1079}}
    result["verdicts"] = {"real": draw.normal(3.0, 1.5, 60).tolist()}
    groups = {"seeds": (8, 0.0), "real": (60, 0.0), "accepted": (60, 0.3), "rejected": (40, 1.5)}
    store.write(ANSWERS, ("\n".join(lines) + "\n").encode())
    store.write_json(RESULT, result)
    store.write_json(MAP, plane({name: draw.normal(shift, 1.0, (count, 16)) for name, (count, shift) in groups.items()}))
    return result


Made = tuple[str, dict[str, Any], dict[str, Any]]


def make(store: RunStore, judged: bool = True, held_out: float = 0.1, real: bool = True) -> Made:
    """A run in `store` with its report: (page, manifest, result of the evaluation)."""
    rows = candidates(judged)
    for pack in range(6):
        store.write_shard(pack, pack, rows[pack * 16 : pack * 16 + 16], {"attempt": "x", "loads": [], "tokens": {}, "seconds": {}})
    facts = manifest(rows, judged, held_out)
    store.write_json(MANIFEST, facts)
    result = evaluated(store) if real else {}
    page.write(store, facts, SEEDS)
    return store.read(REPORT).decode(), facts, result


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("whole") / "run"


@pytest.fixture(scope="module")
def made(run: Path) -> Made:
    """A run with everything in it."""
    return make(RunStore(str(run)))


class Seen(HTMLParser):
    """Tags, attributes and text of a page, as a parser sees them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = [("", {})]
        self.headings: list[str] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words.append(data)
        if self.tags[-1][0] == "h2":
            self.headings.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.words)


def test_the_page_says_what_manifest_and_evaluation_say(made: Made) -> None:
    text, facts, result = made
    seen = Seen(text)
    assert seen.headings == [
        "Verdict: review", "Accuracy of the arms", "What the gate measured without real rows", "Candidates over time", "Scores of the discriminator",
        "Lengths and labels", "Map of the prompts", "Training", "Examples", "Rows that were lost", "Seconds and tokens", "Lineage",
    ]  # fmt: skip
    assert "On 60 real rows" in seen.text and "The other one, without real rows, is review (the adapter answers new prompts otherwise" in seen.text
    for arm in result["arms"].values():
        assert {f"{arm['accuracy']:.3f}", f"{arm['low']:.3f} to {arm['high']:.3f}"} <= set(seen.words)
    for check in facts["gate"]["checks"]:
        shown = f"{check['value']:.3f}" + (f" ({check['low']:.3f} to {check['high']:.3f})" if "low" in check else "")
        assert {check["name"], shown} <= set(seen.words)
    for reason, count in facts["counts"]["rejects"].items():
        assert (reason if reason == NOT_NEEDED else f"rejected: {reason}") in seen.words and f"{count}" in seen.words
    for phase, tokens in facts["tokens"].items():
        assert {phase, f"{tokens:,}", f"{facts['seconds'][phase]:,.1f}"} <= set(seen.words)
    for fact in (*facts["lineage"], facts["kit"], facts["adapter_digest"], facts["recipe_hash"], facts["versions"]["torch"]):
        assert fact in seen.words
    assert "Source base + adapter: 5 of 60 rows right that the transferred adapter gets wrong; the other way round 0." in seen.text
    assert "Bare target: 0 of 60 rows right that the transferred adapter gets wrong; the other way round 48." in seen.text
    assert {"wrong answer of transferred to 51", "wrong answer of transferred to 55"} <= set(seen.words)
    assert "wrong answer of transferred to 56" not in seen.text  # which the source adapter has wrong, too


def test_every_plot_is_sound_and_told_in_words(made: Made) -> None:
    text, facts, result = made
    images = [attributes for tag, attributes in Seen(text).tags if tag == "img"]
    assert len(images) == 7
    told = " ".join(str(image["alt"]) for image in images)
    for image in images:
        drawn = base64.b64decode(str(image["src"]).removeprefix("data:image/svg+xml;base64,"))
        assert ElementTree.fromstring(drawn).tag.endswith("svg")
    accepted, written = facts["counts"]["accepted"], facts["counts"]["candidates"]
    assert f"target + transferred adapter {result['arms']['transferred']['accuracy']:.3f}" in told
    assert f"{accepted / written:.3f} of {written} candidates" in told
    assert f"accepted ({sum(row.accepted for row in candidates(True))})" in told
    assert f"rejected ({sum(row.reason not in (None, NOT_NEEDED) for row in candidates(True))})" in told
    assert "mean of the first epoch 2.100, of the last 0.310" in told
    assert all(label in told for label in LABELS)


def test_what_one_of_two_verdicts_refuses_is_refused(run: Path, made: Made, tmp_path: Path) -> None:
    """As the registry has it, which would not take such a run."""
    store = RunStore(str(shutil.copytree(run, tmp_path / "run")))
    _, facts, result = made
    facts = facts | {"gate": facts["gate"] | {"verdict": "refuse"}}
    store.write_json(RESULT, result | {"gate": {"verdict": "ship", "reasons": []}})
    page.write(store, facts, SEEDS)
    seen = Seen(store.read(REPORT).decode())
    assert seen.headings[0] == "Verdict: refuse"
    assert "Without real rows: the adapter must not ship." in seen.text and "The other one, on 60 real rows, is ship." in seen.text


def test_texts_are_escaped_and_nothing_is_loaded(made: Made) -> None:
    text, *_ = made
    seen = Seen(text)
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in seen.tags}
    assert not [attributes for _, attributes in seen.tags if any(name.startswith("on") for name in attributes)]
    assert all(str(attributes.get("src", "data:")).startswith("data:") and "href" not in attributes for _, attributes in seen.tags)
    assert not re.search(r"url\(|@import|https?://", text)
    assert seen.words.count(EVIL) >= 1  # accepted
    assert f"{EVIL} \ufffd again\nand again" in seen.words  # rejected
    assert f"real row 53 {EVIL}" in seen.words  # flipped
    assert html.escape(EVIL) in text and EVIL not in text
    assert "<b>returns" not in text


@pytest.mark.parametrize(("judged", "held_out"), [(True, 0.1), (False, 0.1), (False, 0.0)])
def test_missing_parts_are_said_and_left_out(judged: bool, held_out: float, tmp_path: Path) -> None:
    text, facts, _ = make(RunStore(str(tmp_path / "run")), judged, held_out, real=False)
    seen = Seen(text)
    assert seen.headings[0] == (f"Verdict: {facts['gate']['verdict']}" if held_out else "Verdict: none")
    assert len(seen.headings) == 12
    assert "translora evaluate RUN --data test.jsonl adds them here" in seen.text
    assert "They need real rows" in seen.text and "It needs embeddings" in seen.text
    assert ("this run asked no discriminator" in seen.text) == (not judged)
    assert ("Nothing: the recipe holds no examples out" in seen.text) == (not held_out)
    assert sum(tag == "img" for tag, _ in seen.tags) == 5 - (not judged)


def test_a_run_without_labels_rejects_or_curve(tmp_path: Path) -> None:
    store = RunStore(str(tmp_path / "run"))
    rows = [Candidate(0, 0, "one", 1.0, "an answer in words")]
    store.write_shard(0, 0, rows, {"attempt": "x", "loads": [], "tokens": {}, "seconds": {}})
    facts = manifest(rows, True, 0.0)
    facts["task"]["labels"] = "open"
    del facts["training"]["loss_curve"]  # a run of version 0.1
    page.write(store, facts, SEEDS[:1])
    seen = Seen(store.read(REPORT).decode())
    assert "there are no labels to compare" in seen.text and "None was rejected." in seen.text
    assert "an answer in words" in seen.words


def test_a_run_that_is_not_on_local_disk(tmp_path: Path) -> None:
    bucket = fsspec.filesystem("memory")
    store = RunStore(str(tmp_path / "run"))
    store.fs, store.root, store.local = pafs.PyFileSystem(pafs.FSSpecHandler(bucket)), "bucket/run", False
    text, *_ = make(store, real=False)
    assert bucket.cat("bucket/run/report.html").decode() == text
    assert not (tmp_path / "run").exists()


def test_keys_in_a_uri_are_not_shown(tmp_path: Path) -> None:
    assert page.place(RunStore("s3://key:secret@bucket/runs/one?region=eu-west-1")) == "s3://bucket/runs/one"
    assert page.place(RunStore(f"{tmp_path}/run/")) == f"{tmp_path}/run"


def test_the_same_run_gives_the_same_page(made: Made, run: Path) -> None:
    page.write(RunStore(str(run)), made[1], SEEDS)
    assert (run / "report.html").read_text() == made[0]


@pytest.fixture(scope="module")
def browser() -> str:
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None and os.environ.get("CI"):
        pytest.fail("There is no chromium, which looks at the report: install it.")
    if found is None:
        pytest.skip("There is no chromium, so nobody looks at the report; where CI is set this is a failure.")
    return found


def browse(browser: str, profile: Path, *arguments: str) -> str:
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync"
    command = [browser, *flags.split(), f"--user-data-dir={profile}", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=True).stdout


@pytest.mark.usefixtures("made")
def test_a_browser_shows_it(browser: str, run: Path, tmp_path: Path) -> None:
    address, shot = (run / "report.html").as_uri(), tmp_path / "shot.png"
    dom = browse(browser, tmp_path / "first", "--dump-dom", address)
    assert "<h2>Verdict: review</h2>" in dom
    browse(browser, tmp_path / "second", f"--screenshot={shot}", "--window-size=1200,2400", address)
    pixels = (imread(shot)[..., :3] * 255).round().astype(int)
    assert pixels.shape == (2400, 1200, 3)
    white = (pixels == 255).all(axis=2).mean()
    assert 0.5 < white < 0.97  # neither blank nor covered
    for colour, where in ((REAL, "accuracy"), (ACCEPTED, "stream"), (REJECTED, "stream")):
        wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
        assert (abs(pixels - wanted).max(axis=2) < 40).sum() > 100, where
    banner = [0xFD, 0xF3, 0xDE]
    assert (pixels[:500] == banner).all(axis=2).sum() > 10_000
