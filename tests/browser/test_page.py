"""The playground in a real browser, before a real server with the bundled model."""

from __future__ import annotations

import base64
import json
import random
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest

from tests.browser.chromium import find_chromium, open_page, running_chromium
from tests.server.test_live import Server
from trunkline.config.resolve import SEEDLING

pytestmark = pytest.mark.browser

playwright = pytest.importorskip("playwright.sync_api")
expect = playwright.expect

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    server = Server(SEEDLING, "--served-model-name", "seedling")
    yield server
    code, output = server.stop()
    assert code == 0 and "Traceback" not in output, output


@pytest.fixture(scope="module")
def locked() -> Iterator[Server]:
    """A server with a key."""
    server = Server(SEEDLING, "--api-key", "sesame", "--admin-api-key", "barley")
    yield server
    server.stop()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if find_chromium() is None:
        pytest.skip("no Chromium here: install Debian's package chromium")
    with running_chromium() as browser:
        yield browser


@pytest.fixture
def page(browser: Any, server: Server) -> Iterator[Any]:
    page = open_page(browser, server.url)
    page.set_default_timeout(20_000)
    yield page
    assert page.complaints == []
    page.context.close()


def say(page: Any, text: str) -> Any:
    """Send a message; the element of the answer, once it is whole."""
    before = page.locator(".message.assistant .actions").count()
    page.get_by_role("textbox", name="Message").fill(text)
    page.keyboard.press("Enter")
    expect(page.locator(".message.assistant .actions")).to_have_count(before + 1)
    return page.locator(".message.assistant").last


def view(page: Any, name: str) -> None:
    page.get_by_role("navigation").get_by_role("link", name=name).click()


# ---------------------------------------------------------------------- chat
def test_a_chat_streams_an_answer_with_its_figures(page: Any) -> None:
    expect(page).to_have_title("Chat · Trunkline")
    answer = say(page, "What is 17 + 15?")
    expect(answer.locator(".md")).to_have_text("17 + 15 = 32")
    figures = answer.locator(".figures")
    for name in ("prompt", "cached", "out", "to first token", "tokens/s"):
        expect(figures).to_contain_text(name)
    expect(page.locator("#announcer")).to_contain_text("17 + 15 = 32")
    page.reload()  # the conversation lasts as long as the tab
    expect(page.locator(".message.assistant .md")).to_have_text("17 + 15 = 32")


def test_branches_edits_and_deletions(page: Any) -> None:
    say(page, "What is 3 + 4?")
    page.get_by_role("button", name="Another answer").click()
    expect(page.get_by_label("Branch 2 of 2")).to_be_visible()
    page.get_by_role("button", name="The branch before").click()
    expect(page.get_by_label("Branch 1 of 2")).to_be_visible()
    page.locator(".message.user").hover()
    page.get_by_role("button", name="Edit and ask again").click()
    page.get_by_role("textbox", name="Edit the message").fill("What is 5 + 6?")
    page.get_by_role("button", name="Ask", exact=True).click()
    expect(page.locator(".message.assistant .md")).to_have_text("5 + 6 = 11")
    page.locator(".message.user").hover()
    page.locator(".message.user").get_by_role("button", name="The branch before").click()
    expect(page.locator(".message.assistant .md")).to_have_text("3 + 4 = 7")
    page.locator(".message.assistant").get_by_role("button", name="Edit, as a new branch").click()
    page.get_by_role("textbox", name="Edit the message").fill("**Seven**, <img src=x onerror=alert(1)>")
    page.get_by_role("button", name="Keep as a branch").click()
    answer = page.locator(".message.assistant .md")
    expect(answer).to_have_text("Seven, <img src=x onerror=alert(1)>")  # what looks like HTML stays text
    expect(answer.locator("strong")).to_have_text("Seven")
    assert answer.locator("img").count() == 0
    page.locator(".message.user").hover()
    page.locator(".message.user").get_by_role("button", name="Delete from here").click()
    expect(page.locator(".message.assistant .md")).to_have_text("5 + 6 = 11")


def test_stop_keeps_what_has_come(page: Any, server: Server) -> None:
    page.goto(
        f"{server.url}/#chat/{link({'settings': {'params': {'min_new_tokens': 3000, 'temperature': 1}}})}"
    )
    page.reload()
    page.get_by_role("textbox", name="Message").fill("hello")
    page.keyboard.press("Enter")
    expect(page.locator(".message.assistant .md")).to_be_visible()
    page.get_by_role("button", name="Stop").click()
    expect(page.locator(".message.assistant .figures .end")).to_have_text("stopped")
    expect(page.get_by_role("button", name="Send")).to_be_disabled()
    server.wait(lambda: server.pages_in_use() == 0, 5)


def test_parameters_show_the_servers_defaults_and_are_sent(page: Any) -> None:
    box = page.get_by_role("spinbutton", name="Temperature")
    expect(box).to_have_attribute("placeholder", "0")  # the model's own default is greedy
    with page.expect_request("**/v1/chat/completions") as sent:
        box.fill("0.7")
        say(page, "hi")
    body = json.loads(sent.value.post_data)
    assert (
        body["temperature"] == 0.7
        and "top_p" not in body
        and body["stream_options"] == {"include_usage": True}
    )
    page.get_by_role("button", name="Back to the default of Temperature").click()
    expect(box).to_have_value("")
    page.get_by_text("Length").click()
    page.get_by_role("spinbutton", name="Answers").fill("2")
    say(page, "hi")
    expect(page.get_by_label("Branch 1 of 2")).to_be_visible()


def test_reasoning_is_shown_apart(page: Any) -> None:
    page.get_by_text("Stop and reasoning").click()
    page.get_by_role("combobox", name="Reasoning").select_option("on")
    answer = say(page, "What is 17 + 15?")
    expect(answer.locator(".reasoning")).to_be_visible()
    expect(answer.locator(".body > .md")).to_have_text("17 + 15 = 32")
    answer.get_by_text("Reasoning").click()
    expect(answer.locator(".reasoning .md")).not_to_be_empty()


def test_what_was_in_force_and_a_seed_that_repeats_it(page: Any) -> None:
    page.get_by_role("spinbutton", name="Temperature").fill("2")
    answer = say(page, "Tell me a story.")
    answer.get_by_role("button", name="What was in force").click()
    rows = answer.locator(".in-force tr")
    expect(rows.filter(has_text="Temperature")).to_contain_text("asked for")
    seed = rows.filter(has_text="Seed").locator("td").first.inner_text()
    assert int(seed) > 2**40
    with page.expect_request("**/v1/chat/completions") as sent:
        page.get_by_role("spinbutton", name="Seed").fill(seed)
        page.get_by_role("button", name="Another answer").click()
    assert f'"seed":{seed},' in sent.value.post_data  # every digit of it
    expect(page.get_by_label("Branch 2 of 2")).to_be_visible()
    again = page.locator(".message.assistant .md").inner_text()
    page.get_by_role("button", name="The branch before").click()
    assert page.locator(".message.assistant .md").inner_text() == again


def test_a_schema_binds_the_answer_and_the_result_is_checked(page: Any) -> None:
    page.get_by_role("checkbox", name="JSON schema").check()
    area = page.get_by_role("textbox", name="Schema that the answer must fit")
    area.fill("{")
    expect(page.get_by_text("Not valid JSON")).to_be_visible()
    area.fill(json.dumps(SCHEMA))
    answer = say(page, "Extract name and age: Mara Lind is 41 years old.")
    expect(answer.locator(".verdict")).to_have_text("Valid against the schema")
    assert json.loads(answer.locator(".json-result pre").inner_text())["age"] == 41
    answer.get_by_role("button", name="Show the tokens").click()
    expect(answer.locator("button.token.forced").first).to_be_visible()


def test_tool_calls_are_cards_that_take_results(page: Any) -> None:
    page.get_by_role("checkbox", name="Tools").check()
    answer = say(page, "What is the weather in Paris?")
    expect(answer.locator(".call")).to_contain_text("get_weather")
    assert json.loads(answer.locator(".call pre").inner_text()) == {"city": "Paris"}
    page.get_by_role("textbox", name="Result of get_weather").fill('{"temperature": 21}')
    with page.expect_request("**/v1/chat/completions") as sent:
        page.get_by_role("button", name="Send the result").click()
    roles = [message["role"] for message in json.loads(sent.value.post_data)["messages"]]
    assert roles == ["user", "assistant", "tool"]
    expect(page.locator(".message.assistant").last.locator(".md")).to_contain_text("21")
    page.get_by_role("combobox", name="Calls").select_option("required")
    answer = say(page, "Hello!")
    expect(answer.locator(".call")).to_contain_text("get_weather")


def test_the_token_view(page: Any) -> None:
    answer = say(page, "What is 17 + 15?")
    say(page, "What is 17 + 15?")
    answer = page.locator(".message.assistant").last
    answer.get_by_role("button", name="Show the tokens").click()
    expect(answer.locator(".token.cached").first).to_be_visible()
    expect(answer.locator(".token.computed").first).to_be_visible()
    told = int(answer.locator(".figures span", has_text="cached").locator("b").inner_text())
    expect(answer.locator(".token.cached")).to_have_count(told)
    expect(answer.locator(".miss")).to_contain_text("prompt tokens matched")
    chips = answer.locator("button.token")
    assert "".join(chips.all_inner_texts()).startswith("17·+·15·=·32")
    chips.first.focus()
    page.keyboard.press("ArrowRight")
    expect(chips.nth(1)).to_be_focused()
    expect(answer.locator(".alternatives li")).not_to_have_count(0)
    expect(answer.locator(".alternatives .chosen code")).to_have_text("7")


# ---------------------------------------------------------------------- other views
def test_raw_completion(page: Any) -> None:
    view(page, "Complete")
    expect(page.get_by_role("spinbutton", name="Temperature")).to_have_attribute("placeholder", "1")
    page.get_by_role("textbox", name="Text to go on with").fill("1 2 3 4")
    with page.expect_request("**/generate") as sent:
        page.keyboard.press("Control+Enter")
    assert json.loads(sent.value.post_data)["text"] == "1 2 3 4"
    expect(page.locator(".output .actions")).to_be_visible()
    page.get_by_role("button", name="Tokens").click()
    expect(page.locator(".token.computed").first).to_be_visible()
    told = int(page.locator(".figures span", has_text="out").locator("b").inner_text())
    expect(page.locator("button.token")).to_have_count(told)


def test_compare_tells_where_answers_part_and_the_link_brings_it_back(page: Any, server: Server) -> None:
    view(page, "Compare")
    page.get_by_role("textbox", name="Prompt of both").fill("What is 3 + 4?")
    page.get_by_role("button", name="Run both").click()
    expect(page.locator(".verdict-line")).to_have_text("Both answers are equal, to the last character.")
    other = {"system": "Answer with the letter x.", "params": {"temperature": 2, "sampling_seed": 3}}
    shared = {"prompt": "Spell the word river.", "a": {}, "b": other}
    page.goto(f"{server.url}/#compare/{link(shared)}")
    expect(page.get_by_role("textbox", name="Prompt of both")).to_have_value("Spell the word river.")
    expect(page.get_by_label("Side B").locator(".chips")).to_contain_text("Temperature 2")
    page.get_by_role("button", name="Run both").click()
    expect(page.locator(".verdict-line")).to_contain_text("The answers part at character")
    expect(page.locator("mark").first).to_be_visible()
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.get_by_role("button", name="Copy a link to this comparison").click()
    address = page.evaluate("() => navigator.clipboard.readText()")
    assert "#compare/" in address and "sesame" not in address


def test_the_live_view_shows_the_tree_and_what_runs(page: Any) -> None:
    view(page, "Live")
    expect(page.locator(".tree .root")).to_be_attached()
    page.get_by_role("button", name="Send eight prompts that begin alike").click()
    expect(page.locator(".tree .request").first).to_be_visible()
    expect(page.locator(".requests tbody tr").first).to_be_visible()
    expect(page.locator(".tree .edge.held").first).to_be_attached()
    expect(page.locator(".timeline rect.prompt").first).to_be_attached()
    expect(page.get_by_role("button", name="Send eight prompts that begin alike")).to_be_enabled(
        timeout=60_000
    )
    expect(page.locator(".requests")).to_be_hidden()
    assert page.locator(".tree .edge").count() > 8
    page.locator(".tree .edge").last.focus()
    expect(page.locator(".tree-info")).to_contain_text("held by nobody")
    expect(page.locator(".tree-info .snippet")).to_be_visible()
    page.get_by_role("checkbox", name="Texts and ids").uncheck()
    expect(page.locator(".tree-info .snippet")).to_have_count(0)
    page.keyboard.press("Escape")


# ---------------------------------------------------------------------- parts of the program
def test_what_models_write_becomes_nodes_and_never_html(page: Any) -> None:
    render = "async text => (await import('/playground/markdown.js')).markdown(text).outerHTML"
    cases = {
        "a **b** `c`": "<p>a <strong>b</strong> <code>c</code></p>",
        "snake_case_name 2 * 3 * 4": "<p>snake_case_name 2 * 3 * 4</p>",
        "- a\n- b\n  - c": "<ul><li>a</li><li>b<ul><li>c</li></ul></li></ul>",
        "3. x\n4. y": '<ol start="3"><li>x</li><li>y</li></ol>',
        "[a](javascript:alert`1`)": "<p>[a](javascript:alert`1`)</p>",
        "[a](data:text/html,x)": "<p>[a](data:text/html,x)</p>",
        "<script>1</script>": "<p>&lt;script&gt;1&lt;/script&gt;</p>",
        "> q": "<blockquote><p>q</p></blockquote>",
        "`a": "<p>`a</p>",
    }
    for text, html in cases.items():
        assert page.evaluate(render, text) == f'<div class="md">{html}</div>', text
    code = page.evaluate(render, "```py\n<b>\n  x")  # as it streams in: without its end
    assert "<code>&lt;b&gt;\n  x</code>" in code
    measure = "async text => (await import('/playground/markdown.js')).markdown(text).textContent.length"
    long = page.evaluate(measure, "*a" * 50_000)
    assert long == 100_000


def test_differences_leave_both_texts_whole(page: Any) -> None:
    rng, words = random.Random(4), ["a", "b", "c", " ", ", ", "\n"]
    for _ in range(60):
        texts = ["".join(rng.choices(words, k=rng.randrange(30))) for _ in range(2)]
        left, right = page.evaluate(
            "async ([a, b]) => (await import('/playground/diff.js')).compareTexts(a, b)", texts
        )
        assert ["".join(text for text, _ in side) for side in (left, right)] == texts
        kept = ["".join(text for text, only in side if not only) for side in (left, right)]
        assert kept[0] == kept[1]


@pytest.mark.parametrize("seed", range(3))
def test_the_schema_check_agrees_with_the_library(page: Any, seed: int) -> None:
    rng = random.Random(seed)
    check = (
        "async ([schema, values]) => (await import('/playground/schema.js').then(m => "
        "values.map(value => m.violations(schema, value).length === 0)))"
    )
    values: list[Any] = [None, True, 0, 3, 2.5, -1, "", "ab", "abc", [], [1], [1, "x"], {}, {"a": 1}]
    values.append({"a": "x", "b": 2})
    parts: list[Any] = [
        {"type": "integer"}, {"type": ["string", "null"]}, {"minimum": 1, "maximum": 3},
        {"exclusiveMinimum": 0}, {"minLength": 1, "maxLength": 2}, {"pattern": "^a"},
        {"enum": [1, "ab", None]}, {"const": 3}, {"minItems": 1}, {"items": {"type": "integer"}},
        {"prefixItems": [{"type": "integer"}], "items": {"type": "string"}}, {"required": ["a"]},
        {"properties": {"a": {"type": "integer"}}, "additionalProperties": False}, {"$ref": "#/$defs/d"},
    ]  # fmt: skip
    for _ in range(40):
        some = rng.sample(parts, 3)
        schema = {"$defs": {"d": {"type": "object"}}, rng.choice(["anyOf", "allOf", "oneOf"]): some}
        right = [jsonschema.Draft202012Validator(schema).is_valid(value) for value in values]
        assert page.evaluate(check, [schema, values]) == right, schema


# ---------------------------------------------------------------------- keys, themes, failures
def test_a_wrong_key_is_told_and_the_right_one_opens(browser: Any, locked: Server) -> None:
    page = open_page(browser, locked.url)
    key = page.get_by_role("textbox", name="Key of this server")
    expect(key).to_be_visible()
    key.fill("wrong")
    page.keyboard.press("Enter")
    box = page.get_by_role("dialog", name="API key")
    expect(box.get_by_role("alert")).to_contain_text("invalid_api_key")
    assert not any("wrong" in complaint for complaint in page.complaints)
    key.fill("sesame")
    page.keyboard.press("Enter")
    expect(box).to_be_hidden()
    expect(say(page, "What is 17 + 15?").locator(".md")).to_have_text("17 + 15 = 32")
    assert page.evaluate("() => sessionStorage.getItem('trunkline.key')") == "sesame"
    assert "sesame" not in page.evaluate("() => JSON.stringify(localStorage)")
    view(page, "Live")
    expect(page.locator(".tree .root")).to_be_attached()
    texts = page.get_by_role("checkbox", name="Texts and ids")
    expect(texts).not_to_be_checked()
    texts.click()
    expect(page.get_by_role("alert")).to_contain_text("admin_key_needed")
    expect(texts).not_to_be_checked()
    page.get_by_role("button", name="API key").click()
    key.fill("barley")
    page.keyboard.press("Enter")
    page.get_by_role("checkbox", name="Texts and ids").check()
    page.locator(".tree .edge").last.focus()
    expect(page.locator(".tree-info .snippet")).to_be_visible()
    assert all("401" in complaint or "403" in complaint for complaint in page.complaints)
    page.context.close()


def test_errors_have_a_code_a_cause_and_a_fix(browser: Any, server: Server) -> None:
    page = open_page(browser, server.url)
    page.get_by_text("Length").click()
    page.get_by_role("spinbutton", name="Most tokens").fill("100000")
    answer = say(page, "hi")
    error = answer.get_by_role("alert")
    for part in ("context_length_exceeded", "max_tokens", "4096", "Try again"):
        expect(error).to_contain_text(part)
    page.context.close()


def test_a_server_that_goes_away_and_comes_back(browser: Any, server: Server) -> None:
    page = open_page(browser, server.url)
    expect(page.get_by_role("img", name="Connected")).to_be_visible()
    page.context.set_offline(True)
    answer = say(page, "hi")
    expect(answer.get_by_role("alert")).to_contain_text("unreachable")
    expect(page.get_by_text("The server can't be reached. Trying again")).to_be_visible()
    page.context.set_offline(False)
    expect(page.get_by_role("img", name="Connected")).to_be_visible()
    page.get_by_role("button", name="Try again").click()
    expect(page.locator(".message.assistant .md")).to_be_visible()
    page.context.close()


def test_the_keyboard_alone_is_enough(page: Any) -> None:
    expect(page.get_by_role("textbox", name="Message")).to_be_focused()
    page.get_by_role("link", name="Trunkline, chat").focus()
    page.keyboard.press("Shift+Tab")
    expect(page.get_by_role("link", name="Skip to the content")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.get_by_role("main")).to_be_focused()
    page.get_by_role("textbox", name="Message").focus()
    expect(page).to_have_title("Chat · Trunkline")  # the link to the content is no view
    page.keyboard.type("What is 17 + 15?")
    page.keyboard.press("Enter")
    expect(page.locator(".message.assistant .actions")).to_be_visible()
    page.keyboard.press("Shift+Tab")  # from the text box back to the answer's last button
    expect(page.get_by_role("button", name="Delete from here").last).to_be_focused()
    for _ in range(5):
        page.keyboard.press("Shift+Tab")
    expect(page.get_by_role("button", name="Show the tokens")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.get_by_role("button", name="Show the text")).to_be_focused()
    names = "e => e.getAttribute('aria-label') || e.labels?.length || e.textContent.trim() || e.title"
    for control in page.locator("button, input, textarea, select").all():
        assert control.evaluate(names), control.evaluate("e => e.outerHTML")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_themes_and_their_contrast(browser: Any, server: Server, scheme: str) -> None:
    page = open_page(browser, server.url, color_scheme=scheme)
    expect(page.locator("html")).to_have_attribute("data-theme", scheme)
    names = ["paper", "surface", "sunken", "ink", "muted", "accent", "danger", "on-accent"]
    read = "name => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim()"
    seen = {name: page.evaluate(read, name) for name in names}
    for ink in ("ink", "muted", "accent", "danger"):
        for paper in ("paper", "surface"):
            assert contrast(seen[ink], seen[paper]) >= 4.5, (ink, paper)
    assert (
        contrast(seen["on-accent"], seen["accent"]) >= 4.5 and contrast(seen["muted"], seen["sunken"]) >= 4.5
    )
    page.get_by_role("button", name="Theme: auto").click()
    page.get_by_role("button", name="Theme: light").click()
    expect(page.locator("html")).to_have_attribute("data-theme", "dark")
    page.reload()
    expect(page.locator("html")).to_have_attribute("data-theme", "dark")
    page.context.close()


@pytest.mark.parametrize("width", [390, 1280])
def test_no_view_is_wider_than_the_screen(browser: Any, server: Server, width: int) -> None:
    page = open_page(browser, server.url, size=(width, 800), reduced_motion="reduce")
    for name in ("Chat", "Complete", "Compare", "Live"):
        view(page, name)
        page.wait_for_timeout(100)
        assert page.evaluate("() => document.documentElement.scrollWidth") <= width, name
    assert page.complaints == []
    page.context.close()


def test_the_policy_stops_what_a_page_must_not_do(browser: Any, server: Server) -> None:
    page = open_page(browser, server.url)
    page.evaluate(
        "() => document.body.append(Object.assign(document.createElement('img'), {src: 'https://example.com/x.png'}))"
    )
    page.wait_for_timeout(100)
    assert any("Content Security Policy" in complaint for complaint in page.complaints)
    with pytest.raises(playwright.Error, match="TrustedHTML"):
        page.evaluate("() => { document.body.innerHTML = '<b>x</b>'; }")
    page.context.close()


def link(data: dict[str, Any]) -> str:
    return base64.urlsafe_b64encode(json.dumps(data).encode()).decode().rstrip("=")


def contrast(one: str, other: str) -> float:
    """Ratio of luminances, WCAG 2."""

    def luminance(color: str) -> float:
        parts = [int(color[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        r, g, b = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
        return 0.2126 * r + 0.7152 * g + 0.0722 * b

    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)
