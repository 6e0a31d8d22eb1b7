"""Benchmark files in the folders of LLaVA's docs/Evaluation.md, and the answer files of LLaVA's scripts."""

import json

import pytest

from eval.benchmarks import BENCHMARKS
from eval.layout import find_folder, read_answers, read_answers_as
from eval.predictions import read_predictions
from eval.run import read_questions
from mmdora.core.config import EvaluationConfig
from mmdora.core.errors import UserError
from tests.media import write_image

SHORT = "Answer the question using a single word or phrase."


def save(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def save_lines(path, rows):
    return save(path, "".join(json.dumps(row) + "\n" for row in rows))


def make_image(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    write_image(path)


def load_questions(benchmark, data, split=None):
    return read_questions(EvaluationConfig(name=benchmark, benchmark=benchmark, data=str(data), split=split))


def prompts(benchmark, data, split=None):
    return [q.sample.messages[-1].text for q in load_questions(benchmark, data, split)]


def answers(benchmark, data, path):
    return read_predictions(path, BENCHMARKS[benchmark](), load_questions(benchmark, data))


def gqa_row(image):
    types = {"structural": "query", "semantic": "attr", "detailed": "color"}
    row = {"imageId": image, "question": "What color is it?", "answer": "red", "isBalanced": True, "groups": {}}
    return row | {"types": types, "entailed": [], "semantic": []}


@pytest.mark.parametrize("folder", ["data", "data/questions1.2"])
def test_gqa_files_in_the_data_folder(tmp_path, folder):
    save(tmp_path / folder / "testdev_balanced_questions.json", {"1": gqa_row("n1")})
    make_image(tmp_path / "data" / "images" / "n1.jpg")
    for data in (tmp_path, tmp_path / "data", tmp_path / folder / "testdev_balanced_questions.json"):
        assert prompts("gqa", data) == [f"What color is it?\n{SHORT}"]


def make_textvqa(folder):
    row = {"question_id": 34602, "image_id": "003a", "question": "what is the brand?", "answers": ["dakota"] * 10}
    save(folder / "TextVQA_0.5.1_val.json", {"data": [row]})
    make_image(folder / "train_images" / "003a.jpg")


def test_textvqa_reads_the_ocr_tokens_in_llavas_questions(tmp_path):
    make_textvqa(tmp_path)
    expected = f"What is the brand?\nReference OCR token: DAKOTA, [yellow, tail]\n{SHORT}"
    row = {"question_id": "003a", "image": "003a.jpg", "text": expected, "category": "default"}
    save_lines(tmp_path / "llava_textvqa_val_v051_ocr.jsonl", [row])
    assert prompts("textvqa", tmp_path) == [expected]
    answer_file = save_lines(
        tmp_path / "answers.jsonl", [{"question_id": "003a", "prompt": expected, "text": "Dakota"}]
    )
    assert answers("textvqa", tmp_path, answer_file) == {"34602": "Dakota"}


def test_textvqa_names_llavas_row_without_ocr_tokens(tmp_path):
    make_textvqa(tmp_path)
    row = {"question_id": "003a", "text": f"What is the brand?\n{SHORT}"}
    save_lines(tmp_path / "llava_textvqa_val_v051_ocr.jsonl", [row])
    with pytest.raises(UserError, match="row 0: no OCR tokens"):
        load_questions("textvqa", tmp_path)


def test_vizwiz_uses_llavas_prompt_and_reads_its_numbered_answers(tmp_path):
    names = [f"VizWiz_val_{number:08d}.jpg" for number in (0, 12)]
    annotation_fields = {"answers": [{"answer": "no"}] * 10, "answerable": 1, "answer_type": "yes/no"}
    rows = [{"image": name, "question": "Ok. Is this a TV? Thank you "} | annotation_fields for name in names]
    save(tmp_path / "val.json", rows)
    for name in names:
        make_image(tmp_path / "val" / name)
    hint = "When the provided information is insufficient, respond with 'Unanswerable'."
    assert prompts("vizwiz", tmp_path) == [f"Ok. is this a tv? thank you \n{hint}\n{SHORT}"] * 2
    rows = [{"question_id": number, "prompt": "", "text": "No"} for number in (0, 12)]
    assert answers("vizwiz", tmp_path, save_lines(tmp_path / "said.jsonl", rows)) == dict.fromkeys(names, "no")


def test_mmvet_reads_llavas_numbered_answers(tmp_path):
    row = {"imagename": "v1_0.png", "question": "What is d?", "answer": "1", "capability": ["math"]}
    save(tmp_path / "mm-vet" / "mm-vet.json", {"v1_0": row})
    make_image(tmp_path / "mm-vet" / "images" / "v1_0.png")
    answer_file = save_lines(tmp_path / "said.jsonl", [{"question_id": 0, "prompt": "What is d?", "text": "One."}])
    assert answers("mmvet", tmp_path, answer_file) == {"v1_0": "One."}


def test_nlvr2_repository_has_images_beside_the_data_folder(tmp_path):
    row = {"sentence": "Two dogs.", "label": "True", "identifier": "dev-1-0-0"}
    save_lines(tmp_path / "nlvr2" / "data" / "dev.json", [row])
    for side in (0, 1):
        make_image(tmp_path / "nlvr2" / "dev" / f"dev-1-0-img{side}.png")
    for data in (tmp_path, tmp_path / "nlvr2", tmp_path / "nlvr2" / "data" / "dev.json"):
        assert [q.id for q in load_questions("nlvr2", data)] == ["dev-1-0-0"]


def test_vqav2_finds_files_in_sibling_folders_of_the_question_file(tmp_path):
    row = {"question_id": 10, "image_id": 1}
    questions = save(
        tmp_path / "Questions" / "v2_OpenEnded_mscoco_val2014_questions.json",
        {"data_subtype": "val2014", "questions": [row | {"question": "Is it?"}]},
    )
    annotation = row | {"answers": [{"answer": "yes"}] * 10}
    save(tmp_path / "Annotations" / "v2_mscoco_val2014_annotations.json", {"annotations": [annotation]})
    make_image(tmp_path / "Images" / "val2014" / "COCO_val2014_000000000001.jpg")
    for data in (tmp_path, questions):
        assert [q.references for q in load_questions("vqav2", data)] == [("yes",) * 10]


def test_media_are_found_in_the_folder_above(tmp_path):
    (tmp_path / "coco").mkdir()
    (tmp_path / "val2014").mkdir()
    assert find_folder(str(tmp_path / "coco"), ["val2014"], None, "") == tmp_path / "val2014"
    assert find_folder(str(tmp_path), ["images", "val2014"], None, "") == tmp_path / "val2014"
    assert find_folder(str(tmp_path / "coco"), ["images"], None, "") == tmp_path / "coco" / "images"


def test_seedbenchs_own_results_are_json_lines_in_a_json_file(tmp_path):
    rows = [{"q_id": "1", "prediction": "A"}, {"q_id": "v0", "prediction": "B"}]
    path = save_lines(tmp_path / "results.json", rows)
    assert BENCHMARKS["seedbench"]().read_predictions(path, []) == [("1", "A"), ("v0", "B")]


def test_unknown_answer_formats_raise_an_error_with_the_known_ones(tmp_path):
    path = save(tmp_path / "said.json", [{"question_id": 1, "ans": "x"}])
    with pytest.raises(
        UserError, match="'question_id' and 'answer', or 'id' and 'response'; found 'question_id', 'ans'"
    ):
        read_answers_as(path, ("question_id", "answer"), ("id", "response"))


@pytest.mark.parametrize("answer", [True, None, ["a"], {"a": 1}, float("nan")])
def test_answers_must_be_text_or_numbers(tmp_path, answer):
    path = save(tmp_path / "said.json", [{"id": "1", "response": answer}])
    with pytest.raises(UserError, match=r"row 0: 'response' is .*, not text"):
        read_answers(path)


def test_a_folder_instead_of_an_answer_file_is_an_error(tmp_path):
    with pytest.raises(UserError, match=r"cannot be read \(Is a directory\)$"):
        read_answers(tmp_path)


def test_mme_warns_of_images_without_questions(tmp_path, caplog):
    task = tmp_path / "MME_Benchmark_release_version" / "OCR"
    save(task / "0001.txt", "Is it?  Please answer yes or no.\tYes\nIs it not?  Please answer yes or no.\tNo")
    for name in ("0001", "0002"):
        make_image(task / f"{name}.jpg")
    with caplog.at_level("WARNING"):
        assert prompts("mme", tmp_path) == [f"Is it?\n{SHORT}", f"Is it not?\n{SHORT}"]
    assert "OCR: 1 images have no questions, such as 0002.jpg" in caplog.text
