import copy
import math

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from care_hf import preference_steering
from care_hf.answers import generate_answers
from care_hf.preference_steering import answer_log_probs, preference_loss, train_preference_steering
from care_hf.samples import Sample, collate
from care_hf.sites import Site, decoder_layers
from care_hf.steering_vectors import SteeringVectors, contrast_vectors
from care_hf.testbed.world import REFUSAL

LAYERS = (1, 3)
SETTINGS = {"layers": LAYERS, "steps": 8, "lr": 0.03, "batch_size": 8}


@pytest.fixture(scope="module")
def mixed(world):
    """Prompts of different lengths, with and without images."""
    return [*world.attack("icon", "fit", 2), *world.plain("fit", 2), *world.benign("split", "fit", 2)]


@pytest.fixture(scope="module")
def data(world):
    """Triples and pairs; answers of different lengths."""
    attacks = [*world.attack("icon", "fit", 4), *world.attack("split", "fit", 4)]
    benign = [*world.benign("recipe", "fit", 4), *world.benign("colour", "fit", 4)]
    return [(s, REFUSAL, s.answer) for s in attacks], [(s, s.answer) for s in benign]


@pytest.fixture(scope="module")
def vectors():
    """Of no particular length."""
    generator = torch.Generator().manual_seed(5)
    return {Site(layer, "residual"): torch.randn(128, generator=generator) for layer in LAYERS}


@pytest.fixture(scope="module")
def trained(testbed, data):
    return train_preference_steering(*testbed, *data, **SETTINGS)


def merged(model, vectors):
    """A copy with the vectors as biases of the layers' last projections: steering without any hook."""
    other = copy.deepcopy(model)
    for site, vector in vectors.items():
        other.model.language_model.layers[site.layer].mlp.down_proj.bias = nn.Parameter(vector.clone())
    return other


def inputs_of(processor, samples):
    return collate(processor, [Sample(s.messages) for s in samples], ()).inputs


@torch.no_grad()
def logits_of(model, processor, samples):
    return model(**inputs_of(processor, samples)).logits


def single(testbed, sample, answer="", end=""):
    """Inputs of one prompt and its answer, written out in the testbed's chat format, and the answer's length."""
    prompt = f"<s><user>{'<image>' * (sample.image is not None)}{sample.text}<assistant>"
    images = None if sample.image is None else [Image.fromarray(sample.image)]
    inputs, whole = (testbed[1](text=t, images=images, return_tensors="pt") for t in (prompt, prompt + answer + end))
    return whole, whole["input_ids"].shape[1] - inputs["input_ids"].shape[1]


def log_prob(model, processor, sample, answer):
    """Of one unpadded answer and its end, float64, and its length."""
    inputs, length = single((model, processor), sample, answer, "</s>")
    scores = model(**inputs).logits[0, -length - 1 : -1].double().log_softmax(-1)
    return scores[range(length), inputs["input_ids"][0, -length:]].sum(), length


def loss_by_hand(steered, base, processor, harmful, benign, beta, retention):
    total = 0.0
    for sample, preferred, dispreferred in harmful:
        with torch.no_grad():
            before = [log_prob(base, processor, sample, answer)[0] for answer in (preferred, dispreferred)]
        after = [log_prob(steered, processor, sample, answer)[0] for answer in (preferred, dispreferred)]
        margin = (after[0] - before[0]) - (after[1] - before[1])
        total = total - torch.log(1 / (1 + torch.exp(-beta * margin))) / len(harmful)
    kept, lengths = zip(*(log_prob(steered, processor, *pair) for pair in benign), strict=True)
    return total - retention * sum(kept) / sum(lengths)


def hooks_of(model):
    """Every forward hook; transformers leaves some of its own in a model that has run."""
    return [(name, key) for name, module in model.named_modules() for key in module._forward_hooks]


# Steering


@pytest.mark.parametrize("by", ["biases", "hooks"])
def test_steering_is_adding_the_vectors_at_every_position(testbed, mixed, vectors, by):
    model = testbed[0]
    steering = SteeringVectors(model, vectors)
    for sample in mixed:
        inputs, _ = single(testbed, sample)
        with steering, torch.no_grad():
            steered = model(**inputs).logits
        other = merged(model, vectors if by == "biases" else {})
        if by == "hooks":
            for site, vector in vectors.items():
                layer = other.model.language_model.layers[site.layer]
                layer.register_forward_hook(lambda module, args, output, vector=vector: output + vector)
        with torch.no_grad():
            torch.testing.assert_close(steered, other(**inputs).logits, atol=1e-4, rtol=1e-4)
            assert not torch.allclose(steered, model(**inputs).logits, atol=0.1)


def test_cached_generation_is_the_uncached_one(testbed, mixed, vectors):
    model, inputs = testbed[0], inputs_of(testbed[1], mixed)
    settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    settings |= {"output_logits": True, "return_dict_in_generate": True}
    with SteeringVectors(model, vectors):
        cached, uncached = (model.generate(**inputs, **settings, use_cache=use) for use in (True, False))
    expected = merged(model, vectors).generate(**inputs, **settings)
    for other in (uncached, expected):
        assert torch.equal(cached.sequences, other.sequences)
        torch.testing.assert_close(torch.stack(cached.logits), torch.stack(other.logits), atol=1e-3, rtol=1e-3)
    assert not torch.equal(cached.sequences, model.generate(**inputs, **settings).sequences)


def test_batched_steering_is_the_single_one_under_left_padding(testbed, mixed, vectors):
    assert not inputs_of(testbed[1], mixed)["attention_mask"][:, 0].all()
    with SteeringVectors(testbed[0], vectors):
        together = logits_of(*testbed, mixed)
        for row, sample in enumerate(mixed):
            torch.testing.assert_close(together[row, -1], logits_of(*testbed, [sample])[0, -1], atol=1e-4, rtol=1e-4)
        answers = generate_answers(*testbed, mixed, 6)
        assert answers == [generate_answers(*testbed, [sample], 6)[0] for sample in mixed]


def test_vectors_of_0_and_leaving_give_the_model_back_bit_for_bit(testbed, mixed, vectors):
    model, base = testbed[0], logits_of(*testbed, mixed)
    hooks = hooks_of(model)
    with SteeringVectors(model, {site: 0 * vector for site, vector in vectors.items()}):
        assert torch.equal(logits_of(*testbed, mixed), base)
    steering = SteeringVectors(model, vectors)
    for _ in range(2):
        with pytest.raises(KeyError), steering:
            assert not torch.equal(logits_of(*testbed, mixed), base)
            raise KeyError
        assert torch.equal(logits_of(*testbed, mixed), base)
    with steering, pytest.raises(RuntimeError, match="already"), steering:
        pass
    assert hooks_of(model) == hooks


def test_half_precision_is_added_to_in_single_and_kept(llava, processor, mixed, vectors):
    half, seen = llava.bfloat16(), []
    inputs = inputs_of(processor, mixed[2:4])
    handles = []
    for when in ("before", "after"):
        layer = decoder_layers(half)[1]
        handles.append(layer.register_forward_hook(lambda module, args, output: seen.append(output)))
        if when == "before":
            steering = SteeringVectors(half, {Site(1, "residual"): vectors[Site(1, "residual")]}).__enter__()
    with torch.no_grad():
        half(**inputs)
    steering.__exit__()
    before, after = seen
    assert after.dtype == torch.bfloat16
    assert torch.equal(after, (before.float() + vectors[Site(1, "residual")]).bfloat16())


def test_what_cannot_steer_is_named(testbed, vectors):
    model, (site, vector) = testbed[0], next(iter(vectors.items()))
    for wrong, match in (
        ({}, "empty"),
        ({Site(2, "ffn"): vector}, "'residual'"),
        ({Site(6, "residual"): vector}, "6 decoder layers"),
        ({site: vector[:5]}, r"1.residual .* \(128,\); got torch.float32 \(5,\)"),
        ({site: vector[None]}, r"\(1, 128\)"),
        ({site: vector / 0}, "finite"),
        ({site: vector.long()}, "int64"),
    ):
        with pytest.raises(ValueError, match=match):
            SteeringVectors(model, wrong)


def test_a_file_gives_the_same_steering(testbed, trained, mixed, tmp_path):
    path = tmp_path / "vectors.safetensors"
    trained.save(path)
    assert set(load_file(path)) == {"sites.1.residual.vector", "sites.3.residual.vector"}
    loaded = SteeringVectors.load(testbed[0], path)
    assert loaded.settings == trained.settings and loaded.settings["lr"] == 0.03
    assert list(loaded.vectors) == list(trained.vectors)
    assert all(torch.equal(vector, trained.vectors[site]) for site, vector in loaded.vectors.items())
    with trained:
        expected = logits_of(*testbed, mixed)
    with loaded:
        assert torch.equal(logits_of(*testbed, mixed), expected)


def test_a_file_that_does_not_fit_is_refused(testbed, vectors, tmp_path):
    path, header = tmp_path / "vectors.safetensors", {"format": "care_hf.steering.v1", "settings": "{}"}
    vector = vectors[Site(1, "residual")]
    for tensors, metadata, match in (
        ({"sites.1.residual.vector": vector[:64].clone()}, header, r"does not fit.*\(64,\)"),
        ({"sites.1.residual.vector": vector / 0}, header, "finite"),
        ({"sites.9.residual.vector": vector}, header, "6 decoder layers"),
        ({"sites.1.ffn.vector": vector}, header, "'residual'"),
        ({"sites.1.residual.vector": vector, "sites.01.residual.vector": vector.clone()}, header, "named as vectors"),
        ({"sites.1.residual": vector}, header, "named as vectors"),
        ({"other": vector}, header, "not a site"),
        ({}, header, "empty"),
        ({"sites.1.residual.vector": vector}, {"format": "care_hf.subspaces.v1"}, "this version reads"),
        ({"sites.1.residual.vector": vector}, None, "this version reads"),
    ):
        save_file(tensors, path, metadata=metadata)
        with pytest.raises(ValueError, match=match):
            SteeringVectors.load(testbed[0], path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        SteeringVectors.load(testbed[0], path)


# Stage I


def test_contrast_vectors_are_their_formula(testbed, world):
    sets = [
        [world.plain("fit", 3), world.attack("icon", "fit", 2)],
        [world.plain("fit", 2), world.benign("kind", "fit", 3)],
    ]
    found, norms = contrast_vectors(*testbed, sets, LAYERS, scale=0.2, batch_size=2)
    for layer in LAYERS:
        means, lengths = [], []
        for samples in [side for contrast in sets for side in contrast]:
            with torch.no_grad():
                states = [testbed[0](**single(testbed, s)[0], output_hidden_states=True).hidden_states for s in samples]
            h = torch.stack([state[layer + 1][0, -1].double() for state in states])
            means.append(h.mean(0))
            lengths.append(h.pow(2).sum(1).sqrt().mean().item())
        norm = sum(lengths) / 4
        units = [(a - b) / (a - b).pow(2).sum().sqrt() for a, b in (means[:2], means[2:])]
        site = Site(layer, "residual")
        assert norms[site] == pytest.approx(norm, rel=1e-4) and found[site].dtype == torch.float32
        torch.testing.assert_close(found[site].double(), 0.2 * norm * (units[0] + units[1]) / 2, atol=1e-3, rtol=1e-3)


def test_what_gives_no_contrast_is_named(testbed, world):
    plain, other = world.plain("fit", 2), world.benign("kind", "fit", 2)
    for contrasts, layers, scale, match in (
        ([], [1], 0.1, "`contrasts`"),
        ([(plain, [])], [1], 0.1, "empty"),
        ([(plain, other), (plain, plain)], [1], 0.1, r"`contrasts`\[1\].*1.residual are the same"),
        ([(plain, other)], [], 0.1, "at least one decoder layer"),
        ([(plain, other)], [1, 1], 0.1, "each once"),
        ([(plain, other)], [6], 0.1, "6 decoder layers"),
        ([(plain, other)], [1], -0.1, "scale=-0.1"),
    ):
        with pytest.raises(ValueError, match=match):
            contrast_vectors(*testbed, contrasts, layers, scale=scale)


# Stage II


def test_log_probabilities_are_those_of_single_answers(testbed, data):
    harmful, benign = data
    pairs = [*benign, *((s, a) for s, _, a in harmful)]
    with torch.no_grad():
        found, lengths = answer_log_probs(*testbed, *zip(*pairs, strict=True))
        expected = [log_prob(*testbed, *pair) for pair in pairs]
    assert lengths.tolist() == [length for _, length in expected] and len(set(lengths.tolist())) > 1
    torch.testing.assert_close(found.double(), torch.stack([p for p, _ in expected]), atol=1e-3, rtol=1e-4)


def test_the_preference_loss_is_its_formula():
    values = 30 * torch.randn(4, 7, generator=torch.Generator().manual_seed(0)).double()
    expected = 0.0
    for chosen, rejected, ref_chosen, ref_rejected in values.T.tolist():
        expected += math.log(1 + math.exp(-0.3 * ((chosen - ref_chosen) - (rejected - ref_rejected)))) / 7
    assert preference_loss(*values, beta=0.3).item() == pytest.approx(expected)
    assert preference_loss(*values[[0, 1, 0, 1]], beta=0.3).item() == pytest.approx(math.log(2))


def test_the_loss_of_a_batch_is_that_of_single_unpadded_sequences(testbed, data, vectors):
    model, processor = testbed
    references = preference_steering._references(model, processor, data[0], batch_size=3)
    with SteeringVectors(model, vectors), torch.no_grad():
        loss = preference_steering._batch_loss(model, processor, *data, references, 0.2, 1.5).item()
    with torch.no_grad():
        expected = loss_by_hand(merged(model, vectors), model, processor, *data, 0.2, 1.5).item()
    assert loss == pytest.approx(expected, rel=1e-4)


def test_one_step_goes_against_the_gradient_in_units_of_the_stream(testbed, data):
    """Adam's first step is the learning rate times the sign of the gradient."""
    settings = {"layers": LAYERS, "batch_size": 16, "beta": 0.2, "retention": 1.5, "scale": 0.1}
    start, norms = contrast_vectors(*testbed, [[[i[0] for i in items] for items in data]], LAYERS, scale=0.1)
    after = train_preference_steering(*testbed, *data, **settings, steps=1, lr=0.02)
    model = merged(testbed[0], start)
    biases = {site: model.model.language_model.layers[site.layer].mlp.down_proj.bias for site in start}
    loss_by_hand(model, testbed[0], testbed[1], *data, 0.2, 1.5).backward()
    for site, bias in biases.items():
        clear = bias.grad.abs() > 1e-3 * bias.grad.abs().max()
        assert clear.float().mean() > 0.95
        expected = -0.02 * norms[site] / math.sqrt(128) * bias.grad.sign()
        torch.testing.assert_close((after.vectors[site] - start[site])[clear], expected[clear], atol=1e-4, rtol=1e-3)


def test_only_the_vectors_are_trained_and_the_model_is_left_as_it_was(llava, processor, data):
    frozen, training = llava.model.multi_modal_projector, decoder_layers(llava)[2]
    frozen.requires_grad_(False)
    training.train()
    modes = [module.training for module in llava.modules()]
    gradients = [parameter.requires_grad for parameter in llava.parameters()]
    before = copy.deepcopy(llava.state_dict())
    logits_of(llava, processor, [data[0][0][0]])
    hooks = hooks_of(llava)
    steering = train_preference_steering(llava, processor, *data, **SETTINGS | {"steps": 2})
    after = llava.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    assert modes == [module.training for module in llava.modules()]
    assert gradients == [parameter.requires_grad for parameter in llava.parameters()]
    assert all(parameter.grad is None for parameter in llava.parameters())
    assert hooks_of(llava) == hooks
    assert not any(vector.requires_grad for vector in steering.vectors.values())
    start = train_preference_steering(llava, processor, *data, **SETTINGS | {"steps": 0})
    assert all(not torch.equal(start.vectors[site], vector) for site, vector in steering.vectors.items())


def test_an_error_leaves_the_model_as_it_was(testbed, data, monkeypatch):
    model, hooks = testbed[0], hooks_of(testbed[0])
    monkeypatch.setattr(preference_steering, "preference_loss", lambda *_: torch.tensor(float("nan")))
    with pytest.raises(ValueError, match="At step 0 the loss is nan; lower `lr`"):
        train_preference_steering(*testbed, *data, **SETTINGS)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert hooks_of(model) == hooks


def test_training_is_a_function_of_its_seed(testbed, data, trained):
    torch.manual_seed(99)
    state = torch.get_rng_state()
    again, other = (train_preference_steering(*testbed, *data, **SETTINGS, seed=seed).vectors for seed in (0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(vector, again[site]) for site, vector in trained.vectors.items())
    assert any(not torch.equal(vector, again[site]) for site, vector in other.items())


def test_training_lowers_its_loss_and_prefers_refusals(testbed, data):
    model, processor = testbed
    settings = SETTINGS | {"beta": 0.1, "retention": 1.0}
    losses, margins = [], []
    for steps in (0, 25):
        steering = train_preference_steering(*testbed, *data, **settings | {"steps": steps})
        steered = merged(model, steering.vectors)
        with torch.no_grad():
            losses.append(loss_by_hand(steered, model, processor, *data, 0.1, 1.0).item())
            pairs = [[log_prob(steered, processor, s, a)[0].item() for a in answers] for s, *answers in data[0]]
        margins.append(sum(a - b for a, b in pairs) / len(pairs))
    assert losses[1] < 0.75 * losses[0]
    assert margins[1] > margins[0] + 5


def test_every_prompt_comes_once_before_any_comes_again():
    order = preference_steering._order(5, 10, 3, torch.Generator().manual_seed(0))
    drawn = [index for step in order for index in step]
    assert len(order) == 10 and all(len(step) == 3 for step in order)
    assert all(sorted(drawn[i : i + 5]) == list(range(5)) for i in range(0, 30, 5))


def test_what_training_cannot_use_is_named(testbed, data):
    harmful, benign = data
    same = [*harmful, (harmful[0][0], REFUSAL, REFUSAL)]
    for arguments, change, match in (
        (([], benign), {}, "`harmful` and `benign`"),
        ((harmful, []), {}, "`harmful` and `benign`"),
        ((same, benign), {}, r"`harmful`\[8\].*refuses already"),
        ((harmful, [*benign, harmful[0]]), {}, r"`benign`\[8\] has 3 parts; expected \(prompt, answer\)"),
        (([benign[0]], benign), {}, r"`harmful`\[0\] has 2 parts"),
        (data, {"batch_size": 3}, "batch_size=3"),
        (data, {"lr": 0}, "lr=0 must be more than 0"),
        (data, {"beta": math.nan}, "beta=nan"),
        (data, {"retention": -1}, "retention=-1 must be 0 or more"),
        (data, {"steps": -1}, "steps=-1"),
        (data, {"layers": [7]}, "6 decoder layers"),
    ):
        with pytest.raises(ValueError, match=match):
            train_preference_steering(*testbed, *arguments, **SETTINGS | change)
