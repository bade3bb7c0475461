import copy
import os

import pytest
import torch
from hypothesis import HealthCheck, settings
from support_matrix import pytest_addoption, pytest_configure  # noqa: F401
from tiny import qwen_config
from transformers import LlavaForConditionalGeneration, Qwen2_5_VLForConditionalGeneration

from care_hf.projection import Subspace
from care_hf.testbed import World, load_testbed
from care_hf.testbed.building import build_model, build_processor

# How long an example takes is no matter of right and wrong.
settings.register_profile("care", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("care")
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # there is a process for each core


@pytest.fixture(scope="session")
def testbed():
    """The bundled model and processor; tests leave them as they are."""
    return load_testbed()


@pytest.fixture(scope="session")
def world():
    return World()


@pytest.fixture(scope="session")
def _untrained():
    torch.manual_seed(0)
    processor = build_processor()
    return build_model(processor).eval(), processor


@pytest.fixture
def llava(_untrained) -> LlavaForConditionalGeneration:
    """A randomly initialised LLaVA of the testbed's shape, fresh for each test."""
    return copy.deepcopy(_untrained[0])


@pytest.fixture(scope="session")
def processor(_untrained):
    return _untrained[1]


def random_subspace(
    seed: int, dimension: int = 128, rank: int = 4, oblique: bool = False, beta: float = 0.75
) -> Subspace:
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(dimension, rank, generator=generator, dtype=torch.float64)).Q
    mean = torch.randn(dimension, generator=generator)
    if not oblique:
        return Subspace(basis, mean, beta)
    # Any R = B + (I - B B^T) X has R^T B = I.
    other = torch.randn(dimension, rank, generator=generator, dtype=torch.float64) / dimension**0.5
    return Subspace(basis, mean, beta, basis + other - basis @ (basis.mT @ other))


@pytest.fixture(scope="session")
def qwen() -> Qwen2_5_VLForConditionalGeneration:
    """A randomly initialised Qwen2.5-VL, its vision tower deeper than its text tower; tests leave it as it is."""
    torch.manual_seed(0)
    return Qwen2_5_VLForConditionalGeneration(qwen_config(99, 90, 93, 91, 92, depth=5)).eval()


@pytest.fixture(scope="session")
def qwen_inputs():
    """One image of 4 x 4 patches, merged to 4 tokens, between text; the second row left-padded and without an image."""
    first = [5, 91, *[90] * 4, 92, 6, 7, 8]
    second = [0] * 6 + [9, 10, 11, 12]
    return {
        "input_ids": torch.tensor([first, second]),
        "attention_mask": torch.tensor([[1] * 10, [0] * 6 + [1] * 4]),
        "mm_token_type_ids": torch.tensor([[0, 0, 1, 1, 1, 1, 0, 0, 0, 0], [0] * 10]),
        "pixel_values": torch.randn(16, 3 * 2 * 4 * 4, generator=torch.Generator().manual_seed(1)),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
    }
