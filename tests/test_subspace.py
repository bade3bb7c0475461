import json

import pytest
import scipy.linalg
import torch
from conftest import random_subspace
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from care_hf.gating import Gate
from care_hf.linalg import RunningCovariance
from care_hf.modeling_care import CareForConditionalGeneration
from care_hf.projection import Subspace
from care_hf.sites import Site
from care_hf.subspace import SafetySubspaces, fit_subspace, fit_subspaces, random_like

D = 40


def moments(data):
    running = RunningCovariance(data.shape[1])
    running.update(data)
    return running


def planted(n, shift=0.0, spread=0.0, seed=0):
    """Benign noise, and malicious noise with one more direction."""
    generator = torch.Generator().manual_seed(seed)
    direction = torch.nn.functional.normalize(torch.randn(D, generator=generator), dim=0)
    benign, malicious = torch.randn(n, D, generator=generator), torch.randn(n, D, generator=generator)
    malicious = malicious + direction * (shift + spread * torch.randn(n, 1, generator=generator))
    return direction, moments(benign), moments(malicious)


@pytest.mark.parametrize("n", [25, 2000])
@pytest.mark.parametrize("projector", ["orthogonal", "oblique"])
def test_a_planted_direction_is_found_with_fewer_tokens_than_dimensions_too(n, projector):
    direction, benign, malicious = planted(n, shift=6.0)
    subspace, report = fit_subspace(benign, malicious, rank=1, projector=projector)
    angle = scipy.linalg.subspace_angles(subspace.basis.numpy(), direction[:, None].numpy())[0]
    assert angle < (0.45 if n == 25 else 0.15)
    assert report.eigenvalues[0] > 10 and (report.benign, report.malicious) == (n, n)
    assert 0 < report.shrinkage <= 1
    torch.testing.assert_close(subspace.mean, benign.mean.float())


def test_own_centring_loses_a_shift_of_the_mean_and_keeps_a_spread():
    _, benign, shifted = planted(3000, shift=5.0)
    _, spread_benign, spread = planted(3000, spread=5.0)
    top = {
        (name, centring): fit_subspace(b, m, rank=1, centring=centring, shrinkage=0.0)[1].eigenvalues[0]
        for name, b, m in (("shift", benign, shifted), ("spread", spread_benign, spread))
        for centring in ("benign", "own")
    }
    assert top["shift", "benign"] > 20 and top["shift", "own"] < 2
    assert top["spread", "benign"] > 15 and top["spread", "own"] > 15


def test_a_rank_above_the_tokens_is_named():
    _, benign, malicious = planted(5)
    with pytest.raises(ValueError, match="rank=6 exceeds the 5 benign tokens"):
        fit_subspace(benign, malicious, rank=6)
    with pytest.raises(ValueError, match=r"Site 2\.ffn, text tokens: .*raise the shrinkage"):
        fit_subspaces({Site(2, "ffn"): {"text": {"benign": benign, "malicious": malicious}}}, rank=2, shrinkage=0.0)


def test_reports_are_kept():
    _, benign, malicious = planted(50)
    fitted = fit_subspaces(
        {Site(2, "ffn"): {"text": {"benign": benign, "malicious": malicious}}},
        rank=2,
        shrinkage=0.3,
        metadata={"a": "b"},
    )
    report = json.loads(fitted.metadata["reports"])["2.ffn.text"]
    assert report["shrinkage"] == 0.3 and len(report["eigenvalues"]) == 2 and fitted.metadata["a"] == "b"


def example():
    sites = {
        Site(1, "ffn"): {"visual": random_subspace(1), "text": random_subspace(2, rank=3, oblique=True)},
        Site(3, "residual"): {"text": random_subspace(3)},
    }
    return SafetySubspaces(sites, "route", 0.25, 0.75, {"origin": "a test"})


def assert_equal(a, b):
    assert (a.fusion, a.fusion_weight, a.strength) == (b.fusion, b.fusion_weight, b.strength)
    assert a.sites.keys() == b.sites.keys()
    for site, by_modality in a.sites.items():
        assert by_modality.keys() == b.sites[site].keys()
        for name, subspace in by_modality.items():
            other = b.sites[site][name]
            assert torch.equal(subspace.basis, other.basis) and torch.equal(subspace.mean, other.mean)
            assert subspace.beta == other.beta and (subspace.reader is None) == (other.reader is None)
            assert subspace.reader is None or torch.equal(subspace.reader, other.reader)


def test_files_give_back_every_bit_under_names_of_sites(tmp_path):
    example().save(tmp_path / "s.safetensors")
    assert_equal(SafetySubspaces.load(tmp_path / "s.safetensors"), example())
    assert SafetySubspaces.load(tmp_path / "s.safetensors").metadata == {"origin": "a test"}
    assert "sites.1.ffn.visual.basis" in load_file(tmp_path / "s.safetensors")


def test_broken_files_are_refused(tmp_path):
    path = tmp_path / "s.safetensors"
    example().save(path)
    with safe_open(path, "pt") as file:
        header = file.metadata()
    tensors = load_file(path)

    def refused(changed, message, metadata=header):
        save_file(changed, path, metadata=metadata)
        with pytest.raises(ValueError, match=message):
            SafetySubspaces.load(path)

    refused({k: v for k, v in tensors.items() if k != "sites.1.ffn.visual.mean"}, "lacks the tensor")
    refused({**tensors, "sites.9.ffn.text.mean": torch.zeros(2)}, "belong to no subspace")
    refused({**tensors, "sites.1.ffn.visual.basis": tensors["sites.1.ffn.visual.basis"] * 2}, "identity")
    refused(tensors, "format 'other'", {**header, "format": "other"})
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        SafetySubspaces.load(path)


def test_random_bases_are_seeded_independent_and_orthonormal(llava):
    first, again, other = (SafetySubspaces.random(llava, layers=[1, 4], rank=5, seed=s) for s in (3, 3, 4))
    assert_equal(first, again)
    bases = [s.basis for by in first.sites.values() for s in by.values()]
    assert len(bases) == 4 and all(basis.shape == (128, 5) for basis in bases)
    assert all((a.T @ b).abs().max() < 0.9 for i, a in enumerate(bases) for b in bases[:i])
    assert not torch.equal(bases[0], next(iter(other.sites.values()))["visual"].basis)
    with pytest.raises(ValueError, match="rank=129"):
        SafetySubspaces.random(llava, layers=[1], rank=129)


def test_the_random_control_differs_in_the_basis_alone():
    control = random_like(example(), seed=1)
    assert control.fusion == "route" and control.strength == 0.75
    for site, by_modality in example().sites.items():
        for name, subspace in by_modality.items():
            other = control.sites[site][name]
            assert other.basis.shape == subspace.basis.shape and not torch.allclose(
                other.basis, subspace.basis, atol=0.1
            )
            assert torch.equal(other.mean, subspace.mean) and other.beta == subspace.beta and other.reader is None


def test_one_modality_alone():
    text = example().only("text")
    assert {name for by in text.sites.values() for name in by} == {"text"}
    with pytest.raises(ValueError, match=r"3\.residual"):
        example().only("visual")


def test_a_models_buffers_give_the_subspaces_back(llava):
    assert_equal(SafetySubspaces.from_model(CareForConditionalGeneration.from_base(llava, example())), example())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (({},), "at least one site"),
        (({Site(0, "ffn"): {}},), "at least one modality"),
        (({Site(0, "ffn"): {"audio": random_subspace(0)}},), "audio"),
        (({Site(0, "ffn"): {"text": random_subspace(0), "visual": random_subspace(0, 64)}},), r"\[64, 128\]"),
        (({Site(0, "ffn"): {"text": random_subspace(0)}}, "mean"), "fusion='mean'"),
    ],
)
def test_impossible_repairs_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        SafetySubspaces(*arguments)


# With a gate


def gated(required=1, alarms=2, **more):
    generator = torch.Generator().manual_seed(5)
    readers = torch.randn(required + alarms, 128, generator=generator).T  # not contiguous, as a fit's may be
    limits = torch.randn(2 * (required + alarms), generator=generator)[::2]
    last, response = random_subspace(6), random_subspace(7, oblique=True)
    steps = torch.randn(3, 128, generator=generator)
    places = {"last": last, "response": Subspace(response.basis, steps, response.beta, response.reader)}
    gate = Gate((7, 9), readers, limits, required)
    sites = {Site(2, "residual"): places, Site(3, "ffn"): {"last": random_subspace(8)}}
    return SafetySubspaces(
        sites, "route", metadata={"calibration": "{}"}, gate=gate, gate_site=Site(1, "residual"), **more
    )


def assert_same_gate(a, b):
    assert (a.gate_site, a.scope, a.gate.required, a.gate.prompt_end) == (
        b.gate_site,
        b.scope,
        b.gate.required,
        b.gate.prompt_end,
    )
    assert torch.equal(a.gate.readers, b.gate.readers) and torch.equal(a.gate.thresholds, b.gate.thresholds)


@pytest.mark.parametrize(("required", "alarms"), [(1, 2), (1, 1), (0, 2), (0, 0)])
def test_files_give_the_gate_and_the_steps_back(tmp_path, required, alarms):
    given = gated(required, alarms)
    given.save(tmp_path / "s.safetensors")
    back = SafetySubspaces.load(tmp_path / "s.safetensors")
    assert_equal(back, given)
    assert_same_gate(back, given)
    assert back.sites[Site(2, "residual")]["response"].steps == 3 and back.metadata == {"calibration": "{}"}


def test_the_ungated_repair_is_saved_too(tmp_path):
    given = gated()
    plain = SafetySubspaces(given.sites, gate=given.gate.ungated(), gate_site=given.gate_site)
    plain.save(tmp_path / "s.safetensors")
    assert_same_gate(SafetySubspaces.load(tmp_path / "s.safetensors"), plain)


def test_the_scope_is_saved_with_a_gate_and_without(tmp_path):
    for given in (
        SafetySubspaces(example().sites, "route", gate=gated().gate, gate_site=Site(0, "residual"), scope="prompt"),
        SafetySubspaces(example().sites, "route", scope="prompt"),
    ):
        given.save(tmp_path / "s.safetensors")
        assert SafetySubspaces.load(tmp_path / "s.safetensors").scope == "prompt"


def test_a_models_buffers_give_the_gate_back(llava):
    out = SafetySubspaces.from_model(CareForConditionalGeneration.from_base(llava, gated()))
    assert_equal(out, gated())
    assert_same_gate(out, gated())
    assert out.metadata == gated().metadata


def test_the_random_control_keeps_the_gate_and_the_anchors():
    control = random_like(gated(), seed=1)
    assert_same_gate(control, gated())
    for site, places in gated().sites.items():
        for name, subspace in places.items():
            other = control.sites[site][name]
            assert torch.equal(other.mean, subspace.mean) and other.rank == subspace.rank
            assert not torch.allclose(other.basis, subspace.basis, atol=0.1)


def test_files_with_a_broken_gate_are_refused(tmp_path):
    path = tmp_path / "s.safetensors"
    gated().save(path)
    with safe_open(path, "pt") as file:
        header = file.metadata()
    tensors = load_file(path)
    settings = json.loads(header["settings"])

    def refused(changed, message, **changed_settings):
        save_file(changed, path, metadata={**header, "settings": json.dumps({**settings, **changed_settings})})
        with pytest.raises(ValueError, match=message):
            SafetySubspaces.load(path)

    for name in ("gate.readers", "gate.thresholds"):
        refused({k: v for k, v in tensors.items() if k != name}, "lacks the tensors of its gate")
        refused({**tensors, name: tensors[name] * torch.nan}, "not finite")
        refused({**tensors, name: tensors[name][..., :2].contiguous()}, "do not fit")
    refused({**tensors, "gate.bias": torch.zeros(2)}, r"belong to no subspace: \['gate.bias'\]")
    refused(tensors, "belong to no subspace", gate=None)
    refused(tensors, "required=4", gate={**settings["gate"], "required": 4})
    refused(tensors, "must be token ids", gate={**settings["gate"], "prompt_end": []})
    refused(tensors, "is not a site", gate={**settings["gate"], "site": "residual"})
    refused(tensors, "scope='last'", scope="last")
    steps = "sites.2.residual.response.mean"
    refused({**tensors, steps: tensors[steps] * torch.inf}, "not finite")
    refused({**tensors, steps: tensors[steps][:, :5].contiguous()}, "do not fit a basis")


def test_files_from_before_there_were_gates_load(tmp_path):
    path = tmp_path / "s.safetensors"
    tensors = {}
    for site, by_modality in example().sites.items():
        for name, s in by_modality.items():
            prefix = f"sites.{site}.{name}"
            tensors |= {f"{prefix}.basis": s.basis.contiguous(), f"{prefix}.mean": s.mean}
            tensors[f"{prefix}.beta"] = torch.tensor(s.beta, dtype=torch.float64)
            if s.reader is not None:
                tensors[f"{prefix}.reader"] = s.reader.contiguous()
    header = {
        "format": "care_hf.subspaces.v1",
        "settings": '{"fusion": "route", "fusion_weight": 0.25, "strength": 0.75}',
        "metadata": '{"origin": "a test"}',
    }
    save_file(tensors, path, metadata=header)
    old = SafetySubspaces.load(path)
    assert_equal(old, example())
    assert old.gate is None and old.gate_site is None and old.scope == "all"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gate": gated().gate}, "come together"),
        ({"gate_site": Site(1, "residual")}, "come together"),
        ({"scope": "last"}, "scope='last'"),
    ],
)
def test_half_a_gate_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        SafetySubspaces(example().sites, **changes)
