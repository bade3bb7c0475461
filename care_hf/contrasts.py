"""By which first token of an answer refusal and compliance are told apart: the log-odds that diagnosis follows."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Contrast:
    """The token ids with which answers begin that refuse, and that comply.

    Raises:
        ValueError: one of them is empty, or a token is in both.
    """

    refused: tuple[int, ...]
    complied: tuple[int, ...]

    def __post_init__(self):
        if not self.refused or not self.complied:
            raise ValueError(
                f"refused={self.refused} and complied={self.complied} must each hold a first token; give malicious "
                "prompts of which the model refuses some and complies with some, in other words, or pass `contrast=`."
            )
        if set(self.refused) & set(self.complied):
            raise ValueError(
                f"Tokens {sorted(set(self.refused) & set(self.complied))} begin refusals and other answers alike; name "
                "tokens that tell them apart."
            )

    @classmethod
    def of_first_tokens(cls, tokens: Sequence[int], verdicts: Sequence[str]) -> "Contrast":
        """Learn them from how answers began and what a judge says of those.

        A token that begins answers of both kinds is left out; answers that neither refuse nor comply do not count.

        Args:
            tokens: the first token that was generated, of each answer.
            verdicts: beside them.

        Raises:
            ValueError: no token is left on one of the sides.
        """
        first: dict[str, set[int]] = {"refused": set(), "complied": set(), "other": set()}
        for token, verdict in zip(tokens, verdicts, strict=True):
            first[verdict].add(token)
        both = first["refused"] & first["complied"]
        return cls(*(tuple(sorted(first[name] - both)) for name in ("refused", "complied")))

    def log_odds(self, logits: torch.Tensor) -> torch.Tensor:
        """``log p(refused) - log p(complied)`` of the next token in nats, (..., ) by logits (..., vocabulary).

        Float32 at least; differentiable. Above 0 the model rather refuses.
        """
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        refused, complied = (logits[..., list(ids)].logsumexp(dim=-1) for ids in (self.refused, self.complied))
        return refused - complied
