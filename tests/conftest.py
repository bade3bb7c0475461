import copy

import pytest
import torch
from support_matrix import pytest_addoption, pytest_configure  # noqa: F401
from transformers import LlavaForConditionalGeneration

from care_hf.projection import Subspace
from care_hf.testbed import World, load_testbed
from care_hf.testbed.building import build_model, build_processor


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
