"""The page in a real browser: it works by mouse and keyboard, in light and dark, on a phone, and asks for nothing."""

import math
import os
import shutil
from pathlib import Path

import pytest
import recorded

from fastclip.monitoring import records
from fastclip.report.digest import digest_of
from fastclip.report.page import page_of

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
EVIL = "<script>window.broken = true</script>"


@pytest.fixture(scope="module")
def page_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    names = ("h.0.weight", "h.0.bias", "h.1.weight", EVIL, *(f"h.{i}.weight" for i in range(2, 20)))
    run, page = folder / "run.jsonl", folder / "run.html"
    run.write_bytes(b"".join([*recorded.run(600, names=names, folds=3), b'{"kind":"st']))
    page.write_text(page_of(digest_of(run)), encoding="utf-8")
    return page


@pytest.fixture(scope="module")
def browser():
    found = os.environ.get("FASTCLIP_BROWSER") or next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip(f"needs a browser: one of {', '.join(BROWSERS)} on the PATH, or its path in FASTCLIP_BROWSER")
    playwright = pytest.importorskip("playwright.sync_api", reason="needs torch-fastclip[test]")
    with playwright.sync_playwright() as driver:
        # the sandbox wants rights that root in a container lacks; the page is our own
        browser = driver.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def opened(browser, page_file):
    """Opens the page; afterwards nothing may have gone wrong in it, and nothing else have been asked for."""
    pages = []

    def open_page(width=1280, height=900, file=page_file, **settings):
        page = browser.new_page(viewport={"width": width, "height": height}, **settings)
        wrong, requests = [], []
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
        page.on("request", lambda request: requests.append(request.url))
        page.goto(file.as_uri())
        settle(page)
        pages.append((page, wrong, requests, file.as_uri()))
        return page

    yield open_page
    for page, wrong, requests, address in pages:
        assert page.evaluate("window.broken") is None
        page.close()
        assert wrong == []
        assert requests == [address]


@pytest.fixture
def page_with(tmp_path):
    """Makes the page of a run with these norms in each step."""

    def make(names, steps):
        run, page = tmp_path / "run.jsonl", tmp_path / "run.html"
        lines = [records.step_line(recorded.step(n, norms, names)) for n, norms in enumerate(steps, 1)]
        run.write_bytes(b"".join([*recorded.beginning(names), *lines]))
        page.write_text(page_of(digest_of(run)), encoding="utf-8")
        return page

    return make


def settle(page):
    """Until what was asked for is drawn."""
    page.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")


def pixels(page, canvas, x, y, width=1, height=1):
    """Red, green, blue of the mean of some pixels; x and y are shares of the canvas."""
    return page.evaluate(
        """([id, x, y, w, h]) => {
            const c = document.getElementById(id);
            const d = c.getContext('2d').getImageData(Math.round(x * c.width), Math.round(y * c.height), w, h).data;
            const sum = [0, 0, 0];
            for (let i = 0; i < d.length; i += 4) for (let k = 0; k < 3; k++) sum[k] += d[i + k];
            return sum.map((s) => s / (d.length / 4));
        }""",
        [canvas, x, y, width, height],
    )


def picture(page, canvas):
    return page.evaluate("(id) => document.getElementById(id).toDataURL()", canvas)


def text(page, element):
    return page.locator(f"#{element}").inner_text()


def test_it_shows_what_is_in_the_file(opened):
    page = opened()
    assert page.title() == "Gradients of run.jsonl"
    words = page.inner_text("body")
    for part in ("600 records · 22 tensors", "Not everything could be read", "the last line is unfinished"):
        assert part in words
    assert EVIL in page.locator("#tensors").text_content()
    assert page.locator("#events tbody tr").count() == 3
    assert page.locator("#folds tbody tr").count() == 4
    assert page.locator("#tensors tbody tr:visible").count() == 12
    assert page.locator("#tensors tbody tr").count() == 22


def test_the_heat_map_has_the_colours_of_the_norms(opened):
    """Row 3 of 22 is not finite at step 300; row 1 vanished after 450; row 4 died after 525."""
    page = opened()
    page.evaluate("go(9)")  # the cursor's line lies over the cells
    settle(page)
    box = page.evaluate("Object.assign({}, heatPlace)")
    width = page.evaluate("document.getElementById('heat').clientWidth")
    height = page.evaluate("document.getElementById('heat').clientHeight")

    def cell(row, step):
        x = (box["left"] + (step - 0.5) / 600 * box["inner"]) / width
        y = (box["top"] + (row + 0.5) * box["row"]) / height
        return pixels(page, "heat", x, y)

    assert cell(2, 300) == pytest.approx([255, 31, 79], abs=2)
    assert cell(0, 580) == pytest.approx([68, 1, 84], abs=25)  # the dark end of viridis
    assert cell(1, 150) == pytest.approx([253, 231, 37], abs=25)  # the light end
    dead = cell(3, 590)
    assert max(dead) - min(dead) < 25  # grey


def colours(page, canvas, wanted):
    """How many pixels have the colour of this name, or nearly so."""
    return page.evaluate(
        """([id, wanted]) => {
            const c = document.getElementById(id), [red, green, blue] = rgb(css(wanted));
            const d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;
            let count = 0;
            const isNear = (a, b) => Math.abs(a - b) < 24;
            for (let i = 0; i < d.length; i += 4)
                count += d[i + 3] > 200 && isNear(d[i], red) && isNear(d[i + 1], green) && isNear(d[i + 2], blue);
            return count;
        }""",
        [canvas, wanted],
    )


@pytest.mark.parametrize("steps", [[(3.0,)], [(3.0,), (math.nan,)] * 50], ids=["one record", "each second NaN"])
def test_norms_without_neighbours_are_drawn(opened, page_with, steps):
    page = opened(file=page_with(["weight"], steps))
    assert colours(page, "norm", "--accent") >= 5 * sum(math.isfinite(norm) for (norm,) in steps)
    assert colours(page, "norm", "--bound") > 300  # a dashed line through all of it
    page.locator("#heat").focus()
    page.keyboard.press("ArrowDown")
    settle(page)
    assert colours(page, "line", "--accent") >= 5 * sum(math.isfinite(norm) for (norm,) in steps)


def test_a_norm_of_0_is_told_and_drawn(opened, page_with):
    page = opened(file=page_with(["weight"], [(0.0,)] * 20))
    assert text(page, "norm-readout") == "step 20: norm 0, bound 2, loss 0.05"
    assert "0" in words_drawn(page, "norm", "drawNorm()")
    page = opened(file=page_with(["weight"], [(1.0,)] * 20))
    assert "0" not in words_drawn(page, "norm", "drawNorm()")


def words_drawn(page, canvas, call):
    return page.evaluate(
        """([id, call]) => {
            const draw = document.getElementById(id).getContext('2d'), words = [];
            draw.fillText = (text) => words.push(text);
            eval(call);
            delete draw.fillText;
            return words;
        }""",
        [canvas, call],
    )


LORA = "base_model.model.model.language_model.layers.{}.self_attn.{}_proj.lora_{}.default.weight"


@pytest.mark.parametrize("others", [[], ["base_model.model.lm_head.modules_to_save.default.weight"]])
def test_long_names_are_told_apart(opened, page_with, others):
    """Their common parts are left out; numbers stay, also where another name has fewer parts in common."""
    names = [LORA.format(layer, which, a) for layer in (7, 11) for which in "qk" for a in "AB"] + others
    page = opened(file=page_with(names, [[1.0, 9.0] + [1.0] * (len(names) - 2)] * 20))
    drawn = words_drawn(page, "heat", "drawHeat()")[: len(names)]
    assert len(set(drawn)) == len(names)
    if not others:
        assert drawn[:2] == ["7.self_attn.q_proj.lora_A", "7.self_attn.q_proj.lora_B"]
    for word, layer in zip(drawn, [7] * 4 + [11] * 4, strict=False):
        assert f".{layer}." in f".{word}"
    tile = page.locator("#first")
    assert tile.get_attribute("title") == names[1]
    assert ".7" in f".{tile.inner_text()}"
    assert tile.inner_text() != names[1]
    assert tile.evaluate("(e) => e.offsetWidth <= e.parentNode.clientWidth")


@pytest.mark.parametrize(
    ("names", "label"),
    [
        (["layers.0.weight", "layers.1.weight"], "0.weight"),
        (["h.0.ln_1.weight", "g.bias"], "h.0.l1.weight"),
        (["a" * 40, "b" * 40], "aaaaa…aaaaa"),
        (["one.very_long_name.of_a_tensor_that_is_alone"], "of_a_t…alone"),
        (["a.b", "a.b.a.b.a.b.a.b.a.b"], "b.a.b.a.b.a.b.a.b"),
    ],
)
def test_names_are_shortened_as_far_as_needed(opened, page_with, names, label):
    page = opened(file=page_with(names, [[1.0] * len(names)]))
    told = page.evaluate(
        """([name, like]) => {
            const draw = document.createElement('canvas').getContext('2d');
            draw.font = '12px ' + css('--mono');
            const room = draw.measureText(like).width + 0.1;
            const words = (room) => shorten(draw, formFor(draw, name, room)(name), room);
            return [words(room), words(draw.measureText(name).width)];
        }""",
        [names[-1] if names[0] == "a.b" else names[0], label],
    )
    assert told[0] == label


def test_a_heat_map_of_any_height(opened, page_with):
    """One that no browser would have a canvas for."""
    count, bad = 14_000, 9_876
    names = [f"h.{i}.weight" for i in range(count)]
    norms = [[1.0 + i % 7 for i in range(count)] for _ in range(4)]
    norms[2][bad] = math.nan
    page = opened(file=page_with(names, norms), device_scale_factor=2)
    page.evaluate(f"choose({bad})")
    page.wait_for_function("heatPlace.above > 0")  # the box tells of its scrolling with a later frame
    box = page.evaluate("Object.assign({}, heatPlace)")
    size = page.evaluate(
        "(({ clientWidth, clientHeight }) => [clientWidth, clientHeight])(document.getElementById('heat'))"
    )
    y = box["top"] + (bad + 0.5) * box["row"] - box["above"]
    x = box["left"] + 2.3 / 4 * box["inner"]
    assert 0 < y < 640
    assert pixels(page, "heat", x / size[0], y / size[1]) == pytest.approx([255, 31, 79], abs=2)
    assert names[bad] in words_drawn(page, "heat", "drawHeat()")
    page.locator("#heat").click(position={"x": x, "y": y + 3 * box["row"]})
    settle(page)
    assert text(page, "heat-readout").startswith(f"{names[bad + 3]}, step 3: norm about ")
    page.evaluate("document.getElementById('heat-scroll').scrollTop = 1e9")
    page.wait_for_function("heatPlace.above > 60_000")
    drawn = words_drawn(page, "heat", "drawHeat()")
    assert "step 1" in drawn
    assert "h.13998.weight" in drawn


def test_clicking_a_cell_tells_of_it(opened):
    page = opened()
    box = page.evaluate("Object.assign({}, heatPlace)")
    x = box["left"] + 149.5 / 600 * box["inner"]
    page.locator("#heat").click(position={"x": x, "y": box["top"] + 1.5 * box["row"]})
    settle(page)
    assert text(page, "heat-readout") == "h.0.bias, step 150: norm about 10000"
    assert page.locator("#line").is_visible()
    assert text(page, "norm-readout").startswith("step 150: norm 10000, bound 2, clipped")


def test_by_keyboard_alone(opened):
    page = opened()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "To the figures"
    reached = []
    for _ in range(60):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id"))
    wanted = ["theme", "norm", "rate", "find", "order", "heat", "kind", "more"]
    assert [name for name in reached if name in wanted][: len(wanted)] == wanted
    page.locator("#norm").focus()
    page.keyboard.press("Home")
    settle(page)
    assert text(page, "norm-readout").startswith("step 1:")
    assert page.locator("#norm").get_attribute("aria-valuetext").startswith("step 1: norm ")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    settle(page)
    assert page.locator("#norm").get_attribute("aria-valuenow") == "2"
    page.keyboard.press("+")
    settle(page)
    assert page.evaluate("[state.from, state.to]") == [0, 300]
    page.keyboard.press("Escape")
    page.keyboard.press("End")
    settle(page)
    assert text(page, "norm-readout").startswith("step 600:")
    page.locator("#heat").focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowLeft")
    settle(page)
    assert text(page, "heat-readout").startswith("h.0.bias, step 599: norm about")


def test_dragging_looks_closer_and_back(opened):
    page = opened()
    page.locator("#norm").scroll_into_view_if_needed()
    box = page.locator("#norm").bounding_box()
    before = picture(page, "norm")
    page.mouse.move(box["x"] + 0.4 * box["width"], box["y"] + 80)
    page.mouse.down()
    page.mouse.move(box["x"] + 0.6 * box["width"], box["y"] + 80, steps=5)
    page.mouse.up()
    settle(page)
    a, z = page.evaluate("[state.from, state.to]")
    assert 200 < a < 260
    assert 320 < z < 380
    assert picture(page, "norm") != before
    page.locator("#all").click()
    settle(page)
    assert page.evaluate("[state.from, state.to]") == [0, 600]


def test_an_event_leads_to_its_step_and_tensor(opened):
    page = opened()
    page.locator("#events button", has_text="300").first.click()
    settle(page)
    assert text(page, "norm-readout").startswith("step 300: no finite norm")
    assert text(page, "heat-readout") == "h.1.weight, step 300: norm NaN"
    page.locator("#kind").select_option("skip")
    assert page.locator("#events tbody tr:visible").count() == 1


def test_finding_ordering_and_sorting(opened):
    page = opened()
    page.locator("#find").fill("bias")
    settle(page)
    assert page.evaluate("state.order.map((i) => data.names[i])") == ["h.0.bias"]
    page.locator("#find").fill("<script>")
    assert page.evaluate("state.order.map((i) => data.names[i])") == [EVIL]
    page.locator("#find").fill("no such")
    assert text(page, "heat-readout") == "No tensor has such a name."
    page.locator("#find").fill("")
    page.locator("#order").select_option("worst")
    assert page.evaluate("data.names[state.order[0]]") == "h.1.weight"
    page.locator("#more").click()
    assert page.locator("#tensors tbody tr:visible").count() == 22
    head = page.locator("#tensors th", has_text="Largest")
    head.locator("button").click()
    assert head.get_attribute("aria-sort") == "descending"
    assert page.locator("#tensors tbody tr").first.inner_text().startswith("h.0.bias")
    head.locator("button").click()
    assert head.get_attribute("aria-sort") == "ascending"
    assert not page.locator("#tensors tbody tr").first.inner_text().startswith("h.0.bias")


def brightness(page, selector):
    colour = page.evaluate("(s) => getComputedStyle(document.querySelector(s)).backgroundColor", selector)
    return sum(map(float, colour[4:-1].split(",")[:3]))


def test_light_and_dark(opened):
    light, dark = opened(color_scheme="light"), opened(color_scheme="dark")
    assert brightness(light, "body") > 700
    assert brightness(dark, "body") < 100
    assert picture(light, "norm") != picture(dark, "norm")
    for name in ("Light", "Dark", "Auto"):
        dark.locator("#theme").click()
        settle(dark)
        assert text(dark, "theme") == name
        assert (brightness(dark, "body") > 700) == (name == "Light")


CONTRAST = """() => {
    const parse = (c) => c.match(/[\\d.]+/g).map(Number);
    const linear = (v) => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
    const light = (c) => [0.2126, 0.7152, 0.0722].reduce((sum, part, i) => sum + part * linear(c[i] / 255), 0);
    const poor = [];
    for (const element of document.querySelectorAll('body *')) {
        const own = [...element.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
        if (!own || !element.offsetParent || element.disabled) continue;
        let under = element, back;
        do {
            back = parse(getComputedStyle(under).backgroundColor);
            under = under.parentElement;
        } while (under && back[3] === 0);
        const [a, b] = [light(parse(getComputedStyle(element).color).slice(0, 3)), light(back.slice(0, 3))];
        const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
        if (ratio < 4.5) poor.push([element.textContent.slice(0, 30), ratio]);
    }
    return poor;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out(opened, scheme):
    """The contrast that WCAG asks for at level AA."""
    assert opened(color_scheme=scheme).evaluate(CONTRAST) == []


def test_what_a_screen_reader_is_told(opened):
    page = opened()
    assert page.evaluate("document.documentElement.lang") == "en"
    unnamed = page.evaluate(
        """() => [...document.querySelectorAll('canvas[tabindex], button, select, input, section')].filter(
            (e) => !(e.getAttribute('aria-label') || e.textContent.trim() || e.labels?.length
              || document.getElementById(e.getAttribute('aria-labelledby')))).map((e) => e.outerHTML)"""
    )
    assert unnamed == []
    levels = page.evaluate("[...document.querySelectorAll('h1, h2, h3')].map((h) => h.tagName)")
    assert levels == ["H1"] + ["H2"] * (len(levels) - 1)
    assert page.evaluate("[...document.querySelectorAll('table')].every((t) => t.caption && t.tHead)")
    assert page.evaluate("[...document.querySelectorAll('th')].every((t) => t.scope === 'col')")


@pytest.mark.parametrize("width", [320, 390, 768])
def test_on_small_screens(opened, width):
    page = opened(width=width, height=800, has_touch=True)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    for canvas in ("norm", "rate", "heat"):
        box = page.locator(f"#{canvas}").bounding_box()
        assert box["width"] > 0.75 * width
    box = page.evaluate("Object.assign({}, heatPlace)")
    page.locator("#heat").tap(position={"x": box["left"] + 0.5 * box["inner"], "y": box["top"] + 0.5 * box["row"]})
    settle(page)
    assert text(page, "heat-readout").startswith("h.0.weight, step 30")
    page.evaluate("go(0)")
    settle(page)
    height = page.evaluate("document.getElementById('heat').clientHeight")
    y = (box["top"] + 2.5 * box["row"]) / height
    row = [pixels(page, "heat", (box["left"] + x) / width, y) for x in range(int(box["inner"]))]
    assert [255, 31, 79] in row  # the one step with NaN, where a pixel is several steps


def test_pictures_of_it(opened, tmp_path):
    """In every look the charts are drawn: no canvas is of one colour. The files are for whoever wants to look."""
    folder = Path(os.environ.get("FASTCLIP_PICTURES", tmp_path))
    for name, settings in {
        "light": {"color_scheme": "light"},
        "dark": {"color_scheme": "dark"},
        "phone": {"width": 390, "height": 844, "device_scale_factor": 2},
    }.items():
        page = opened(**settings)
        page.screenshot(path=str(folder / f"{name}.png"), full_page=True)
        assert (folder / f"{name}.png").stat().st_size > 40_000
        for canvas in ("norm", "rate", "heat", "scale"):
            colours = page.evaluate(
                """(id) => { const c = document.getElementById(id);
                    const d = new Uint32Array(c.getContext('2d').getImageData(0, 0, c.width, c.height).data.buffer);
                    return new Set(d).size; }""",
                canvas,
            )
            assert colours > 10, (name, canvas)
