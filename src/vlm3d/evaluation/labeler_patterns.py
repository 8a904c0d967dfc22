"""How reports name the 18 findings: one rule a finding, in the order of `vlm3d.labels`.

What counts follows CT-RATE's hand-made labels: lymph nodes that are described count even where they are small; opacity is
ground glass, a linear density or an unexplained increase of density, while consolidation is a label of its own;
infiltration alone is neither; a sequela or a fibrotic band of the lung or the pleura is a fibrotic sequela, honeycombing
is not; thick bronchial walls count where the report says peribronchial; atherosclerosis counts where a vessel is named.
"""

from __future__ import annotations

import re

from vlm3d.evaluation.labeler_rule import FindingRule, Naming
from vlm3d.labels import DISEASE_NAMES


def _any(*alternatives: str) -> re.Pattern[str]:
    return re.compile(rf"\b(?:{'|'.join(alternatives)})")


_SENTENCE = (1000, 1000)
_CORONARY = r"[ck]oron[ae]r\w*|\blad\b|\brca\b|circumflex|anterior descending"
_NO_VESSEL = (
    r"lymph|nodul|nodes?\b|valve|pleura\w*|liver|kidney|spleen|thyroid|adrenal|granulom|disc\b|parenchyma\w*|fibrotic|"
    r"sequel\w*|subcutan|tendon|ligament|gallbladder|breast|pericard\w*|hamart"
)
_GREW = (
    r"(?:increas\w*|enlarg\w*|larger|large|dilat\w*|big\w*|above (?:the )?normal|cardiomegal\w*|wider|grown|"
    r"prominent|over (?:the )?(?:normal|limit)\w*)"
)
_IS_NORMAL = r"(?:is|are|was|were) (?:of )?(?:within )?(?:the )?(?:normal|unremarkable|natural)\b"
_LUNG = r"(?:lung|pulmon|upper lobe|lower lobe|middle lobe|fissur|lingul|centr\w*acinar|hemithora)"
_ORGANS = (
    r"mediastin|calculus|thyroid|adrenal|schmorl|breast|liver|spleen|kidney|hepatic|isthmus|subcutan|skin|ventric|"
    r"lymph nod|retroareol|mammar|gland|pancrea|periton|omental|pericardial|hypodense|adipose|mesent|fatty tissue|"
    r"muscle|vertebra|renal"
)

_RULES: tuple[FindingRule, ...] = (
    FindingRule(
        "Medical material",
        (
            *(
                "cathe",
                "pacem",
                "stent",
                "prosthe",
                "sutur",
                "clip",
                "tube",
                "cannul",
                "port",
                "metal",
                "screw",
            ),
            *("implant", "wire", "electrode", "graft", "material", "replac", "sternotom", "device", "icd "),
            *(
                "silicon",
                "drain",
                "valvulopl",
                "stapl",
                "fixat",
                "foreign",
                "leads",
                "coil",
                "peg ",
                "pace maker",
            ),
            *("medical", "tracheost"),
        ),
        (
            Naming(
                _any(
                    r"cathet[eh]?r?s?\w*",
                    r"pace ?makers?",
                    r"stents?\b",
                    r"prosthe\w*",
                    r"sutur\w*",
                    r"clips?\b",
                    r"(?<!upper )(?<!lower )tubes?\b",
                    r"cannula\w*",
                    r"port\b",
                    r"chamber port",
                    r"metal\w*(?! art[ei]fact)",
                    r"electrodes?\b",
                    r"peg\b",
                    r"(?:surgical|operation|operative|postoperative|medical|foreign|embolizing|suture|graft) "
                    r"(?:\w+ )?materials?",
                    r"medical devices?",
                    r"breast implants?",
                    r"implants? (?:\w+ ){0,4}breasts?",
                    r"tracheostom\w*",
                    r"valve replacement",
                    r"valvuloplast\w*",
                    r"wires?\b",
                    r"icd\b",
                    r"drain(?:age)?s?\b",
                    r"foreign bod\w*",
                    r"leads\b",
                    r"vena cava filter",
                    r"(?:surgical )?staples?\b",
                    r"(?:stent )?graft\b(?! vein)",
                ),
                unless=re.compile(r"drainage (?:vein|of the)|metallo|tubercul|vertebra|[tl]\d+ "),
                window=(30, 40),
            ),
        ),
    ),
    FindingRule(
        "Arterial wall calcification",
        ("athero", "atero", "calcif", "calsif", "plaque", "calcic"),
        (
            Naming(
                _any(r"athero\w*", r"atero\w*", r"arteriosclero\w*"),
                needs=re.compile(r"aort|arcus|(?<!coronary )vascular|carotid|iliac|subclav|supra|vessels"),
                window=_SENTENCE,
            ),
            Naming(
                _any(r"calcif\w*", r"calsif\w*", r"calcic\w*", r"plaques?\b"),
                needs=re.compile(
                    r"aort(?!o ?pulm|ic valve)|arcus|(?<!coronary )vascular (?:wall|struct)|carotid|iliac|"
                    r"subclav|supra ?aort|\barterial|"
                    r"(?<!coronary )(?<!coroner )(?<!descending )\barter(?:y|ies)\b|vessels"
                ),
                unless=re.compile(rf"^.{{0,80}}(?:{_NO_VESSEL})"),
                window=(60, 100),
            ),
        ),
    ),
    FindingRule(
        "Cardiomegaly",
        ("cardiomeg", "heart", "cardiothor", "ctr", "cardiac", "cardio thor", "kardio"),
        (
            Naming(
                _any(
                    r"[ck]ardiomegal\w*",
                    rf"(?:heart|cardiac) (?:sizes?|dimensions?|diameters?|contours?)(?:,? \w+){{0,4}}? {_GREW}",
                    rf"(?:sizes?|dimensions?|diameters?) of the heart(?: \w+){{0,4}}? {_GREW}",
                    rf"heart (?:is|was|appears|has)(?: \w+){{0,3}}? {_GREW}",
                    rf"(?:cardio ?thora\w*(?: (?:index|ratio|rate))?|ctr)(?: \w+){{0,6}}? {_GREW}",
                    rf"{_GREW} (?:in|of) (?:the )?(?:heart|cardio ?thora\w*|ctr|cardiac)",
                    rf"{_GREW} (?:heart|cardiac)(?: (?:size|dimension|contour))?\b(?! (?:chamber|cavit))",
                    r"increas\w* in favou?r of (?:the )?(?:heart|ctr)",
                    # "is normal" right behind it denies it
                    rf"(?:heart|cardiac) (?:sizes?|dimensions?|contours?)(?= {_IS_NORMAL})",
                    rf"heart(?= {_IS_NORMAL}(?: in)? size)",
                ),
            ),
        ),
    ),
    FindingRule(
        "Pericardial effusion",
        ("pericard", "perikard"),
        (
            Naming(
                _any(
                    r"peri[ck]ardi\w+ (?:\w+,? ){0,6}?(?:effusion\w*|fluid|liquid|efusion)",
                    r"(?:effusion\w*|fluid|liquid)(?: [\w.]+,?){0,14}? peri[ck]ardi\w+",
                ),
            ),
        ),
    ),
    FindingRule(
        "Coronary artery wall calcification",
        ("coron", "koron", " lad", "lad ", "circumflex", "anterior descending"),
        (
            Naming(
                _any(r"athero\w*", r"atero\w*", r"calcif\w*", r"calsif\w*", r"calcic\w*", r"plaques?\b"),
                needs=re.compile(_CORONARY),
                window=_SENTENCE,
            ),
        ),
    ),
    FindingRule(
        "Hiatal hernia",
        ("hernia", "hiat"),
        (
            Naming(
                _any(r"hernia\w*"),
                needs=re.compile(r"hiat|slid|esoph|stomach|gastric"),
                unless=re.compile(r"inguinal|umbilic|disc |lumbar|femoral|incision"),
                window=(60, 60),
            ),
        ),
    ),
    FindingRule(
        "Lymphadenopathy",
        ("lymph", "lap", "adenopat", "lenf", " node"),
        (
            Naming(
                _any(
                    r"lymph(?:atic)? (?:nodes?|nods?|nodules?|glands?)\b(?! stations?)",
                    r"laps?\b",
                    r"\w*adenopat\w*",
                    r"lymphadeno\w*",
                    r"lymphonodes?",
                    r"lymphomegal\w*",
                ),
                unless=re.compile(r"dissection|breast|sigmoid|intra ?abdominal|subpleural|intra ?pulmonary"),
                window=(30, 20),
            ),
        ),
        counts_if_asked=False,
    ),
    FindingRule(
        "Emphysema",
        ("emphy", "emfiz", "emphi", "bulla", "bleb", "bull "),
        (Naming(_any(r"emph[yi]\w*", r"emfiz\w*", r"bulla\w*", r"blebs?\b", r"bull(?:ous)?\b")),),
    ),
    FindingRule(
        "Atelectasis",
        ("atele", "collaps", "atalec"),
        (
            Naming(_any(r"(?<!fibro )(?<!fibrotic )(?:at[ea]l\w*ta\w*|atelec\w*)")),
            Naming(
                _any(r"collaps\w*"),
                unless=re.compile(r"vertebra|corpus|trache|vena|gallbladder|stomach|esophag|fracture|bowel"),
                window=(40, 50),
            ),
        ),
        counts_if_asked=False,
    ),
    FindingRule(
        "Lung nodule",
        ("nodul", "nodül"),
        (
            Naming(
                _any(
                    r"(?:micro)?nod[uü]l(?:es?|o|ary?\b(?! (?:\w+ )?"
                    r"(?:consolid|infiltr|ground|thick|densit|opaci|enhanc|calcif|increas|configur|contam)))\w*",
                ),
                unless=re.compile(rf"^(?!.*{_LUNG}).*(?:{_ORGANS})|thyroid|adrenal|liver|mediastin|structur"),
                window=_SENTENCE,
            ),
        ),
    ),
    FindingRule(
        "Lung opacity",
        ("opaci", "ground", "densit", "glass"),
        (
            Naming(
                _any(
                    r"ground ?\w* ?glass\w*",
                    r"(?:frosted|icy|iced) (?:glass|densit)\w*",
                    r"glass (?:area|densit)\w*",
                )
            ),
            Naming(
                _any(
                    r"(?:acinar|dep[ae]nd[ae]nt|patchy|alveolar|hazy) densit\w*",
                    r"linear (?:\w+ )?densit\w*",
                ),
                unless=re.compile(
                    r"subcutan|fat|adipose|mesent|skin|breast|oment|periton|renal|muscle|colon"
                ),
            ),
            Naming(
                _any(r"opaci\w*"),
                unless=re.compile(r"contrast|opacif"),
            ),
            Naming(
                _any(r"densit\w+ (?:increas\w*|increment\w*)"),
                unless=re.compile(
                    r"soft tissue|sequel\w*|fibro\w*|pleuro?a?l? ?parenchym\w*|subcutan|fat|adipose|mesent|skin|breast|"
                    r"bone|liver|vertebra|metal\w*|rib\b|inguinal|coronar|bladder|thymic|oment|periton|spleen|"
                    r"(?:consistent|compatible|favou?r)[\w ,]{0,40}(?:atelect|sequel|consolid)"
                ),
                window=(60, 90),
            ),
        ),
    ),
    FindingRule(
        "Pulmonary fibrotic sequela",
        ("fibro", "sequel", "pleuro", "scar", "recession", "retraction", "sekel", "band", "fibra"),
        (
            Naming(
                _any(
                    r"fibro(?!calc|aden|lip|gland|musc|scop|ma|sis)\w*",
                    r"pleur[oa]l? ?paren\w* (?:\w+ ){0,3}?(?:band|densit|recession|streak|retract|line|thick|distor)\w*",
                    r"(?:parenchymal|subpleural|pleural) bands?",
                )
            ),
            Naming(
                _any(
                    r"sequel\w*(?! (?:calcif\w+ )?(?:nodul|lymph|pulmonary nod))",
                    r"(?<!interstitial )scar\w*",
                ),
                unless=re.compile(
                    r"fractur|kidney|renal|rib\b|ribs\b|vertebra|liver|spleen|bone|humerus|myocard|clavic|hepatic|"
                    r"elevation|lymph|mediastin"
                ),
            ),
        ),
    ),
    FindingRule(
        "Pleural effusion",
        ("effus", "fluid", "liquid", "hydrothor", "hemothor", "hydropneu", "efus"),
        (
            Naming(
                _any(r"eff?usion\w*"),
                unless=re.compile(
                    r"^(?!.*(?:pleur|hemithora)).*pericard|abdom|mediastin|renal|nephric|kidney|joint|pelvi|perihep|knee|fatty"
                ),
                window=(30, 110),
            ),
            Naming(
                _any(
                    r"hydro(?:pneumo)?thora\w*",
                    r"hemothora\w*",
                    r"(?:pleural|hemithora\w*|costophrenic) (?:\w+ ){0,4}?(?:fluid|liquid)\w*",
                    r"(?:fluid|liquid)\w* (?:\w+ ){0,6}?(?:pleura\w*|hemithora\w*|interlobar|fissure)",
                )
            ),
        ),
    ),
    FindingRule("Mosaic attenuation pattern", ("mosaic", "mozaic"), (Naming(_any(r"mo[sz]aic\w*")),)),
    FindingRule(
        "Peribronchial thickening",
        ("peribronch", "peri bronch"),
        (
            Naming(
                _any(
                    r"peri ?bronch\w* (?:(?!and )\w+ ){0,4}?(?:thick\w*|cuff\w*|increas\w*)",
                    r"thick\w*(?: \w+){0,5}? peri ?bronch\w*",
                    r"increas\w*(?: \w+){0,4}? peri ?bronch\w*",
                ),
            ),
        ),
    ),
    FindingRule(
        "Consolidation",
        ("consolid", "konsol"),
        (Naming(_any(r"[ck]onsolid\w*")),),
    ),
    FindingRule(
        "Bronchiectasis",
        ("bronch",),
        (
            Naming(
                _any(
                    r"bronchi?o?l?o?e[ck]ta\w*",
                    r"bronchi\w*(?: \w+){0,4}? (?:dilat\w*|ectasi\w*|enlarge\w*|wide\w*)",
                    r"(?:dilat\w*|ectasi\w*|enlarge\w*|widen\w*)(?: \w+){0,3}? bronch\w*",
                ),
            ),
        ),
    ),
    FindingRule(
        "Interlobular septal thickening",
        ("sept", "interlob", "intralob", "interstit"),
        (
            Naming(
                _any(
                    r"\w*sept\w* (?:[\w,]+ ){0,4}?thick\w*",
                    r"prominence(?: \w+){0,4}? inter ?lob\w* sept\w*",
                    r"prominent inter ?lob\w* sept\w*",
                    r"inter ?lob\w* sept\w* (?:is|are|were|was) (?:\w+ )?prominent",
                    r"thick\w*(?: \w+){0,8}? \w*sept(?:a|ae|al|as|um|ums)\b",
                    r"(?:inter|intra) ?lobul\w* (?:[\w,]+ ){0,4}?thick\w*",
                    r"interstiti\w* (?:\w+ ){0,2}?thick\w*",
                    r"thick\w*(?: \w+){0,4}? (?:interstiti|(?:inter|intra) ?lobul)\w*",
                ),
                unless=re.compile(r"ventric|nasal|paraseptal"),
                window=(20, 10),
            ),
        ),
    ),
)

RULES: tuple[FindingRule, ...] = tuple(
    next(rule for rule in _RULES if rule.name == name) for name in DISEASE_NAMES
)
