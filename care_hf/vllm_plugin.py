"""vLLM's way in, its entry point `vllm.general_plugins`: with care_hf installed it serves repaired checkpoints."""

import logging

logger = logging.getLogger(__name__)


def register() -> None:
    """Tell vLLM of repaired checkpoints; called by vLLM in each of its processes, and more than once.

    In a vLLM that is too different it says so and does nothing else, so that other models are served as without; a
    repaired checkpoint then does not load.
    """
    try:
        _register()
    except (ImportError, AttributeError, KeyError) as error:
        logger.warning(
            "care_hf does not fit this version of vLLM (%s: %s), which cannot serve repaired checkpoints; known to "
            "fit is 0.32.",
            type(error).__name__,
            error,
        )


def _register() -> None:
    from vllm import ModelRegistry

    import care_hf  # noqa: F401  registers the configuration with transformers

    from .vllm_settings import BACKEND, NATIVE, install

    install()
    for name in (*NATIVE, *BACKEND):
        ModelRegistry.register_model(f"Care{name}", f"care_hf.vllm_models:Care{name}")
