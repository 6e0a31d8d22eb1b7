"""A judge's verdicts on answers that no rule can score: by a language model at an OpenAI-compatible address, or from a
file of verdicts that were given before.

Verdicts are kept in the result's folder as `verdicts.jsonl`, one fsynced line each, keyed by the judge and all that it
was told: killed and restarted, nothing is asked twice, and a changed answer, prompt or judge is asked again. A verdict
that cannot be read is an error that names the question, and is not kept.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from http.client import HTTPException
from pathlib import Path
from typing import Any

from eval.benchmarks import Benchmark, Question
from eval.files import json_text, write_whole
from eval.layout import fields, read_jsonl
from mmdora.core.config import JudgeConfig
from mmdora.core.config_files import find_path
from mmdora.core.errors import RunError, UserError

log = logging.getLogger(__name__)

CONCURRENT = 8  # questions that wait for the model at once
TIMEOUT = 120.0  # seconds that one of them may take
ATTEMPTS = 4
PAUSE = 1.0  # seconds before the second attempt; doubled before each further one
AGAIN = {408, 409, 425, 429, 500, 502, 503, 504}  # HTTP statuses that another attempt may mend

Row = dict[str, str]  # id, verdict, model, prompt (a digest), key


def describe_judge(benchmark: Benchmark, config: JudgeConfig) -> dict[str, Any]:
    """What a receipt says of the judge. Raises UserError for a benchmark that is not judged, and for verdicts that are
    not there."""
    if not benchmark.is_judged:
        raise UserError(f"judge: {type(benchmark).__name__} is not judged; leave the judge out")
    if config.verdicts is None:
        return {"url": config.url, "model": config.model, "prompt_version": benchmark.judge_version}
    path = find_path(config.verdicts)
    if not path.is_file():
        raise UserError(f"judge.verdicts: no such file {config.verdicts!r}")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:32]
    return {"verdicts": config.verdicts, "file": digest, "prompt_version": benchmark.judge_version}


def judge_all(
    benchmark: Benchmark,
    config: JudgeConfig,
    responses: Mapping[str, str],
    questions: Sequence[Question],
    folder: Path,
) -> dict[str, float]:
    """What each answer is worth to the judge, 0 to 1, by question id.

    Raises RunError or UserError where the judge cannot be reached, or a verdict cannot be read.
    """
    judge = describe_judge(benchmark, config)
    prompts = {q.id: benchmark.judge_prompt(responses[q.id], q) for q in questions}
    keys = {question_id: _digest([prompt, judge]) for question_id, prompt in prompts.items()}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "verdicts.jsonl"
    kept = {i: row for i, row in read_verdicts(path, keys).items() if benchmark.judge_score(row["verdict"]) is not None}
    wanted = {question_id: prompt for question_id, prompt in prompts.items() if question_id not in kept}
    given = recorded(find_path(config.verdicts), wanted) if config.verdicts is not None else ask_all(config, wanted)
    unreadable: dict[str, str] = {}
    with path.open("a", encoding="utf-8", errors="backslashreplace") as file:
        for question_id, verdict, model in given:
            if benchmark.judge_score(verdict) is None:
                unreadable[question_id] = verdict
                continue
            prompt = _digest(prompts[question_id])
            row = {"id": question_id, "verdict": verdict, "model": model, "prompt": prompt, "key": keys[question_id]}
            kept[question_id] = row
            file.write(json_text(row))
            file.flush()
            os.fsync(file.fileno())
    if unreadable:
        question_id, verdict = min(unreadable.items())
        what = f"{len(unreadable)} verdicts cannot be read, such as that on {question_id}: {verdict!r:.80}"
        raise (RunError if config.verdicts is None else UserError)(f"judge: {what}")
    # The file as a whole, in the order of the questions, without what was kept of other answers.
    write_whole(path, "".join(json_text(kept[question_id]) for question_id in prompts))
    return {question_id: _worth(benchmark, kept[question_id]["verdict"]) for question_id in prompts}


def read_verdicts(path: Path, keys: Mapping[str, str]) -> dict[str, Row]:
    """The verdicts kept that were given to what is asked now, by question id. A line that was cut off is dropped, and
    ended, so that another can follow it."""
    if not path.is_file():
        return {}
    text, kept = path.read_text(encoding="utf-8", errors="replace"), {}
    for line in text.split("\n"):
        try:
            row = json.loads(line) if line else {}
            if row and row["key"] == keys.get(row["id"]):
                kept[row["id"]] = {name: str(row[name]) for name in ("id", "verdict", "model", "prompt", "key")}
        except (ValueError, KeyError, TypeError):
            log.warning("%s: dropped a line that was cut off", path)
    if text and not text.endswith("\n"):
        with path.open("a", encoding="utf-8") as file:
            file.write("\n")
    return kept


def recorded(path: Path, prompts: Mapping[str, str]) -> Iterator[tuple[str, str, str]]:
    """(question id, verdict, model) from JSON lines with `id` and `verdict`. Raises UserError for questions without
    one, and for one that its line's `prompt`, if it has that, says was given on another answer."""
    rows: dict[str, dict[str, Any]] = {}
    for number, row in enumerate(read_jsonl(path)):
        question_id, _ = fields(row, path, f"row {number}", "id", "verdict")
        if str(question_id) in rows:
            raise UserError(f"{path}, row {number}: a second verdict on {question_id}")
        rows[str(question_id)] = row
    if missing := [question_id for question_id in prompts if question_id not in rows]:
        raise UserError(f"{path}: {len(missing)} questions have no verdict, such as {missing[0]}")
    for question_id, prompt in prompts.items():
        row = rows[question_id]
        if row.get("prompt", _digest(prompt)) != _digest(prompt):
            raise UserError(f"{path}: the verdict on {question_id} was given on another answer, or asked for otherwise")
        yield question_id, str(row["verdict"]), str(row.get("model", ""))


def ask_all(config: JudgeConfig, prompts: Mapping[str, str]) -> Iterator[tuple[str, str, str]]:
    """(question id, verdict, model) as they come, several at once. Raises RunError that names the address."""
    with ThreadPoolExecutor(CONCURRENT) as pool:
        asked = {pool.submit(ask, config, prompt): question_id for question_id, prompt in prompts.items()}
        try:
            for future in as_completed(asked):
                verdict, model = future.result()
                yield asked[future], verdict, model
        finally:
            pool.shutdown(cancel_futures=True)


def ask(config: JudgeConfig, prompt: str) -> tuple[str, str]:
    """The model's words, and the name that it gives itself. Greedy: temperature 0."""
    address = f"{str(config.url).rstrip('/')}/chat/completions"
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get("OPENAI_API_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    body = {"model": config.model, "messages": [{"role": "user", "content": prompt}], "temperature": 0}
    request = urllib.request.Request(address, json.dumps(body).encode(), headers)
    for attempt in range(ATTEMPTS):
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT) as reply:
                return _words(reply.read(), address, config)
        except urllib.error.HTTPError as error:
            why = f"HTTP {error.code}: {error.read(300).decode(errors='replace')}"
            if error.code not in AGAIN:
                break
        except (OSError, HTTPException) as error:
            why = str(error) or type(error).__name__
        if attempt + 1 < ATTEMPTS:
            time.sleep(PAUSE * 2**attempt)
    raise RunError(f"judge at {address}: {why}")


def _words(reply: bytes, address: str, config: JudgeConfig) -> tuple[str, str]:
    try:
        content = json.loads(reply)
        words, model = content["choices"][0]["message"]["content"], content.get("model", config.model)
        return ("" if words is None else str(words)), str(model)
    except (ValueError, LookupError, TypeError, AttributeError):
        raise RunError(f"judge at {address}: not a chat completion: {reply[:200].decode(errors='replace')}") from None


def _worth(benchmark: Benchmark, verdict: str) -> float:
    worth = benchmark.judge_score(verdict)
    assert worth is not None, "only verdicts that can be read are kept"
    return worth


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]
