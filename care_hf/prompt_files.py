"""The prompts that defences are trained on, from data sets that a file names."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from .judges import is_refusal
from .settings_files import check_fields, read_fields

FORMATS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


@dataclass(frozen=True, eq=False)
class PromptSets:
    """Prompts in any form that `samples.load_samples` takes, as `training.Trainer` takes them.

    Attributes:
        benign: requests that should be granted.
        malicious: harmful requests in plain words, of which the model refuses some.
        attacks: jailbreaks by family.
        exposed, neutral: harmless questions about harmful and about harmless things; both or neither.
        refusal: how the model refuses.
    """

    benign: Sequence[Any]
    malicious: Sequence[Any]
    attacks: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    exposed: Sequence[Any] | None = None
    neutral: Sequence[Any] | None = None
    refusal: str = "I'm sorry, but I can't help with that."

    @classmethod
    def load(cls, path: str | Path) -> "PromptSets":
        """Read a YAML file of these fields; a set is the path of a JSON lines, CSV or Parquet file beside it.

        Raises:
            ValueError: a field is not known or missing, or a file has another format.
            OSError: a file is missing.
        """
        path = Path(path)
        values = read_fields(path)
        check_fields(values, [item.name for item in fields(cls)], str(path), ("benign", "malicious"))

        def read(value: Any) -> Any:
            return (
                {name: read_rows(path.parent / file) for name, file in value.items()}
                if isinstance(value, dict)
                else (read_rows(path.parent / value))
            )

        sets = {name: read(value) for name, value in values.items() if name != "refusal" and value}
        return cls(**sets, **({"refusal": values["refusal"]} if "refusal" in values else {}))

    def prompts(self, families: Sequence[str], exposure: bool) -> dict[str, Sequence[Any]]:
        """See `training.TrainingPrompts`; without exposed and neutral prompts there is no exposure.

        Raises:
            ValueError: there is no such family.
        """
        unknown = sorted(set(families) - set(self.attacks))
        if unknown:
            raise ValueError(f"There are no attacks of the families {unknown}; known are {sorted(self.attacks)}.")
        malicious = [prompt for family in families for prompt in self.attacks[family]]
        prompts = {"benign": list(self.benign), "malicious": [*self.malicious, *malicious]}
        if exposure and self.exposed is not None and self.neutral is not None:
            return prompts | {"exposed": self.exposed, "neutral": self.neutral}
        return prompts

    def is_refusal(self, answer: str) -> bool:
        """Whether an answer begins like a refusal in English."""
        return is_refusal(answer)


def read_rows(path: Path) -> Any:
    """The prompts of a file as a `datasets.Dataset`.

    Raises:
        ValueError: the file has another format, is broken or empty.
        FileNotFoundError: it is missing.
    """
    import datasets

    if path.suffix not in FORMATS:
        raise ValueError(f"{path}: prompts are read from {tuple(FORMATS)}.")
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing.")
    try:
        return datasets.load_dataset(FORMATS[path.suffix], data_files=str(path), split="train")
    except (ValueError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(f"{path} cannot be read as rows of prompts, or has none: {error}") from error
