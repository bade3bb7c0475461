"""Whether a repaired model can be an ordinary checkpoint, and what has to change in its weights for that."""

from dataclasses import dataclass, field

from .adapters import adapter_layers, check_places
from .affine import Affine, why_not_affine
from .folding import FLAGS, Ends, biases_by_flag, find_ends
from .modeling_care import CareForConditionalGeneration
from .sites import Site

PRINTED = "Recipe.load('paper').replace(fusion='constant', fusion_weight=0.5)"
UNANCHORED = "Recipe(anchor='none')"
VLLM_BIASES = ("llama", "chameleon")  # text models that vLLM gives the biases that their configuration asks for


@dataclass
class Plan:
    """How to merge a repair.

    Attributes:
        maps: what to fold into the weights of every site.
        ends: the weights.
        biases: shapes of the biases that the model has to be given, by name.
        flags: set in the text configuration, so that loading makes those biases.
    """

    maps: dict[Site, Affine] = field(default_factory=dict)
    ends: dict[Site, Ends] = field(default_factory=dict)
    biases: dict[str, tuple[int, ...]] = field(default_factory=dict)
    flags: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class Obstacle:
    """What keeps a repair from being merged, and what would merge instead.

    Attributes:
        reason: what it is.
        setting: the recipe that does without it; empty if none does.
        site: where it is; None if everywhere.
    """

    reason: str
    setting: str = ""
    site: Site | None = None


def plan_merge(model: CareForConditionalGeneration) -> tuple[Plan, list[Obstacle]]:
    """The plan, which is whole if there are no obstacles."""
    if model.strength == 0:
        return Plan(), []  # it is the base
    if model.config.gate and model.gate.readers.shape[1]:  # without any detector it only tells where a prompt ends
        reason = "its gate decides from activations whether to repair, and a linear layer cannot"
        return Plan(), [Obstacle(reason, PRINTED)]
    plan, obstacles = Plan(), []
    for site, care in model.care_modules().items():
        why = why_not_affine(care, model.config.scope)
        if why:
            obstacles.append(Obstacle(why[0], f"Recipe({why[1]})" if why[1] else PRINTED, site))
        try:
            ends = find_ends(model.vlm, site)
        except ValueError as error:
            obstacles.append(Obstacle(str(error), _other_component(model, site), site))
            continue
        if why or (mapping := Affine.of(care)).identity:
            continue
        plan.maps[site], plan.ends[site] = mapping, ends
        obstacles += _find_place_of_constant(model, site, plan)
    return plan, obstacles


def _find_place_of_constant(model: CareForConditionalGeneration, site: Site, plan: Plan) -> list[Obstacle]:
    """Give the plan the biases that hold the constant of `site`."""
    mapping, ends = plan.maps[site], plan.ends[site]
    if mapping.linear or (ends.single and model.vlm.get_submodule(ends.single).bias is not None):
        return []
    if ends.single is None:
        reason = "it adds a constant to a sum over experts, none of which is given to every token once"
        return [Obstacle(reason, UNANCHORED, site)]
    biases = biases_by_flag(model.vlm, site.component)
    if f"{ends.single}.bias" not in biases:
        leaf, family = ends.single.rpartition(".")[2], model.config.get_text_config().model_type
        return [Obstacle(f"it adds a constant, and {leaf} of {family} can have no bias", UNANCHORED, site)]
    plan.biases |= biases
    plan.flags.add(FLAGS[site.component])
    return []


def _other_component(model: CareForConditionalGeneration, site: Site) -> str:
    for component in ("ffn", "attention"):
        try:
            find_ends(model.vlm, Site(site.layer, component))
        except ValueError:
            continue
        return f"Recipe(component='{component}')"
    return ""


def check_weights(model: CareForConditionalGeneration) -> None:
    """Assert that the weights are there, whole and in floating point.

    Raises:
        TypeError: the model is not repaired, or in a `PeftModel`.
        ValueError: it has adapters, or quantised, offloaded or distributed weights.
    """
    if not isinstance(model, CareForConditionalGeneration):
        raise TypeError(
            f"A {type(model).__name__} is not a repaired model; give what `care_hf.fit` returned (with adapters on it: "
            "after `merge_and_unload()`)."
        )
    check_places(model.vlm)
    if adapter_layers(model.vlm):
        raise ValueError("The model has adapters of PEFT; call its `merge_adapters()` first.")
    if getattr(model, "is_quantized", False) or getattr(model.config, "quantization_config", None) is not None:
        raise ValueError("The base is quantised, and merging would round its weights anew; merge before quantising.")
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise ValueError(
                f"The weight {name} is offloaded; load the model on the CPU, where weights stay in their file."
            )
        if hasattr(parameter, "device_mesh"):
            raise ValueError(f"The weight {name} is distributed; load the model in one process, on the CPU.")
    model.check()


def check_vllm(model: CareForConditionalGeneration, plan: Plan) -> None:
    """Assert that vLLM, which drops biases that its own class of a model does not have, will not drop the repair's.

    Raises:
        ValueError: it would.
    """
    family = model.config.get_text_config().model_type
    if plan.biases and family not in VLLM_BIASES:
        raise ValueError(
            f"The merged checkpoint would have {len(plan.biases)} biases that vLLM's class of {family} does not, and "
            f"drops without a word: there it would run unrepaired. Fit with {UNANCHORED}, which needs none; serve the "
            "repaired checkpoint itself, by this package's plugin; or, if transformers alone will load it, merge with "
            "only_transformers=True."
        )


def check_untied(model: CareForConditionalGeneration, plan: Plan) -> None:
    """Assert that no weight that is to change is used elsewhere, too.

    Raises:
        ValueError: one is.
    """
    users: dict[int, list[str]] = {}
    for name, parameter in model.vlm.named_parameters(remove_duplicate=False):
        users.setdefault(id(parameter), []).append(name)
    for site, ends in plan.ends.items():
        for name in ends.parameters:
            tied = users[id(model.vlm.get_parameter(name))]
            if len(tied) > 1:
                raise ValueError(f"Site {site}: {name} is tied ({', '.join(tied)}), and merging would change all.")
