"""What a causal trace found, prompt by prompt, and its tables."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from .rates import Mean, Rate
from .sites import Site

LAYER = "layer"  # what a user calls the component "residual" when it is blocked
BASE = "unblocked"


@dataclass(frozen=True, eq=False)
class Outcome:
    """What the model does under one block, prompt by prompt.

    Attributes:
        malicious: a verdict (`judges.VERDICTS`) on the answer to each malicious prompt.
        benign: the same of benign prompts.
        log_odds: of a refusal against compliance at the first token after malicious prompts, nats.
        kept: whether the answer to each benign prompt is that of the unblocked model.
        divergence: ``KL(unblocked || blocked)`` of the first token after each benign prompt, nats.
    """

    malicious: list[str]
    benign: list[str]
    log_odds: list[float]
    kept: list[bool]
    divergence: list[float]


@dataclass(frozen=True, eq=False)
class Trace:
    """The outcome without a block and under each.

    Attributes:
        unblocked: without.
        blocked: by mode and site; a site of the component "residual" is a whole layer.
        settings: plain values from which it could be made again.
    """

    unblocked: Outcome
    blocked: Mapping[str, Mapping[Site, Outcome]]
    settings: Mapping[str, Any]

    def rate(self, outcome: Outcome, of: str, verdict: str) -> Rate:
        """The share of a verdict on "malicious" or "benign" prompts."""
        verdicts = getattr(outcome, of)
        return Rate(verdicts.count(verdict), len(verdicts))

    def log_odds_change(self, outcome: Outcome) -> Mean:
        """By how much refusal has become likelier than without the block, nats, mean over malicious prompts."""
        return Mean.of([a - b for a, b in zip(outcome.log_odds, self.unblocked.log_odds, strict=True)])

    def rows(self, mode: str) -> list[tuple[str, Outcome]]:
        """The unblocked model and every block, named."""
        return [(BASE, self.unblocked), *((site_name(site), one) for site, one in self.blocked[mode].items())]

    def table(self, mode: str) -> str:
        """A Markdown table: one row per block, percent with 95 % Wilson intervals, nats with bootstrap intervals."""
        lines = [
            "| blocked | attacks complied | attacks refused | benign right | benign kept | log-odds of refusal, change "
            "| divergence, benign |",
            "| --- " + "| ---: " * 6 + "|",
        ]
        for name, outcome in self.rows(mode):
            rates = [self.rate(outcome, "malicious", verdict) for verdict in ("complied", "refused")]
            rates += [self.rate(outcome, "benign", "complied"), Rate(sum(outcome.kept), len(outcome.kept))]
            divergence = Mean.of(outcome.divergence)
            cells = [name, *(rate.percent for rate in rates), str(self.log_odds_change(outcome)), str(divergence)]
            lines.append("| " + " | ".join(cells) + " |")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        blocked = {m: {str(site): asdict(one) for site, one in by.items()} for m, by in self.blocked.items()}
        return {"unblocked": asdict(self.unblocked), "blocked": blocked, "settings": dict(self.settings)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Trace":
        """What `to_dict` gave."""
        blocked = {
            mode: {Site.parse(site): Outcome(**one) for site, one in by.items()}
            for mode, by in values["blocked"].items()
        }
        return cls(Outcome(**values["unblocked"]), blocked, values["settings"])


def site_name(site: Site) -> str:
    """A site as tables call it when it is blocked: "3.layer" for the whole layer."""
    return f"{site.layer}.{LAYER}" if site.component == "residual" else str(site)
