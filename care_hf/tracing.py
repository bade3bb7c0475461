"""Which layers and components a behaviour needs: block each, and see what the model then does.

Attack success falls when the place that carries it is blocked, and also when the model is broken; so benign answers
stand beside it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from .adapters import unwrapped
from .answers import relative_entropy
from .blocking import MODES, Blocker, Contributions, collect_contributions, generate_blocked
from .cells import Cells
from .contrasts import Contrast
from .interventions import evaluating
from .judges import Judge, KeywordJudge
from .replay import NotReplayable, Replay
from .resume import answers_fingerprint, prompts_fingerprint
from .samples import Sample, batches, collate, load_samples
from .sites import Site, decoder_layers, site_module
from .suite import Case
from .trace_results import BASE, LAYER, Outcome, Trace

logger = logging.get_logger(__name__)
Block = tuple[str, Site] | None  # a mode and a site; None is the unblocked model


def find_sites(model: nn.Module, components: Sequence[str], layers: Sequence[int] | None = None) -> list[Site]:
    """The sites of `components` ("layer", "ffn", "attention") in `layers`, by layer.

    Args:
        model: whose decoder has the layers.
        components: at least one.
        layers: from 0; if None all, of which those are left out, with a warning, that do not have a component, such as
            gated cross-attention.

    Raises:
        ValueError: an unknown component or a layer that is not there, or a component that a layer that was named, or
            every layer, does not have.
    """
    known = {LAYER: "residual", "ffn": "ffn", "attention": "attention"}
    unknown = [name for name in components if name not in known]
    if unknown or not components:
        raise ValueError(f"components={tuple(components)} must be some of {tuple(known)}.")
    named = range(len(decoder_layers(model))) if layers is None else sorted(set(layers))
    sites, missing = [], {}
    for site in (Site(layer, known[name]) for layer in named for name in components):
        try:
            site_module(model, site)
            sites.append(site)
        except ValueError as error:
            missing[site] = ValueError(
                f"{error} (Here that is called {LAYER!r}.)" if "'residual'" in str(error) else error
            )
    for name in components:
        lacking = [site for site in missing if site.component == known[name]]
        if lacking and (layers is not None or len(lacking) == len(named)):
            raise missing[lacking[0]]
    if missing:
        logger.warning(f"{', '.join(map(str, missing))} are left out. {next(iter(missing.values()))}")
    return sites


def as_cases(prompts: Sequence[Any], name: str) -> list[Case]:
    """Prompts in any form that `load_samples` takes as cases; those that are cases stay.

    Raises:
        TypeError, ValueError, OSError: as `load_samples`.
    """
    prompts = list(prompts)
    if prompts and all(isinstance(prompt, Case) for prompt in prompts):
        return prompts
    plain = [Sample(p.messages) if hasattr(p, "messages") and not isinstance(p, Sample) else p for p in prompts]
    samples = load_samples(plain, name)
    return [Case(sample.messages) for sample in samples]


def trace(
    model: nn.Module,
    processor,
    malicious: Sequence[Any],
    benign: Sequence[Any],
    judge: Judge | None = None,
    components: Sequence[str] = (LAYER, "ffn", "attention"),
    *,
    layers: Sequence[int] | None = None,
    modes: Sequence[str] = ("mean",),
    contrast: Contrast | None = None,
    max_new_tokens: int = 32,
    batch_size: int = 16,
    seed: int = 0,
    out: str | Path | None = None,
    reuse: bool = True,
) -> Trace:
    """Block each layer and each of its components, and measure what the model then answers.

    A blocked place adds to the residual stream nothing ("zero"), the mean of what it adds at benign tokens ("mean"), or
    what it added at a random benign token ("resample"), at every token of prompt and answer.

    Args:
        model: any that transformers loads; stays as it is.
        processor: its processor.
        malicious: prompts that should be refused, some of which are: cases (`Case`) where the judge compares answers
            with references, else anything that `load_samples` takes.
        benign: prompts that should be answered.
        judge: of the answers; by default keywords, to which every benign answer that is no refusal is right.
        components: of "layer" (all that it adds), "ffn" and "attention".
        layers: from 0; if None all, each with the components that it has.
        modes: of blocking.
        contrast: first tokens of refusals and of compliance; by default those of the model's own answers.
        max_new_tokens: of every answer, at least 1.
        batch_size: prompts per forward, at least 1.
        seed: of what "resample" draws.
        out: a folder that keeps what is finished, a batch under a block at a time; another call goes on from there.
        reuse: whether blocks share the undisturbed run (`replay.Replay`); what comes out is the same.

    Raises:
        TypeError, ValueError: prompts, components, layers, modes or numbers do not fit, before any forward; or the
            model refuses none or all of the malicious prompts, so that there is no contrast.
    """
    for name, value in {"max_new_tokens": max_new_tokens, "batch_size": batch_size}.items():
        if value < 1:
            raise ValueError(f"{name}={value} must be positive.")
    model = unwrapped(model)
    sites = find_sites(model, components, layers)
    unknown = [mode for mode in modes if mode not in MODES]
    if unknown or not modes:
        raise ValueError(f"modes={tuple(modes)} must be among {MODES}.")
    tracer = _Tracer(model, processor, as_cases(malicious, "malicious"), as_cases(benign, "benign"), judge)
    tracer.tokens, tracer.batch_size, tracer.seed, tracer.reuse = max_new_tokens, batch_size, seed, reuse
    with evaluating(model):
        return tracer.run(sites, tuple(modes), contrast, Cells(out))


class _Tracer:
    """One trace as it goes."""

    def __init__(self, model, processor, malicious: list[Case], benign: list[Case], judge: Judge | None):
        self.model, self.processor, self.judge = model, processor, judge or KeywordJudge()
        self.malicious, self.benign = malicious, benign
        self.cases = [*malicious, *benign]
        self.tokens, self.batch_size, self.seed, self.reuse = 32, 16, 0, True
        self.sites: Sequence[Site] = ()
        self._checked: set[frozenset[str]] = set()  # names of inputs with which replays have been checked
        self._contributions: Contributions | None = None
        self.contrast: Contrast | None = None
        self._of_model, self._of_benign = answers_fingerprint(model, processor), prompts_fingerprint(benign)
        for cases in (malicious, benign):  # a judge that lacks something says so now, not after hours
            self.judge.verdicts(cases[:1], [""])

    def run(self, sites: Sequence[Site], modes: Sequence[str], contrast: Contrast | None, cells: Cells) -> Trace:
        """Trace."""
        self.sites, self.contrast = sites, contrast or self._learn_contrast(cells)
        blocks: list[Block] = [None, *((mode, site) for mode in modes for site in sites)]
        found: dict[Block, dict[str, list]] = {block: {} for block in blocks}
        parts = list(batches(range(len(self.cases)), self.batch_size))
        with logging.tqdm(total=len(parts) * len(blocks), desc="Tracing", unit="block") as progress:
            for part in parts:
                for block, result in self._batch(list(part), blocks, cells):
                    for name, values in result.items():
                        found[block].setdefault(name, []).extend(values)
                    progress.update()
        outcomes = {block: self._outcome(found[block], found[None]["answers"]) for block in blocks}
        blocked = {mode: {site: outcomes[mode, site] for site in sites} for mode in modes}
        return Trace(outcomes[None], blocked, self._settings())

    def _settings(self) -> dict[str, Any]:
        return {
            "judge": {self.judge.name: self.judge.settings},
            "contrast": asdict(self.contrast),
            "prompts": {"malicious": len(self.malicious), "benign": len(self.benign)},
            "max_new_tokens": self.tokens,
            "seed": self.seed,
        }

    def _learn_contrast(self, cells: Cells) -> Contrast:
        """From the answers to the malicious prompts."""
        answers: list[str] = []
        first: list[int] = []
        for part in batches(range(len(self.malicious)), self.batch_size):
            found = cells.get({**self._key(part), "of": "answers"}, lambda part=part: self._begun(part))
            answers += found["answers"]
            first += found["first"]
        return Contrast.of_first_tokens(first, self.judge.verdicts(self.malicious, answers))

    def _begun(self, numbers: Sequence[int]) -> dict[str, list]:
        """Answers without a block, and the first token of each."""
        which = torch.tensor(list(numbers))
        tokens = generate_blocked(self.model, self._inputs(numbers), None, which, self.tokens)[0]
        return {"answers": self._decoded(tokens), "first": tokens[:, 0].tolist()}

    def _decoded(self, tokens: torch.Tensor) -> list[str]:
        return [text.strip() for text in self.processor.batch_decode(tokens, skip_special_tokens=True)]

    def _key(self, numbers: Sequence[int]) -> dict[str, Any]:
        prompts = prompts_fingerprint([self.cases[i] for i in numbers])
        return {"model": self._of_model, "prompts": prompts, "numbers": list(numbers), "tokens": self.tokens}

    def _inputs(self, numbers: Sequence[int]) -> dict[str, torch.Tensor]:
        return collate(self.processor, [Sample(self.cases[i].messages) for i in numbers], ()).inputs

    def _batch(self, numbers: list[int], blocks: Sequence[Block], cells: Cells) -> Iterator[tuple[Block, dict]]:
        """What one batch does under each block, from what is kept or from the model."""
        base = {**self._key(numbers), "contrast": asdict(self.contrast), "malicious": len(self.malicious)}
        keys: dict[Block, dict[str, Any]] = {}
        for block in blocks:
            mode, site = block or (BASE, "")
            own = {"zero": {}, BASE: {}, "mean": {"benign": self._of_benign}}
            more = own.get(mode, {"benign": self._of_benign, "seed": self.seed})
            keys[block] = {**base, "mode": mode, "site": str(site), **more}
        missing = [block for block in blocks if not cells.holds(keys[block])]
        for block, result in self._answered(numbers, missing):
            yield block, cells.get(keys[block], lambda result=result: result)
        for block in blocks:
            if block not in missing:
                yield block, cells.get(keys[block], dict)

    @torch.no_grad()
    def _answered(self, numbers: list[int], blocks: Sequence[Block]) -> Iterator[tuple[Block, dict[str, list]]]:
        """What the model does under each block, as soon as it is known."""
        if not blocks:
            return
        which = torch.tensor(numbers)
        inputs = self._inputs(numbers)
        blockers = [self._blocker(mode, site) for mode, site in filter(None, blocks)]
        replay = self._replay(inputs, which, blockers) if self.reuse else None
        plain = generate_blocked(self.model, inputs, None, which, self.tokens) if replay is None else None
        answers, first = plain or (replay.answers, replay.first)
        unblocked = first.float().log_softmax(dim=-1)
        if None in blocks:
            yield None, self._result(numbers, answers, first, unblocked)
        results = (
            ((b, *generate_blocked(self.model, inputs, b, which, self.tokens)) for b in blockers)
            if replay is None
            else replay.blocked(blockers)
        )
        for blocker, tokens, logits in results:
            yield (blocker.mode, blocker.site), self._result(numbers, tokens, logits, unblocked)

    def _blocker(self, mode: str, site: Site) -> Blocker:
        if mode != "zero" and self._contributions is None:  # not read where all is kept
            of = self.benign, self.sites, self.batch_size, self.seed
            self._contributions = collect_contributions(self.model, self.processor, *of)
        return Blocker(site, mode, self._contributions, self.seed)

    def _replay(self, inputs, which: torch.Tensor, blockers: Sequence[Blocker]) -> Replay | None:
        """The undisturbed run to share; None where the plain way has to do.

        The first one is held against the plain way, without a block and under one, and its answers are read at once,
        since models may do what no check foresees; so is the first one with images if there were none, which a model
        may hand on to layers in other ways than in the stream.
        """
        try:
            replay = Replay(self.model, inputs, which, self.tokens)
        except NotReplayable as reason:
            return self._give_up(str(reason))
        if frozenset(inputs) in self._checked:
            return replay
        if not replay.agrees():
            return self._give_up("it reads its answers otherwise at once than one token at a time.")
        some = blockers[len(blockers) // 2 :][:1]
        for blocker, answers in [(None, replay.answers), *((b, tokens) for b, tokens, _ in replay.blocked(some))]:
            expected = generate_blocked(self.model, inputs, blocker, which, self.tokens)[0]
            if self._decoded(answers) != self._decoded(expected):
                return self._give_up("its answers came out otherwise.")
        self._checked.add(frozenset(inputs))
        return replay

    def _give_up(self, reason: str) -> None:
        logger.warning(f"{type(self.model).__name__} is traced one block at a time: {reason}")
        self.reuse = False

    def _result(self, numbers, tokens, first: torch.Tensor, unblocked: torch.Tensor) -> dict[str, list]:
        """Answers, and of the first token its log-odds after malicious prompts and its divergence after benign ones."""
        malicious = torch.tensor([i < len(self.malicious) for i in numbers], device=first.device)
        divergence = relative_entropy(unblocked[~malicious], first[~malicious].float().log_softmax(dim=-1))
        return {
            "answers": self._decoded(tokens),
            "log_odds": self.contrast.log_odds(first[malicious]).tolist(),
            "divergence": divergence.clamp_min(0).tolist(),
        }

    def _outcome(self, found: dict[str, list], unblocked: Sequence[str]) -> Outcome:
        count = len(self.malicious)
        answers = found["answers"]
        kept = [a == b for a, b in zip(answers[count:], unblocked[count:], strict=True)]
        verdicts = (
            self.judge.verdicts(self.malicious, answers[:count]),
            self.judge.verdicts(self.benign, answers[count:]),
        )
        return Outcome(*verdicts, found["log_odds"], kept, found["divergence"])
