"""VQA accuracy: open questions from your own data in any dataset format, and the scorer that VQA benchmarks share.

Scorer: GT-Vision-Lab/VQA, PythonEvaluationTools/vqaEvaluation/vqaEval.py: an answer scores min(matches / 3, 1),
averaged over the leave-one-out subsets of the annotators. Two quirks are reproduced: answers are normalised only if the
annotators disagree, and a period between words is removed only where the official regular expression matches. A
question with a single reference, as in your own data, scores 0 or 1 after both sides are normalised.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache

from eval.benchmarks.base import BENCHMARKS, Question, Score
from eval.benchmarks.own_data import OwnData

ARTICLES = {"a", "an", "the"}
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
NUMBERS = {word: str(i) for i, word in enumerate(DIGITS)} | {"none": "0"}
PUNCTUATION = list(';/[]"{}()=+\\_-><@`,?!')
PERIOD = re.compile(r"(?!<=\d)(\.)(?!\d)")  # the official pattern, including its malformed look-behind
COMMA_IN_NUMBER = re.compile(r"(\d)(\,)(\d)")
CONTRACTIONS = """
aint:ain't arent:aren't cant:can't couldve:could've couldnt:couldn't couldn'tve:couldn't've couldnt've:couldn't've
didnt:didn't doesnt:doesn't dont:don't hadnt:hadn't hadnt've:hadn't've hadn'tve:hadn't've hasnt:hasn't
havent:haven't hed:he'd hed've:he'd've he'dve:he'd've hes:he's howd:how'd howll:how'll hows:how's Id've:I'd've
I'dve:I'd've Im:I'm Ive:I've isnt:isn't itd:it'd itd've:it'd've it'dve:it'd've itll:it'll let's:let's maam:ma'am
mightnt:mightn't mightnt've:mightn't've mightn'tve:mightn't've mightve:might've mustnt:mustn't mustve:must've
neednt:needn't notve:not've oclock:o'clock oughtnt:oughtn't ow's'at:'ow's'at 'ows'at:'ow's'at 'ow'sat:'ow's'at
shant:shan't shed've:she'd've she'dve:she'd've she's:she's shouldve:should've shouldnt:shouldn't
shouldnt've:shouldn't've shouldn'tve:shouldn't've somebody'd:somebodyd somebodyd've:somebody'd've
somebody'dve:somebody'd've somebodyll:somebody'll somebodys:somebody's someoned:someone'd someoned've:someone'd've
someone'dve:someone'd've someonell:someone'll someones:someone's somethingd:something'd somethingd've:something'd've
something'dve:something'd've somethingll:something'll thats:that's thered:there'd thered've:there'd've
there'dve:there'd've therere:there're theres:there's theyd:they'd theyd've:they'd've they'dve:they'd've
theyll:they'll theyre:they're theyve:they've twas:'twas wasnt:wasn't wed've:we'd've we'dve:we'd've weve:we've
werent:weren't whatll:what'll whatre:what're whats:what's whatve:what've whens:when's whered:where'd wheres:where's
whereve:where've whod:who'd whod've:who'd've who'dve:who'd've wholl:who'll whos:who's whove:who've whyll:why'll
whyre:why're whys:why's wont:won't wouldve:would've wouldnt:wouldn't wouldnt've:wouldn't've wouldn'tve:wouldn't've
yall:y'all yall'll:y'all'll y'allll:y'all'll yall'd've:y'all'd've y'alld've:y'all'd've y'all'dve:y'all'd've
youd:you'd youd've:you'd've you'dve:you'd've youll:you'll youre:you're youve:you've
"""
EXPANDED = dict(pair.split(":") for pair in CONTRACTIONS.split())


def strip_whitespace(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def process_punctuation(text: str) -> str:
    out = text
    for mark in PUNCTUATION:
        if f"{mark} " in text or f" {mark}" in text or COMMA_IN_NUMBER.search(text):
            out = out.replace(mark, "")
        else:
            out = out.replace(mark, " ")
    return PERIOD.sub(
        "", out, re.UNICODE
    )  # the official call passes the flag as `count`: at most 32 periods are removed


def process_digits_and_articles(text: str, contractions: Mapping[str, str] = EXPANDED) -> str:
    words = [NUMBERS.get(word, word) for word in text.lower().split()]
    kept = [word for word in words if word not in ARTICLES]
    return " ".join(contractions.get(word, word) for word in kept)


@lru_cache(maxsize=100_000)  # VQAv2's two million answers contain many repeats
def normalize(text: str) -> str:
    return process_digits_and_articles(process_punctuation(strip_whitespace(text)))


def vqa_accuracy(response: str, references: Sequence[str]) -> float:
    """Return the official accuracy, 0 to 1, against several annotators' answers. With one annotator it is always 0."""
    answer, gold = strip_whitespace(response), [strip_whitespace(r) for r in references]
    if len(set(gold)) > 1:
        answer, gold = normalize(answer), [normalize(g) for g in gold]
    return leave_one_out(answer, gold)


def leave_one_out(answer: str, gold: Sequence[str]) -> float:
    """Return min(matches / 3, 1), averaged over the subsets that leave out one annotator."""
    matches = sum(g == answer for g in gold)
    return sum(min(1.0, (matches - (g == answer)) / 3) for g in gold) / len(gold)


def evalai_normalize(text: str) -> str:
    """Remove commas and question marks, then normalise, as TextVQA's scorer and LLaVA's EvalAI submissions do.

    Source: facebookresearch/mmf, mmf/utils/m4c_evaluators.py, EvalAIAnswerProcessor.
    """
    return normalize(text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip())


@BENCHMARKS.register("vqa")
class VQA(OwnData):
    """VQA accuracy: open questions from your own data, scored like VQA v2.0 (GT-Vision-Lab/VQA, vqaEval.py)."""

    def score(self, response: str, question: Question) -> Score:
        if len(question.references) == 1:
            value = float(normalize(response) == normalize(question.references[0]))
        else:
            value = vqa_accuracy(response, question.references)
        return Score.free_text(value, response)
