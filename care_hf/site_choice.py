"""Where to repair, from where refusal reaches the answer."""

import math
from collections.abc import Sequence
from pathlib import Path

from .diagnosis import Diagnosis
from .mediation import Mediation
from .recipe import AUTO, Recipe
from .sites import Site, runs_before

# What a repair by turn changes is the prompt's last token and the answer's own.
CHANGED = ("last", "generated")
SHARE = 0.9


def choose_site(mediation: Mediation, after: Site | None = None) -> Site:
    """The earliest place through which nearly all of refusal passes.

    That is, of the places that run after the gate has decided, the first whose indirect effect through the prompt's
    last token and the answer's tokens together is at least `SHARE` of the largest one's. The last layer's is always
    the largest; what is repaired earlier has layers left that make an answer of it.

    Args:
        mediation: measured on prompts that are not evaluated on.
        after: where the gate reads; None for no gate.

    Raises:
        ValueError: no place runs after the gate, or none has an effect.
    """
    places = [site for site in mediation.effects if after is None or runs_before(after, site)]
    effects = {site: _effect(mediation, site) for site in _in_order(places)}
    effects = {site: effect for site, effect in effects.items() if math.isfinite(effect)}
    if not effects or max(effects.values()) <= 0:
        raise ValueError(
            f"Of the places {[str(site) for site in places]} after the gate at {after} none carries refusal; diagnose "
            "more layers and prompts, or name `sites` yourself."
        )
    return next(site for site, effect in effects.items() if effect >= SHARE * max(effects.values()))


def _effect(mediation: Mediation, site: Site) -> float:
    """Through what a repair changes, of the pairs that have it."""
    # Means without their intervals, which take long and warn of what is not finite.
    found = [[value for value in mediation.effects[site][group].indirect if value is not None] for group in CHANGED]
    return sum(sum(values) / len(values) for values in found if values)


def _in_order(sites: Sequence[Site]) -> list[Site]:
    return sorted(sites, key=lambda site: sum(runs_before(other, site) for other in sites))


def with_chosen_sites(recipe: Recipe, diagnosis: Diagnosis | str | Path | None, model) -> Recipe:
    """The recipe with the site that `choose_site` finds in the place of "auto"; another recipe as it is.

    Raises:
        ValueError: as `choose_site`; there is no diagnosis, or one of another model or without patching; or the recipe
            repairs prompts by modality, of which the patching says nothing.
    """
    if recipe.sites != AUTO:
        return recipe
    if diagnosis is None:
        raise ValueError(f"sites={AUTO!r} needs a diagnosis of this model; pass `diagnosis=`, or name the sites.")
    if not recipe.by_turn:
        raise ValueError(
            f"sites={AUTO!r} is for recipes that repair the last token and the response, not scope={recipe.scope!r}; "
            "name the sites."
        )
    diagnosis = diagnosis if isinstance(diagnosis, Diagnosis) else Diagnosis.load(diagnosis)
    diagnosis.check_model(model)
    if diagnosis.mediation is None:
        raise ValueError(f"The diagnosis holds no patching ({diagnosis.left_out.get('mediation')}); name the sites.")
    return recipe.replace(sites=(str(choose_site(diagnosis.mediation, recipe.gate_site(model))),))
