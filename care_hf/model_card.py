"""The model card of a repaired checkpoint, made from what its files tell, and from what was measured."""

import hashlib
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard, ModelCardData, try_to_load_from_cache
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from .atomic import replace_file
from .card_results import chosen_defence, eval_results, gradient_rates, read_report, results_table
from .configuration_care import CareConfig, auto_class
from .diagnosis import Diagnosis
from .provenance import reproduction
from .report import Report

logger = logging.get_logger(__name__)

README, REPRODUCE = "README.md", "reproduce.json"
TEMPLATE = Path(__file__).parent / "data" / "model_card.jinja"
TAGS = ("care_hf", "safety", "refusal", "vision-language", "arxiv:2603.27240")
LICENSE = ("license", "license_name", "license_link")
# The last line of a card; with any change above it, the card is no longer ours.
SIGNATURE = "<!-- Written by care_hf, which replaces it when the model is saved again, unless it was edited: {} -->\n"
WHERE = {"last": "last token of the prompt", "response": "first {} tokens of the answer"}


@dataclass(frozen=True, eq=False)
class Card:
    """What a model card should tell beyond what the model knows of itself: ``repaired.card = care_hf.Card(report)``.

    Attributes:
        report: what `care_hf.evaluate` gave, or the folder or ``report.json`` that it was saved in. Answers stay out.
        defence: the name of the model's row in the report; needed if there are several, none of them "repaired".
        diagnosis: of the base, by `care_hf.diagnose`; or its folder, the figures in which are shown.
        figures: further pictures.
        base_model: the base's id on the Hub, if it was loaded from a folder.
        license: by default the base's, if it can be found.
        datasets: ids on the Hub of what the repair was fitted on.
        command: what makes the model again; by default a call of `care_hf.fit`.
        intended_use: a paragraph of your own.

    Raises:
        ValueError, FileNotFoundError: a report, defence, diagnosis or figure does not exist or cannot be read.
    """

    report: Report | Mapping[str, Any] | str | Path | None = None
    defence: str = ""
    diagnosis: Diagnosis | str | Path | None = None
    figures: Sequence[str | Path] = ()
    base_model: str = ""
    license: str = ""
    datasets: Sequence[str] = ()
    command: str = ""
    intended_use: str = ""

    def __post_init__(self):
        figures = [Path(path) for path in self.figures]
        if self.report is not None:
            if isinstance(self.report, (str, Path)):
                figures += sorted(Path(self.report).glob("*.png"))
            object.__setattr__(self, "report", read_report(self.report))
            object.__setattr__(self, "defence", chosen_defence(self.report, self.defence))
        if isinstance(self.diagnosis, (str, Path)):
            figures += sorted(Path(self.diagnosis).glob("*.png"))
            object.__setattr__(self, "diagnosis", Diagnosis.load(self.diagnosis))
        absent = [path.name for path in figures if not path.is_file()]
        if absent:
            raise FileNotFoundError(f"The figures {absent} do not exist.")
        object.__setattr__(self, "figures", tuple(figures))


def write_card(folder: str | Path, card: Card | None = None) -> Path:
    """Write the card of a saved checkpoint anew, for example once it was measured.

    Args:
        folder: what `save_pretrained` wrote.
        card: what to tell.

    Returns:
        The card's path; a README.md that is no card of care_hf, or was edited, stays as it is.

    Raises:
        FileNotFoundError: the folder has no ``reproduce.json``; save the model again.
    """
    folder = Path(folder).resolve()
    told = json.loads((folder / REPRODUCE).read_text())
    _write(folder, folder, CareConfig.from_pretrained(folder), told, card or Card())
    return folder / README


def add_card(
    model,
    folder: str | Path,
    tags: Sequence[str] = (),
    repo_id: str = "",
    online: HfApi | None = None,
    target: str | Path | None = None,
) -> None:
    """Write the card of a model that was just saved; what goes wrong is a warning, for the model is worth more.

    Args:
        model: a repaired model, with its `card`.
        folder: where it was saved.
        tags: further ones.
        repo_id: where it will be on the Hub, if it will.
        online: where to look for the license of the base, if it is not at hand.
        target: the folder that `folder` will take the place of, whose name and README.md count; by default itself.
    """
    try:
        tags = [*tags, *(model.model_tags or ())]
        told = {**reproduction(model), "strength": model.strength}
        folder, target = Path(folder).resolve(), Path(target or folder).resolve()
        _write(folder, target, model.config, told, model.card or Card(), tags, repo_id, online)
    except Exception as error:
        logger.warning(f"The model is saved, but without a new model card: {type(error).__name__}: {error}")


def written_here(readme: bytes) -> bool:
    """Whether a README.md is a card of care_hf that nobody has edited."""
    text, _, last = readme.decode(errors="replace").removesuffix("\n").rpartition("\n")
    return f"{last}\n" == SIGNATURE.format(_digest(text + "\n"))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _write(
    folder: Path,
    target: Path,
    config: CareConfig,
    told: dict[str, Any],
    card: Card,
    tags: Sequence[str] = (),
    repo_id: str = "",
    online: HfApi | None = None,
) -> None:
    name = repo_id or target.name
    base = card.base_model or told["base"]["name"]
    terms = {"license": card.license} if card.license else _license(config, base, online)
    told["base"]["name"] = base
    told["command"] = card.command or _fit_command(told, auto_class(config.vlm_config).__name__)
    attached = _attach(folder, card, told)
    (folder / REPRODUCE).write_text(json.dumps(told, indent=1) + "\n")
    before = target / README
    if before.exists() and not written_here(before.read_bytes()):
        logger.info(f"{README} is not a card of care_hf, or was edited; it is kept.")
        return
    kind, results = _pipeline(config), None
    if card.report:
        results = eval_results(card.report, card.defence, kind) or None
    data = ModelCardData(
        base_model=base,
        base_model_relation="finetune" if base else None,
        library_name="transformers",
        pipeline_tag=kind,
        tags=[*TAGS, *tags],
        datasets=list(card.datasets) or None,
        model_name=name.split("/")[-1] if results else None,  # a part of the results, unknown to the Hub by itself
        eval_results=results,
        **terms,
    )
    facts = {"name": name.split("/")[-1], "base": base, **_described(config, told, card, name), **attached}
    facts["license"] = terms
    text = str(ModelCard.from_template(data, template_path=str(TEMPLATE), **facts))
    text = re.sub(r"\n{3,}", "\n\n", text).rstrip() + "\n\n"
    replace_file(folder / README, (text + SIGNATURE.format(_digest(text))).encode())


def _attach(folder: Path, card: Card, told: dict[str, Any]) -> dict[str, Any]:
    """Copy what was measured beside the card; returns how it is shown."""
    shown: dict[str, Any] = {"figures": []}
    for index, path in enumerate(card.figures):
        known = any(path.name == Path(one["path"]).name for one in shown["figures"])
        copy = folder / "figures" / (f"{index}_{path.name}" if known else path.name)
        copy.parent.mkdir(exist_ok=True)
        if not (copy.exists() and copy.samefile(path)):
            shutil.copyfile(path, copy)
        shown["figures"].append({"name": path.stem, "path": f"figures/{copy.name}"})
    if card.report:
        shown |= _results(card.report, card.defence)
        text = json.dumps(card.report.to_dict()) + "\n"
        (folder / "report.json").write_text(text)
        (folder / "report.md").write_text(card.report.markdown())
        told["hashes"]["report"] = hashlib.sha256(text.encode()).hexdigest()
    if card.diagnosis:
        (folder / "diagnosis.md").write_text(card.diagnosis.markdown())
        same = card.diagnosis.model["fingerprint"] in (told["hashes"]["base"], told["hashes"]["saved base"])
        shown["diagnosis"] = (
            f"[diagnosis.md](diagnosis.md) tells where the base decides to refuse. It was measured on "
            f"{'these weights' if same else '**other weights than these**, or in another precision'}."
        )
    return shown


def _results(report: Report, defence: str) -> dict[str, Any]:
    settings = report.settings
    source = ", ".join(f"{name} {value}" for name, value in settings["source"].items())
    measured = (
        f"Row {defence!r} of suite {settings['suite']} ({source}), judge {report.judge}, seed {settings['seed']}, "
        "greedy decoding. Percent, and 95 % Wilson intervals that take prompts as independent; all tables in "
        "[report.md](report.md). That the row is this checkpoint is the word of whoever attached the report."
    )
    shown = {"measured": measured, "results": results_table(report, defence)}
    shown["comparison"] = report.main_table() if len(report.results) > 2 else ""
    rates = gradient_rates(report, defence)
    if rates:
        budget = settings["budget"]
        shown["gradient"] = (
            f"they succeed on {rates[1].percent} % of {rates[1].n} prompts (undefended {rates[0].percent} %) at eps "
            f"{budget['eps'][0]} of 255, {budget['steps']} steps."
        )
    return shown


def _described(config: CareConfig, told: Mapping[str, Any], card: Card, name: str) -> dict[str, Any]:
    recipe, hashes = told["recipe"], told["hashes"]["data"]
    counts = [f"{n} {name}" + (f" (sha256 {hashes[name][:12]})" if name in hashes else "") for name, n in _counts(told)]
    gate = config.gate and (
        f"reads {config.gate['site']}; {config.gate['required']} detector(s) must fire, and one of "
        f"{config.gate['alarms']} on text or of {config.gate['pictured']} on prompts with images"
    )
    auto = auto_class(config.vlm_config).__name__
    return {
        "base_class": told["class"],
        "sites": [_site(entry, config.scope) for entry in config.sites],
        "recipe": recipe and ", ".join(f"{name} {_plain(value)}" for name, value in recipe.items()),
        "gate": gate,
        "strength": told.get("strength"),
        "origin": told["origin"].get("origin"),
        "adapters": list(config.adapters),
        "prompts": ", ".join(counts),
        "data": [f"[{name}](https://huggingface.co/datasets/{name})" for name in card.datasets],
        "auto": auto,
        "where": name,
        "intended_use": card.intended_use,
        "install": _install(told["environment"]["fit"] or told["environment"]["saved"]),
        "command": told["command"],
        "language": "sh" if card.command else "python",
    }


def _counts(told: Mapping[str, Any]) -> list[tuple[str, int]]:
    return list(told["prompts"].items())


def _site(entry: Mapping[str, Any], scope: str) -> dict[str, Any]:
    tokens = {"visual": "image tokens", "text": "text tokens"}
    of = " of the prompt" if scope == "prompt" else ""
    where = [WHERE[n].format(entry["steps"]) if n in WHERE else tokens[n] + of for n in entry["ranks"]]
    return {"site": entry["site"], "where": ", ".join(where), "rank": ", ".join(map(str, entry["ranks"].values()))}


def _plain(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _install(versions: Mapping[str, str]) -> str:
    wanted = [f"{name}=={versions[name].split('+')[0]}" for name in ("care_hf", "torch", "transformers")]
    return f"pip install {' '.join(wanted)}  # Python {versions['python']}"


def _fit_command(told: Mapping[str, Any], auto: str) -> str:
    """Python that fits the repair again; the prompts are whoever's they were."""
    base, revision = told["base"]["name"] or "the base", told["base"]["revision"]
    where = f'"{base}"' + (f', revision="{revision}"' if revision else "")
    given = ["benign", "malicious", *(f"{n}={n}" for n, _ in _counts(told) if n in ("exposed", "neutral"))]
    lines = ["import json", "", "import care_hf", f"from transformers import {auto}", ""]
    lines.append(f"model = {auto}.from_pretrained({where})")
    if told["recipe"] is None:
        return "\n".join([*lines, "# How its subspaces were made was not recorded: see Origin."])
    lines += [
        f'recipe = care_hf.Recipe(**json.load(open("{REPRODUCE}"))["recipe"])',
        f"repaired = care_hf.fit(model, {', '.join(given)}, recipe=recipe)  # prompts with the hashes above",
    ]
    return "\n".join(lines)


def _pipeline(config: CareConfig) -> str:
    return "text-generation" if auto_class(config.vlm_config) is AutoModelForCausalLM else "image-text-to-text"


def _license(config: CareConfig, base: str | None, online: HfApi | None) -> dict[str, str]:
    """What the base's card says of its license: in its folder, in the cache, or on the Hub; else nothing."""
    beside = Path(getattr(config.vlm_config, "_name_or_path", "") or "-") / README
    cached = try_to_load_from_cache(base, README) if base else None
    try:
        if beside.is_file():
            path = beside
        elif isinstance(cached, str):
            path = cached
        elif base and online:
            path = online.hf_hub_download(base, README)
        else:
            return {}
        found = ModelCard.load(path, ignore_metadata_errors=True).data
    except Exception as error:
        logger.info(f"The license of {base} is not known: {error!r}")
        return {}
    return {name: found.get(name) for name in LICENSE if isinstance(found.get(name), str)}
