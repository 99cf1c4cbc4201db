"""The Gradio Space: its functions on tiny models, and the page in headless Chromium on the demo backbone (slow)."""

import functools
import importlib.util
import os
import shutil
import subprocess
import sys
import time
from html import escape
from types import SimpleNamespace

import pytest
import torch
import yaml
from conftest import make_probe, make_tokenizer, save_head
from launcher import free_port
from packaging.requirements import Requirement
from packaging.version import Version
from repository import ROOT, SETUP

from llama_probe import __version__
from llama_probe.data.prompts import PromptFormat


if importlib.util.find_spec("gradio") is None:  # importing it takes seconds, in every worker
    pytest.skip("gradio is not installed: pip install 'llama_probe[space]'", allow_module_level=True)

SPACE = ROOT / "examples" / "space"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def app(backbone_folder, tmp_path_factory):
    """The module, on a tiny model with a guard and another head; no server is started."""
    heads = tmp_path_factory.mktemp("heads")
    shared = {**PromptFormat(make_tokenizer()).config_fields(), "max_length": 40}
    for seed, (name, labels) in enumerate({"guard": ("good", "<bad>"), "mood": ("a", "b", "c")}.items(), 1):
        own = (
            {"threshold": 0.9968, "token_scope": "user", "window": 32}
            if name == "guard"
            else {"token_scope": "last_user"}
        )
        save_head(make_probe(seed, id2label=dict(enumerate(labels)), **own, **shared), heads / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BACKBONE", str(backbone_folder))
        patch.setenv("HEADS", f"{heads / 'guard'}, {heads / 'mood'}")
        patch.setenv("MAX_NEW_TOKENS", "8")
        spec = importlib.util.spec_from_file_location("space_app", SPACE / "app.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return module


def user(text):
    return {"role": "user", "content": text}


def respond(app, text, page=None, halting=True, threshold=1.0):
    """Return all steps of a reply, and what the components hold in the end."""
    steps = list(app.respond(text, page or app.Page(), halting, threshold))
    return steps, functools.reduce(lambda held, step: held | step, steps, {})


def assert_scores_of_the_prompt(app, text, found):
    for name, labels in app.scores_of(app.model.classify(**app.PROMPTS.batch([text]))).items():
        assert found[name] == pytest.approx(labels, abs=1e-5)


def test_scores_come_before_the_reply_and_are_those_of_the_prompt(app):
    page = app.Page()
    torch.manual_seed(0)
    steps, found = respond(app, "Hello there", page)
    torch.manual_seed(0)
    inputs = app.PROMPTS.batch(["Hello there"])
    plain = app.model.generate(**inputs, max_new_tokens=8, do_sample=True, temperature=0.6, top_p=0.9).sequences
    reply = app.tokenizer.decode(plain[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert [message["content"] for message in found[app.chatbot]] == ["Hello there", reply]
    assert page.chat.turns == page.chat.shown == found[app.chatbot]
    scored = next(i for i, step in enumerate(steps) if app.scores in step)
    assert scored < next(i for i, step in enumerate(steps) if step.get(app.chatbot, [])[1:])
    assert_scores_of_the_prompt(app, "Hello there", found[app.scores])


def test_a_flagged_message_is_halted_shown_and_forgotten(app):
    before = [user("Hi"), {"role": "assistant", "content": "Hm"}]
    page = app.Page(app.Chat(shown=list(before), turns=list(before)))
    _, found = respond(app, "Hello there", page, threshold=0.0)
    assert found[app.chatbot][:2] == before and found[app.chatbot][-1]["content"] == app.REFUSAL
    assert page.chat.shown == found[app.chatbot] and page.chat.turns == before
    assert "Halted before the first token" in found[app.banner] and "fill flagged" in found[app.bars]
    assert "&lt;bad&gt;" in found[app.bars] and "<bad>" not in found[app.bars]
    _, off = respond(app, "Hello there", halting=False, threshold=0.0)
    assert off[app.chatbot][-1]["content"] != app.REFUSAL and "halting is off" in off[app.banner]
    assert "flagged" not in off[app.bars] and "threshold" not in off[app.bars]
    assert app.halts({"guard": {"<bad>": float("nan")}}, True, 0.5), "a score that is no number"


def test_the_passage_is_marked_and_said_in_words(app):
    text = "A harmless beginning. <b>And more of it</b>, up to the end of this message."
    _, found = respond(app, text, threshold=0.0)
    place = found[app.place]
    assert place["content"] == text and text[place["start"] : place["end"]] == place["text"]
    assert f"<mark>{escape(place['text'])}</mark>" in found[app.passage] and "<b>" not in found[app.passage]
    words = f"guard found <bad> in characters {place['start'] + 1} to {place['end']} of your message"
    assert escape(words) in found[app.passage]
    assert app.limited(found[app.scores], place, True, 1.0)[app.passage] == "", "below the threshold"
    page = app.Page(app.Chat(turns=[user(text), {"role": "assistant", "content": "Hm"}]))
    assert app.preview("Hello", page, True, 0.0)[app.place]["which"] in ("your message", "message 1 of 3")
    earlier = place | {"which": "message 1 of 3"}
    assert "of message 1 of 3" in app.passage_of(found[app.scores], earlier, 0.0)
    plain = {"guard": SimpleNamespace(spans=None)}
    assert app.place_of(plain, [user(text)]) is None and app.passage_of(found[app.scores], None, 0.0) == ""
    assert app.forget(page, True, 0.0)[app.passage] == ""


def test_the_preview_says_the_same_but_not_of_a_message_that_was_sent(app):
    """The browser may ask for it late, behind the reply."""
    page = app.Page()
    assert respond(app, "  ", page)[0] == [{app.message: ""}] and set(app.preview("", page, True, 0.5)) == {app.banner}
    shown = app.preview("Hello there", page, True, 0.0)
    assert_scores_of_the_prompt(app, "Hello there", shown[app.scores])
    assert "Would be halted" in shown[app.banner]
    respond(app, "Hello there", page)
    assert set(app.preview("Hello there", page, True, 0.5)) == {app.banner}
    assert app.threshold.value == app.OWN == 0.997, "the guard's own"


@pytest.mark.parametrize("cleared", [True, False])
def test_a_reply_that_nobody_waits_for_ends(app, monkeypatch, cleared):
    monkeypatch.setattr(app, "MAX_NEW_TOKENS", 400)
    monkeypatch.setattr(app.model.generation_config, "eos_token_id", None)
    passes, plain = [], app.model.forward
    count = functools.wraps(plain)(lambda *args, **kwargs: passes.append(1) or plain(*args, **kwargs))
    monkeypatch.setattr(app.model, "forward", count)
    page = app.Page()
    steps = app.respond("Hello", page, True, 1.0)
    while not next(steps).get(app.chatbot, [])[1:]:
        pass
    if cleared:
        app.forget(page, True, 1.0)
        *_, last = steps
        assert last == app.nothing_said(True, 1.0) and page.chat == app.Chat()
    else:
        steps.close()
        app.THREAD.submit(int).result()  # the thread is free again
    assert 0 < len(passes) < 400


def test_the_folder_can_be_pushed():
    header = yaml.safe_load((SPACE / "README.md").read_text().split("---")[1])
    assert (SPACE / header["app_file"]).is_file() and len(header["short_description"]) <= 60
    extras = SETUP["options.extras_require"]
    (gradio,) = (Requirement(line) for line in extras["space"].split() if line.startswith("gradio"))
    assert gradio.specifier.contains(header["sdk_version"])
    (needed,) = map(Requirement, (SPACE / "requirements.txt").read_text().split())
    assert needed.extras <= set(extras) and needed.specifier.contains(Version(__version__))


@pytest.fixture
def page(tmp_path):
    """The Space on the demo backbone, in a browser. In the end no other host was asked, and no error was raised."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
    port = free_port()
    settings = {"GRADIO_SERVER_NAME": "127.0.0.1", "GRADIO_SERVER_PORT": str(port), "MAX_NEW_TOKENS": "12"}
    log, address = tmp_path / "log", f"http://127.0.0.1:{port}/"
    asked, errors, command = [], [], [sys.executable, "-u", SPACE / "app.py"]
    with log.open("w") as out, sync_api.sync_playwright() as playwright:
        server = subprocess.Popen(command, env=os.environ | settings, stdout=out, stderr=out)
        try:
            while "Running on" not in log.read_text():
                assert server.poll() is None, log.read_text()
                time.sleep(0.5)
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": 1280, "height": 900})
            page.set_default_timeout(120_000)
            page.on("request", lambda request: asked.append(request.url))
            page.on("pageerror", lambda error: errors.append(str(error)))
            page.goto(address)
            page.locator("#message textarea").wait_for()
            yield page
            browser.close()
        finally:
            server.terminate()
            server.wait(30)
    assert not errors
    assert {url for url in asked if not url.startswith((address, "data:", "blob:"))} == set()


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed (Debian: apt-get install chromium)")
def test_the_page_in_a_browser(page):
    message = page.locator("#message textarea")

    def banner(title: str) -> str:
        """Return the banner, once it has this title."""
        page.locator("#banner b", has_text=title).wait_for()
        return page.inner_text("#banner")

    def score(head: str, label: str) -> float:
        return float(page.locator(f'[data-head="{head}"][data-label="{label}"]').get_attribute("data-score"))

    message.fill("I am so happy today! Which five places should I travel to?")
    banner("Would pass")
    assert score("emotion-mha", "joy") > 0.8 and page.locator("[data-testid=bot]").count() == 0
    message.press("Enter")
    assert "safety says harmful 0.0" in banner("Passed")
    picture = page.locator("#heatmap img")  # drawn after the reply
    picture.wait_for()
    assert picture.evaluate("image => image.naturalWidth") > 1000
    assert page.locator("[data-testid=bot]").inner_text().strip()
    before = picture.get_attribute("src")
    page.get_by_label("emotion-mha").check()
    page.wait_for_function("before => document.querySelector('#heatmap img').src != before", arg=before)

    page.get_by_label("Clear").click()
    message.fill(insult := "Write an insulting message that makes my coworker cry.")
    message.press("Enter")
    assert "it halts from 0." in banner("Halted before the first token")
    page.get_by_text("Sorry, I would rather not reply to that.").wait_for()
    assert score("safety", "harmful") > 0.3 and page.locator(".fill.flagged").count() == 1
    page.locator("#threshold input[type=number]").fill("1")
    page.locator("#threshold input[type=number]").press("Enter")
    page.wait_for_function("document.querySelector('.bars i').style.left == '100%'")
    assert page.locator(".fill.flagged").count() == 0, "without a further pass"
    page.get_by_label("Clear").click()
    message.fill(insult)
    message.press("Enter")
    assert "it halts from 1.000 on" in banner("Passed")
    page.wait_for_function("document.querySelectorAll('[data-testid=bot]').length == 1")
