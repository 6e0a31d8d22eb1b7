"""Judged answers: a judge at an address (a local server) or in a file, kept, resumed and keyed."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipelines.encoding import Encoder
from eval import judge
from eval.benchmarks import BENCHMARKS
from eval.judge import judge_all
from eval.results import read_report, read_result
from eval.run import evaluate, read_questions
from mmdora.apps.during_training import check_scored
from mmdora.apps.evaluate import Request, as_requested
from mmdora.cli.score import run as score
from mmdora.cli.submit import run as submit
from mmdora.core.config import EvaluationConfig, JudgeConfig
from mmdora.core.config_files import load_config
from mmdora.core.errors import RunError, UserError
from tests.vqa_miniatures import images, write

ANSWERS = {"v1_0": "x = 3", "v1_1": "a cat | a dog", "v1_2": "seven"}
GRADES = {"x = 3": "0.0", "a cat | a dog": "0.5", "seven": "1.0"}


class Server(ThreadingHTTPServer):
    """Grades an answer as `grades` says, once `failures` requests have failed; keeps what it was asked."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.grades, self.failures, self.status = dict(GRADES), 0, 503
        self.asked: list[tuple[dict, str | None]] = []

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.server.failures or self.path != "/v1/chat/completions":
            self.server.failures -= 1
            return self.reply(self.server.status, {"error": "not now"})
        self.server.asked.append((body, self.headers.get("Authorization")))
        said = body["messages"][0]["content"].rpartition("Answer: ")[2].removesuffix("\nGrade:")
        words = {"message": {"role": "assistant", "content": self.server.grades[said]}}
        return self.reply(200, {"model": f"{body['model']}-0613", "choices": [words]})

    def reply(self, status, content):
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(judge, "PAUSE", 0.01)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with Server() as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def mmvet(tmp_path):
    abilities = (["math", "ocr"], ["rec"], ["ocr"])
    rows = {
        f"v1_{i}": {"imagename": f"v1_{i}.png", "question": f"What {i}?", "answer": a, "capability": list(abilities[i])}
        for i, a in enumerate(["-1<AND>-5", "cat<OR>dog", "7"])
    }
    write(tmp_path / "mm-vet.json", rows)
    images(tmp_path / "images", "v1_0.png", "v1_1.png", "v1_2.png")
    write(tmp_path / "answers.json", ANSWERS)
    return tmp_path


def questions(folder):
    return BENCHMARKS["mmvet"]().questions(EvaluationConfig(name="m", benchmark="mmvet", data=str(folder)))


def verdicts(folder, config, answers=ANSWERS):
    return judge_all(BENCHMARKS["mmvet"](), config, answers, questions(folder), folder / "out")


def scored(folder, out, config=None):
    score("mmvet", folder / "answers.json", str(folder / "mm-vet.json"), None, False, folder / out, False, [], config)
    return read_report(folder / out)


def test_mmvet_by_capability(mmvet, server):
    report = scored(mmvet, "out", JudgeConfig(url=server.url, model="gpt-4"))
    assert report["scores"]["official"] is None
    assert report["scores"]["strict"] is None
    assert report["scores"]["judged"]["value"] == pytest.approx(50)
    assert 0 <= report["scores"]["judged"]["low"] < 50 < report["scores"]["judged"]["high"] <= 100
    judged = {name: (figure["n"], figure["judged"]["value"]) for name, figure in report["categories"].items()}
    assert judged == {
        "capability: math": (1, 0),
        "capability: ocr": (2, 50),
        "capability: rec": (1, 50),
        "integration: math + ocr": (1, 0),
        "integration: ocr": (1, 100),
        "integration: rec": (1, 50),
    }
    assert report["receipt"]["judge"] == {"url": server.url, "model": "gpt-4", "prompt_version": 1}
    assert [row["judged"] for row in read_result(mmvet / "out").rows] == [0, 0.5, 1]
    body, key = server.asked[0]
    assert (body["temperature"], body["model"], key) == (0, "gpt-4", None)
    assert any("Reference: cat <OR> dog\n" in body["messages"][0]["content"] for body, _ in server.asked)
    submit([mmvet / "out"], mmvet / "handed_in.json", [])
    assert json.loads((mmvet / "handed_in.json").read_text()) == ANSWERS


def test_without_a_judge_there_is_no_score(mmvet):
    report = scored(mmvet, "out")
    assert report["scores"] == {"official": None, "strict": None, "judged": None}
    assert report["n"] == 3
    with pytest.raises(UserError, match="is not judged"):
        judge.describe_judge(BENCHMARKS["vqav2"](), JudgeConfig(url="http://x", model="m"))


def test_verdicts_are_kept_resumed_and_keyed(mmvet, server):
    config, path = JudgeConfig(url=server.url, model="gpt-4"), mmvet / "out" / "verdicts.jsonl"

    def asked_for(config=config, answers=ANSWERS):
        server.asked.clear()
        verdicts(mmvet, config, answers)
        return len(server.asked)

    assert asked_for() == 3
    assert asked_for() == 0
    lines = path.read_text().split("\n")
    assert [json.loads(line)["model"] for line in lines if line] == ["gpt-4-0613"] * 3
    path.write_text("\n".join([lines[0], lines[1][:30]]))  # killed in the midst of a line
    assert asked_for() == 2
    assert asked_for() == 0
    server.grades["four"] = "0.1"
    assert asked_for(answers=ANSWERS | {"v1_2": "four"}) == 1
    assert asked_for(JudgeConfig(url=server.url, model="other")) == 3
    assert len(path.read_text().splitlines()) == 3  # of the present answers and judge


def test_a_verdict_that_cannot_be_read_is_an_error(mmvet, server):
    server.grades["seven"] = "I cannot say."
    config = JudgeConfig(url=server.url, model="gpt-4")
    with pytest.raises(RunError, match=r"1 verdicts cannot be read, such as that on v1_2: 'I cannot say\.'"):
        verdicts(mmvet, config)
    server.grades["seven"] = "1.0"
    server.asked.clear()
    assert verdicts(mmvet, config) == {"v1_0": 0, "v1_1": 0.5, "v1_2": 1}
    assert len(server.asked) == 1  # the others were kept


def test_what_an_address_answers(mmvet, server, monkeypatch):
    config = JudgeConfig(url=server.url, model="gpt-4")
    monkeypatch.setenv("OPENAI_API_KEY", "of the test")
    server.failures = 2
    assert len(verdicts(mmvet, config)) == 3  # asked again
    assert server.asked[0][1] == "Bearer of the test"
    server.failures, server.status = 99, 401
    with pytest.raises(RunError, match=r"judge at http.*: HTTP 401: .*not now") as caught:
        verdicts(mmvet, JudgeConfig(url=server.url, model="b"))
    assert "of the test" not in str(caught.value)
    assert server.failures >= 99 - 3  # none was asked twice: that would mend nothing
    with pytest.raises(RunError, match=r"judge at http://127\.0\.0\.1:9/v1"):
        verdicts(mmvet, JudgeConfig(url="http://127.0.0.1:9/v1", model="b"))


def test_recorded_verdicts(mmvet, server):
    given = [{"id": i, "verdict": GRADES[a]} for i, a in ANSWERS.items()]
    path = mmvet / "given.jsonl"

    def record(rows):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return JudgeConfig(verdicts=str(path))

    report = scored(mmvet, "out", record(given))
    assert report["scores"]["judged"]["value"] == pytest.approx(50)
    assert report["receipt"]["judge"]["verdicts"] == str(path)
    with pytest.raises(UserError, match="1 questions have no verdict, such as v1_2"):
        verdicts(mmvet, record(given[:2]))
    with pytest.raises(UserError, match="a second verdict on v1_0"):
        verdicts(mmvet, record(given + given[:1]))
    with pytest.raises(UserError, match="such as that on v1_0: 'maybe'"):
        verdicts(mmvet, record([given[0] | {"verdict": "maybe"}, *given[1:]]))
    with pytest.raises(UserError, match="no such file"):
        verdicts(mmvet, JudgeConfig(verdicts=str(mmvet / "none.jsonl")))
    verdicts(mmvet, JudgeConfig(url=server.url, model="gpt-4"))
    kept = JudgeConfig(verdicts=str((mmvet / "out" / "verdicts.jsonl").rename(mmvet / "kept.jsonl")))
    assert verdicts(mmvet, kept) == {"v1_0": 0, "v1_1": 0.5, "v1_2": 1}
    with pytest.raises(UserError, match="v1_2 was given on another answer"):
        verdicts(mmvet, kept, ANSWERS | {"v1_2": "four"})


def test_a_model_is_asked_and_judged(tiny, mmvet, server):
    model, processor = tiny
    server.grades = type("Always", (dict,), {"__missing__": lambda *_: "0.3"})()
    entry = EvaluationConfig(name="m", benchmark="mmvet", data=str(mmvet), max_new_tokens=3)
    with_judge = EvaluationConfig.model_validate(entry.model_dump() | {"judge": {"url": server.url, "model": "g"}})

    def run(entry, overwrite=False):
        return evaluate(model, Encoder(processor), entry, read_questions(entry), mmvet / "out", overwrite=overwrite)

    assert run(entry)["scores"]["judged"] is None
    with pytest.raises(UserError, match="other judge"):
        run(with_judge)
    report = run(with_judge, overwrite=True)
    assert report["scores"]["judged"]["value"] == pytest.approx(30)
    assert run(with_judge) == run(entry) == report  # a finished result, with or without a judge to ask
    assert report["receipt"]["prompt_template"] == "{question}"
    followed = entry.model_copy(update={"during": True})
    config = load_config("quickstart").model_copy(update={"evaluation": [followed]})
    with pytest.raises(UserError, match=r"evaluation\.0\.during: mmvet is scored by a judge alone"):
        check_scored(config, {followed.name: read_questions(followed)})


def test_a_runs_own_judge_is_asked_only_if_it_is_given_again(caplog):
    given = JudgeConfig(url="http://mine", model="m")
    entry = EvaluationConfig(name="m", benchmark="mmvet", data="d", judge=JudgeConfig(url="http://theirs", model="m"))
    assert as_requested(entry, Request("run")).judge is None
    assert "the judge at http://theirs is not used" in caplog.text
    assert as_requested(entry, Request("run", judge=given)).judge == given
    recorded = entry.model_copy(update={"judge": JudgeConfig(verdicts="f")})
    assert as_requested(recorded, Request("run")).judge == recorded.judge


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        {"url": "http://x"},
        {"model": "m"},
        {"url": "http://x", "model": "m", "verdicts": "f"},
        {"url": "x", "model": "m"},
        {"url": "http://key@x", "model": "m"},
    ],
)
def test_a_judge_is_an_address_or_a_file(wrong):
    with pytest.raises(ValueError, match="url"):
        JudgeConfig(**wrong)


@given(st.text())
def test_no_verdict_breaks_the_reader(text):
    worth = BENCHMARKS["mmvet"]().judge_score(text)
    assert worth is None or 0 <= worth <= 1


def test_verdicts_are_read_as_the_official_code_does():
    read = BENCHMARKS["mmvet"]().judge_score
    assert [read(v) for v in ("0.5", "1.0", "1", " 0.3 (ok)", "0.4\n")] == [0.5, 1, 1, 0.3, 0.4]
    assert [read(v) for v in ("", "10", "1.5", "0.5.1", "Grade: 0.5", "nan", "-0.5")] == [None] * 7
