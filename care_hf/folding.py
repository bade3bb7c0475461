"""Which linear layers a site's output comes from, so that a map of the output can be folded into their weights."""

import copy
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights

from .configuration_care import auto_class
from .repaired_module import CareSiteMixin
from .sites import Site, hidden_size, site_module

FFN_ENDS = ("down_proj", "fc2", "w2", "c_proj", "dense_4h_to_h")
ATTENTION_ENDS = ("o_proj", "out_proj", "c_proj", "dense", "wo")
SHARED_EXPERTS = ("shared_expert", "shared_experts", "shared_mlp")
ROUTERS = ("gate", "router", "shared_expert_gate")  # they only weigh what experts put out, or put in
FLAGS = {"ffn": "mlp_bias", "attention": "attention_bias"}  # with which a text configuration gives layers biases


@dataclass(frozen=True)
class Ends:
    """The weights that a site's output is linear in.

    Attributes:
        linears: paths of linear layers from the model.
        stacks: names of parameters that hold a weight per expert, and whether their output is the last dimension.
    """

    linears: tuple[str, ...]
    stacks: tuple[tuple[str, bool], ...] = ()

    @property
    def single(self) -> str | None:
        """The one layer that puts the output out; None if the output is a sum of several."""
        return self.linears[0] if len(self.linears) == 1 and not self.stacks else None

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of all the weights."""
        return (*(f"{name}.weight" for name in self.linears), *(name for name, _ in self.stacks))


def find_ends(model: PreTrainedModel, site: Site) -> Ends:
    """The linear layers that end in what `site` means.

    Raises:
        ValueError: it is not such layers that put it out.
    """
    if site.component == "residual":
        raise ValueError(
            "a whole layer's output is the residual stream itself, which comes from all layers before, not from one"
        )
    module = site_module(model, site)
    path = next(name for name, other in model.named_modules() if other is module)
    return _ends(module, path, FFN_ENDS if site.component == "ffn" else ATTENTION_ENDS, hidden_size(model))


def _ends(module: nn.Module, path: str, names: tuple[str, ...], dimension: int) -> Ends:
    own = _own_class(module)
    if own is nn.Linear:
        return Ends((path,))
    children = dict(module.named_children())
    if "experts" in children:
        return _expert_ends(children, path, names, dimension)
    name = next((name for name in names if name in children), None)
    if name is None or _own_class(children[name]) is not nn.Linear or children[name].out_features != dimension:
        found = f" in {type(children[name]).__name__}" if name else ""
        norm = "norm" in own.__name__.lower()
        why = "which scales each token by its own length" if norm else f"not in a linear layer of {names}"
        raise ValueError(f"its output ends in a {own.__name__}{found}, {why}")
    return Ends((f"{path}.{name}",))


def _expert_ends(children: dict[str, nn.Module], path: str, names: tuple[str, ...], dimension: int) -> Ends:
    experts = children.pop("experts")
    linears, stacks = [], []
    shared = [name for name in SHARED_EXPERTS if name in children]
    others = [n for n, m in children.items() if n not in (*shared, *ROUTERS) and list(m.parameters())]
    biased = [n for n, _ in experts.named_parameters(recurse=False) if "bias" in n]
    if others or biased:
        raise ValueError(f"its mixture of experts has {[*others, *biased]}, of which it is not known what they add")
    if isinstance(experts, nn.ModuleList):
        found = [_ends(one, f"{path}.experts.{i}", names, dimension) for i, one in enumerate(experts)]
        linears += [name for ends in found for name in ends.linears]
    else:
        stacks.append((f"{path}.experts.down_proj", _output_last(experts, dimension)))
    for name in shared:
        linears += _ends(children[name], f"{path}.{name}", names, dimension).linears
    return Ends(tuple(linears), tuple(stacks))


def _output_last(experts: nn.Module, dimension: int) -> bool:
    """Whether experts' stacked weights are (in, out): (d, 2n) and (n, d), not (2n, d) and (d, n)."""
    down, up = (getattr(experts, name, None) for name in ("down_proj", "gate_up_proj"))
    shapes = [tuple(t.shape[1:]) if isinstance(t, nn.Parameter) and t.ndim == 3 else None for t in (up, down)]
    for output_last in (False, True):
        inner = shapes[1] and shapes[1][0 if output_last else 1]
        expected = [(2 * (inner or 0), dimension), (dimension, inner)]
        if shapes == [shape[::-1] if output_last else shape for shape in expected]:
            return output_last
    raise ValueError(f"the weights of {type(experts).__name__} are not stacked in a known way")


def _own_class(module: nn.Module) -> type[nn.Module]:
    """The module's class, or that it had before its repair."""
    return type(module).__mro__[2] if isinstance(module, CareSiteMixin) else type(module)


def biases_by_flag(model: PreTrainedModel, component: str) -> dict[str, torch.Size]:
    """The biases that the model would have with its configuration's flag for them, beside those that it has.

    Returns:
        Shapes by name; empty if there is no such flag, or it does anything else, too.
    """
    config, flag = copy.deepcopy(model.config), FLAGS[component]
    text = config.get_text_config()
    if not hasattr(text, flag):
        return {}
    setattr(text, flag, True)
    with torch.device("meta"), no_init_weights():
        shapes = {name: p.shape for name, p in auto_class(config).from_config(config).named_parameters()}
    own = {name for name, _ in model.named_parameters(remove_duplicate=False)}  # not all are tied there
    new = {name: shape for name, shape in shapes.items() if name not in own}
    lost = {name for name, _ in model.named_parameters()} - set(shapes)
    return new if not lost and all(name.endswith(".bias") for name in new) else {}
