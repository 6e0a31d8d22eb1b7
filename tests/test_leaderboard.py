"""`mmdora leaderboard`: one page that ranks models, tested in headless Chromium if it is installed."""

from __future__ import annotations

import json
import re

import pytest

from benchmarks.browser import Browser, find_chromium
from eval.leaderboard import arrange, cells
from eval.metrics import holm, mcnemar
from eval.results import read_result
from tests.media import write_video
from tests.scored import command, edit, judge, right, scored, write_questions

HOSTILE = [
    "</script><script>document.title = 'owned'</script>",
    "<img src=x onerror=\"document.title = 'owned'\">",
    "<!-- <script>",
    "a\u2028b\u2029c \ud800 \x00 & ' \"",
    "{{ 7 * 7 }}",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("leaderboard")


@pytest.fixture(scope="module")
def page(folder):
    """Three models on 120 questions, one of them also on 12 others. One model's answers contain markup."""
    rows = write_questions(folder / "data", 120, per_image=2)
    (folder / "data" / "3.png").unlink()
    small = write_questions(folder / "few", 12)
    video = write_video(folder / "few" / "video.mp4", frames=8, size=(32, 32))
    questions = json.loads(small.read_text())
    questions[0] = {k: v for k, v in questions[0].items() if k != "image"} | {"video": video.name}
    small.write_text(json.dumps(questions))
    hostile = HOSTILE + right(120)[len(HOSTILE) :]
    results = [
        f"best={scored(folder / 'best', rows, right(120, 7))}",
        f"<b>bold</b>={scored(folder / 'hostile', rows, hostile)}",
        f"worst={scored(folder / 'worst', rows, right(120, *range(60)))}",
        f"worst={scored(folder / 'few_result', small, right(12, 1))}",
    ]
    edit(folder / "few_result" / "report.json", name="few", receipt={"num_frames": 2})
    assert command("leaderboard", *results, "--html", folder / "pages" / "page.html") == 0
    return folder / "pages" / "page.html"


def payload(page, number: int) -> dict:
    text = page.read_text(encoding="utf-8")
    found = re.search(rf'<script type="application/json" id="questions-{number}">(.*?)</script>', text, re.DOTALL)
    return json.loads(found[1])


def test_the_page_holds_every_answer_without_its_markup(page):
    text = page.read_text(encoding="utf-8")
    assert text.count("<script") == text.count("</script>") == 4  # models, two benchmarks, and the script
    assert 'onerror="' not in text
    assert "<b>bold</b>" not in text
    assert "\u2028" not in text
    assert "http" not in re.sub(r"http-equiv|data:image[^\"]*", "", text)
    assert [row[5][1] for row in payload(page, 0)["questions"][:5]] == HOSTILE
    assert "49" not in [row[5][1] for row in payload(page, 0)["questions"]]


def test_images_and_frames_are_in_the_page(page):
    large, few = payload(page, 0), payload(page, 1)
    assert len(large["media"]) == len(large["images"]) == 60
    by_name = dict(zip(large["media"], large["images"], strict=True))
    assert by_name["3.png"] == []
    assert by_name["4.png"][0].startswith("data:image/jpeg;base64,")
    assert "1 could not be read at the paths in the results" in page.read_text(encoding="utf-8")
    assert len(dict(zip(few["media"], few["images"], strict=True))["video.mp4"]) == 2


def test_the_numbers_of_questions_and_images_are_limited(folder, monkeypatch):
    """Images of questions on which models differ come first."""
    monkeypatch.setattr("eval.leaderboard_page.MAX_MEDIA_FILES", 3)
    monkeypatch.setattr("eval.leaderboard_page.MAX_QUESTIONS", 50)
    rows = write_questions(folder / "many", 100)
    results = [scored(folder / "one", rows, right(100, 40)), scored(folder / "two", rows, right(100))]
    page = folder / "bounded.html"
    assert command("leaderboard", *results, "--html", page) == 0
    found = payload(page, 0)
    assert [row[0] for row in found["questions"]] == [f"q{i}" for i in range(0, 100, 2)]
    assert len(found["images"]) == 3
    assert found["media"][0] == "40.png"
    text = page.read_text(encoding="utf-8")
    assert "50 of 100 questions are on this page" in text
    assert "3 of 50 images and videos are on this page" in text


def test_each_model_is_compared_with_the_best(folder):
    rows = write_questions(folder / "ranked", 40)
    answers = {"a": right(40, *range(12)), "b": right(40, 0), "c": right(40, 1, 2)}
    board = arrange([(name, read_result(scored(folder / f"r{name}", rows, given))) for name, given in answers.items()])
    found = cells(board.columns[0], "official")
    assert [found[i].best for i in range(3)] == [False, True, False]
    assert found[1].behind is None
    assert found[0].behind.difference == pytest.approx(-27.5)
    ps = mcnemar(11, 0), mcnemar(2, 1)
    assert [found[i].behind.p_holm for i in (0, 2)] == pytest.approx(holm(ps))
    assert cells(board.columns[0], "judged") == {}


def test_results_are_grouped_by_model_and_by_comparable_questions(folder):
    """Results of one model share a row, another model of the same name has its own, and results that cannot be compared
    have separate columns."""
    rows, other = write_questions(folder / "x", 12), write_questions(folder / "y", 12, answers=["no"])
    places = {name: folder / "apart" / name / "vqa" for name in "abcd"}
    for name, out in places.items():
        scored(out, other if name == "b" else rows, right(12))
    edit(places["a"] / "report.json", receipt={"target": "runs/tuned", "weights": "w1"})
    edit(places["b"] / "report.json", receipt={"target": "runs/tuned", "weights": "w1"})
    edit(places["c"] / "report.json", receipt={"target": "old/tuned", "weights": "w2"})
    board = arrange([(None, read_result(out)) for out in places.values()])
    assert board.models == ["tuned", "tuned (2)", "d"]
    assert [column.name for column in board.columns] == ["vqa", "vqa (2)"]
    assert [list(column.results) for column in board.columns] == [[0, 1, 2], [0]]
    assert board.columns[1].differences == ["references: 12 questions differ, such as 'q0': ['yes'] and ['no']"]


def test_a_run_is_named_by_its_folder(folder):
    rows = write_questions(folder / "x", 12)
    for name in ("vqa", "before/vqa"):
        scored(folder / "tuned" / "eval" / name, rows, right(12))
    named = [(None, read_result(folder / "tuned" / "eval" / name)) for name in ("vqa", "before/vqa")]
    assert arrange(named).models == ["tuned", "tuned, before"]


def test_invalid_arguments(folder, capsys):
    assert command("leaderboard", folder / "nothing", "--html", folder / "x.html") == 2
    assert "no such folder" in capsys.readouterr().err
    out = scored(folder / "r", write_questions(folder / "x", 12), right(12))
    assert command("leaderboard", out, "--html", folder) == 2
    assert "this is a folder" in capsys.readouterr().err
    assert command("leaderboard", out, "--html", out / "report.json" / "page.html") == 2
    assert "--html: cannot make the folder" in capsys.readouterr().err


needs_chromium = pytest.mark.skipif(find_chromium() is None, reason="no Chromium on PATH, nor named in CHROME_BIN")
ROWS = "[...document.querySelectorAll('table.sortable')[0].tBodies[0].rows].map(row => row.cells[0].textContent)"
SHOWN = "[...document.querySelectorAll('#list > li')].map(item => item.dataset.id)"
COUNT = "document.getElementById('count').textContent"


@pytest.fixture(scope="module")
def browser():
    with Browser.start() as started:
        yield started


def choose(page, control: str, value: str, event: str = "change") -> None:
    """Choose or type like a user."""
    page.run(f"(c => {{ c.value = {json.dumps(value)}; c.dispatchEvent(new Event('{event}')) }})({control})")


@needs_chromium
def test_the_page_sorts_and_filters_in_a_browser(page, browser):
    """Sort, filter down to one question by mouse and by URL; no script of an answer runs, nothing is fetched."""
    seen = browser.open(page.as_uri())
    assert seen.run("document.title") == "Leaderboard: 3 models, 2 benchmarks"
    assert seen.run(ROWS) == ["best", "<b>bold</b>", "worst"]
    seen.run("document.querySelectorAll('table.sortable th button')[1].click()")
    assert seen.run(ROWS) == ["worst", "<b>bold</b>", "best"]
    seen.run("document.querySelectorAll('table.sortable th button')[2].click()")
    assert seen.run(ROWS)[0] == "worst"  # missing values come last
    assert seen.run("document.querySelectorAll('table.sortable th')[2].getAttribute('aria-sort')") == "descending"

    assert seen.run(COUNT) == "1–50 of 120 questions"
    assert "in the order best · <b>bold</b> · worst" in seen.run("document.getElementById('order').textContent")
    seen.run("document.getElementById('next').click()")
    assert seen.run(SHOWN)[0] == "q50"
    choose(seen, "document.getElementById('show')", "differ")
    assert seen.run(COUNT) == "1–50 of 60 questions"
    choose(seen, "document.getElementById('show')", "only-1")
    assert seen.run(SHOWN) == ["q7"]
    choose(seen, "document.getElementById('show')", "wrong")
    assert seen.run(COUNT) == "0 questions"
    choose(seen, "document.getElementById('show')", "wrong-1")
    assert seen.run(SHOWN) == [f"q{i}" for i in range(5)]
    choose(seen, "document.getElementById('category')", "1")
    assert seen.run(SHOWN) == ["q1", "q3"]
    choose(seen, "document.getElementById('search')", "ONERROR", "input")
    assert seen.run(SHOWN) == ["q1"]
    address = seen.run("location.href")

    seen.run("document.querySelector('#list summary').click()")
    seen.run("new Promise(done => setTimeout(done, 50))")
    inside = seen.run("document.querySelector('#list details').innerText")
    for text in ("Question number 1?", "reference: yes", HOSTILE[1], "<b>bold</b>", "✗ wrong (0)", "✓ correct (1)"):
        assert text in inside
    assert seen.run("document.querySelector('#list img').naturalWidth") == 32
    again = browser.open(address)
    assert again.run(SHOWN) == ["q1"]
    single = browser.open(f"{page.as_uri()}#benchmark=0&id=q3")
    assert single.run(SHOWN) == ["q3"]
    assert single.run("document.querySelector('#list details').open")
    assert "number 3?" in single.run("document.querySelector('#list').innerText")
    missing = browser.open(f"{page.as_uri()}#benchmark=0&id=q6")
    assert "3.png could not be read" in missing.run("document.querySelector('#list').innerText")
    single.run("document.getElementById('all').click()")
    assert single.run(COUNT) == "1–50 of 120 questions"
    other = browser.open(f"{page.as_uri()}#benchmark=1&id=q0")
    assert other.run("document.querySelectorAll('#list img').length") == 2  # frames

    for shown in (seen, again, single, missing, other):
        assert "owned" not in shown.run("document.title")
    assert {address.partition(":")[0] for address in browser.requests} <= {"file", "data"}


@needs_chromium
def test_links_lead_to_sections_and_to_questions(page, browser):
    seen = browser.open(f"{page.as_uri()}#benchmark=0&search=q7")
    found = seen.run(SHOWN)
    seen.run("document.querySelector('nav a:last-child').click()")
    seen.run("new Promise(done => setTimeout(done, 50))")
    assert seen.run("scrollY") > 0
    assert seen.run(SHOWN) == found  # the search is unchanged
    assert browser.open(f"{page.as_uri()}#id=q1").run("scrollY") > 0


@needs_chromium
@pytest.mark.parametrize(("only", "heads"), [(False, ["vqa", "vqa, judged"]), (True, ["vqa, judged"])])
def test_judged_scores_have_their_own_column(only, heads, folder, browser):
    rows = write_questions(folder / "x", 12)
    for name, score in (("good", 1.0), ("bad", 0.25)):
        judge(scored(folder / f"{name}_{only}", rows, right(12)), score, only)
    page = folder / "judged.html"
    results = [f"{name}={folder}/{name}_{only}" for name in ("bad", "good")]
    assert command("leaderboard", *results, "--html", page) == 0
    seen = browser.open(page.as_uri())
    tables = "[...document.querySelectorAll('table.sortable')]"
    found = seen.run(f"[...{tables}[0].tHead.rows[0].cells].map(cell => cell.querySelector('button').textContent)")
    assert found == ["model", *heads]
    last = seen.run(
        f"[...{tables}[0].tBodies[0].rows].map(row => row.cells[row.cells.length - 1].innerText.split(/\\s/)[0])"
    )
    assert sorted(last) == ["100.0", "25.0"]
    assert seen.run(f"{tables}.pop().innerText").split()[:4] == ["category", "bad", "good", "shape"]
    assert seen.run("document.querySelector('#list .marks').textContent") == ("◔✓" if only else "✓✓")


@needs_chromium
def test_questions_without_public_references_have_no_score(folder, browser):
    out = scored(folder / "test_split", write_questions(folder / "x", 12), right(12))
    lines = [json.loads(line) for line in (out / "scores.jsonl").read_text().split("\n") if line]
    hidden = {"references": [], "official": None, "strict": None}
    (out / "scores.jsonl").write_text("".join(json.dumps(line | hidden) + "\n" for line in lines))
    edit(out / "report.json", scores={"official": None, "strict": None}, categories={})
    assert command("leaderboard", f"model={out}", "--html", folder / "unscored.html") == 0
    seen = browser.open(f"{(folder / 'unscored.html').as_uri()}#id=q4")
    assert seen.run("document.querySelector('table.sortable').innerText").split()[-2:] == ["model", "–"]
    inside = seen.run("document.querySelector('#list').innerText")
    assert "the reference is not public" in inside
    assert "· not scored" in inside
    assert seen.run("document.getElementById('show').options.length") == 1


@needs_chromium
def test_the_page_works_by_keyboard(page, browser):
    seen = browser.open(page.as_uri())
    reached = []
    for _ in range(20):
        seen.press("Tab", 9)
        reached.append(seen.run("document.activeElement.id || document.activeElement.tagName"))
    assert {"benchmark", "show", "category", "search", "SUMMARY"} <= set(reached)
    while seen.run("document.activeElement.tagName") != "SUMMARY":
        seen.press("Tab", 9)
    seen.press("Enter", 13, "\r")
    seen.run("new Promise(done => setTimeout(done, 50))")
    assert seen.run("document.activeElement.parentElement.open")
    assert seen.run("document.activeElement.parentElement.innerText.includes('reference: yes')")


@needs_chromium
@pytest.mark.parametrize("dark", [False, True])
def test_the_page_fits_a_phone(page, browser, dark):
    """At 390 pixels only tables scroll sideways. Colours follow the system's scheme with enough contrast."""
    seen = browser.open(f"{page.as_uri()}#id=q1", width=390, dark=dark)
    assert seen.run("document.documentElement.scrollWidth") == 390
    paper, ink = (seen.run(f"getComputedStyle(document.body).{key}") for key in ("backgroundColor", "color"))
    light = [sum(map(int, re.findall(r"\d+", colour)[:3])) / 3 for colour in (paper, ink)]
    assert abs(light[0] - light[1]) > 150
    assert (light[0] < light[1]) == dark
