"""The Gradio Space: its functions on tiny models, and the page in headless Chromium on the demo backbone (slow)."""

import configparser
import functools
import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
import torch
import yaml
from conftest import make_probe, save_head
from packaging.requirements import Requirement
from packaging.version import Version
from repository import ROOT

from llama_probe import __version__


pytest.importorskip("gradio", reason="gradio is not installed: pip install 'llama_probe[space]'")

# One server serves all of these; see `make test-slow`.
pytestmark = pytest.mark.xdist_group("space")

SPACE = ROOT / "examples" / "space"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_chromium = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium is installed (Debian: apt-get install chromium)"
)


@pytest.fixture(scope="module")
def app(backbone_folder, tmp_path_factory):
    """The module, on a tiny model with a guard and another head; no server is started."""
    heads = tmp_path_factory.mktemp("heads")
    shared = {"token_scope": "content", "prefix_ids": []}
    save_head(
        make_probe(1, probe_type="gate", id2label={0: "good", 1: "<bad>"}, max_length=40, **shared), heads / "guard"
    )
    save_head(make_probe(2, probe_type="mha", id2label={0: "a", 1: "b", 2: "c"}, **shared), heads / "mood")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BACKBONE", str(backbone_folder))
        patch.setenv("HEADS", f"{heads / 'guard'}, {heads / 'mood'}")  # as one writes a list
        patch.setenv("MAX_NEW_TOKENS", "8")
        spec = importlib.util.spec_from_file_location("space_app", SPACE / "app.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return module


def collect(app, steps) -> dict:
    """What the components hold in the end, with what each of them was given on the way under its id."""
    held, told = {}, []
    for step in steps:
        held |= step
        told.append(step)
    return {**held, "steps": told}


def alone(app, text):
    """What the heads say of a prompt by itself."""
    inputs = app.PROMPTS.batch([text])
    mask = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
    mask[:, len(app.PROMPTS.prefix_ids) :] = True
    return app.scores_of(app.model.classify(**inputs, probe_mask=mask))


def test_scores_come_before_the_reply_and_are_those_of_the_prompt(app):
    torch.manual_seed(0)
    page = app.Page()
    found = collect(app, app.respond("Hello there", page, True, 1.0))
    torch.manual_seed(0)
    inputs = app.PROMPTS.batch(["Hello there"])
    plain = app.model.generate(
        **inputs, max_new_tokens=8, do_sample=True, temperature=0.6, top_p=0.9, return_dict_in_generate=False
    )
    reply = app.tokenizer.decode(plain[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert [message["content"] for message in found[app.chatbot]] == ["Hello there", reply]
    assert page.chat.turns == page.chat.shown == found[app.chatbot]
    scored = next(i for i, step in enumerate(found["steps"]) if app.scores in step)
    written = next(i for i, step in enumerate(found["steps"]) if step.get(app.chatbot, [])[1:])
    assert scored < written, "the bars are there before the reply is"
    for name, labels in alone(app, "Hello there").items():
        assert found[app.scores][name] == pytest.approx(labels, abs=1e-5)


def test_what_is_flagged_is_halted_shown_and_forgotten(app):
    before = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hm"}]
    score = alone(app, "Hello there")["guard"]["<bad>"]
    page = app.Page(app.Chat(shown=list(before), turns=list(before)))
    found = collect(app, app.respond("Hello there", page, True, 0.0))
    assert found[app.chatbot][:2] == before and found[app.chatbot][-1]["content"] == app.REFUSAL
    assert page.chat.shown == found[app.chatbot] and page.chat.turns == before
    assert "halted" in found[app.banner] and "Halted before the first token" in found[app.banner]
    assert "fill flagged" in found[app.bars] and 0 < score < 1
    off = collect(app, app.respond("Hello there", app.Page(), False, 0.0))
    assert off[app.chatbot][-1]["content"] != app.REFUSAL and "halting is off" in off[app.banner]
    assert "flagged" not in off[app.bars] and "threshold" not in off[app.bars]


def test_a_score_that_is_no_number_halts(app):
    assert app.halts({"guard": {"<bad>": float("nan")}}, True, 0.5)
    assert not app.halts({"guard": {"<bad>": float("nan")}}, False, 0.5)


@pytest.mark.parametrize("words", [1, 60])
def test_heads_read_the_newest_message_however_long_the_chat(app, words):
    newest = "abc " * words
    chat = [{"role": "user", "content": "x" * 90}, {"role": "assistant", "content": "y" * 90}]
    inputs = app.inputs_of([*chat, {"role": "user", "content": newest}])
    read = app.tokenizer.decode(inputs["input_ids"][0, inputs["probe_mask"][0]])
    assert read == f"{newest}<eos>\n<bos>assistant\n"
    whole = app.tokenizer.decode(inputs["input_ids"][0])
    assert "x" * 90 in whole and whole.endswith(read)


def test_the_model_sees_the_last_messages_of_a_chat(app):
    turns = [{"role": ("user", "assistant")[i % 2], "content": str(i)} for i in range(20)]
    page = app.Page(app.Chat(turns=turns))
    collect(app, app.respond("Hello", page, True, 1.0))
    assert [turn["content"] for turn in page.chat.asked] == ["14", "15", "16", "17", "18", "19", "Hello"]


def test_nothing_is_asked_of_an_empty_message(app):
    page = app.Page()
    assert list(app.respond("  ", page, True, 0.5)) == [{app.message: ""}] and page == app.Page()
    assert set(app.preview("", page, True, 0.5)) == {app.banner}


def test_a_reply_that_fails_is_not_waited_for(app, monkeypatch):
    monkeypatch.setattr(app, "MAX_NEW_TOKENS", -1)
    with pytest.raises(ValueError, match="max_new_tokens"):
        collect(app, app.respond("Hello", app.Page(), True, 0.5))


def test_a_cleared_chat_is_forgotten(app):
    page = app.Page(app.Chat(*[[{"role": "user", "content": "Hi"}]] * 3))
    held = app.forget(page, True, 0.5)
    assert page.chat == app.Chat() and held[app.chatbot] == []
    assert held[app.scores] == {"guard": {"good": 0.0, "<bad>": 0.0}, "mood": {"a": 0.0, "b": 0.0, "c": 0.0}}


@pytest.fixture
def forwards(app, monkeypatch) -> list:
    """Grows with each pass of a model whose replies are 400 tokens long."""
    monkeypatch.setattr(app, "MAX_NEW_TOKENS", 400)
    monkeypatch.setattr(app.model.generation_config, "eos_token_id", None)
    passes, plain = [], app.model.forward

    def forward(*args, **kwargs):
        passes.append(1)
        return plain(*args, **kwargs)

    monkeypatch.setattr(app.model, "forward", functools.wraps(plain)(forward))
    return passes


def until_the_reply_begins(app, steps) -> None:
    while not next(steps).get(app.chatbot, [])[1:]:
        pass


def test_a_reply_that_nobody_waits_for_is_not_written_to_its_end(app, forwards):
    steps = app.respond("Hello", app.Page(), True, 1.0)
    until_the_reply_begins(app, steps)
    steps.close()
    app.THREAD.submit(int).result()  # the thread is free again
    assert 0 < len(forwards) < 400


def test_a_reply_that_is_cleared_away_ends_and_leaves_nothing(app, forwards):
    page = app.Page()
    steps = app.respond("Hello", page, True, 1.0)
    until_the_reply_begins(app, steps)
    app.forget(page, True, 1.0)
    *_, last = steps
    assert 0 < len(forwards) < 400
    assert last == app.nothing_said(True, 1.0) and page.chat == app.Chat()
    found = collect(app, app.respond("Again", page, True, 0.0))
    assert [message["content"] for message in found[app.chatbot]] == ["Again", app.REFUSAL]


def test_while_one_types_the_same_is_said(app):
    shown = app.preview("Hello there", app.Page(), True, 0.0)
    for name, labels in alone(app, "Hello there").items():
        assert shown[app.scores][name] == pytest.approx(labels, abs=1e-5)
    assert "Would be halted" in shown[app.banner]
    assert "Would pass" in app.preview("Hello there", app.Page(), True, 1.0)[app.banner]


def test_bars_show_each_score_and_escape_names(app):
    bars = app.bars_of({"guard": {"good": 0.25, "<bad>": 0.75}, "mood": {"a": 1.0, "b": 0.0, "c": 0.0}}, True, 0.6)
    assert bars.count('class="row"') == 5 and "<bad>" not in bars and "&lt;bad&gt;" in bars
    assert "width:75.0%" in bars and 'left:60.0%" title="threshold"' in bars and bars.count("<i ") == 1


def test_the_heat_map_is_of_the_newest_message(app):
    assert app.look(app.Page(), "mood") is None
    chat = [
        {"role": "user", "content": "old"},
        {"role": "assistant", "content": "x"},
        {"role": "user", "content": "new"},
    ]
    figure = app.look(app.Page(app.Chat(asked=chat)), "mood")
    names = [tick.get_text() for tick in figure.axes[2].get_xticklabels()]
    assert names[:3] == ["n", "e", "w"] and "mood" in figure.get_suptitle()
    (image,) = figure.axes[2].get_images()
    weights = image.get_array()
    assert weights.shape == (5, 16)  # layers; three letters, and what the template puts after them
    torch.testing.assert_close(torch.as_tensor(weights.sum(axis=1)), torch.ones(5), atol=1e-4, rtol=0)


def test_the_folder_can_be_pushed():
    header = yaml.safe_load((SPACE / "README.md").read_text().split("---")[1])
    assert header["sdk"] == "gradio" and (SPACE / header["app_file"]).is_file()
    assert len(header["short_description"]) <= 60
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    extras = config["options.extras_require"]
    (gradio,) = (Requirement(line) for line in extras["space"].split() if line.startswith("gradio"))
    assert gradio.specifier.contains(header["sdk_version"])
    (needed,) = map(Requirement, (SPACE / "requirements.txt").read_text().split())
    assert needed.name == config["metadata"]["name"] and needed.extras <= set(extras)
    assert needed.specifier.contains(Version(__version__))


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """The address of the Space, served on the demo backbone by a process of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {"GRADIO_SERVER_NAME": "127.0.0.1", "GRADIO_SERVER_PORT": str(port), "MAX_NEW_TOKENS": "24"}
    log = tmp_path_factory.mktemp("space") / "log"
    with log.open("w") as told:
        server = subprocess.Popen(
            [sys.executable, SPACE / "app.py"], env=os.environ | settings, stdout=told, stderr=subprocess.STDOUT
        )
        try:
            url = f"http://127.0.0.1:{port}/"
            for _ in range(1200):
                assert server.poll() is None, log.read_text()
                try:
                    urllib.request.urlopen(url).close()
                    break
                except OSError:
                    time.sleep(0.5)
            else:
                raise AssertionError(f"the page does not come up: {log.read_text()}")
            yield url
        finally:
            server.terminate()
            server.wait(30)


@pytest.fixture
def page(address):
    """The page in a browser. In the end nothing may have been asked of another host, nor an error been told."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.set_default_timeout(120_000)
        asked, errors = [], []
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(address)
        page.locator("#message textarea").wait_for()
        yield page
        browser.close()
    assert not errors
    assert {url for url in asked if not url.startswith((address, "data:", "blob:"))} == set()


def send(page, text: str) -> None:
    """Types a message and sends it."""
    page.locator("#message textarea").fill(text)
    page.locator("#message textarea").press("Enter")


def wait_for_banner(page, title: str) -> str:
    """The banner, once it has this title."""
    page.locator("#banner b", has_text=title).wait_for()
    return page.inner_text("#banner")


def score_shown(page, head: str, label: str) -> float:
    """The score behind a bar."""
    return float(page.locator(f'[data-head="{head}"][data-label="{label}"]').get_attribute("data-score"))


@pytest.mark.slow
@needs_chromium
def test_a_prompt_its_scores_and_its_reply_in_a_browser(page, address, tmp_path):
    # The reply is drawn at random. The question is one that no model answers in a word, but one of 135 million parameters may
    # answer it with a row of globes.
    question = "I am so happy today, everything went well! Which five places should I travel to, and why?"
    for _ in range(4):
        page.goto(address)
        page.evaluate(  # what the reply looks like on the way
            """() => { window.seen = []; new MutationObserver(() => {
                const last = [...document.querySelectorAll('[data-testid=bot]')].pop();
                const text = last ? last.innerText.trim() : '';
                if (text && text != window.seen.at(-1)) window.seen.push(text);
            }).observe(document.body, {subtree: true, childList: true, characterData: true}); }"""
        )
        page.locator("#message textarea").fill(question)
        wait_for_banner(page, "Would pass")  # nothing was sent yet
        assert score_shown(page, "emotion-mha", "joy") > 0.8
        assert page.locator("[data-testid=bot]").count() == 0
        page.locator("#message textarea").press("Enter")
        assert "toxicchat-mha says toxic 0.0" in wait_for_banner(page, "Passed")
        picture = page.locator("#heatmap img")  # it is drawn once the reply is complete
        picture.wait_for()
        assert picture.evaluate("image => image.naturalWidth") > 1000
        reply = page.locator("[data-testid=bot]").inner_text().strip()
        seen = page.evaluate("window.seen")
        assert reply and seen[-1] == reply
        if len(reply.split()) > 3:
            break
    assert len(seen) > 2 and len(seen[0]) < len(reply) / 2, "the reply is shown as it is written"
    bar = page.locator('[data-head="emotion-mha"][data-label="joy"]')
    shares = bar.evaluate("row => [row.querySelector('.fill'), row.querySelector('.track')].map(e => e.offsetWidth)")
    assert shares[0] / shares[1] == pytest.approx(score_shown(page, "emotion-mha", "joy"), abs=0.02)
    before = picture.get_attribute("src")
    page.get_by_label("emotion-mha").check()
    page.wait_for_function("before => document.querySelector('#heatmap img').src != before", arg=before)
    page.screenshot(path=tmp_path / "passed.png", full_page=True)
    assert (tmp_path / "passed.png").stat().st_size > 50_000


@pytest.mark.slow
@needs_chromium
def test_halting_is_seen_and_follows_the_threshold(page, tmp_path):
    insult = "Write an insulting message that makes my coworker cry."
    send(page, insult)
    assert "it halts from 0.50 on" in wait_for_banner(page, "Halted before the first token")
    page.get_by_text("Sorry, I would rather not reply to that.").wait_for()
    assert score_shown(page, "toxicchat-mha", "toxic") > 0.5
    assert page.locator(".fill.flagged").count() == 1
    page.screenshot(path=tmp_path / "halted.png", full_page=True)
    number = page.locator("#threshold input[type=number]")
    number.fill("1")
    number.press("Enter")
    page.wait_for_function("document.querySelector('.bars i').style.left == '100%'")
    assert page.locator(".fill.flagged").count() == 0, "the bars follow the threshold without a further pass"
    send(page, insult)
    assert "it halts from 1.00 on" in wait_for_banner(page, "Passed")
    page.wait_for_function("document.querySelectorAll('[data-testid=bot]').length == 2")
    page.get_by_label("Clear").click()  # while the reply is written
    wait_for_banner(page, "Type a message")
    page.wait_for_function("document.querySelectorAll('[data-testid=bot]').length == 0")
    assert page.locator("[data-testid=user]").count() == 0


@pytest.mark.slow
@needs_chromium
def test_what_is_sent_right_after_a_reply_was_cleared_away_is_answered(page):
    send(page, "Tell me a long story about a lighthouse.")
    for message in (
        "Hello!",
        "Which river is the longest, and through which countries does it flow?",
        "Good morning!",
    ):
        page.locator("[data-testid=bot]").wait_for()  # the reply is being written
        page.get_by_label("Clear").click()
        send(page, message)
        page.wait_for_function(
            "message => JSON.stringify([...document.querySelectorAll('[data-testid=user]')].map(e => e.innerText.trim()))"
            " == JSON.stringify([message]) && document.querySelectorAll('[data-testid=bot]').length == 1",
            arg=message,
        )
        wait_for_banner(page, "Passed")
    page.locator("#heatmap img").wait_for()  # drawn once the reply is complete
    assert page.locator("[data-testid=user]").all_inner_texts() == [message]
    assert page.locator("[data-testid=bot]").count() == 1
    assert page.locator("#message textarea").input_value() == ""
