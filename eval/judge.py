"""Verdicts on answers that no rule can score: from a language model at an OpenAI-compatible URL, or from a file.

Verdicts are stored in the result's folder as `verdicts.jsonl`, one fsynced line each, keyed by the judge and its whole
prompt. A restarted evaluation requests only the verdicts that are missing; a changed answer, prompt or judge needs a
new one. A verdict that cannot be parsed is an error that names the question, and is not stored.
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
from eval.digests import json_digest
from eval.files import json_text, write_whole
from eval.layout import fields, read_jsonl
from mmdora.core.config import JudgeConfig
from mmdora.core.config_files import find_path
from mmdora.core.errors import RunError, UserError

log = logging.getLogger(__name__)

CONCURRENT_REQUESTS = 8
TIMEOUT = 120.0  # seconds for each request
ATTEMPTS = 4
PAUSE = 1.0  # seconds before the second attempt; doubled before each further attempt
RETRY_STATUSES = {408, 409, 425, 429, 500, 502, 503, 504}  # HTTP statuses after which another attempt may succeed

Row = dict[str, str]  # id, verdict, model, prompt (a digest), key


def describe_judge(benchmark: Benchmark, config: JudgeConfig) -> dict[str, Any]:
    """Return the receipt's entry for the judge.

    Raises UserError if the benchmark uses no judge, or the file of verdicts does not exist.
    """
    if not benchmark.is_judged:
        raise UserError(f"judge: {type(benchmark).__name__} uses no judge; remove the setting")
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
    """Return the judge's score of each answer, 0 to 1, by question id.

    Raises RunError or UserError if the judge cannot be reached, or a verdict cannot be parsed.
    """
    judge = describe_judge(benchmark, config)
    prompts = {q.id: benchmark.judge_prompt(responses[q.id], q) for q in questions}
    keys = {question_id: _digest([prompt, judge]) for question_id, prompt in prompts.items()}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "verdicts.jsonl"
    stored = {i: row for i, row in read_stored(path, keys).items() if benchmark.judge_score(row["verdict"]) is not None}
    missing = {question_id: prompt for question_id, prompt in prompts.items() if question_id not in stored}
    if config.verdicts is None:
        verdicts = request_verdicts(config, missing)
    else:
        verdicts = recorded_verdicts(find_path(config.verdicts), missing)
    unparsed: dict[str, str] = {}
    with path.open("a", encoding="utf-8", errors="backslashreplace") as file:
        for question_id, verdict, model in verdicts:
            if benchmark.judge_score(verdict) is None:
                unparsed[question_id] = verdict
                continue
            prompt = _digest(prompts[question_id])
            row = {"id": question_id, "verdict": verdict, "model": model, "prompt": prompt, "key": keys[question_id]}
            stored[question_id] = row
            file.write(json_text(row))
            file.flush()
            os.fsync(file.fileno())
    if unparsed:
        question_id, verdict = min(unparsed.items())
        message = f"judge: {len(unparsed)} verdicts cannot be parsed, such as the one on {question_id}: {verdict!r:.80}"
        raise (RunError if config.verdicts is None else UserError)(message)
    # Rewrite the file in the order of the questions, without verdicts on other answers.
    write_whole(path, "".join(json_text(stored[question_id]) for question_id in prompts))
    return {question_id: _score(benchmark, stored[question_id]["verdict"]) for question_id in prompts}


def read_stored(path: Path, keys: Mapping[str, str]) -> dict[str, Row]:
    """Return the stored verdicts with the given keys, by question id.

    An incomplete last line is skipped, and completed with a line break so that another line can follow it.
    """
    if not path.is_file():
        return {}
    text, stored = path.read_text(encoding="utf-8", errors="replace"), {}
    for line in text.split("\n"):
        try:
            row = json.loads(line) if line else {}
            if row and row["key"] == keys.get(row["id"]):
                stored[row["id"]] = {name: str(row[name]) for name in ("id", "verdict", "model", "prompt", "key")}
        except (ValueError, KeyError, TypeError):
            log.warning("%s: skipped an incomplete line", path)
    if text and not text.endswith("\n"):
        with path.open("a", encoding="utf-8") as file:
            file.write("\n")
    return stored


def recorded_verdicts(path: Path, prompts: Mapping[str, str]) -> Iterator[tuple[str, str, str]]:
    """Yield (question id, verdict, model) from a file of JSON lines with `id` and `verdict`.

    Raises UserError for questions without a verdict, for a second verdict on a question, and for a line whose `prompt`
    digest (optional) belongs to another answer.
    """
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
            raise UserError(f"{path}: the verdict on {question_id} belongs to another answer or another judge prompt")
        yield question_id, str(row["verdict"]), str(row.get("model", ""))


def request_verdicts(config: JudgeConfig, prompts: Mapping[str, str]) -> Iterator[tuple[str, str, str]]:
    """Yield (question id, verdict, model) as replies arrive. Raises RunError that names the URL."""
    with ThreadPoolExecutor(CONCURRENT_REQUESTS) as pool:
        ids = {pool.submit(request_verdict, config, prompt): question_id for question_id, prompt in prompts.items()}
        try:
            for future in as_completed(ids):
                verdict, model = future.result()
                yield ids[future], verdict, model
        finally:
            pool.shutdown(cancel_futures=True)


def request_verdict(config: JudgeConfig, prompt: str) -> tuple[str, str]:
    """Return the judge's reply at temperature 0, and the model name in it. The API key is OPENAI_API_KEY."""
    address = f"{str(config.url).rstrip('/')}/chat/completions"
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get("OPENAI_API_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    body = {"model": config.model, "messages": [{"role": "user", "content": prompt}], "temperature": 0}
    request = urllib.request.Request(address, json.dumps(body).encode(), headers)
    for attempt in range(ATTEMPTS):
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT) as reply:
                return _parse_reply(reply.read(), address, config)
        except urllib.error.HTTPError as error:
            why = f"HTTP {error.code}: {error.read(300).decode(errors='replace')}"
            if error.code not in RETRY_STATUSES:
                break
        except (OSError, HTTPException) as error:
            why = str(error) or type(error).__name__
        if attempt + 1 < ATTEMPTS:
            time.sleep(PAUSE * 2**attempt)
    raise RunError(f"judge at {address}: {why}")


def _parse_reply(reply: bytes, address: str, config: JudgeConfig) -> tuple[str, str]:
    try:
        content = json.loads(reply)
        text, model = content["choices"][0]["message"]["content"], content.get("model", config.model)
        return ("" if text is None else str(text)), str(model)
    except (ValueError, LookupError, TypeError, AttributeError):
        raise RunError(f"judge at {address}: not a chat completion: {reply[:200].decode(errors='replace')}") from None


def _score(benchmark: Benchmark, verdict: str) -> float:
    score = benchmark.judge_score(verdict)
    assert score is not None, "only verdicts that can be parsed are stored"
    return score


def _digest(value: Any) -> str:
    return json_digest(value, sort_keys=True)
