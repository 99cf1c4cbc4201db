"""Attacks on head folders, data files, configs, saves, the Hub, threads and the disk: `make attack`.

Each try is refused with a `ProbeError`, or is harmless. The table at the end says how often. The counts in this file are those of
`make attack`; `make test-slow` tries 1 % of them.
"""

import gzip
import json
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import datasets
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import HIDDEN, LAYERS, make_probe, make_prompts, probed, read_head, save_head
from hub_server import HOME
from hub_server.heads import same_weights
from kills import each_kill, full_disk, kill_after
from mutators import VALUES, changed, damage_head, damaged
from training_runs import train

from llama_probe import ProbeConfig, ProbeError
from llama_probe.data.row_files import InputFile
from llama_probe.data.row_sources import Source
from llama_probe.evaluation.scoring_job import ScoringJob
from llama_probe.files import current_file
from llama_probe.heads import probe_types
from llama_probe.heads.decision import ProbeOutput
from llama_probe.hub.card import MARKER, write_card
from llama_probe.hub.folder import HEAD_FILES, PLOT_NAMES, RECIPE_NAME, WEIGHTS_NAME, check_output, is_head_folder
from llama_probe.hub.publish import pull_head


pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("attack")]

REPO = "alice/mood"
STATES = [torch.randn(2, 5, HIDDEN, generator=torch.Generator().manual_seed(layer)) for layer in range(LAYERS + 1)]


def outputs(head) -> list:
    """What a user of a head gets from it."""
    with torch.no_grad():
        output = head(hidden_states=STATES)
    scores = [output.logits.tolist(), output.probabilities.tolist(), output.labels]
    return [*scores, head.config.token_scope, head.config.max_length]


@pytest.fixture
def heads(tmp_path) -> tuple[Path, Path]:
    """Two head folders with results and cards."""
    folders = []
    for seed, head_type in enumerate(("mha", "gate")):
        head = make_probe(seed, probe_type=head_type, id2label={0: "no", 1: "yes"}, threshold=0.3, temperature=1.5)
        head.results = {"chosen_seed": seed, "runs": [{"seed": seed}], "card": {"license": "mit"}}
        folder = save_head(head, tmp_path / head_type)
        (folder / "README.md").write_text(f"---\nlicense: mit\ntags:\n- a\n---\n{MARKER}\n")
        folders.append(folder)
    return tuple(folders)


def test_head_folders(tally, heads, tmp_path):
    """No crash and no other scores; a card can be made, or not."""
    expected, folder = outputs(read_head(heads[0])), tmp_path / "damaged"
    for number in tally.times(10_000):
        shutil.copytree(heads[0], folder)
        is_owner = damage_head(tally.rng, folder, heads[1])

        def judge(found, is_owner=is_owner):
            return found == expected or (is_owner and bool(torch.tensor(found[1]).isfinite().all()))

        tally.attempt(lambda: outputs(read_head(folder)), judge, number)
        tally.attempt(lambda: write_card(folder), lambda _: True, number)
        shutil.rmtree(folder)


def test_configs(tally):
    """A config that is taken gives numbers, and is the same when it is read again."""
    plain = [make_probe(probe_type=name).config.to_dict() for name in probe_types()]
    for number in tally.times(10_000):
        values = dict(tally.rng.choice(plain))
        for _ in range(tally.rng.randrange(1, 4)):
            values = changed(tally.rng, values)
        if tally.rng.random() < 0.3:
            values = {tally.rng.choice(list(plain[0])): tally.rng.choice(VALUES)}

        def judge(found):
            config, again = found[0], ProbeConfig.from_dict(json.loads(found[0].to_json_string()))[0]
            output = ProbeOutput.from_logits(torch.randn(3, config.num_labels) * 100, config)
            return again == config and bool(output.probabilities.isfinite().all())

        tally.attempt(lambda values=values: ProbeConfig.from_dict(values), judge, f"{number}: {str(values)[:300]}")


def test_data_files(tally, tmp_path):
    """Damage in a text cannot be seen, but nothing crashes, and no row comes twice."""
    datasets.disable_progress_bars()
    rows = [{"text": f"number {i} ☂", "label": i % 2} for i in range(20)]
    lines = "\n".join(map(json.dumps, rows)).encode()
    cells = "\n".join(["text,label", *(f"number {i} ☂,{i % 2}" for i in range(20))]).encode()
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    files = {"a.jsonl": lines, "a.csv": cells, "a.parquet": (tmp_path / "a.parquet").read_bytes()}
    files |= {"a.jsonl.gz": gzip.compress(lines), "a.csv.gz": gzip.compress(cells)}
    for number in tally.times(2000):
        name = tally.rng.choice(list(files))
        if name == "a.jsonl" and tally.rng.random() < 0.5:
            content = "\n".join(json.dumps(changed(tally.rng, row)) for row in rows).encode()
        else:
            content = damaged(tally.rng, files[name])
        (tmp_path / name).write_bytes(content)

        def stream(path=tmp_path / name):
            file = InputFile.find([str(path)])[0]
            file.fields()
            return [rows.start for rows, _ in file.chunks(["text"], 7)]

        tally.attempt(stream, lambda found: found == sorted(set(found)), f"{number}: {name}")
        if number % 10 == 0:
            source = Source(rows=str(tmp_path / name))
            tally.attempt(source.read, lambda _: True, f"{number}: {name}")


def found_in(folder: Path) -> dict[str, bytes]:
    """The files of a head as a reader finds them."""
    return {name: path.read_bytes() for name in HEAD_FILES if (path := current_file(folder, name)).is_file()}


def test_kills_of_a_save_at_every_operation(tally, heads, tmp_path):
    """Wholly the old head or wholly the new one, plots and card as well. The next save leaves nothing of the killed one."""
    place, head = tmp_path / "place", read_head(heads[1])
    for name in (PLOT_NAMES[0], RECIPE_NAME):
        (heads[0] / name).write_bytes(b"of the old head")
    for old in (heads[0], None):

        def prepare(old=old):
            shutil.rmtree(place, ignore_errors=True)
            if old is not None:
                shutil.copytree(old, place)

        prepare()
        allowed = [found_in(place)]
        save_head(head, place)
        allowed.append(found_in(place))
        for number in each_kill(lambda: save_head(head, place), tmp_path, prepare):
            whole = found_in(place) in allowed and (not is_head_folder(place) or outputs(read_head(place)))
            check_output(place)
            save_head(head, place)
            clean = {path.name: path.read_bytes() for path in place.iterdir()} == allowed[1]
            tally.add("harmless" if whole and clean else "lost", f"{number} over {old}")


def test_kills_of_a_save_at_random(tally, heads, tmp_path):
    place = tmp_path / "place"
    both = [read_head(folder) for folder in heads]
    allowed = []
    for head in both:
        save_head(head, place)
        allowed.append(found_in(place))

    def save_in_turn():
        while True:
            for head in both:
                save_head(head, place)

    for number in tally.times(1000):
        kill_after(0.01 + 0.05 * tally.rng.random(), save_in_turn)
        whole = found_in(place) in allowed and outputs(read_head(place))
        tally.add("harmless" if whole else "lost", number)
    save_head(both[0], place)
    assert {path.name for path in place.iterdir()} == set(allowed[0])


def resumed(tally, tmp_path, run, judge, last) -> None:
    """Kill `run(resume=False)` at some of its first operations; it must resume, and end as it would have."""
    output = tmp_path / "killed"
    some = sorted(tally.rng.sample(range(last), min(last, len(tally.times(200)))))
    numbers = iter([*some, 10**9])  # the last one is never reached
    for number in each_kill(lambda: run(False), output, lambda: shutil.rmtree(output, ignore_errors=True), numbers):
        try:
            run(True)
            tally.add("harmless" if judge(output) else "lost", number)
        except ProbeError as error:
            # Killed when all was written: there is nothing to resume.
            is_whole = "holds a finished head" in str(error) and judge(output)
            tally.add("harmless" if is_whole else "lost", f"{number}: {error}")


def kill_training(tally, backbone, folder, **sections):
    def run(resume):
        return train(folder, backbone, 20, resume, "killed", validation={"share": 0.3}, **sections)

    resumed(tally, folder, run, lambda output: bool(read_head(output).results), 60)


def test_kills_of_train(tally, backbone_folder, tmp_path):
    kill_training(tally, backbone_folder, tmp_path)


def test_kills_of_a_search(tally, backbone_folder, tmp_path):
    search = {"trials": 2, "probe_types": ["gate", "pooling"]}
    kill_training(tally, backbone_folder, tmp_path, search=search, training={"cache_states": False})


def test_kills_of_classify(tally, backbone_folder, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"number {i}"}) for i in range(20)))
    head = save_head(make_probe(probe_type="gate", prompt_format="chat"), tmp_path / "head")

    def run(resume):
        places = ([str(path)], tmp_path / "killed", [str(head)], str(backbone_folder))
        return ScoringJob(*places, chunk_rows=5, resume=resume).execute()

    def judge(output):
        rows = pq.read_table(output)["row"].to_pylist()
        return sorted(rows) == list(range(20)) and len(list(output.iterdir())) == 5

    resumed(tally, tmp_path, run, judge, 40)


def test_kills_of_pull(tally, hub, heads, tmp_path):
    hub.plant(REPO, found_in(heads[0]))
    place = tmp_path / "pulled"
    pull_head(REPO, place)
    for number in each_kill(lambda: pull_head(REPO, place), tmp_path, lambda: shutil.rmtree(place, True)):
        whole = not place.exists() or found_in(place) == found_in(heads[0])
        shutil.rmtree(place, True)
        pull_head(REPO, place)
        tally.add("harmless" if whole and found_in(place) == found_in(heads[0]) else "lost", number)


def test_kills_of_push_at_random(tally, hub, token, heads):
    """The branch holds the head before or the one that was pushed, and the next push succeeds."""
    both, allowed = [read_head(folder) for folder in heads], []
    for head in both:
        head.results = None  # they would give no card
        start = time.monotonic()
        head.push_to_hub(REPO, license="mit")
        seconds = time.monotonic() - start
        allowed.append(hub.files(REPO))
    for number in tally.times(200):
        head = both[number % 2]
        kill_after(seconds * tally.rng.random(), lambda head=head: head.push_to_hub(REPO, license="mit"))
        whole = hub.files(REPO) in allowed
        head.push_to_hub(REPO, license="mit")
        tally.add("harmless" if whole and hub.files(REPO) == allowed[number % 2] else "lost", number)


def test_a_hub_with_faults(tally, hub, token, heads):
    """A pull gives the head or a refusal; a push that is said to have failed has left the branch as it was."""
    old, new = (read_head(folder) for folder in heads)
    old.results = new.results = None  # they would give no card
    old.push_to_hub(REPO, license="mit")
    anywhere, paths = ("answer", "truncate", "wrong sha", "lose"), ("/resolve/", "/commit/", "json", "/api/")
    for number in tally.times(1000):
        hub.faults.clear()
        for _ in range(tally.rng.randrange(1, 4)):
            fault = tally.rng.choice(["forbid", "cut upload", *anywhere])
            fields = {"path": tally.rng.choice(["", "safetensors", *paths])} if fault in anywhere else {}
            if fault == "answer":
                fields["status"] = tally.rng.choice([400, 403, 404, 412, 429, 500, 503])
            hub.fault(fault, times=tally.rng.choice([1, 1, 2, None]), **fields)
        before = hub.head(REPO)
        head = tally.rng.choice([old, new])
        if number % 2:
            shutil.rmtree(Path(HOME.name, "hub"), ignore_errors=True)
            planted = old if hub.files(REPO)[WEIGHTS_NAME] == found_in(heads[0])[WEIGHTS_NAME] else new
            tally.attempt(lambda: read_head(REPO), lambda found, planted=planted: same_weights(found, planted), number)
            continue
        try:
            head.push_to_hub(REPO, license="mit")
        except ProbeError as error:
            tally.add("refused" if hub.head(REPO) == before or "not known" in str(error) else "lost", number)
        else:
            hub.faults.clear()
            tally.add("harmless" if same_weights(read_head(REPO, force_download=True), head) else "lost", number)


def test_full_disks(tally, heads, tmp_path):
    """A save that finds no room is refused and changes nothing."""
    place, new = tmp_path / "place", read_head(heads[1])
    for number in tally.times(1000):
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(heads[0], place)
        before = found_in(place)
        with full_disk(tally.rng.randrange(4000)):
            outcome = tally.attempt(lambda: save_head(new, place), lambda _: True, number)
        if outcome == "refused" and (found_in(place) != before or len(list(place.iterdir())) != len(before)):
            tally.add("lost", number)


def test_threads(tally):
    """Scores of calls from eight threads are those of one, while heads come and go."""
    model = probed({f"head-{seed}": make_probe(seed) for seed in range(3)})
    prompts = [make_prompts(2, 6, seed) for seed in range(4)]
    expected = [{name: output.logits for name, output in model.classify(input_ids=ids).items()} for ids in prompts]
    over = threading.Event()

    def come_and_go():
        while not over.is_set():
            model.add_probe("guest", make_probe(9))
            model.delete_probe("guest")
            time.sleep(0.001)

    def call(number):
        ids, wanted = prompts[number % 4], expected[number % 4]
        try:
            found = model.classify(input_ids=ids)
        except ProbeError:
            return "refused"
        except Exception as error:
            return f"crashed: {error!r}"
        right = all(torch.allclose(found[name].logits, logits, atol=1e-5) for name, logits in wanted.items())
        return "harmless" if right else "wrongly accepted"

    guest = threading.Thread(target=come_and_go)
    guest.start()
    with ThreadPoolExecutor(8) as pool:
        outcomes = list(pool.map(call, tally.times(40_000)))
    over.set()
    guest.join()
    for outcome in outcomes:
        tally.add(outcome.split(":")[0], outcome)


def test_a_soak(tally, heads, tmp_path):
    """Memory, handles and threads stay as they are."""
    model, ids, process = probed(), make_prompts(), psutil.Process()

    def turn():
        model.load_probe(heads[0], name="mood")
        found = model.classify(input_ids=ids)["mood"].logits
        model.save_probe(tmp_path / "saved", "mood")
        model.delete_probe("mood")
        return found

    expected = turn()
    handles, threads = process.num_fds(), process.num_threads()
    for number in tally.times(5000):
        tally.attempt(turn, lambda found: torch.equal(found, expected), number)
    assert process.num_fds() <= handles + 2 and process.num_threads() <= threads + 2
