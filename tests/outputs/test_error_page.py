"""The page of errors is one file that asks nobody for anything, says what the weights are, and escapes hostile text."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm3d.evaluation.case_findings import CaseFindings, FindingsSource, LesionMasks
from vlm3d.evaluation.evaluator import Evaluation, EvaluationSettings, evaluate
from vlm3d.evaluation.intervals import Intervals
from vlm3d.evaluation.tables import evaluation_text
from vlm3d.labels import DISEASE_NAMES
from vlm3d.outputs.error_page import render_error_page
from vlm3d.outputs.svg_plots import Point, curve_plot, heat_map, interval_bar, reliability_plot, scatter_plot
from vlm3d.volume import Volume

K = len(DISEASE_NAMES)
AFFINE = np.array([[0.0, 0, -2, 10], [0, -2, 0, 20], [3, 0, 0, 30], [0, 0, 0, 1]])
HOSTILE = 'x"><script>alert(1)</script>\x00\u202e'


class Tags(HTMLParser):
    """Collects tags and checks that each closes what was opened."""

    VOID = ("meta", "img", "br", "link", "input")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def evaluation(
    cases: int = 8, name: str = "case", training: str | None = "synthetic", text: str = "", scan: bool = True
) -> Evaluation:
    rng = np.random.default_rng(1)
    truth, predictions = {}, {}
    for n in range(cases):
        case_id = f"{name}_{n}"
        label_K = (rng.random(K) > 0.6).astype(float)
        probability_K = np.clip(0.5 + (label_K - 0.5) * 0.3 + rng.normal(0, 0.3, K), 0, 1)
        mask, drawn = rng.random((2, 4, 30, 40)) > 0.6

        def load(mask_DHW=mask) -> LesionMasks:
            return LesionMasks.on_grid({"lung_nodule": mask_DHW, "pleural_effusion": mask_DHW}, AFFINE)

        def load_scan() -> Volume:
            return Volume(np.full((4, 30, 40), 30, np.int16), AFFINE)

        truth[case_id] = CaseFindings(
            case_id,
            case_id,
            label_K,
            f"There is a pleural effusion. {text}",
            load,
            load_scan=load_scan if scan else None,
        )
        predictions[case_id] = CaseFindings(
            case_id, case_id, probability_K, f"There is emphysema. {text}", lambda m=drawn: load(m)
        )
    keys = frozenset({"lung_nodule", "pleural_effusion"})
    return evaluate(
        FindingsSource(f"system {text}", predictions, keys, training),  # type: ignore[arg-type]
        FindingsSource("truth", truth, keys),
        EvaluationSettings(key_slices=2, intervals=Intervals(resamples=30)),
        against=FindingsSource("other", predictions, keys),
    )


@pytest.fixture(scope="module")
def page() -> str:
    return render_error_page(evaluation())


def test_the_page_is_whole_and_asks_for_nothing(page: str) -> None:
    tags = Tags(page)
    assert not tags.open
    assert not [tag for tag, _ in tags.tags if tag in ("script", "link", "iframe", "object")]
    for _, attributes in tags.tags:
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("src", "href"):
            if name in attributes:
                assert re.match(r"data:image/jpeg;base64,|#", attributes[name] or "")
    assert "http" not in page.replace("http-equiv", "")
    assert "url(" not in page
    assert "default-src 'none'" in page


def test_the_page_tells_whether_reports_say_what_the_scans_show(page: str) -> None:
    assert 'id="grounding"' not in page
    found = evaluation()
    value = {"value": 0.25, "low": 0.125, "high": 0.5}
    names = (
        "report_macro_f1",
        "classifier_macro_f1",
        "macro_f1_difference",
        "written_macro_f1",
        "valid_format",
    )
    more = ("no_contradiction", "no_contradiction_written", "bleu_4", "bleu_4_written")
    found.figures["grounding"] = {
        **dict.fromkeys((*names, *more), value),
        "right_side": {"right": 3, "judged": 4, "share": value},
        "right_lobe": {"right": 1, "judged": 2, "share": value},
        "contradictions_checked": 7,
        "reports": 8,
        "thresholds": f"tuned {HOSTILE}",
    }
    section = render_error_page(found).split('<section id="grounding">')[1].split("</section>")[0]
    assert section.count("0.250 (0.125 to 0.500)") == 11
    assert "right side of true positives (3/4)" in section
    assert "8 reports" in section
    assert "<script" not in section
    assert not Tags(section).open


def test_every_link_leads_to_a_part_of_the_page(page: str) -> None:
    tags = Tags(page).tags
    ids = {attributes["id"] for _, attributes in tags if "id" in attributes}
    links = {(attributes["href"] or "")[1:] for tag, attributes in tags if tag == "a"}
    assert links <= ids
    assert {"summary", "diseases", "curves", "confusion", "worst", "lesions", "reports", "comparison"} <= ids


def test_pictures_show_truth_and_prediction_over_the_scan(page: str) -> None:
    assert page.count("data:image/jpeg") == 4  # two of each lesion
    assert page.count('<path class="truth"') == page.count('<path class="predicted"') == 4
    assert "Mediastinum W 400 L 40" in page
    assert "Lung W 1500" in page
    without = render_error_page(evaluation(scan=False))
    assert without.count('<path class="truth"') == 4
    assert "no scan" in without


@pytest.mark.parametrize(
    ("training", "words"),
    [
        ("untrained", "UNTRAINED weights"),
        ("synthetic", "synthetic phantoms only"),
        (None, "How the weights behind these predictions were trained is not known"),
    ],
)
def test_the_page_says_what_the_weights_are(training: str | None, words: str) -> None:
    found = render_error_page(evaluation(4, training=training))
    assert words in found
    assert "not a medical device" in found
    assert ("banner" in found.partition("<main>")[2].partition("<section")[0]) == (training is not None)


def test_a_trained_systems_page_warns_of_nothing_but_its_use() -> None:
    found = render_error_page(evaluation(4, training="trained")).partition("<main>")[2]
    assert "banner" not in found
    assert "not a medical device" in found


def test_tasks_that_the_weights_never_learned_are_named() -> None:
    found = evaluation(4)
    found.figures["untrained_tasks"] = ["generation"]
    page = render_error_page(found)
    assert "synthetic phantoms only" in page
    assert "The report writer was NOT TRAINED" in page
    assert "NOT TRAINED, random: generation" in evaluation_text(found.figures)


def test_hostile_ids_names_and_reports_are_text() -> None:
    found = render_error_page(evaluation(4, name=HOSTILE, text=HOSTILE))
    assert not Tags(found).open
    assert "<script" not in found
    assert "\x00" not in found
    assert "\u202e" not in found
    assert "&lt;script&gt;" in found


def test_a_page_of_labels_alone_has_no_empty_parts() -> None:
    rng = np.random.default_rng(0)
    label_NK = np.zeros((5, K))
    label_NK[:2, 1:] = 1  # the first disease has one class only
    cases = {
        name: {f"c{n}": CaseFindings(f"c{n}", f"c{n}", row) for n, row in enumerate(rows)}
        for name, rows in (("p", rng.random((5, K))), ("t", label_NK))
    }
    settings = EvaluationSettings(intervals=Intervals(resamples=0))
    found = render_error_page(
        evaluate(FindingsSource("p", cases["p"]), FindingsSource("t", cases["t"]), settings)
    )
    assert not Tags(found).open
    assert 'id="lesions"' not in found
    assert 'id="reports"' not in found
    assert "One class only" in found
    assert "None" not in found
    assert "nan" not in re.sub(r"<style>.*?</style>", "", found, flags=re.DOTALL)


UNIT = st.floats(0, 1)


@settings(max_examples=15, deadline=None)
@given(points=st.lists(st.tuples(UNIT, UNIT), min_size=1, max_size=20), name=st.text(max_size=20))
def test_plots_are_well_formed_and_stay_inside_their_frame(
    points: list[tuple[float, float]], name: str
) -> None:
    xs, ys = sorted(x for x, _ in points), [y for _, y in points]
    plots = [
        curve_plot(xs, ys, at=points[0], base="diagonal", label=name, axes=("a", "b")),
        reliability_plot(xs, ys, [n % 3 for n in range(len(xs))], label=name),
        scatter_plot([Point(x * 1000, y, "#112233", name) for x, y in points], label=name, axes=("a", "b")),
        heat_map([[1, 0], [0, 3]], ["one", name], label=name, unit="cases"),
        interval_bar(ys[0], min(ys), max(ys), 0.5),
    ]
    for plot in plots:
        tags = Tags(str(plot))
        assert not tags.open
        width, height = map(float, (tags.tags[0][1]["viewbox"] or "").split()[2:])
        for tag, attributes in tags.tags:
            if tag == "circle":
                assert 0 <= float(attributes["cx"] or "nan") <= width
                assert 0 <= float(attributes["cy"] or "nan") <= height
