"""The page's order, links, guards and cost, and the plain report."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
import time
from dataclasses import dataclass
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from support.predictions import SHAPE, component, make_prediction
from support.scan_files import affine_of, reoriented, small_chest
from vlm3d.inference.consistency import consistent_report
from vlm3d.inference.prediction import DISCLAIMER, TRAINING_NOTES, Policy, Prediction
from vlm3d.labels import DISEASE_NAMES, LESIONS
from vlm3d.outputs.grounded_text import report_as_text
from vlm3d.outputs.html_report import render_page
from vlm3d.outputs.report_text import printable
from vlm3d.outputs.slice_viewer import build_viewer
from vlm3d.volume import RegionMap, Volume

VOID = {"meta", "img", "input", "br"}


def make_masks(*keys: str) -> dict[str, NDArray[np.bool_]]:
    masks = {lesion.key: np.zeros(SHAPE, bool) for lesion in LESIONS}
    for place, key in enumerate(keys):
        masks[key][5:8, 13 + place : 18 + place, 10:15] = True
    return masks


def page_of(prediction: Prediction, masks: dict[str, NDArray[np.bool_]] | None = None) -> str:
    regions = np.zeros(SHAPE, np.uint8)
    regions[2:10, 10:30, 8:18] = 1
    volume = Volume(small_chest(SHAPE), affine_of())
    return render_page(
        prediction, volume, make_masks() if masks is None else masks, RegionMap(regions, affine_of())
    )


class Reader(HTMLParser):
    """Fails on tags that are left open; collects ids, links and images."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag not in VOID:
            self.open.append(tag)
        if "id" in values:
            self.ids.append(str(values["id"]))
        if tag == "a":
            self.links.append(str(values["href"]))
        if tag == "img":
            self.images.append(values)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """SVG's paths close themselves."""

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def viewer_of(page: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="viewer-data">(.*?)</script>', page, re.S)
    assert found
    viewer: dict[str, Any] = json.loads(found.group(1))
    return viewer


def test_positives_come_first_then_by_probability() -> None:
    names = [
        html.unescape(name)
        for name in re.findall(r'<th scope="row" class="name">([^<]+)', page_of(make_prediction()))
    ]
    rest = [name for i, name in reversed(list(enumerate(DISEASE_NAMES))) if i not in (3, 12)]
    assert names == [DISEASE_NAMES[12], DISEASE_NAMES[3], *rest]


def test_the_page_is_well_formed_and_its_links_lead_somewhere() -> None:
    keys = ("lung_nodule", "consolidation", "pleural_effusion")
    page = page_of(make_prediction({key: [component()] for key in keys}), make_masks(*keys))
    reader = Reader(page)
    assert len(reader.ids) == len(set(reader.ids))
    assert {link.removeprefix("#") for link in reader.links} <= set(reader.ids)
    assert all(image["alt"] for image in reader.images)
    assert all(str(image["src"]).startswith("data:image/jpeg;base64,") for image in reader.images)


def test_a_lesion_has_both_windows_a_close_up_and_outlines() -> None:
    page = page_of(make_prediction({"lung_nodule": [component()]}), make_masks("lung_nodule"))
    card = page.split('<article class="card"')[1].split("</article>")[0]
    assert card.count('class="main"') == 3
    for words in ("lung window", "mediastinum window", "close-up", "slice 7 of 12", "17.0 mm"):
        assert words in card
    assert 'data-slice="6"' in page
    assert viewer_of(page)["slices"][viewer_of(page)["start"]]["index"] == 6


def test_the_most_probable_lesion_leads() -> None:
    keys = ("pericardial_effusion", "lung_nodule")
    page = page_of(make_prediction({key: [component()] for key in keys}), make_masks(*keys))
    cards = re.findall(r"<h3><span[^>]*></span>(\d) · ([^<]+)</h3>", page)
    assert cards == [("1", "Lung nodule"), ("2", "Pericardial effusion")]


def test_many_pieces_are_listed_and_some_pictured() -> None:
    pieces = {lesion.key: [component(i % 12) for i in range(20)] for lesion in LESIONS}
    page = page_of(make_prediction(pieces), make_masks(*pieces))
    assert page.count("<article") == 10
    assert page.count("<td>Lung nodule") + page.count("</span>Lung nodule</td>") == 20


def test_without_lesions_the_page_says_so() -> None:
    prediction = make_prediction()
    prediction.settings["min_lesion_ml"] = 0.05
    page = page_of(prediction)
    assert "No mask has a piece of 0.05 ml or more, so there is nothing to measure." in page
    assert "<article" not in page
    assert "data-lesion=" not in page


def test_measurements_beyond_the_scan_do_not_break_the_page() -> None:
    far = component(key_slice=500) | {"centroid_index_dhw": (-4, 900, 900)}
    assert "slice 12 of 12" in page_of(make_prediction({"lung_nodule": [far]}), make_masks("lung_nodule"))


def test_only_the_shipped_script_may_run() -> None:
    page = page_of(make_prediction())
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', page)
    assert policy
    script = page.rsplit("<script>", 1)[1].split("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{html.unescape(digest)}'" in html.unescape(policy.group(1))
    assert "default-src 'none'" in html.unescape(policy.group(1))
    assert not re.findall(r"\son\w+\s*=", page)


def test_text_from_outside_cannot_leave_its_place() -> None:
    attack = "</script><script>alert(1)</script>\x1b[31m\u202e\" onload='x'"
    prediction = make_prediction(notes=(attack,), findings=attack)
    prediction = prediction.model_copy(
        update={
            "settings": {attack: {attack: attack}},
            "versions": {attack: attack},
            "seconds": {attack: 1.0},
            "model": prediction.model.model_copy(update={"llm": attack, "checkpoint": attack}),
        }
    )
    page = page_of(prediction)
    assert page.count("<script") == page.count("</script>") == 2
    assert not {"\x1b", "\u202e"} & set(page)
    Reader(page)


def test_the_page_is_the_same_for_every_storage_order() -> None:
    prediction = make_prediction({"lung_nodule": [component()]})
    expected = page_of(prediction, make_masks("lung_nodule"))
    for order, flips in (((2, 0, 1), (True, False, True)), ((1, 2, 0), (False, True, True))):
        voxels, affine = reoriented(small_chest(SHAPE), affine_of(), order, flips)
        regions, _ = reoriented(np.zeros(SHAPE, np.uint8), affine_of(), order, flips)
        masks = {
            key: reoriented(mask, affine_of(), order, flips)[0]
            for key, mask in make_masks("lung_nodule").items()
        }
        page = render_page(prediction, Volume(voxels, affine), masks, RegionMap(regions, affine))
        assert viewer_of(page) == viewer_of(expected)


def test_masks_of_noise_cost_seconds_not_minutes() -> None:
    shape = (20, 256, 256)
    noise = np.random.default_rng(0).random(shape) > 0.5
    masks = {lesion.key: noise for lesion in LESIONS}
    pieces = {lesion.key: [component(3)] for lesion in LESIONS}
    started = time.process_time()
    page = render_page(make_prediction(pieces), Volume(small_chest(shape), affine_of((5.0, 1.4, 1.4))), masks)
    assert time.process_time() - started < 8
    assert len(page) < 6_000_000


@pytest.mark.parametrize("voxels", [np.zeros((1, 1, 1), np.int16), np.full((2, 3, 4), np.nan, np.float32)])
def test_the_smallest_and_emptiest_scans_have_a_page(voxels: NDArray[Any]) -> None:
    page = render_page(make_prediction(), Volume(voxels, affine_of()), {})
    assert viewer_of(page)["total"] == voxels.shape[0]


def test_the_report_is_framed_by_its_warnings() -> None:
    lines = report_as_text(make_prediction()).splitlines()
    warnings = [TRAINING_NOTES["untrained"], DISCLAIMER]
    assert lines[:2] == lines[-2:] == warnings
    assert [line for line in lines if line in ("Findings", "Impression", "Recommendations")] == [
        "Findings",
        "Impression",
        "Recommendations",
    ]
    assert "None stated." in lines
    assert report_as_text(make_prediction(training="trained")).splitlines()[0] == DISCLAIMER


def test_a_report_without_sections_or_without_text_is_still_told() -> None:
    whole = make_prediction(text="Only this.", findings="", impression="", recommendations="")
    assert "Only this." in report_as_text(whole)
    assert "Only this." in page_of(whole)
    off = make_prediction(generated=False)
    assert "switched off" in report_as_text(off)
    assert "switched off" in page_of(off)


def test_printable_keeps_words_and_lines() -> None:
    assert printable("a\tb\r\nc\rd é 肺\x1b[2J\x00\u202ex\x85") == "a\tb\nc\nd é 肺[2Jx"


SENTENCES = (
    "Findings:\nA nodule in the right upper lobe. Emphysema <b>everywhere</b>. No consolidation.\n\n"
    "Impression:\nLung nodule on the left.\n\nRecommendations:\nNone."
)


@dataclass(frozen=True)
class Written:
    text: str
    mean_surprisal_bits: float = 1.0


def checked_prediction(policy: Policy = "flag", training: str = "synthetic", *untrained: str) -> Prediction:
    """A prediction whose report tells a nodule rightly and on the wrong side, and an emphysema that is not there."""
    prediction = make_prediction({"lung_nodule": [component()]}, training=training)
    report = consistent_report(lambda _: Written(SENTENCES), prediction.diseases, prediction.lesions, policy)
    model = prediction.model.model_copy(update={"untrained_tasks": list(untrained)})
    return prediction.model_copy(update={"report": report, "model": model})


def sentence_on(page: str, number: int) -> str:
    return page.split(f'id="sentence-{number}">')[1].split('<span class="sentence')[0].split("</p>")[0]


def test_a_sentence_leads_to_its_lesion_and_slice() -> None:
    page = page_of(checked_prediction(), make_masks("lung_nodule"))
    nodule = sentence_on(page, 0)
    assert nodule.count('href="#lesion-1" data-slice="6" data-focus="lung_nodule"') == 2
    assert "lesion 1, slice 7" in nodule
    assert "Contradiction" not in nodule
    card = page.split('<article class="card"')[1].split("</article>")[0]
    assert 'href="#sentence-0"' in card
    finding = re.search(r'<a class="told" href="#(finding-\d+)"', sentence_on(page, 2))
    assert finding
    row = page.split(f'<tr id="{finding.group(1)}"')[1].split("</tr>")[0]
    assert ">Consolidation<" in row
    reader = Reader(page)
    assert len(reader.ids) == len(set(reader.ids))
    assert {link.removeprefix("#") for link in reader.links} <= set(reader.ids)


def test_the_ring_lies_around_the_piece() -> None:
    page = page_of(checked_prediction(), make_masks("lung_nodule"))
    ring = re.search(r'data-ring="([\d.\- ]+)" data-reach="(\d+)"', page)
    assert ring
    left, top, width, height = map(float, ring.group(1).split())
    assert 0 < left < left + width < 100
    assert 0 < top < top + height < 100
    assert int(ring.group(2)) >= 1


def test_contradictions_are_marked_in_words_where_they_stand() -> None:
    page = page_of(checked_prediction(), make_masks("lung_nodule"))
    assert "Contradiction: Affirms Emphysema" in html.unescape(sentence_on(page, 1))
    assert "Contradiction: Places Lung nodule in the left side" in html.unescape(sentence_on(page, 3))
    assert "<b>everywhere</b>" not in page
    text = report_as_text(checked_prediction())
    assert "No consolidation. [" not in text
    assert "[CONTRADICTION: Affirms Emphysema" in text
    omissions = [line for line in text.splitlines() if line.startswith("- Does not mention")]
    assert len(omissions) == 2
    assert all(line.removeprefix("- ") in html.unescape(page) for line in omissions)
    assert f"{2 + len(omissions)} contradictions with the model's own" in text


def test_what_a_repair_changed_is_shown() -> None:
    prediction = checked_prediction("repair")
    page = html.unescape(page_of(prediction, make_masks("lung_nodule")))
    assert "No contradiction with the model's own" in page
    assert page.count("added by the repair") == sum(
        edit.action == "added"
        for edit in prediction.report.check.edits  # type: ignore[union-attr]
    )
    assert "removed (findings): Emphysema <b>everywhere</b>." in page
    assert "removed (findings): Emphysema" in report_as_text(prediction)


def test_an_untrained_writer_is_named_beside_its_report() -> None:
    for prediction in (
        checked_prediction("flag", "synthetic", "generation"),
        checked_prediction("flag", "trained", "generation"),
        checked_prediction("flag", "untrained"),
    ):
        report = page_of(prediction).split('<section id="report"')[1].split("</section>")[0]
        assert '<p class="note-untrained">The report writer was NOT TRAINED' in report
        assert "This check means nothing here." in report
        assert "This check means nothing here." in report_as_text(prediction)
    trained = page_of(checked_prediction("flag", "trained"))
    assert "NOT TRAINED" not in trained
    assert "means nothing" not in trained


def test_a_note_on_trained_weights_is_shown_too() -> None:
    noted = make_prediction(training="trained").model_copy(
        update={"training_note": "The localizer was NOT TRAINED."}
    )
    assert 'role="alert"><strong>The localizer was NOT TRAINED.' in page_of(noted)
    assert report_as_text(noted).startswith("The localizer was NOT TRAINED.")


def test_a_sentence_about_what_no_mask_shows_leads_to_where_the_classifier_looked() -> None:
    values = checked_prediction().model_dump()
    finding = values["report"]["sentences"][2]["findings"][0]
    place = {"side": "left", "region": "left_lower_lobe", "level": "lower", "agreement": "agrees"}
    finding["places"] = [{**place, "key_slice": 4}, {**place, "key_slice": 4}, {**place, "key_slice": None}]
    told = sentence_on(page_of(Prediction.model_validate(values), make_masks("lung_nodule")), 2)
    assert told.count(f"{finding['name'].lower()} looked at, slice 5</a>") == 1
    assert f'href="#images" data-slice="4" data-name="{finding["name"]}, looked at"' in told
    assert "looked at" not in sentence_on(page_of(checked_prediction(), make_masks("lung_nodule")), 2)


def test_the_viewer_is_to_hold_the_slice_that_the_classifier_looked_at(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []

    def build(*arguments: Any, key_slices: list[int], **named: Any) -> Any:
        asked.append(key_slices)
        return build_viewer(*arguments, key_slices=key_slices, **named)

    monkeypatch.setattr("vlm3d.outputs.html_report.build_viewer", build)
    values = make_prediction({"lung_nodule": [component()]}).model_dump()
    place = {"side": "left", "region": "", "level": "lower"}
    values["diseases"][0]["places"] = [{**place, "key_slice": 4}, {**place, "key_slice": None}]
    page_of(Prediction.model_validate(values), make_masks("lung_nodule"))
    assert asked == [[6, 4]]


def test_sentences_that_do_not_fit_the_text_are_not_trusted() -> None:
    prediction = checked_prediction()
    moved = prediction.report.model_copy(update={"text": "x" + prediction.report.text})
    page = page_of(prediction.model_copy(update={"report": moved}), make_masks("lung_nodule"))
    assert 'class="sentence' not in page
    assert "A nodule in the right upper lobe." in page


def test_a_finding_without_a_mask_names_where_the_classifier_looked() -> None:
    values = make_prediction().model_dump()
    values["diseases"][0]["places"] = [
        {"side": "left", "region": "left lower lobe", "level": "lower", "key_slice": 4},
        {"side": "right", "region": "", "level": "upper", "key_slice": None},
    ]
    page = page_of(Prediction.model_validate(values))
    link = f'href="#images" data-slice="4" data-name="{values["diseases"][0]["name"]}, looked at"'
    assert f"looked at: left lower lobe, <a {link}>slice 5</a></small>" in page
    assert "looked at: right</small>" in page
    assert "looked at" not in page_of(make_prediction())
