"""Loaders on small local files in the schemas of the public sets (shared knowledge: columns, types, nesting)."""

import csv
import json
import re
from io import BytesIO

import datasets
import numpy as np
import pytest
import yaml
from PIL import Image

from care_hf.data_settings import DataSettings
from care_hf.loaders import LazyCases, load_cases, load_suite
from care_hf.shipped import shipped
from care_hf.utility_sets import LETTER_PLEASE, accepted_answers

SETTINGS = shipped("configs") / "datasets"

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}
BY_COLOUR = {value: name for name, value in COLOURS.items()}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    datasets.disable_progress_bars()


def picture(colour):
    return Image.new("RGB", (8, 8), COLOURS[colour])


def write(path, rows, images=()):
    """Rows as parquet, JSON, JSON lines or CSV; `images` are columns of colours, written as images."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    else:
        columns = {name: [row[name] for row in rows] for name in rows[0]}
        table = datasets.Dataset.from_dict({name: columns[name] for name in columns if name not in images})
        features = dict(table.features) | dict.fromkeys(images, datasets.Image())
        for name in images:
            columns[name] = [None if colour is None else picture(colour) for colour in columns[name]]
        table = datasets.Dataset.from_dict(columns, features=datasets.Features({n: features[n] for n in columns}))
        table.to_parquet(path)
    return path


def content(case):
    """The parts of the one message: texts, and images by the name of their colour."""
    (message,) = case.messages
    assert message["role"] == "user"
    return [
        part["text"] if part["type"] == "text" else BY_COLOUR[part["image"].getpixel((4, 4))]
        for part in message["content"]
    ]


def told(case):
    return content(case), case.request, case.reference, case.target, case.category, case.choices


# Plain requests


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".json", ".jsonl"])
def test_advbench(tmp_path, suffix):
    write(tmp_path / f"train{suffix}", [{"prompt": "Do X", "target": "Sure, here is X"}])
    (case,) = load_cases("advbench", id=tmp_path)["advbench"]
    assert told(case) == (["Do X"], "Do X", None, "Sure, here is X", "", ())


def test_advbench_without_near_duplicates(tmp_path):
    prompts = ["Write a guide on how to bake", "Write a guide on how to bake bread", "Name three rivers"]
    file = write(tmp_path / "train.csv", [{"prompt": prompt, "target": "Sure"} for prompt in prompts])
    cases = load_cases("advbench", id=str(file), options={"distinct": 0.8})["advbench"]
    assert [case.request for case in cases] == [prompts[0], prompts[2]]  # 7 of 8 words are shared
    write(file, [{"prompt": prompt, "target": "Sure"} for prompt in prompts[1::-1]])
    assert len(load_cases("advbench", id=str(file), options={"distinct": 0.87})["advbench"]) == 1
    assert len(load_cases("advbench", id=str(file), options={"distinct": 0.88})["advbench"]) == 2


def test_harmbench(tmp_path):
    write(tmp_path / "standard" / "train-00000-of-00001.parquet", [{"prompt": "Do X", "category": "misc"}])
    row = {"prompt": "Use it", "context": "A thing", "category": "misc"}
    write(tmp_path / "contextual" / "train-00000-of-00001.parquet", [row])
    write(tmp_path / "copyright" / "train-00000-of-00001.parquet", [{"prompt": "Sing it", "tags": ["song", "new"]}])
    told_of = {}
    for name in ("harmbench", "harmbench_contextual", "harmbench_copyright"):
        (told_of[name],) = map(told, load_cases(name, id=str(tmp_path))[name])
    assert told_of["harmbench"] == (["Do X"], "Do X", None, None, "misc", ())
    text = "A thing\n\n---\n\nUse it"
    assert told_of["harmbench_contextual"] == ([text], text, None, None, "misc", ())
    assert told_of["harmbench_copyright"] == (["Sing it"], "Sing it", None, None, "song, new", ())


def test_a_contextual_behaviour_needs_its_context(tmp_path):
    file = write(tmp_path / "train.csv", [{"prompt": "Use it", "category": "misc"}])
    with pytest.raises(ValueError, match=r"lacks the columns {'context': \['context'\]}"):
        load_cases("harmbench_contextual", id=str(file))


@pytest.mark.parametrize("column", ["forbidden_prompt", "prompt"])
def test_strongreject(tmp_path, column):
    write(tmp_path / "train.csv", [{"category": "Violence", "source": "custom", column: "Do X"}])
    (case,) = load_cases("strongreject", id=str(tmp_path))["strongreject"]
    assert told(case) == (["Do X"], "Do X", None, None, "Violence", ())


def test_redteam_2k(tmp_path):
    write(tmp_path / "RedTeam_2K.csv", [{"question": "Do X", "policy": "Fraud"}])
    (case,) = load_cases("redteam_2k", id=str(tmp_path))["redteam_2k"]
    assert told(case) == (["Do X"], "Do X", None, None, "Fraud", ())


def xstest_rows():
    kinds = [("homonyms", "safe"), ("contrast_homonyms", "unsafe"), ("figurative_language", "safe")]
    return [
        {"prompt": f"How {index}?", "focus": "kill", "type": kind, "note": "", "label": label}
        for index, (kind, label) in enumerate(kinds)
    ]


def test_xstest(tmp_path):
    write(tmp_path / "test.parquet", xstest_rows())
    sets = load_cases("xstest", id=str(tmp_path))
    assert {part: [(case.request, case.category) for case in cases] for part, cases in sets.items()} == {
        "safe": [("How 0?", "homonyms"), ("How 2?", "figurative_language")],
        "unsafe": [("How 1?", "contrast_homonyms")],
    }


def test_an_unknown_label_is_refused(tmp_path):
    file = write(tmp_path / "test.csv", [*xstest_rows(), {**xstest_rows()[0], "label": "Safe"}])
    with pytest.raises(ValueError, match=r"xstest\[3\]: label='Safe' must be one of \('safe', 'unsafe'\)"):
        load_cases("xstest", id=str(file))


# Attacks


@pytest.fixture
def jailbreakv(tmp_path):
    names = ["id", "jailbreak_query", "redteam_query", "format", "policy", "image_path", "from", "selected_mini"]
    rows = [
        [0, "As Omega, do X", "Do X", "Template", "Fraud", "llm_transfer_attack/red.png", "GPT", True],
        [1, "The image shows", "Do Y", "figstep", "Malware", "figstep/green.png", "Hand", True],
        [2, "As Omega, do Z", "Do Z", "Template", "Malware", "llm_transfer_attack/blue.png", "GPT", True],
    ]
    rows = [dict(zip(names, row, strict=True)) for row in rows]
    write(tmp_path / "set" / "JailBreakV_28K" / "mini_JailBreakV_28K.csv", rows)
    write(tmp_path / "set" / "JailBreakV_28K" / "JailBreakV_28K.csv", rows[:1])
    for row in rows:
        file = tmp_path / "images" / row["image_path"]
        file.parent.mkdir(parents=True, exist_ok=True)
        picture(file.stem).save(file)
    return tmp_path


def test_jailbreakv(jailbreakv):
    where = {"id": str(jailbreakv / "set"), "image_root": str(jailbreakv / "images")}
    sets = load_cases("jailbreakv", **where)
    assert {part: list(map(told, cases)) for part, cases in sets.items()} == {
        "Template": [
            (["red", "As Omega, do X"], "Do X", None, None, "Fraud", ()),
            (["blue", "As Omega, do Z"], "Do Z", None, None, "Malware", ()),
        ],
        "figstep": [(["green", "The image shows"], "Do Y", None, None, "Malware", ())],
    }
    whole = load_cases("jailbreakv", splits=["JailBreakV_28K"], **where)
    assert {part: len(cases) for part, cases in whole.items()} == {"Template": 1}


def test_missing_images_are_named_before_any_work(jailbreakv):
    (jailbreakv / "images" / "figstep" / "green.png").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"1 of 3 images are missing.*figstep/green.png.* zip file .*image_root"
    ):
        load_cases("jailbreakv", id=str(jailbreakv / "set"), image_root=str(jailbreakv / "images"))
    with pytest.raises(FileNotFoundError, match=r"3 of 3 images are missing.*image_root=None"):
        load_cases("jailbreakv", id=str(jailbreakv / "set"))


@pytest.fixture
def mm_safetybench(tmp_path):
    for scenario in ("Fraud", "Sex"):
        for split, colour in (("SD", "red"), ("SD_TYPO", "green"), ("TYPO", "blue"), ("Text_only", None)):
            # In another order than the plain questions: they are joined by id, not by place.
            ids = ["0", "1"] if colour is None else ["1", "0"]
            rows = [{"id": i, "question": f"{scenario} {split} {i}", "image": colour} for i in ids]
            write(tmp_path / "data" / scenario / f"{split}-00000-of-00001.parquet", rows, images=["image"])
    return {"id": str(tmp_path), "configs": ["Fraud", "Sex"]}


def test_mm_safetybench(mm_safetybench):
    sets = load_cases("mm_safetybench", **mm_safetybench)
    assert list(sets) == ["SD", "SD_TYPO", "TYPO", "Text_only"]
    for split, colour in (("SD", "red"), ("SD_TYPO", "green"), ("TYPO", "blue")):
        assert list(map(told, sets[split])) == [
            ([colour, f"{scenario} {split} {i}"], f"{scenario} Text_only {i}", None, None, scenario, ())
            for scenario in ("Fraud", "Sex")
            for i in "10"
        ]
    assert told(sets["Text_only"][3]) == (["Sex Text_only 1"], "Sex Text_only 1", None, None, "Sex", ())


def test_a_limit_shows_all_scenarios(mm_safetybench):
    sets = load_cases("mm_safetybench", limit=2, **mm_safetybench)
    assert list(sets) == ["SD", "SD_TYPO", "TYPO", "Text_only"]
    assert all([case.category for case in cases] == ["Fraud", "Sex"] for cases in sets.values())
    assert len(load_cases("mm_safetybench", limit=9, **mm_safetybench)["SD"]) == 4
    for limit in (0, True, 1.5):
        with pytest.raises(ValueError, match="limit="):
            load_cases("mm_safetybench", limit=limit, **mm_safetybench)


def test_mm_safetybench_rows_without_a_plain_question(mm_safetybench, tmp_path):
    plain = tmp_path / "data" / "Fraud" / "Text_only-00000-of-00001.parquet"
    for ids, message in (("0", "SD has the id '1', which Text_only lacks"), ("011", "ids that are not unique")):
        write(plain, [{"id": i, "question": "q", "image": None} for i in ids], images=["image"])
        with pytest.raises(ValueError, match=message):
            load_cases("mm_safetybench", **mm_safetybench)


def test_mm_safetybench_needs_its_plain_questions(mm_safetybench):
    with pytest.raises(ValueError, match="add 'Text_only' to `splits`"):
        load_cases("mm_safetybench", splits=["SD"], **mm_safetybench)
    with pytest.raises(OSError, match=r"no file in .* is called 'SD' .* in a folder 'Fraud2'"):
        load_cases("mm_safetybench", id=mm_safetybench["id"], configs=["Fraud2", "Sex"])


def test_figstep(tmp_path):
    names = ["dataset", "category_id", "task_id", "category_name", "question", "instruction"]
    row = dict(zip(names, ["ForbidQI", 1, 1, "Kitchen", "How to bake?", "Steps to bake."], strict=True))
    write(tmp_path / "safebench.csv", [row])
    (case,) = load_cases("figstep", id=str(tmp_path), options={"size": [300, 200]})["figstep"]
    image, text = case.messages[0]["content"]
    assert (case.request, case.category) == ("How to bake?", "Kitchen")
    assert text["text"].startswith("The image shows a list numbered 1, 2, and 3") and "bake" not in text["text"]
    pixels = np.asarray(image["image"])
    assert pixels.shape == (200, 300, 3) and pixels.min() == 0 and pixels.max() == 255


def test_a_set_may_be_a_file_at_an_address(tmp_path):
    row = {"question": "How to bake?", "instruction": "Steps to bake.", "category_name": "Kitchen"}
    file = write(tmp_path / "tiny.csv", [row])
    cases = load_cases("figstep", splits=["tiny"], data_files={"tiny": str(file)})["figstep"]
    assert [case.request for case in cases] == ["How to bake?"]
    with pytest.raises(OSError, match=r"`data_files` says nothing of this split; it has \['safebench', 'tiny'\]"):
        load_cases("figstep", splits=["train"])


def vlguard_rows():
    both = [
        {"safe_instruction": "What is it?", "response": "A cup."},
        {"unsafe_instruction": "Insult them.", "response": "I cannot."},
    ]
    alone = [{"instruction": "Explain the plan.", "response": "I'm sorry."}]
    safe = {"id": "1", "image": "cups/red.png", "safe": True, "harmful_category": None, "harmful_subcategory": None}
    unsafe = {"id": "2", "image": "plans/blue.png", "safe": False, "harmful_category": "risk"}
    return [{**safe, "instr-resp": both}, {**unsafe, "harmful_subcategory": "violence", "instr-resp": alone}]


VLGUARD = {
    "safe_safe": [(["red", "What is it?"], "What is it?", "A cup.", None, "", ())],
    "safe_unsafe": [(["red", "Insult them."], "Insult them.", None, None, "", ())],
    "unsafe": [(["blue", "Explain the plan."], "Explain the plan.", None, None, "violence", ())],
}


def test_vlguard(tmp_path):
    write(tmp_path / "test.json", vlguard_rows())
    for row in vlguard_rows():
        file = tmp_path / "unpacked" / row["image"]
        file.parent.mkdir(parents=True)
        picture(file.stem).save(file)
    sets = load_cases("vlguard", id=str(tmp_path), image_root=str(tmp_path / "unpacked"))
    assert {part: list(map(told, cases)) for part, cases in sets.items()} == VLGUARD
    with pytest.raises(FileNotFoundError, match=r"3 of 3 images are missing.*test.zip"):
        load_cases("vlguard", id=str(tmp_path))


def test_vlguard_as_parquet_has_all_keys_in_every_pair(tmp_path):
    keys = ("safe_instruction", "unsafe_instruction", "instruction", "response")
    rows = [
        {**row, "image": row["image"].split("/")[1][:-4], "instr-resp": [{k: p.get(k) for k in keys} for p in pairs]}
        for row in vlguard_rows()
        for pairs in [row["instr-resp"]]
    ]
    file = write(tmp_path / "test.parquet", rows, images=["image"])
    sets = load_cases("vlguard", id=str(file))
    assert {part: list(map(told, cases)) for part, cases in sets.items()} == VLGUARD


# Utility


def mmbench_row(**changes):
    row = {"index": 7, "question": "Which one?", "hint": "nan", "answer": "B", "A": "cat", "B": "dog"}
    row |= {"C": "nan", "D": "nan", "category": "animals", "image": "red", "source": "s", "L2-category": "c"}
    return row | changes


def test_mmbench(tmp_path):
    rows = [mmbench_row(), mmbench_row(hint="It barks.", C="cow", D="emu", answer="D", image="blue")]
    write(tmp_path / "en" / "dev-00000-of-00001.parquet", rows, images=["image"])
    write(tmp_path / "cn" / "dev-00000-of-00001.parquet", rows[:1], images=["image"])
    short, long = load_cases("mmbench", id=str(tmp_path))["mmbench"]
    text = f"Which one?\nA. cat\nB. dog\n{LETTER_PLEASE}"
    assert told(short) == (["red", text], "Which one?", "B", None, "animals", ("cat", "dog"))
    text = f"It barks.\nWhich one?\nA. cat\nB. dog\nC. cow\nD. emu\n{LETTER_PLEASE}"
    assert told(long) == (["blue", text], "Which one?", "D", None, "animals", ("cat", "dog", "cow", "emu"))


@pytest.mark.parametrize("answer", ["C", "nan", "dog", "", None])
def test_an_answer_that_is_no_choice_is_refused_at_once(tmp_path, answer):
    file = write(tmp_path / "dev.parquet", [mmbench_row(), mmbench_row(answer=answer)], images=["image"])
    with pytest.raises(ValueError, match=rf"mmbench\[1\]: answer={answer!r} is none of the 2 choices"):
        load_cases("mmbench", id=str(file))


def test_mmvet(tmp_path):
    row = {"question_id": "v1_0", "question": "x?", "answer": "x=1 <AND> y=2 <OR> (1, 2)", "capability": "ocr,math"}
    file = write(tmp_path / "test.parquet", [{**row, "image": "red"}], images=["image"])
    (case,) = load_cases("mmvet", id=str(file))["mmvet"]
    assert told(case) == (["red", "x?"], "x?", "x=1 <AND> y=2 <OR> (1, 2)", None, "ocr,math", ())
    assert accepted_answers(case.reference) == [("x=1", "y=2"), ("(1, 2)",)]
    assert accepted_answers("yes") == [("yes",)]


def test_scienceqa(tmp_path):
    row = {"question": "Which?", "choices": ["ice", "salt", "oil"], "answer": 2, "hint": "", "subject": "chemistry"}
    rows = [{**row, "image": "green"}, {**row, "image": None, "answer": 0, "hint": "It melts."}]
    file = write(tmp_path / "test.parquet", rows, images=["image"])
    pictured, plain = load_cases("scienceqa", id=str(file))["scienceqa"]
    options = f"Which?\nA. ice\nB. salt\nC. oil\n{LETTER_PLEASE}"
    choices = ("ice", "salt", "oil")
    assert told(pictured) == (["green", options], "Which?", "C", None, "chemistry", choices)
    assert told(plain) == ([f"It melts.\n{options}"], "Which?", "A", None, "chemistry", choices)


def test_scienceqa_answers_count_from_zero(tmp_path):
    row = {"image": None, "question": "Which?", "choices": ["ice", "salt"], "answer": 2}
    file = write(tmp_path / "test.parquet", [row], images=["image"])
    with pytest.raises(ValueError, match="answer=2 is none of the 2 choices"):
        load_cases("scienceqa", id=str(file))


def mmmu_row(question, options, answer, **images):
    row = {"id": "validation_Art_Theory_3", "question": question, "options": options, "answer": answer}
    return row | {f"image_{number}": images.get(f"image_{number}") for number in range(1, 8)}


def mmmu(path, *rows):
    write(path / "validation.parquet", list(rows), images=[f"image_{number}" for number in range(1, 8)])
    return load_cases("mmmu", id=str(path))["mmmu"]


def test_mmmu_puts_images_where_they_are_named(tmp_path):
    question, options = "Is <image 2> after <image 1>? See <image 2>.", "['It\\'s <image 1>', \"no\"]"
    row = mmmu_row(question, options, "B", image_1="red", image_2="blue")
    (case,) = mmmu(tmp_path, row)
    begin = ["Is ", "blue", " after ", "red", "? See ", "image 2"]
    assert content(case) == [*begin, ".\nA. It's ", "image 1", f"\nB. no\n{LETTER_PLEASE}"]
    assert (case.reference, case.choices, case.category) == ("B", ("It's <image 1>", "no"), "Art_Theory")


def test_mmmu_open_questions_and_unnamed_images(tmp_path):
    (case,) = mmmu(tmp_path, mmmu_row("How many?", "[]", "3.5", image_1="green", image_3="red"))
    assert content(case) == ["green", "red", "How many?\nAnswer the question using a single word or phrase."]
    assert (case.reference, case.choices) == ("3.5", ())


def test_mmmu_rows_that_cannot_be_read(tmp_path):
    with pytest.raises(ValueError, match="is no list in Python's notation"):
        mmmu(tmp_path / "a", mmmu_row("Which?", "[yes, no]", "A", image_1="red"))
    cases = mmmu(tmp_path / "b", mmmu_row("See <image 2>.", "['a', 'b']", "A", image_1="red"))
    with pytest.raises(ValueError, match=r"mmmu\[0\]: names <image 2>, but image_2 is empty; it has \[1\]"):
        cases[0]


# What all have in common


def test_missing_columns_are_named_with_what_was_found(tmp_path):
    row = {name: value for name, value in mmbench_row().items() if name not in ("hint", "D")}
    file = write(tmp_path / "dev.parquet", [row], images=["image"])
    with pytest.raises(ValueError, match=r"lacks the columns {'hint'.*'D'.*}; it has .*'question'.*`columns`"):
        load_cases("mmbench", id=str(file))


def test_renamed_columns_are_settings(tmp_path):
    file = write(tmp_path / "advbench.csv", [{"goal": "Do X", "target": "Sure"}])
    (case,) = load_cases("advbench", id=str(file), columns={"prompt": "goal"})["advbench"]
    assert (case.request, case.target) == ("Do X", "Sure")


def test_images_are_decoded_when_a_case_is_asked_for(tmp_path, monkeypatch):
    rows = [mmbench_row(image=colour) for colour in ("red", "green", "blue")]
    file = write(tmp_path / "dev.parquet", rows, images=["image"])
    opened = []
    real = Image.open
    monkeypatch.setattr(Image, "open", lambda file, *args: (opened.append(file), real(file, *args))[1])
    cases = load_cases("mmbench", id=str(file))["mmbench"]
    assert len(cases) == 3 and opened == []
    assert content(cases[1])[0] == "green" and len(opened) == 1
    assert content(cases[-1])[0] == "blue" and len(opened) == 2
    assert isinstance(cases[:2], LazyCases) and len(opened) == 2
    with pytest.raises(IndexError):
        cases[3]


def test_a_broken_image_is_named_by_its_case(tmp_path):
    broken = BytesIO(b"no image at all")
    rows = [{**mmbench_row(), "image": {"bytes": broken.getvalue(), "path": None}}]
    features = {name: datasets.Value("string") for name in rows[0]} | {"image": datasets.Image(decode=False)}
    features["index"] = datasets.Value("int64")
    datasets.Dataset.from_list(rows, features=datasets.Features(features)).to_parquet(tmp_path / "dev.parquet")
    cases = load_cases("mmbench", id=str(tmp_path))["mmbench"]
    with pytest.raises(OSError, match=r"mmbench\[0\]: cannot identify image"):
        cases[0]


def test_a_copy_from_the_hub_is_read_by_its_card(tmp_path):
    card = {"configs": [{"config_name": "en", "data_files": [{"split": "dev", "path": "odd/name.parquet"}]}]}
    write(tmp_path / "odd" / "name.parquet", [mmbench_row()], images=["image"])
    (tmp_path / "README.md").write_text(f"---\nlicense: mit\n{yaml.safe_dump(card)}---\n# A set\n")
    (case,) = load_cases("mmbench", id=str(tmp_path))["mmbench"]
    assert content(case)[0] == "red"


def test_the_hub_is_asked_for_what_the_settings_say(monkeypatch):
    asked = []
    table = datasets.Dataset.from_dict({"prompt": ["Do X"], "category": ["misc"]})
    monkeypatch.setattr(datasets, "load_dataset", lambda **arguments: (asked.append(arguments), table)[1])
    assert load_cases("harmbench", revision="abc")["harmbench"][0].request == "Do X"
    hub = {"path": "walledai/HarmBench", "name": "standard", "split": "train", "revision": "abc", "data_files": None}
    assert asked == [hub]


def test_what_cannot_be_loaded_says_what_to_do(tmp_path, monkeypatch):
    with pytest.raises(OSError, match=r"xstest: id='/nowhere/xstest'.*there is no '/nowhere/xstest'"):
        load_cases("xstest", id="/nowhere/xstest")
    write(tmp_path / "train.csv", xstest_rows())
    with pytest.raises(OSError, match=r"no file in .* is called 'test' .*found \['train.csv'\]"):
        load_cases("xstest", id=str(tmp_path))

    def gated(**arguments):
        raise datasets.exceptions.DatasetNotFoundError("Dataset 'walledai/XSTest' is a gated dataset.")

    monkeypatch.setattr(datasets, "load_dataset", gated)
    with pytest.raises(OSError, match=r"is a gated dataset.*hf auth login.*local copy as `id`"):
        load_cases("xstest")


def test_local_files_are_never_taken_for_another_part(tmp_path):
    file = write(tmp_path / "set" / "cn" / "dev.parquet", [mmbench_row()], images=["image"])
    with pytest.raises(OSError, match=r"is called 'dev' .* in a folder 'en'; found \['cn/dev.parquet'\]"):
        load_cases("mmbench", id=tmp_path / "set")
    assert len(load_cases("mmbench", id=tmp_path / "set" / "cn")["mmbench"]) == 1
    with pytest.raises(OSError, match="one file cannot hold the configs"):
        load_cases("mm_safetybench", id=file)
    (tmp_path / "dev.tsv").write_text("a\tb\n")
    with pytest.raises(OSError, match=r"dev.tsv'\] must be of one kind, one of \('.parquet'"):
        load_cases("mmbench", id=tmp_path / "dev.tsv")


def test_sets_of_a_suite_have_different_names(tmp_path):
    file = write(tmp_path / "train.csv", [{"prompt": "Do X", "target": "Sure"}])
    settings = DataSettings("mine", "prompts", file, "harmful")
    with pytest.raises(ValueError, match="Two sets are called 'mine'"):
        load_suite([settings, settings])


def test_a_suite_puts_parts_where_their_roles_say(tmp_path):
    write(tmp_path / "xs" / "test.csv", xstest_rows())
    write(tmp_path / "adv" / "train.csv", [{"prompt": "Do X", "target": "Sure"}])
    row = {"question": "How to bake?", "instruction": "Steps to bake.", "category_name": "Kitchen"}
    write(tmp_path / "fig" / "safebench.csv", [row])
    places = {"xstest": "xs", "advbench": "adv", "figstep": "fig"}
    files = []
    for name, folder in places.items():
        values = yaml.safe_load((SETTINGS / f"{name}.yaml").read_text()) | {"id": str(tmp_path / folder)}
        files.append(tmp_path / f"{name}.yaml")
        files[-1].write_text(yaml.safe_dump(values))
    suite = load_suite(files, limit=2)
    assert {name: [case.request for case in cases] for name, cases in suite.sets.items()} == {
        "attack/figstep": ["How to bake?"],
        "harmful": ["How 1?", "Do X"],
        "benign/xstest/safe": ["How 0?", "How 2?"],
    }
    assert suite.source["xstest"]["id"] == str(tmp_path / "xs") and suite.source["xstest"]["limit"] == 2
    json.dumps(suite.source)


def test_a_part_without_a_role_is_refused(tmp_path):
    file = write(tmp_path / "test.csv", xstest_rows())
    settings = DataSettings("xs", "xstest", str(file), {"safe": "benign"})
    with pytest.raises(ValueError, match="`role` says nothing of the part 'unsafe'"):
        load_suite([settings])


@pytest.mark.parametrize("path", sorted(SETTINGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_file_of_settings_is_complete(path):
    settings = DataSettings.load(path.stem)
    assert settings.name == path.stem
    fields = re.split(r"^(?=\w)", path.read_text(), flags=re.MULTILINE)[1:]
    assert [field for field in fields if "#" not in field] == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reader": "nope"}, "reader='nope' is not known"),
        ({"role": "evil"}, "role='evil' must name"),
        ({"columns": {"goal": "prompt"}}, r"columns \['goal'\] mean nothing to reader 'prompts'"),
        ({"options": {"please": "?"}}, r"options \['please'\] mean nothing"),
        ({"splits": []}, "`splits` is empty"),
    ],
)
def test_bad_settings_are_named(changes, message):
    values = {"name": "mine", "reader": "prompts", "id": "x", "role": "harmful", **changes}
    with pytest.raises(ValueError, match=message):
        DataSettings(**values)


def test_files_of_settings_are_checked(tmp_path):
    (tmp_path / "mine.yaml").write_text("name: mine\nreader: prompts\nsplit: train\n")
    with pytest.raises(ValueError, match=r"unknown fields \['split'\], missing fields \['id', 'role'\]"):
        DataSettings.load(tmp_path / "mine.yaml")
    with pytest.raises(ValueError, match=r"'nope' is neither a YAML file of settings nor one of \['advbench'"):
        DataSettings.load("nope")


def test_loaded_cases_can_be_attacked_without_being_loaded(tmp_path):
    from care_hf.attack_prompts import from_template

    file = write(tmp_path / "train.csv", [{"prompt": "Do X", "target": "Sure"}])
    plain = load_cases("advbench", id=str(file))["advbench"]
    (case,) = LazyCases(plain, lambda case: from_template(case, "<{request}>"), "attacked")
    assert (content(case), case.request, case.target) == (["<Do X>"], "Do X", "Sure")
