"""vLLM's way in, its entry point `vllm.general_plugins`: with care_hf installed it serves repaired checkpoints."""


def register() -> None:
    """Tell vLLM of repaired checkpoints; called by vLLM in each of its processes, and more than once."""
    from vllm import ModelRegistry

    import care_hf  # noqa: F401  registers the configuration with transformers

    from .vllm_settings import BACKEND, NATIVE, install

    install()
    for name in (*NATIVE, *BACKEND):
        ModelRegistry.register_model(f"Care{name}", f"care_hf.vllm_models:Care{name}")
