"""A base is retired: six public tasks' adapters move from SmolLM2 to Gemma as one fleet, from one job, whose driver is killed twice on the way.

    python benchmarks/fleet_tasks.py           (--data DIR)

Kits are prepared first. Then `cluster/local.sh` starts a Ray of one worker node, and the fleet is submitted to it as users do, without real rows, as there are
none by then; SIGKILL hits the driver when a third of the examples is committed, and when the first adapter trains; each time the same job is submitted again.
When it has ended each adapter is compared on test rows, which tells what the gate's verdict was worth. Kits and fleet lie in runs/fleet-tasks/; a kit that is
there is not made again, a fleet is begun anew, unless --finish goes on with the one that is there, whose driver was killed twice.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import quality
import results
import transfer
import yaml
from rounds import TARGET, translora

from translora_ray.fleet import state as states
from translora_ray.registry import Registry
from translora_ray.storage import MANIFEST, RESULT, RunStore

WORK = results.ROOT / "runs" / "fleet-tasks"
TASKS = {**quality.TASKS, "slots/snips_PlayMusic": quality.TASKS["slots/snips_GetWeather"]}
QUOTA, TESTED = 100, 200
RECIPE = {"selection": {"quota": QUOTA}, "training": {"epochs": 4}}
OWN = {"boolean_expressions": {**quality.TASKS["bbh/boolean_expressions"]["recipe"], "selection": {"quota": 400}}}
"""Items with a recipe of their own: this task gets as many examples as `benchmarks/transfer.py` gives it."""
ENVIRONMENT = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "TRANSLORA_LOCAL": "/tmp/translora-fleet-tasks"}
KILLS = WORK / "kills.json"
"""What the kills found, and the minutes until the end, for --finish."""
COLUMNS = (
    "task",
    "ended as",
    "on the test rows",
    "source adapter",
    "bare target",
    "transferred (95 % interval)",
    "agreement with the teacher: gate, real rows",
    "candidates",
    "release",
)


def prepare(name: str, data: Path, engine: str) -> Path:
    """The kit of a task lies there; its test rows beside it."""
    here = WORK / "kits" / name.split("/")[1]
    quality.prepared(name, here, data, engine, TASKS[name]["task"], TESTED)
    return here


def write_fleet(kits: list[Path]) -> Path:
    items = [{"kit": str(here / "kit"), "name": here.name, "recipe": OWN.get(here.name, {})} for here in kits]
    fleet = {"out": str(WORK / "fleet"), "registry": str(WORK / "registry"), "kits": items, "target": TARGET, "recipe": RECIPE}
    (WORK / "fleet.yaml").write_text(yaml.safe_dump(fleet))
    return WORK / "fleet.yaml"


def local(*words: str) -> None:
    subprocess.run(["cluster/local.sh", *words], cwd=results.ROOT, env=ENVIRONMENT, check=True)


def submit(fleet: Path, engine: str) -> subprocess.Popen[bytes]:
    with (WORK / "job.log").open("ab") as log:
        command = ["cluster/local.sh", "submit", "python", "jobs/fleet.py", str(fleet), "--resume", "--engine", engine]
        return subprocess.Popen(command, cwd=results.ROOT, env=ENVIRONMENT, stdout=log, stderr=log)


def kill_when(job: subprocess.Popen[bytes], moment: Callable[[float], bool], fleet: Path) -> str:
    """SIGKILL the job's driver at the moment, which is given when the job was submitted; what there was, in words."""
    submitted = time.time()
    while not moment(submitted):
        if job.poll() is not None:
            raise SystemExit(f"the job ended before it could be killed: see {WORK / 'job.log'}")
        time.sleep(0.5)
    ours = [entry for entry in Path("/proc").glob("[0-9]*") if _words(entry)[1:3] == ["jobs/fleet.py", str(fleet)]]
    for entry in ours:
        os.kill(int(entry.name), signal.SIGKILL)
    if len(ours) != 1 or job.wait(120) == 0:
        raise SystemExit(f"{len(ours)} drivers were killed, and not one")
    counts = Counter(row["state"] for row in _transfers())
    return f"{_shards()} shards, {', '.join(f'{count} {state}' for state, count in counts.items())}"


def _words(process: Path) -> list[str]:
    try:
        return (process / "cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return []


def _transfers() -> list[dict[str, Any]]:
    file = WORK / "fleet" / states.FILE
    return json.loads(file.read_text())["transfers"] if file.exists() else []


def _shards() -> int:
    return len(list(WORK.glob("fleet/runs/*/shards/*.parquet")))


def _accepted() -> int:
    stores = [RunStore(str(run)) for run in WORK.glob("fleet/runs/*")]
    return sum(candidate.accepted for store in stores for candidate in store.candidates())


def drive(fleet: Path, engine: str) -> list[str]:
    """Submit, kill, submit, kill, submit; what the kills found."""
    third = sum(OWN.get(name.split("/")[1], RECIPE)["selection"]["quota"] for name in TASKS) // 3
    moments: list[tuple[str, Callable[[float], bool]]] = [
        ("a third of the examples is there", lambda _submitted: _shards() > 2 and _accepted() >= third),
        ("an adapter trains", lambda submitted: any(row["state"] == states.TRAINING and row["changed"] > submitted for row in _transfers())),
    ]
    return [f"Killed when {words}: {kill_when(submit(fleet, engine), moment, fleet)}." for words, moment in moments]


def finish(fleet: Path, engine: str) -> None:
    """Submit once more, and wait for the end."""
    submit(fleet, engine).wait()  # with 1 where a transfer was refused, and where the driver failed
    if any(row["state"] not in states.ENDS for row in _transfers()) or not (WORK / "fleet" / "index.html").exists():
        raise SystemExit(f"the fleet did not end: see {WORK / 'job.log'}")


def row(moved: dict[str, Any], engine: str) -> str:
    store = RunStore(str(WORK / "fleet" / "runs" / moved["name"]))
    cells = [moved["name"], moved["state"]]
    if store.exists(MANIFEST):
        translora("evaluate", store.root, "--data", str(WORK / "kits" / moved["name"] / "test.jsonl"), "--engine", engine)
        result = store.read_json(RESULT)
        arms, verdict = result["arms"], result["gate"]["verdict"]
        cells += [verdict, *(f"{arms[arm]['accuracy']:.3f}" for arm in ("source_adapter", "target_base"))]
        cells.append(results.interval(*(arms["transferred"][figure] for figure in ("accuracy", "low", "high"))))
        manifest = store.read_json(MANIFEST)
        answers = [tested["answers"] for tested in store.answers()]
        real = sum(answer["transferred"] == answer["source_adapter"] for answer in answers) / len(answers)
        cells += [f"{manifest['gate']['checks'][0]['value']:.3f}, {real:.3f}", str(manifest["counts"]["candidates"])]
    else:
        cells += ["-"] * 6
    return f"| {' | '.join([*cells, moved['release'] or '-'])} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--finish", action="store_true", help="go on with the fleet that is there")
    options = transfer.with_data(parser)
    fleet = write_fleet([prepare(name, options.data.resolve(), options.engine) for name in TASKS])
    if not options.finish:
        for old in ("fleet", "registry"):
            shutil.rmtree(WORK / old, ignore_errors=True)
        (WORK / "job.log").unlink(missing_ok=True)
    local("start", "1", str(os.cpu_count()))
    began = time.monotonic()
    try:
        if not options.finish:
            KILLS.write_text(json.dumps({"said": drive(fleet, options.engine)}))
        finish(fleet, options.engine)
    finally:
        local("stop")
    known = json.loads(KILLS.read_text())
    known.setdefault("minutes", (time.monotonic() - began) / 60)
    KILLS.write_text(json.dumps(known))
    transfers = _transfers()
    loads = json.loads((WORK / "fleet" / states.FILE).read_text())["engine_loads"]
    releases = [release.id for release in Registry(str(WORK / "registry")).releases()]
    own = "".join(f", {recipe['selection']['quota']} for {name}" for name, recipe in OWN.items())
    test = f"{QUOTA} examples a task{own}; at most {TESTED} test rows"
    head = f"Commit {results.commit()}, engine {options.engine}; {test}, {known['minutes']:.0f} minutes from the first submission to the end."
    facts = f"Engines loaded by streams that came to their end: {sum(map(len, loads.values()))}. In the registry: {', '.join(releases) or 'nothing'}."
    rows = [row(moved, options.engine) for moved in transfers]
    lines = [head, *known["said"], facts, "", f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|", *rows]
    results.replace("fleet-tasks", "\n".join(lines))
    print("\n".join(lines))
    if not releases:
        raise SystemExit("nothing was good enough to be published")


if __name__ == "__main__":
    main()
