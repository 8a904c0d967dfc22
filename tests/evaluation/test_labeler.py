"""Rules read findings, denials, doubt, history and lists from reports; every sentence here was written for the test."""

from __future__ import annotations

import csv
import hashlib
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from typer.testing import CliRunner

from vlm3d.cli import app
from vlm3d.errors import CheckpointError, UnreadableFileError
from vlm3d.evaluation.labeler import ReportLabeler, RuleLabeler, label_report, label_reports
from vlm3d.evaluation.labeler_files import labels_table, read_reports
from vlm3d.evaluation.labeler_radbert import RadBertLabeler
from vlm3d.evaluation.official import write_reports
from vlm3d.evaluation.sentences import plain, split_sentences
from vlm3d.labels import DISEASE_NAMES

PHRASES = {
    "Medical material": "a central venous catheter",
    "Arterial wall calcification": "calcified plaque of the aortic arch",
    "Cardiomegaly": "cardiomegaly",
    "Pericardial effusion": "pericardial effusion",
    "Coronary artery wall calcification": "calcification of the coronary arteries",
    "Hiatal hernia": "hiatal hernia",
    "Lymphadenopathy": "mediastinal lymphadenopathy",
    "Emphysema": "centrilobular emphysema",
    "Atelectasis": "linear atelectasis",
    "Lung nodule": "pulmonary nodule",
    "Lung opacity": "ground-glass opacity",
    "Pulmonary fibrotic sequela": "fibrotic scarring of the apices",
    "Pleural effusion": "pleural effusion",
    "Mosaic attenuation pattern": "mosaic attenuation",
    "Peribronchial thickening": "peribronchial thickening",
    "Consolidation": "consolidation",
    "Bronchiectasis": "bronchiectasis",
    "Interlobular septal thickening": "interlobular septal thickening",
}
AFFIRMED = ("There is {}.", "{} is seen.", "Findings: {} on both sides", "No pneumothorax, but there is {}.")
DENIED = (
    *("There is no {}.", "{} was not observed.", "Without evidence of {}.", "The chest is free of {}."),
    *("No pneumothorax, rib fracture or {} was detected.", "{} or rib fracture are not seen."),
    *("Neither rib fracture nor {} is present.", "{}: none.", "Absence of {}."),
)


def present(text: str) -> set[str]:
    return set(label_report(text).present)


@pytest.mark.parametrize("name", DISEASE_NAMES)
@pytest.mark.parametrize("form", AFFIRMED)
def test_each_finding_is_read_where_it_is_affirmed(name: str, form: str) -> None:
    assert present(form.format(PHRASES[name])) == {name}


@pytest.mark.parametrize("name", DISEASE_NAMES)
@pytest.mark.parametrize("form", DENIED)
def test_no_finding_is_read_where_it_is_denied(name: str, form: str) -> None:
    text = form.format(PHRASES[name])
    assert present(text) == set()
    assert label_report(text).evidence[name].status == "negative"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        # lists, exceptions, and clauses of one sentence
        ("A small effusion in the left pleural space, no consolidation.", {"Pleural effusion"}),
        ("No nodule apart from a calcified nodule of 4 mm at the right base.", {"Lung nodule"}),
        ("Except for mild emphysema, the lungs are clear.", {"Emphysema"}),
        ("There is no effusion; however, consolidation is present in the lingula.", {"Consolidation"}),
        ("Effusion is not seen, but there is atelectasis.", {"Atelectasis"}),
        ("Atelectasis is seen and effusion was not detected.", {"Atelectasis"}),
        ("No pleural effusion, minimal pericardial effusion is observed.", {"Pericardial effusion"}),
        ("Pericardial and pleural effusion.", {"Pericardial effusion", "Pleural effusion"}),
        ("No pericardial, pleural effusion or thickening was detected.", set()),
        ("Effusion-thickening of the pleura wasn't detected.", set()),
        ("Pericardial effusion - no thickening was detected.", set()),
        ("Mild cardiomegaly without pericardial effusion.", {"Cardiomegaly"}),
        ("Cardiomegaly, no pericardial effusion.", {"Cardiomegaly"}),
        ("Emphysema without bullae.", {"Emphysema"}),
        ("Pleural effusion: no.", set()),
        ("Stable 3 mm nodule, no new nodules.", {"Lung nodule"}),
        ("Not only emphysema but also bronchiectasis is present.", {"Emphysema", "Bronchiectasis"}),
        ("1. Emphysema. 2. No nodules. 3. Cardiomegaly.", {"Emphysema", "Cardiomegaly"}),
        ("Ground-glass haze in both lower lobes without consolidation.", {"Lung opacity"}),
        # what is denied is a change, not the finding
        ("No change in the size of the nodules.", {"Lung nodule"}),
        ("No significant difference was found in the emphysema.", {"Emphysema"}),
        ("The nodules have not increased in number.", {"Lung nodule"}),
        ("A nodule that was not seen in the previous examination is present.", {"Lung nodule"}),
        # the past
        ("The effusion seen previously has resolved completely.", set()),
        ("The catheter was removed.", set()),
        ("The consolidation described in the previous examination is no longer seen.", set()),
        ("Status after treatment, history of pleural effusion.", set()),
        # normality
        ("Heart size is within normal limits.", set()),
        ("The heart is not enlarged.", set()),
        ("Heart size is normal; the heart is of normal size.", set()),
        ("Lymph nodes are of normal size.", set()),
        ("No lymph nodes of pathological size.", set()),
        ("The pleural spaces are free of fluid.", set()),
        ("Lymph nodes cannot be evaluated without contrast.", set()),
        # doubt counts, a bare question about nodes or atelectasis does not
        ("Consolidation cannot be excluded.", {"Consolidation"}),
        ("Findings in favor of emphysema.", {"Emphysema"}),
        ("Soft tissue focus at the hilum (lymph node?).", set()),
        # the same words elsewhere in the body
        ("A thyroid nodule of 12 mm.", set()),
        ("Nodular lesion of 9 mm in the left adrenal gland.", set()),
        ("Inguinal hernia.", set()),
        ("Collapse of the T7 vertebra.", set()),
        ("Old fracture sequela of the ribs.", set()),
        ("Calcified plaque in the LAD.", {"Coronary artery wall calcification"}),
        (
            "Plaques of the aorta and the coronary arteries.",
            {"Arterial wall calcification", "Coronary artery wall calcification"},
        ),
        ("Calcified lymph nodes beside the trachea.", {"Lymphadenopathy"}),
        ("The cardiothoracic index has increased in favor of the heart.", {"Cardiomegaly"}),
        ("Ground glass nodule of the right upper lobe.", {"Lung nodule", "Lung opacity"}),
        # translation and spelling
        ("Emphysematous areas, ateletasis and calsific plaques of the aorta.",
         {"Emphysema", "Atelectasis", "Arterial wall calcification"}),
        ("İnterlobular septal thickening", {"Interlobular septal thickening"}),
    ],
)  # fmt: skip
def test_sentences(text: str, expected: set[str]) -> None:
    assert present(text) == expected


def test_a_report_is_present_if_any_sentence_affirms_and_names_that_sentence() -> None:
    text = "No nodule on the right. There is a nodule of 6 mm on the left. No nodule elsewhere."
    evidence = label_report(text).evidence["Lung nodule"]
    assert evidence.sentence == "There is a nodule of 6 mm on the left."
    assert evidence.status == "positive"
    assert text[evidence.start : evidence.end] == "nodule"


def test_statuses() -> None:
    found = label_report(
        "Emphysema. No effusion. Possible consolidation. The nodule has disappeared."
    ).evidence
    assert {name: item.status for name, item in found.items()} == {
        "Emphysema": "positive",
        "Pleural effusion": "negative",
        "Consolidation": "uncertain",
        "Lung nodule": "historical",
    }


def test_arrays_of_reports() -> None:
    labels_NK = label_reports(["Cardiomegaly.", "", "Bronchiectasis."])
    assert labels_NK.shape == (3, 18)
    assert labels_NK.dtype == np.bool_
    assert [list(np.flatnonzero(row)) for row in labels_NK] == [[2], [], [16]]
    assert label_reports([]).shape == (0, 18)
    labeler: ReportLabeler = RuleLabeler()
    assert (labeler.label_reports(["Cardiomegaly."]) == labels_NK[:1]).all()


SENTENCES = [
    sentence[0].upper() + sentence[1:]
    for phrase in PHRASES.values()
    for sentence in (form.format(phrase) for form in AFFIRMED + DENIED)
]


@settings(deadline=None)
@given(st.lists(st.sampled_from(SENTENCES), max_size=6))
def test_sentences_do_not_reach_into_each_other(sentences: list[str]) -> None:
    """A report's labels are the union of its sentences' labels, in any order."""
    union = set().union(*(present(sentence) for sentence in sentences)) if sentences else set()
    assert present("\n".join(sentences)) == union
    assert present("\n".join(reversed(sentences))) == union


TEXTS = st.lists(
    st.one_of(
        st.characters(), st.sampled_from([*'. ;?!\n"•-1', "no ", "nodule ", "effusion ", "is ", "not "])
    )
).map("".join)


@settings(deadline=None)
@given(TEXTS)
@example("İ" * 5 + "nodule ẞ. No nodule.")
@example("12. " * 10)
def test_any_text_is_read_and_evidence_points_into_it(text: str) -> None:
    labels = label_report(text)
    assert len(labels.labels_K) == 18
    for item in labels.evidence.values():
        assert item.sentence in text
        assert text[item.start : item.end] in item.sentence
    assert len(plain(text)) == len(text)


@settings(deadline=None)
@given(TEXTS)
def test_sentences_cover_the_text_in_order(text: str) -> None:
    sentences = split_sentences(text)
    assert all(text[sentence.start : sentence.end] == sentence.text for sentence in sentences)
    edges = [edge for sentence in sentences for edge in (sentence.start, sentence.end)]
    assert edges == sorted(edges)
    covered = {place for sentence in sentences for place in range(sentence.start, sentence.end)}
    assert all(place in covered for place, letter in enumerate(text) if letter.isalpha())


def test_sentence_ends() -> None:
    text = "A cyst of 1.5 cm, e.g. in the liver. Effusion (new?) noted? Yes\n- clear lungs; 2. Heart  Normal"
    assert [sentence.text for sentence in split_sentences(text)] == [
        "A cyst of 1.5 cm, e.g. in the liver.",
        "Effusion (new?) noted?",
        "Yes",
        "- clear lungs;",
        "2. Heart",
        "Normal",
    ]


def test_text_without_an_end_takes_time_in_proportion() -> None:
    """A model that repeats itself must not stop an evaluation."""
    label_report("no nodule " * 100)
    start = time.process_time()
    label_report("no nodule or effusion " * 1_000)
    assert time.process_time() - start < 5


# --- files and command line


def test_command_writes_labels_and_sentences(tmp_path: Path) -> None:
    table = tmp_path / "reports.csv"
    table.write_text(
        'VolumeName,Findings_EN,Impressions_EN\nx_1.nii.gz,"Heart enlarged.\nNo nodule.",Cardiomegaly.\nx_2.nii.gz,,\n',
        encoding="utf-8",
    )
    note = tmp_path / "note.txt"
    note.write_text("Bronchiectasis in the lingula.", encoding="utf-8")
    out = tmp_path / "labels.csv"
    result = CliRunner().invoke(app, ["label", str(table), str(note), "-o", str(out)])
    assert result.exit_code == 0, result.output
    rows = list(csv.DictReader(out.read_text(encoding="utf-8").splitlines()))
    assert [row["VolumeName"] for row in rows] == ["x_1.nii.gz", "x_2.nii.gz", "note"]
    assert list(rows[0])[1:19] == list(DISEASE_NAMES)
    assert [[name for name in DISEASE_NAMES if row[name] == "1"] for row in rows] == [
        ["Cardiomegaly"],
        [],
        ["Bronchiectasis"],
    ]
    assert rows[0]["Lung nodule sentence"] == "negative: No nodule."
    assert rows[2]["Bronchiectasis sentence"] == "positive: Bronchiectasis in the lingula."
    CliRunner().invoke(app, ["label", str(note), "-o", str(out), "--no-evidence"])
    assert out.read_text(encoding="utf-8").splitlines()[0] == ",".join(["VolumeName", *DISEASE_NAMES])


def test_named_columns_are_read(tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    table.write_text("id,a,b\n1,Emphysema.,Effusion.\n", encoding="utf-8")
    assert read_reports([table], ["b"])[0] == ("1", "Effusion.")
    assert read_reports([table], ["b", "a"])[0] == ("1", "Effusion.\nEmphysema.")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"id,words\n1,x\n", "no column any of"),
        (b"id,text\n1,x,y\n", "row 1 has another number of fields"),
        (b'id,text\n1,"x\n', "no CSV table"),
        (b"\xff\xfe\x00", "not UTF-8"),
        (b"", "no column any of"),
        (None, "cannot be read: no such file"),
    ],
)
def test_unreadable_tables_are_refused_in_one_line(
    tmp_path: Path, content: bytes | None, message: str
) -> None:
    table = tmp_path / "t.csv"
    if content is not None:
        table.write_bytes(content)
    with pytest.raises(UnreadableFileError, match=message) as caught:
        read_reports([table])
    assert "\n" not in str(caught.value)


def test_table_needs_as_many_names_as_labels() -> None:
    with pytest.raises(ValueError, match=r"argument 2 is shorter"):
        labels_table(["a", "b"], [label_report("")])


# --- the official classifier, with random weights of its shape


@pytest.fixture(scope="module")
def radbert_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny RoBERTa's config and tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, RobertaConfig

    words = ["<s>", "<pad>", "</s>", "<unk>", "nodule", "no", "effusion", "heart"]
    core = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )
    folder = tmp_path_factory.mktemp("roberta")
    tokenizer.save_pretrained(folder)
    RobertaConfig(
        vocab_size=8,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        max_position_embeddings=514 + 2,
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def radbert_state(radbert_folder: Path) -> dict[str, torch.Tensor]:
    from transformers import AutoConfig, AutoModel

    torch.manual_seed(0)
    model = AutoModel.from_config(AutoConfig.from_pretrained(radbert_folder))
    state = {f"model.{name}": value.clone() for name, value in model.state_dict().items()}
    return state | {"classifier.weight": torch.randn(18, 8), "classifier.bias": torch.randn(18)}


def test_reports_are_judged_by_the_official_classifier_where_asked(
    tmp_path: Path,
    radbert_folder: Path,
    radbert_state: dict[str, torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.save(radbert_state, tmp_path / "classifier.pth")
    write_reports(tmp_path / "mine.json", {"a": "Nodule.", "b": "effusion"})
    write_reports(tmp_path / "true.json", {"a": "effusion", "b": "effusion"})
    arguments = ["mine.json", "--truth", "true.json", "--radbert", "classifier.pth", "--resamples", "0"]
    arguments += ["--radbert-encoder", str(radbert_folder), "--out", "out"]
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["evaluate", *arguments])
    assert result.exit_code == 0, result.output
    clinical = json.loads((tmp_path / "out" / "evaluation.json").read_text())["reports"]["clinical"]
    assert clinical["labeler"] == "RadBERT"
    assert clinical["truth"] == "read from the true reports by RadBERT"


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_official_classifier_gives_its_formula(
    tmp_path: Path, radbert_folder: Path, radbert_state: dict[str, torch.Tensor], suffix: str
) -> None:
    """sigmoid(W pooled + b) of the first 512 tokens in lower case, from a .pth with old buffers or a .safetensors."""
    file = tmp_path / f"classifier{suffix}"
    if suffix == ".pth":
        torch.save(radbert_state | {"model.embeddings.position_ids": torch.arange(516)[None]}, file)
    else:
        save_file({name: value.contiguous() for name, value in radbert_state.items()}, file)
    labeler = RadBertLabeler.load(file, radbert_folder)
    texts = ["No NODULE", "effusion " * 900, "heart"]
    ids = [[0, 5, 4, 2], [0, *[6] * 510, 2], [0, 7, 2]]
    for row, tokens, label in zip(
        labeler.probabilities(texts), ids, labeler.label_reports(texts), strict=True
    ):
        with torch.no_grad():
            pooled = labeler.encoder(input_ids=torch.tensor([tokens])).pooler_output[0]
        logits = radbert_state["classifier.weight"] @ pooled + radbert_state["classifier.bias"]
        np.testing.assert_allclose(row, torch.sigmoid(logits).numpy(), atol=1e-5)
        assert (label == (logits >= 0).numpy()).all()
    assert labeler.label_reports([]).shape == (0, 18)


class _Evil:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("never_made"),))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: {"model": _Evil()}, "cannot be read as weights"),
        (
            lambda state: {k: v for k, v in state.items() if k != "classifier.weight"},
            "no 'classifier.weight'",
        ),
        (lambda state: {k: v for k, v in state.items() if "word_embed" not in k}, "lacks 'embeddings.word"),
        (lambda state: state | {"model.extra": torch.zeros(1)}, "has 'extra' too much"),
        (
            lambda state: (
                state | {"classifier.weight": torch.zeros(17, 8), "classifier.bias": torch.zeros(17)}
            ),
            "17",
        ),
        (lambda state: state | {"model.pooler.dense.bias": torch.zeros(5)}, "does not fit the encoder"),
        (lambda state: {"model": [1, 2]}, "something other than named tensors"),
    ],
)
def test_other_weights_are_refused_in_one_line(
    tmp_path: Path, radbert_folder: Path, radbert_state: dict[str, torch.Tensor], change: Any, message: str
) -> None:
    file = tmp_path / "weights.pth"
    torch.save(change(radbert_state), file)
    with pytest.raises(CheckpointError, match=message) as caught:
        RadBertLabeler.load(file, radbert_folder)
    assert "\n" not in str(caught.value)


def test_truncated_weights_are_refused(tmp_path: Path, radbert_folder: Path) -> None:
    for name in ("a.pth", "a.safetensors"):
        (tmp_path / name).write_bytes(b"\x00" * 20)
        with pytest.raises(CheckpointError, match="cannot be read as weights"):
            RadBertLabeler.load(tmp_path / name, radbert_folder)


# --- hand-made labels of real reports


@pytest.mark.real_data
def test_agreement_with_hand_made_labels(real_data: Path) -> None:
    """Macro F1 on the 200 reports that no rule was written for, and no finding far behind."""
    table = real_data / "reports" / "ct_clip_reports_with_manual_labels.csv"
    with table.open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    rows.sort(key=lambda row: hashlib.sha256(row["AccessionNo"].encode()).hexdigest())
    held_out = rows[600:]
    truth_NK = np.array([[float(row[name]) > 0.5 for name in DISEASE_NAMES] for row in held_out])
    called_NK = label_reports(row["report_text"] for row in held_out)
    hits_K = (called_NK & truth_NK).sum(axis=0)
    f1_K = 2 * hits_K / (2 * hits_K + (called_NK != truth_NK).sum(axis=0))
    assert f1_K.mean() >= 0.96
    assert f1_K.min() >= 0.85
