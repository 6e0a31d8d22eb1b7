"""Evaluation in three stages that never mix: generate (responses.jsonl), score (scores.jsonl), report (report.json)."""
