"""The repair of a checkpoint in a model of vLLM: its modules, its tensors from the files, and that they are whole."""

import re
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.linear import LinearBase

from .configuration_care import CareConfig
from .gating import GateReader, TurnProjection, among
from .loading import ADVICE, compare_digests, digest_of, of_the_repair
from .projection import SafetyProjection
from .sites import Site, image_token_ids, visual_token_ids
from .vllm_sites import Place, check_in_place, swap
from .vllm_turns import TurnCache, Turns

KEY = re.compile(r"(?:^|.*\.)(\d+)\.(?:([\w.]+)\.)?(care|care_gate)\.([\w.]+)")  # layer, path, kind, leaf
PREFIX = "vlm."


class Repair:
    """The repair of one model, unfilled until it has taken its tensors out of the weights.

    Args:
        config: of the checkpoint.
        vllm_config: of the engine.
        places: where the sites are that are named, see `vllm_sites`.

    Raises:
        ValueError: a site is not there, or fusion "route" cannot tell image tokens.
    """

    def __init__(self, config: CareConfig, vllm_config: VllmConfig, places: Callable[[list[Site]], dict[Site, Place]]):
        self.config, self.whole, self._filled = config, False, False
        gate_site = Site.parse(config.gate["site"]) if config.gate else None
        sites = {Site.parse(entry["site"]): entry for entry in config.sites}
        self._places = places(sorted({*sites, *([gate_site] if gate_site else [])}))
        if vllm_config.lora_config and any(isinstance(place.module, LinearBase) for place in self._places.values()):
            raise ValueError(
                "A site of the repair is a linear layer, in whose place vLLM would put another for LoRA; serve without "
                "enable_lora, or merge the adapter into the base before it is repaired."
            )
        self.routed = visual_token_ids(config) if config.fusion == "route" and self._by_modality() else ()
        if config.fusion == "route" and self._by_modality() and not self.routed:
            raise ValueError("Fusion 'route' needs to know the image tokens, and config.json names none.")
        count = _most_tokens(vllm_config)
        self.turns = Turns(torch.zeros(count, dtype=torch.int64), torch.zeros(count, dtype=torch.bool))
        self.parts: dict[str, nn.Module] = {}  # as `digest` names them
        self._keys: dict[tuple[int, str, str], str] = {}
        width = config.get_text_config().hidden_size
        for site, entry in sites.items():
            self._add(f"sites.{site}", site, "care", _projection(config, entry, width))
        self.cache = None
        if gate_site:
            gate = config.gate
            reader = GateReader(width, gate["required"], gate["alarms"], gate["pictured"])
            self._add("gate", gate_site, "care_gate", reader)
            self.cache = TurnCache(vllm_config, tuple(gate["prompt_end"]), image_token_ids(config))
            self.cache.read_by(reader)

    def _by_modality(self) -> bool:
        return any(set(entry["ranks"]) & {"visual", "text"} for entry in self.config.sites)

    def _add(self, name: str, site: Site, kind: str, part: nn.Module) -> None:
        place = self._places[site]
        setattr(swap(place, self.turns, self.config.scope), kind, part)
        self.parts[name], self._keys[site.layer, place.path, kind] = part, name

    def begin(self, ids: torch.Tensor | None) -> None:
        """Before a forward: the ids (N,) of its tokens, those of images' placeholders among them.

        Raises:
            ValueError: the repair was never filled, or the ids cannot be told.
        """
        if not self.whole:
            raise ValueError(
                "The repair was not loaded: serve with load format 'auto' or 'safetensors', by which alone its tensors "
                "are taken from the checkpoint and checked."
            )
        if self.cache is None and not self.routed:
            return
        if ids is None or ids.ndim != 1 or len(ids) > len(self.turns.packed):
            raise ValueError(
                f"The repair needs the ids of at most {len(self.turns.packed)} tokens and was given "
                f"{None if ids is None else tuple(ids.shape)}; prompts given as embeddings cannot be served."
            )
        if self.cache is not None:
            self.cache.ids = ids
        if self.routed:
            self.turns.visual[: len(ids)] = among(ids, self.routed)

    def take(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """Fill the repair from the checkpoint's tensors, and pass on the base's, by their names in the base.

        Raises:
            ValueError: a tensor of the repair is missing, foreign, there twice, or not what was saved; or the weights
                are not those of a repaired checkpoint.
        """
        self.whole = self._filled = False
        filled: set[tuple[str, str]] = set()
        for key, tensor in weights:
            if key == "layers":
                self._check_layers(tensor)
                filled.add(("", key))
            elif of_the_repair(key):
                self._fill(key, tensor, filled)
            elif key.startswith(PREFIX):
                yield key.removeprefix(PREFIX), tensor
            else:
                raise ValueError(f"The checkpoint has a tensor {key!r} that no repaired model has. {ADVICE}")
        expected = {(name, leaf) for name, part in self.parts.items() for leaf, _ in part.named_buffers()}
        lacking = sorted(f"{name}.{leaf}".lstrip(".") for name, leaf in (expected | {("", "layers")}) - filled)
        if lacking:
            raise ValueError(f"The checkpoint lacks {len(lacking)} tensors: {', '.join(lacking[:5])}. {ADVICE}")
        self._check()
        self._filled = True

    def _check_layers(self, tensor: torch.Tensor) -> None:
        expected = sorted({Site.parse(entry["site"]).layer for entry in self.config.sites})
        if tensor.tolist() != expected:
            raise ValueError(f"The tensor `layers` is {tensor.tolist()}, but config.json names sites in {expected}.")

    def _fill(self, key: str, tensor: torch.Tensor, filled: set[tuple[str, str]]) -> None:
        found = KEY.fullmatch(key)
        name = found and self._keys.get((int(found[1]), found[2] or "", found[3]))
        buffers = dict(self.parts[name].named_buffers()) if name else {}
        buffer = buffers.get(found[4]) if found else None
        if buffer is None or (name, found[4]) in filled:
            raise ValueError(f"The checkpoint has, unknown to its config.json, the tensor {key}. {ADVICE}")
        if buffer.shape != tensor.shape or buffer.is_floating_point() != tensor.is_floating_point():
            raise ValueError(
                f"The tensor {key} is {tensor.dtype} {tuple(tensor.shape)}; expected {buffer.dtype} "
                f"{tuple(buffer.shape)}. {ADVICE}"
            )
        buffer.copy_(tensor)
        filled.add((name, found[4]))

    def check(self, model: nn.Module) -> None:
        """Assert, once it is filled, that it is applied; before, no forward is allowed.

        Raises:
            ValueError: vLLM did not read all weights, or a module that is to repair its output would not.
        """
        if not self._filled:
            raise ValueError("vLLM did not read all weights of the checkpoint, so the repair could not be checked.")
        for place in self._places.values():
            check_in_place(model, place)
        self.whole = True

    def _check(self) -> None:
        for name, part in self.parts.items():
            try:
                part.check()
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
        compare_digests(
            self.config, digest_of(self.config, {name: dict(part.named_buffers()) for name, part in self.parts.items()})
        )


def _projection(config: CareConfig, entry: dict, width: int) -> SafetyProjection | TurnProjection:
    if set(entry["ranks"]) <= {"visual", "text"}:
        return SafetyProjection(width, entry["ranks"], config.fusion, entry["oblique"])
    return TurnProjection(width, entry["ranks"], entry["steps"], entry["oblique"])


def _most_tokens(vllm_config: VllmConfig) -> int:
    """Of one forward, those that only fill up a recorded graph among them."""
    captured = vllm_config.compilation_config.max_cudagraph_capture_size or 0
    return max(vllm_config.scheduler_config.max_num_batched_tokens, captured)
