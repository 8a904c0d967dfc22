"""How reports name the 18 findings: one rule a finding, in the order of `vlm3d.labels`.

What counts follows CT-RATE's hand-made labels: lymph nodes that are described count even where they are small, opacity
includes consolidation and infiltration, a sequela or a fibrotic band of the lung or the pleura is a fibrotic sequela.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from vlm3d.labels import DISEASE_NAMES


@dataclass(frozen=True)
class FindingRule:
    """How one finding is recognized.

    Attributes:
        name: Of the disease.
        stems: A sentence without any of these substrings cannot name it.
        mention: The words that name it.
        unless: Near these words the mention is of something else.
        window: Characters before and after the mention in which `unless` and `needs` are looked for.
        needs: Without these words nearby the mention is of something else.
        counts_if_uncertain: Whether "perhaps" is labeled as present.
    """

    name: str
    stems: tuple[str, ...]
    mention: re.Pattern[str]
    unless: re.Pattern[str] | None = None
    window: tuple[int, int] = (60, 40)
    needs: re.Pattern[str] | None = None
    counts_if_uncertain: bool = True


def _any(*alternatives: str) -> re.Pattern[str]:
    return re.compile(rf"\b(?:{'|'.join(alternatives)})")


_ATHEROMA = (r"athero\w*", r"atero\w*", r"calcif\w*", r"calsif\w*", r"calcic\w*", r"plaques?")
_GREW = (
    r"(?:increas\w*|enlarg\w*|larger|large|dilat\w*|big\w*|above (?:the )?normal|cardiomegal\w*|wide\w*|grown|"
    r"prominent|over (?:the )?(?:normal|limit))"
)

_RULES: tuple[FindingRule, ...] = (
    FindingRule(
        "Medical material",
        (
            *("cathet", "pacem", "stent", "prosthe", "sutur", "clip", "tube", "cannul", "port ", "metal", "screw"),
            *("implant", "wire", "electrode", "graft", "material", "valve repl", "sternotom", "device", "icd "),
            *("silicon", "drain", "replacement", "valvulopl", "stapl", "fixat", "foreign", "lead", "plate", "coil"),
            *("filter", "balloon", "pump"),
        ),
        _any(
            r"catheters?\b",
            r"\bpace ?makers?",
            r"stents?\b",
            r"prosthe\w*",
            r"sutur\w*",
            r"(?:surgical |metal\w* |operation )?clips?\b",
            r"(?:chest|thora\w*|drainage|nasogastric|endotracheal|tracheo\w*|feeding|intubation|\bng\b|draining) "
            r"(?:\w+ )?tubes?\b",
            r"\btubes?\b",
            r"cannul\w*",
            r"port (?:chamber|catheter|reservoir)",
            r"chamber port",
            r"metal\w*",
            r"screws?\b",
            r"implants?\b",
            r"wires?\b",
            r"electrodes?\b",
            r"grafts?\b",
            r"(?:surgical|operation|operative|postoperative|medical|foreign|fixation|stabili\w*|embolizing) "
            r"(?:\w+ )?materials?",
            r"valve replacement",
            r"valvuloplast\w*",
            r"sternotom\w*",
            r"icd\b",
            r"silicone",
            r"drain\b",
            r"staples?\b",
            r"fixat(?:or|ion)\w*",
            r"foreign bod\w*",
            r"pacing leads?",
            r"leads?\b(?= (?:of|extending|in the|terminat))",
            r"(?:vena cava|ivc) filter",
        ),
        unless=re.compile(
            r"omental|peritoneal implant|pleural implant|tumou?r\w* implant|end ?plate|implantation|metalloid|"
            r"gallbladder|bypass graft\b(?! material)|tubercul|biliary|bile duct|choledoc|ureter|renal|jj|hepatic"
        ),
        window=(30, 25),
    ),
    FindingRule(
        "Arterial wall calcification",
        ("athero", "atero", "calcif", "calsif", "plaque"),
        _any(*_ATHEROMA),
    ),
    FindingRule(
        "Cardiomegaly",
        ("cardiomeg", "heart", "cardiothor", "ctr", "cardiac", "cardio thor", "kardio"),
        _any(
            r"[ck]ardiomegal\w*",
            rf"(?:heart|cardiac) (?:sizes?|dimensions?|diameters?|contours?)(?: \w+){{0,4}}? {_GREW}",
            rf"(?:size|dimensions?|diameters?) of the heart(?: \w+){{0,4}}? {_GREW}",
            rf"heart (?:is|was|appears|has)(?: \w+){{0,3}}? {_GREW}",
            rf"(?:cardio ?thora\w*(?: (?:index|ratio|rate))?|ctr)(?: \w+){{0,6}}? {_GREW}",
            rf"{_GREW} (?:in|of) (?:the )?(?:heart|cardio ?thora\w*|ctr|cardiac)(?: (?:size|dimension|index|ratio))?",
            rf"{_GREW} (?:heart|cardiac)(?: (?:size|dimension|contour))?",
        ),
        unless=re.compile(r"vessel|vascular structures"),
        window=(0, 0),
    ),
    FindingRule(
        "Pericardial effusion",
        ("pericard", "perikard"),
        _any(
            r"peri[ck]ardial (?:\w+,? ){0,4}?(?:effusion\w*|fluid|liquid)",
            r"(?:effusion\w*|fluid|liquid)(?: \w+,?){0,8}? (?:peri[ck]ardi\w+|pericardium)",
            r"pericardi\w+ (?:\w+,? ){0,6}?(?:effusion\w*|fluid\b|liquid)",
        ),
    ),
    FindingRule(
        "Coronary artery wall calcification",
        ("coronar", "koroner", " lad", "lad ", "circumflex"),
        _any(*_ATHEROMA),
        needs=re.compile(r"[ck]oron[ae]r\w*|\blad\b|circumflex"),
        window=(400, 400),
    ),
    FindingRule("Hiatal hernia", ("hernia", "hiat"), _any(r"hernia\w*", r"hiat\w* defect")),
    FindingRule(
        "Lymphadenopathy",
        ("lymph", "lap", "adenopat", "lenf", "node"),
        _any(
            r"lymph(?:atic)? (?:nodes?|nods?|nodules?|glands?)",
            r"laps?\b",
            r"\w*adenopat\w*",
            r"lymphadeno\w*",
            r"lymphonodes?",
            r"lymphomegal\w*",
            r"nodes? of up to",
        ),
        unless=re.compile(r"intrapulmonary|dissection|lymphoma"),
        window=(25, 12),
    ),
    FindingRule(
        "Emphysema",
        ("emphys", "emfiz", "emphiz", "bulla", "bleb", "bull ", "bullet"),
        _any(r"emph[yi]\w*", r"emfiz\w*", r"bulla\w*", r"blebs?\b", r"bull(?:et|ous)?\b"),
        unless=re.compile(r"subcutan|skin|soft tissue|chest wall|thoracic wall|cutaneous|muscle|mediastinal emph"),
        window=(60, 60),
    ),
    FindingRule(
        "Atelectasis",
        ("atele", "collaps", "atalec"),
        _any(r"at[ea]l\w*ta\w*", r"atelec\w*", r"collaps\w*"),
        unless=re.compile(r"vertebra|corpus|trache|vena|gallbladder|stomach|esophag"),
        window=(40, 30),
    ),
    FindingRule(
        "Lung nodule",
        ("nodul", "nodül"),
        _any(r"(?:micro)?nod[uü]l\w*"),
        unless=re.compile(
            r"thyroid|adrenal|schmorl|breast|liver|spleen|kidney|hepatic|isthmus|subcutan|skin|ventric|lymph nod|"
            r"retroareol|mammar|gland|pancrea|peritone|omental|pericardial"
        ),
        window=(70, 50),
    ),
    FindingRule(
        "Lung opacity",
        ("opaci", "ground", "consolid", "infiltra", "densit", "pneumon", "glass", "crazy", "budding"),
        _any(
            r"ground ?\w* ?glass\w*",
            r"frosted glass",
            r"\w*opaci\w*",
            r"consolid\w*",
            r"(?:pneumonic|nodular|active|acinar|centri\w+|alveolar|infectious|interstitial|patchy) infiltrat\w*",
            r"infiltrat(?:ions?|es)\b",
            r"(?:densit\w+) (?:increas\w*|increment\w*)",
            r"increas\w* (?:in )?(?:\w+ )?densit\w*",
            r"crazy paving",
        ),
        unless=re.compile(
            r"sequel\w*|fibro\w*|pleuroparenchym\w*|subcutan|fat plan|fatty|mesent|skin|breast|bone|liver|vertebra|"
            r"nodules?\b|bronchopneumonia|omental"
        ),
        window=(60, 45),
    ),
    FindingRule(
        "Pulmonary fibrotic sequela",
        ("fibro", "sequel", "pleuroparen", "scar", "honeycomb", "recession", "retraction", "sekel"),
        _any(
            r"fibro(?!calc|aden|lip|gland|musc|scop|ma)\w*",
            r"sequel\w*",
            r"pleuro ?paren\w* (?:\w+ ){0,3}?(?:band|density|densities|recession|streak|retraction|line|thick|distor)\w*",
            r"scar\w*",
            r"honey ?comb\w*",
            r"fibrosis",
        ),
        unless=re.compile(
            r"fractur|kidney|renal|rib\b|ribs\b|vertebra|liver|spleen|bone|humerus|myocard|clavic|hepatic|covid"
        ),
        window=(60, 45),
    ),
    FindingRule(
        "Pleural effusion",
        ("effus", "fluid", "liquid", "hydrothor", "hemothor", "hydropneu"),
        _any(
            r"effus\w*",
            r"hydro(?:pneumo)?thora\w*",
            r"hemothora\w*",
            r"(?:pleural|hemithora\w*|costophrenic) (?:\w+ ){0,4}?(?:fluid|liquid)\w*",
            r"(?:fluid|liquid)\w* (?:\w+ ){0,6}?(?:pleura\w*|hemithora\w*|interlobar|fissure)",
        ),
    ),
    FindingRule("Mosaic attenuation pattern", ("mosaic", "mozaic"), _any(r"mo[sz]aic\w*")),
    FindingRule(
        "Peribronchial thickening",
        ("peribronch", "bronch"),
        _any(
            r"peri ?bronch\w* (?:\w+ ){0,3}?(?:thick\w*|cuff\w*|increas\w*)",
            r"thick\w*(?: \w+){0,5}? (?:peri ?)?bronch\w*",
            r"bronch\w*(?: \w+){0,3}? wall\w*(?: \w+){0,3}? (?:thick\w*|increas\w*)",
            r"bronch\w* (?:wall )?thick\w*",
        ),
    ),
    FindingRule(
        "Consolidation",
        ("consolid", "infiltra", "konsol", "pneumonic"),
        _any(
            r"[ck]onsolid\w*", r"pneumonic infiltrat\w*", r"infiltrat(?:ions?|es)\b", r"pneumonic (?:area|dens)"
        ),
        counts_if_uncertain=True,
    ),
    FindingRule(
        "Bronchiectasis",
        ("bronchi", "bronş"),
        _any(
            r"bronchi?o?l?o?e[ck]ta\w*",
            r"bronchi\w*(?: \w+){0,4}? (?:dilat\w*|ectasi\w*|enlarge\w*|wide\w*)",
            r"(?:dilat\w*|ectasi\w*|enlarge\w*|widen\w*)(?: \w+){0,3}? bronch\w*",
        ),
    ),
    FindingRule(
        "Interlobular septal thickening",
        ("sept", "interlob", "crazy"),
        _any(
            r"(?:inter|intra)?(?:lobular|lobar|septal|lobul\w*)?[ -]*(?:inter)?sept\w* (?:\w+ ){0,3}?thick\w*",
            r"thick\w*(?: \w+){0,4}? (?:inter\w* )?sept(?:a|al|um)\b",
            r"inter ?lobular (?:\w+ ){0,3}?thick\w*",
            r"crazy paving",
        ),
        unless=re.compile(r"ventric|nasal|paraseptal"),
        window=(20, 10),
    ),
)

RULES: tuple[FindingRule, ...] = tuple(
    next(rule for rule in _RULES if rule.name == name) for name in DISEASE_NAMES
)
